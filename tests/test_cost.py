"""What a step costs, against the definitions."""

import os
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from support.cost import estimate_mfu, line_of, memory_mb, peak_tflops, step_cost

CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=1, n_embd=4)
KNOBS = SimpleNamespace(device="cuda", dtype="bfloat16", batch_size=2, gradient_accumulation_steps=3, block_size=8)


@pytest.mark.parametrize(
    "gpu, dtype, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.0),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H100 80GB HBM3", "float32", 0.0),
        ("an abacus", "bfloat16", 0.0),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(gpu, dtype, tflops):
    assert peak_tflops(gpu, dtype) == tflops


def test_mfu_counts_six_operations_a_parameter_and_the_attention():
    parameters, tokens_per_s = 1000, 10.0
    attention = 2 * (2 * 2 * 8 * 4) * 3  # layers; q k and its product with v, two operations each; forward and backward
    assert estimate_mfu(CONFIG, parameters, tokens_per_s, 1.0) == (6 * parameters + attention) * tokens_per_s / 1e12


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "an abacus"])
def test_a_step_on_gpus_has_its_share_of_their_peak_and_pytorch_s_memory(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    model = GPT(CONFIG)
    cost = step_cost(500.0, model, KNOBS, 2)
    assert (cost["step_ms"], cost["tokens_per_s"], cost["peak_mb"]) == (500.0, 96.0, 3.0)
    assert ("mfu" in cost) == ("H100" in gpu)
    parameters = sum(p.numel() for p in model.parameters())
    assert cost.get("mfu", 0) in (0, pytest.approx(estimate_mfu(CONFIG, parameters, 48.0, 989.0)))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells")
def test_on_a_cpu_the_memory_is_what_was_resident():
    before = memory_mb("VmHWM")
    held = torch.ones(2**26)  # 256 MB
    resident = memory_mb("VmRSS")
    cost = step_cost(500.0, None, SimpleNamespace(**vars(KNOBS) | dict(device="cpu")), 1)
    assert cost["peak_mb"] >= max(before, resident - 1) and "mfu" not in cost
    assert len(held)


def test_a_line_says_what_is_known():
    metrics = dict(iter=3, loss=1.5, tokens_per_s=1234.0, step_ms=20.0)
    assert line_of(metrics) == "iter 3: loss 1.5000, 1,234 tokens/s, 20 ms"
    assert line_of(metrics | dict(mfu=0.412, peak_mb=5000.0)).endswith("20 ms, 41.2% MFU, 5,000 MB")

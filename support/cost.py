"""What a step costs: its time, its share of the GPUs' peak, its memory."""

import os
import time

import torch

# of dense bfloat16 products, in 10^12 operations a second, from NVIDIA's data sheets
PEAK_TFLOPS = {"A100": 312.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200 NVL": 835.0, "H200": 989.0}


def peak_tflops(gpu, dtype):
    """Of the GPU of this name, 0 where it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu and dtype == "bfloat16"), 0.0)


def estimate_mfu(shape, parameters, tokens_per_s, peak):
    """
    The share of `peak`, in 10^12 operations a second, that training takes (PaLM, App. B), None where it is 0. `shape`
    has n_layer, n_embd and block_size; what scoring and validation compute is not counted.
    """
    operations = 6 * parameters + 12 * shape.n_layer * shape.n_embd * shape.block_size  # of a token
    return operations * tokens_per_s / (peak * 1e12) if peak else None


def memory_mb(field):
    """VmRSS, resident now, or VmHWM, its peak. (getrusage's peak would begin with that of the parent process.)"""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 2**10 for line in file if line.startswith(field))


def step_cost(step_ms, model, knobs, world):
    """
    The metrics of a step of `step_ms` on `world` devices: tokens a second, MFU where the GPU's peak is known, and the
    peak of this process's memory, PyTorch's on a GPU, else what was resident (only Linux tells).
    """
    tokens = knobs.batch_size * knobs.gradient_accumulation_steps * knobs.block_size
    metrics = dict(step_ms=step_ms, tokens_per_s=tokens / step_ms * 1000)
    if knobs.device.startswith("cuda"):
        peak = world * peak_tflops(torch.cuda.get_device_name(), knobs.dtype)
        parameters = sum(p.numel() for p in model.parameters())
        mfu = estimate_mfu(model.config, parameters, metrics["tokens_per_s"], peak)
        metrics |= {"mfu": mfu} if mfu else {}
        metrics["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    elif os.path.exists("/proc/self/status"):
        metrics["peak_mb"] = memory_mb("VmHWM")
    return metrics


def line_of(metrics):
    """What is printed of a step's metrics."""
    line = "iter {iter}: loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, {step_ms:.0f} ms"
    line += " ({val_ms:.0f} validation)" if "val_ms" in metrics else ""
    line += ", {mfu:.1%} MFU" if "mfu" in metrics else ""
    line += ", {peak_mb:,.0f} MB" if "peak_mb" in metrics else ""
    if "negative" in metrics:
        line += ", {negative:.1%} negative; validation loss: predicted drop {predicted:.2e}, realised {realised:.2e}, "
        line += "sum of values {value_sum:.2e}"
    return line.format(**metrics)


def timed(run, device, wanted):
    """What run() returns, and the milliseconds that it took. They count only where they are `wanted`: a GPU waits."""
    wait = torch.accelerator.synchronize if wanted and device != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    result = run()
    wait()
    return result, (time.perf_counter() - started) * 1000

"""
The kernel that goes row by row against float64. Without a GPU it runs in Triton's interpreter (conftest.py).
"""

import importlib.util
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from support import row_kernels

needs_gpu = pytest.mark.gpu
needs_triton = pytest.mark.skipif(row_kernels.triton is None, reason="triton is not installed")
DTYPES = [torch.float32, torch.bfloat16]
# Of a gradient. bfloat16 has 8 bits: rounded as a GPU does it is off by up to 2^-8, cut off as the interpreter does, by
# up to 2^-7. float32 goes through a few roundings of 2^-24.
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-7 * 1.01}


def relative_error(ours, oracle):
    return ((ours.double() - oracle).norm() / oracle.norm().clamp_min(1e-300)).item()


def cross_entropy_problem(N, V, dtype, offset=0.0, gap=0, masked=0, spread=4.0, seed=0, device="cpu"):
    """
    Logits (N, V), rows `gap` numbers apart, each with an offset of its own up to `offset`; the first `masked` columns
    are -inf and no target.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(N, V + gap, generator=generator) + offset * torch.randn(N, 1, generator=generator)
    logits[:, :masked] = -float("inf")
    targets = torch.randint(masked, V, (N,), generator=generator)
    return logits.to(device, dtype)[:, :V], targets.to(device)


def cross_entropy_errors(case, backward=True, scale=0.125):
    """
    Against float64 on the same, rounded, logits: the largest error of a row's loss as a share of it (of 0.1 nats where
    it is less, since it is the logarithm of a float32 near one), and of a number of the gradient as a share of it (with
    `scale` * 2^-22 more, since the target's is a difference from one). Asserts that nothing else has changed.
    """
    logits, targets = cross_entropy_problem(**case)
    room = logits._base.clone() if logits._is_view() else logits.clone()
    exact = logits.double().requires_grad_()
    oracle = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(oracle.sum() * scale, exact)
    before = logits.clone()
    losses = row_kernels.cross_entropy_rows(logits, targets, scale, backward)
    assert losses.dtype == torch.float32 and losses.shape == targets.shape
    loss_error = ((losses - oracle) / oracle.clamp_min(0.1)).abs().max().item()
    if not backward:
        assert torch.equal(logits, before)
        return loss_error, 0.0
    if logits._is_view():
        assert torch.equal(logits._base[:, logits.shape[1] :], room[:, logits.shape[1] :])  # what lies between rows
    error = (logits.double() - gradient).abs() / (gradient.abs() + scale * 2**-22)
    assert logits.dtype == case["dtype"]
    return loss_error, error.max().item()


CASES = {
    "one logit": dict(N=1, V=1),
    "one row": dict(N=1, V=300),
    "a power of two": dict(N=3, V=64),
    "the tile of a GPU": dict(N=2, V=8192),
    "one more": dict(N=2, V=8193),
    "three tiles": dict(N=2, V=20001),
    "large offsets": dict(N=5, V=300, offset=1e4),
    "sure": dict(N=9, V=70, spread=1e3),
    "a masked tile": dict(N=2, V=10000, masked=8300),
    "rows apart": dict(N=5, V=100, gap=13, offset=100.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cross_entropy_equals_float64(interpreter, name, dtype):
    loss_error, error = interpreter.submit(cross_entropy_errors, dict(CASES[name], dtype=dtype)).result()
    assert loss_error < 1e-6
    assert error < ROUNDING[dtype]


@settings(max_examples=30, deadline=None)
@given(
    case=st.fixed_dictionaries(
        {
            "N": st.integers(1, 5),
            "V": st.integers(2, 700),
            "dtype": st.sampled_from(DTYPES),
            "offset": st.sampled_from([0.0, 30.0, 1e4]),
            "gap": st.sampled_from([0, 1, 16]),
            "masked": st.integers(0, 1),
            "spread": st.sampled_from([0.01, 1.0, 50.0]),
            "seed": st.integers(0, 2**31),
        }
    ),
    backward=st.booleans(),
    scale=st.sampled_from([1.0, 1 / 3, 1 / 16384]),
)
def test_any_rows(interpreter, case, backward, scale):
    loss_error, error = interpreter.submit(cross_entropy_errors, case, backward, scale).result()
    assert loss_error < 1e-6
    assert error < ROUNDING[case["dtype"]]


def losses_of(logits, targets):
    return row_kernels.cross_entropy_rows(logits, targets, 1.0, False)


def test_no_loss_for_a_target_outside_the_vocabulary(interpreter):
    logits, targets = torch.randn(4, 10), torch.tensor([3, -1, 10, 2**40])
    assert interpreter.submit(losses_of, logits, targets).result().isnan().tolist() == [False, True, True, True]


def test_a_logit_that_is_no_number_is_not_lost(interpreter):
    logits = torch.randn(2, 10000)
    logits[1, 9000] = float("nan")
    losses = interpreter.submit(losses_of, logits, torch.zeros(2, dtype=torch.int64)).result()
    assert losses.isnan().tolist() == [False, True]


@needs_triton
def test_rows_that_the_kernel_cannot_read_are_refused():
    logits, targets = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    for arguments in [
        (logits.double(), targets),
        (logits.half(), targets),
        (logits.T, targets),
        (logits, targets[:3]),
        (logits, targets.int()),
        (logits, torch.zeros(8, dtype=torch.int64)[::2]),
    ]:
        with pytest.raises(ValueError):
            losses_of(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Its traffic on paper, against the loads and stores that the interpreter makes.


@contextmanager
def counted_bytes():
    """A dict of the bytes that kernels load and store in the interpreter, lanes that are masked left out."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = {"load": 0, "store": 0}

    def counting(name, method, mask_place):
        def wrapper(builder, pointers, *arguments):
            bits = pointers.get_element_ty().primitive_bitwidth
            counts[name] += int(arguments[mask_place].data.sum()) * bits // 8
            return method(builder, pointers, *arguments)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name, mask_place in (("load", 0), ("store", 1)):
            method = f"create_masked_{name}"
            patch.setattr(InterpreterBuilder, method, counting(name, getattr(InterpreterBuilder, method), mask_place))
        yield counts


def cross_entropy_bytes(case, backward):
    logits, targets = cross_entropy_problem(**case)
    with counted_bytes() as counts:
        row_kernels.cross_entropy_rows(logits, targets, 1.0, backward)
    return counts


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_moves_the_bytes_that_are_stated(interpreter, dtype, backward):
    case = dict(N=3, V=10001, dtype=dtype)
    counts = interpreter.submit(cross_entropy_bytes, case, backward).result()
    memory, l2 = row_kernels.cross_entropy_rows_traffic(*cross_entropy_problem(**case), 1.0, backward)
    assert counts["load"] + counts["store"] == l2
    assert counts["store"] == 3 * (backward * 10001 * dtype.itemsize + 4)
    assert memory == 3 * ((1 + 2 * backward) * 10001 * dtype.itemsize + 12)
    # Six bytes for a bfloat16 logit, two without its gradient.
    assert round(memory / (3 * 10001), 2) == (3 if backward else 1) * dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for a GPU that is not there.


def disassembled(compiled, tmp_path):
    """(registers, the machine code) of a kernel, by the tools that come with triton."""
    tools = Path(row_kernels.triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: E731
    usage = run(tools / "cuobjdump", "--dump-resource-usage", cubin)
    return int(re.search(r"REG:(\d+)", usage).group(1)), run(tools / "nvdisasm", "--print-code", cubin)


@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_for_a_gpu_that_is_not_there(dtype, capability, tmp_path, monkeypatch):
    """As GPT-2's logits would have it: whole lines of the cache, no number spilt, two programs to a processor."""
    if row_kernels.triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    signature = dict(logits_ptr=pointer, targets_ptr="*i64", losses_ptr="*fp32", stride="i32", V="i32", scale="fp32")
    signature |= dict(BACKWARD="constexpr", BLOCK="constexpr")
    block = row_kernels.BLOCK_BYTES // dtype.itemsize
    kernel, constants = row_kernels.cross_entropy_kernel, dict(BACKWARD=True, BLOCK=block)
    assert list(signature) == kernel.arg_names
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = ASTSource(kernel, signature, constants, attributes)
    options = dict(num_warps=row_kernels.WARPS)
    compiled = row_kernels.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, code = disassembled(compiled, tmp_path)
    spilt = re.findall(r"\b(?:LDL|STL)\S*", code)
    assert not spilt, f"{len(spilt)} spills with {registers} registers: {spilt}"
    assert 2 * registers * 32 * row_kernels.WARPS <= 2**16
    assert re.findall(r"\bLDG\.E\.\S*128", code) and re.findall(r"\bSTG\.E\.\S*128", code)


def test_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("without", row_kernels.__file__))
    module.__spec__.loader.exec_module(module)
    assert module.triton is None

    class OnGPU(torch.Tensor):
        is_cuda = True

    x = torch.ones(1).as_subclass(OnGPU)
    assert row_kernels.runs_on(x) == (row_kernels.triton is not None)
    assert not module.runs_on(x)

"""
What a GPU does row by row, against float64: the head's cross-entropy, a Triton kernel, and the layer norms' dots, which
torch.compile makes a kernel of. Without a GPU the kernel runs in Triton's interpreter (conftest.py), on CPU tensors.
"""

import copy
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
from test_data_value import _LiveStorages, brute_force, tokens, validation_oracle
from torch.nn import functional as F

import data_value
from data_value import attach_directions
from model import GPT, GPTConfig
from support import kernels, operators

needs_gpu = pytest.mark.gpu
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
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
    Against float64 on the same, rounded, logits: the largest error of a row's loss as a share of it (of 0.25 nats where
    it is less, since it is the logarithm of a float32 near one, whose steps are 2^-23), and of a number of the gradient
    as a share of it (the target's, a difference from one, may be off by `scale` * 2^-22 more). Asserts that nothing
    else has changed.
    """
    logits, targets = cross_entropy_problem(**case)
    room = logits._base.clone() if logits._is_view() else logits.clone()
    exact = logits.double().requires_grad_()
    oracle = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(oracle.sum() * scale, exact)
    before = logits.clone()
    losses = kernels.cross_entropy_rows(logits, targets, scale, backward)
    assert losses.dtype == torch.float32 and losses.shape == targets.shape
    loss_error = ((losses - oracle) / oracle.clamp_min(0.25)).abs().max().item()
    if not backward:
        assert torch.equal(logits, before)
        return loss_error, 0.0
    if logits._is_view():
        assert torch.equal(logits._base[:, logits.shape[1] :], room[:, logits.shape[1] :])  # what lies between rows
    error = (logits.double() - gradient).abs()
    of_target = error.gather(1, targets[:, None])
    error.scatter_(1, targets[:, None], (of_target - scale * 2**-22).clamp_min(0))
    error /= gradient.abs() + scale * 2**-22
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
    return kernels.cross_entropy_rows(logits, targets, 1.0, False)


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
        kernels.cross_entropy_rows(logits, targets, 1.0, backward)
    return counts


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_moves_the_bytes_that_are_stated(interpreter, dtype, backward):
    case = dict(N=3, V=10001, dtype=dtype)
    counts = interpreter.submit(cross_entropy_bytes, case, backward).result()
    on_paper = kernels.cross_entropy_rows_traffic(*cross_entropy_problem(**case), 1.0, backward)
    assert counts["load"] + counts["store"] == on_paper + 3 * dtype.itemsize  # a row's target is among its logits
    assert counts["store"] == 3 * (backward * 10001 * dtype.itemsize + 4)
    # Six bytes for a bfloat16 logit, two without its gradient.
    assert round(on_paper / (3 * 10001), 2) == (3 if backward else 1) * dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for a GPU that is not there.


def disassembled(compiled, tmp_path):
    """(registers, the machine code) of a kernel, by the tools that come with triton."""
    tools = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: E731
    usage = run(tools / "cuobjdump", "--dump-resource-usage", cubin)
    return int(re.search(r"REG:(\d+)", usage).group(1)), run(tools / "nvdisasm", "--print-code", cubin)


def made(kernel, types, constants, warps, capability, tmp_path, monkeypatch):
    """
    (registers, the machine code) of a kernel for a GPU of this capability, `types` being those of its arguments in
    their order. Pointers, strides and sizes are multiples of 16, as GPT-2's are.
    """
    if kernels.triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    even = [i for i, (name, kind) in enumerate(signature.items()) if "*" in kind or name in ("stride", "V", "size")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in even})
    target = GPUTarget("cuda", capability, 32)
    return disassembled(kernels.triton.compile(source, target=target, options=dict(num_warps=warps)), tmp_path)


@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("name", ["bf16", "fp32"])
@pytest.mark.parametrize("K", [0, 1, 4], ids=["rows", "add and dot", "add and dot with four"])
def test_compiles_for_a_gpu_that_is_not_there(K, name, capability, tmp_path, monkeypatch):
    """For GPT-2's logits, and weights with K directions: whole lines of the cache, no number spilt, room for two."""
    if not K:
        of = kernels.cross_entropy_kernel, [f"*{name}", "*i64", "*fp32", "i32", "i32", "fp32"]
        warps, constants = kernels.WARPS, dict(BACKWARD=True, BLOCK=kernels.BLOCK_BYTES // (2 if name == "bf16" else 4))
    else:
        of = kernels.add_and_dot_kernel, [f"*{name}", *["*fp32"] * 3, *["i32"] * 4]
        warps, constants = 4, dict(K=K, ROOM=K, BLOCK=max(512, kernels.BLOCK // K))
    registers, code = made(*of, constants, warps, capability, tmp_path, monkeypatch)
    spilt = re.findall(r"\b(?:LDL|STL)\S*", code)
    assert not spilt, f"{len(spilt)} spills with {registers} registers: {spilt}"
    assert (2 if not K else 5) * registers * 32 * warps <= 2**16  # programs on a processor
    assert re.findall(r"\bLDG\.E\.\S*128", code) and re.findall(r"\bSTG\.E\.\S*128", code)


# ---------------------------------------------------------------------------------------------------------------------
# The head with it, and the layer norms.


def head_problem(dtype, K=2, B=5, T=7, V=50, C=12, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, weight, direction = (torch.randn(*shape, generator=generator) for shape in ((B, T, C), (V, C), (K, V, C)))
    targets = torch.randint(V, (B, T), generator=generator)
    return x.to(device, dtype), weight.to(device, dtype), targets.to(device), direction.to(device) if K else None


def head_on_a_gpu(problem, backward, head_slice):
    """The branch that a GPU takes, in the interpreter. The room for its gradients is not zero beforehand."""
    room = operators.head_results
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "runs_on", lambda x: True)
        patch.setattr(operators, "head_slice", lambda *_: head_slice)
        patch.setattr(operators, "head_results", lambda *arguments: [g.fill_(7) for g in room(*arguments)])
        return operators.head_loss.function(*problem, backward)


@pytest.mark.parametrize("head_slice", [(5, 7), (2, 7), (1, 3)], ids=["whole", "samples", "tokens"])
@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str)
def test_the_head_on_a_gpu_equals_float64_of_its_logits(interpreter, dtype, tolerance, K, head_slice):
    problem = x, weight, targets, direction = head_problem(dtype, K)
    found = interpreter.submit(head_on_a_gpu, problem, True, head_slice).result()
    evaluated, *none = interpreter.submit(head_on_a_gpu, problem, False, head_slice).result()
    logits = (x @ weight.T).double().requires_grad_()
    oracle = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (dy,) = torch.autograd.grad(oracle, logits)
    sample_dw = torch.einsum("btv,btc->bvc", dy, x.double())
    exact = [oracle, dy @ weight.double(), sample_dw.sum(0)]
    exact.append(torch.einsum("bvc,kvc->bk", sample_dw, direction.double()) if K else torch.zeros(5, 0))
    whole = K == 0 and head_slice == (5, 7)
    assert [part.dtype for part in found] == [torch.float32, dtype, dtype if whole else torch.float32, torch.float32]
    assert relative_error(found[0], oracle) < 1e-6  # its logits are bfloat16, its loss of them is not
    assert torch.equal(found[0], evaluated) and not any(map(len, none))
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert ours.shape == theirs.shape and (not ours.numel() or relative_error(ours, theirs) < tolerance)
    for ours, theirs in zip(found, operators.head_loss(*problem, True), strict=True):  # and a CPU's branch
        assert not ours.numel() or relative_error(ours, theirs.double()) < 2 * tolerance


def test_one_slice_of_logits_exists_at_a_time_on_a_gpu(monkeypatch):
    """With nothing of its size beside it: the products of float32 make none on a CPU either."""
    x, weight, targets, direction = head_problem(torch.float32, B=2, T=600, V=50, C=4)
    monkeypatch.setattr(kernels, "runs_on", lambda x: True)
    monkeypatch.setattr(kernels, "cross_entropy_rows", lambda logits, *_: logits.mul_(0)[:, 0])
    monkeypatch.setattr(kernels, "weight_gradient", lambda dw, x, *_: dw.new_zeros(len(x), 1))
    monkeypatch.setattr(operators, "head_slice", lambda *_: (1, 300))
    for arguments in ((None, False), (None, True), (direction, True)):
        with _LiveStorages(300 * 50) as live:
            operators.head_loss.function(x, weight, targets, *arguments)
        assert live.most == 1


def test_slices_keep_the_bytes_of_the_logits_bounded():
    """GPT-2's batch on a GPU: one slice, of float32 two; on a CPU the same slices whatever the dtype."""
    gpt2 = 16, 1024, 50304
    slices = {
        (device_type, dtype): operators.head_slice(*gpt2, device_type, dtype)
        for device_type in ("cpu", "cuda")
        for dtype in DTYPES
    }
    assert slices["cuda", torch.bfloat16] == (16, 1024) and slices["cuda", torch.float32] == (10, 1024)
    assert slices["cpu", torch.bfloat16] == slices["cpu", torch.float32] == (1, 512)


def layer_norm_problem(B, T, C, K, bias, dtype=torch.float32, device="cpu"):
    """A layer norm with K directions, x and dY; means and scales of rows differ, as they do in a residual stream."""
    layer_norm = data_value.LayerNorm(C, bias=bias).to(dtype)
    buffers = attach_directions(layer_norm, K)
    for tensor in (*layer_norm.parameters(), *buffers.values()):
        tensor.data.normal_()
    x = 3 * torch.randn(B, T, 1) + torch.rand(B, T, 1) * torch.randn(B, T, C)
    return layer_norm.to(device), x.to(device, dtype), torch.randn(B, T, C, dtype=dtype).to(device)


def layer_norm_oracle(layer_norm, x, dy):
    """dx, the parameters' gradients and the dots by autograd, in float64, with a batch of one at a time."""
    params = [p.detach().double().requires_grad_() for p in layer_norm.parameters()]
    directions = [getattr(layer_norm, f"{name}_direction").double() for name, _ in layer_norm.named_parameters()]
    dxs, samples, dots = [], [], []
    for sample_x, sample_dy in zip(x.double(), dy.double(), strict=True):
        sample_x = sample_x.requires_grad_()
        y = F.layer_norm(sample_x, x.shape[2:], *params, eps=layer_norm.eps)
        dx, *sample = torch.autograd.grad(y, [sample_x, *params], sample_dy)
        dxs.append(dx)
        samples.append(sample)
        dots.append(sum(direction @ gradient for direction, gradient in zip(directions, sample, strict=True)))
    return torch.stack(dxs), *(sum(parts) for parts in zip(*samples, strict=True)), torch.stack(dots)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 7, 1), (3, 5, 33, 2), (4, 64, 768, 1)], ids=str)
def test_layer_norms_on_a_gpu_equal_a_batch_of_one(monkeypatch, shape, dtype, tolerance, bias):
    torch.manual_seed(0)
    layer_norm, x, dy = layer_norm_problem(*shape, bias, dtype)
    x.requires_grad_()
    alpha = torch.zeros(shape[0], shape[3], dtype=dtype, requires_grad=True)
    y, dots, called = layer_norm(x, alpha), data_value.layer_norm_dots, []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(data_value, "layer_norm_dots", lambda *of: called.append(of) or dots(*of))
    found = torch.autograd.grad(y, [x, *layer_norm.parameters(), alpha], dy)
    monkeypatch.undo()
    assert len(called) == 1
    for ours, exact in zip(found, layer_norm_oracle(layer_norm, x.detach(), dy), strict=True):
        assert ours.shape == exact.shape and relative_error(ours, exact) < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU.


def scored_step(device, compiled, bias, **shape):
    """Relative errors of the loss, dots and gradients of a step under autocast; the dots' oracle is brute force."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(bias=bias, **shape))
    B, T, V = 4, shape["block_size"], shape["vocab_size"]
    windows = x, y, x_val, y_val = [tokens(V, B, T) for _ in range(4)]
    exact = copy.deepcopy(model).double()
    direction = validation_oracle(exact, x_val, y_val)
    oracle = [exact(x, y)[1], brute_force(exact, x, y, direction)]
    oracle += torch.autograd.grad(oracle[0], list(exact.parameters()))

    model.to(device)
    buffers = attach_directions(model)
    for p, d in zip(model.parameters(), direction, strict=True):
        buffers[p][0].copy_(d)
    alpha = torch.zeros(B, 1, device=device, requires_grad=True)
    net = torch.compile(model, fullgraph=True, dynamic=False, disable=not compiled)
    with torch.autocast(device, torch.bfloat16):
        loss = net(*(window.to(device) for window in windows[:2]), alpha)[1]
    loss.backward()
    found = [loss, alpha.grad[:, 0] * B, *(p.grad for p in model.parameters())]
    return [relative_error(ours.cpu(), theirs) for ours, theirs in zip(found, oracle, strict=True)]


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V, gap", [(50304, 0), (50257, 0), (50257, 47)])
def test_gpt2s_logits_on_a_gpu(V, gap, dtype):
    loss_error, error = cross_entropy_errors(dict(N=1024, V=V, gap=gap, dtype=dtype, offset=10.0, device="cuda"))
    assert loss_error < 1e-6
    assert error < {torch.float32: 2**-18, torch.bfloat16: 2**-8 * 1.01}[dtype]  # a GPU rounds


@needs_triton
@needs_gpu
@pytest.mark.parametrize("head_slice", [(4, 256), (3, 256), (1, 100)], ids=["whole", "samples", "tokens"])
@pytest.mark.parametrize("K", [0, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)], ids=str)
def test_gpt2s_head_on_a_gpu(monkeypatch, dtype, tolerance, K, head_slice):
    """Against a CPU's float64 of the same factors, with what the rounding of the logits does to them."""
    problem = head_problem(dtype, K, B=4, T=256, V=50304, C=64, device="cuda")
    monkeypatch.setattr(operators, "head_slice", lambda *_: head_slice)
    found = operators.head_loss(*problem, True)
    x, weight, targets, direction = (None if part is None else part.double() for part in problem)
    logits = (problem[0] @ problem[1].T).double().requires_grad_()
    oracle = F.cross_entropy(logits.flatten(0, 1), problem[2].flatten())
    (dy,) = torch.autograd.grad(oracle, logits)
    exact = [oracle, dy @ weight, torch.einsum("btv,btc->vc", dy, x)]
    if K:
        exact.append(torch.stack([torch.einsum("btv,btc,vc->b", dy, x, one) for one in direction], 1))
    assert relative_error(found[0], oracle) < 1e-6
    for ours, theirs in zip(found[1 : len(exact)], exact[1:], strict=True):
        assert relative_error(ours, theirs) < tolerance


@needs_gpu
@pytest.mark.parametrize("several", [(), (3,)], ids=["one", "several"])
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_join_float32_sums_on_a_gpu(dtype, beta, several):
    """Of bfloat16 too; with beta = 0 what was there, not a number, does not matter."""
    a, b = torch.randn(*several, 70, 300, device="cuda").to(dtype).mT, torch.randn(*several, 70, 50, device="cuda")
    b, sums = b.to(dtype), torch.full((*several, 300, 50), 0.5 if beta else float("nan"), device="cuda")
    operators.add_products(sums, a, b, beta)
    assert relative_error(sums, a.double() @ b.double() + 0.5 * beta) < 1e-5


@needs_triton
@needs_gpu
@pytest.mark.parametrize("bias", [True, False])
def test_gpt2s_layer_norms_on_a_gpu(bias):
    """Compiled and eager; compiled with no more than three kernels: the rows', and sums of their small results."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    layer_norm, x, dy = layer_norm_problem(16, 1024, 768, 1, bias, device="cuda")
    exact = layer_norm_oracle(layer_norm, x, dy)
    for compiled in (False, True):
        x = x.detach().requires_grad_()
        alpha = torch.zeros(16, 1, device="cuda", requires_grad=True)
        inputs = [x, *layer_norm.parameters(), alpha]
        net = torch.compile(layer_norm, fullgraph=True, dynamic=False, disable=not compiled)
        found, code = run_and_get_code(lambda: torch.autograd.grad(net(x, alpha), inputs, dy))  # noqa: B023
        for ours, theirs in zip(found, exact, strict=True):
            assert relative_error(ours, theirs) < 1e-5
        if compiled:
            backward = code[-1]
            assert backward.count(".run(") <= 3, backward


@needs_triton
@needs_gpu
@pytest.mark.parametrize("compiled, bias", [(False, False), (True, True)])
def test_a_scored_step_under_autocast_on_a_gpu(compiled, bias):
    """GPT-2's widths; tolerances of bfloat16 factors, as on a CPU. The last on a GPU: it compiles for half a minute."""
    shape = dict(block_size=64, vocab_size=50304, n_layer=2, n_head=12, n_embd=768)
    loss_error, dots_error, *gradient_errors = scored_step("cuda", compiled, bias, **shape)
    assert loss_error < 1e-3
    assert dots_error < 0.02
    assert max(gradient_errors) < 0.05


def test_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("without", kernels.__file__))
    module.__spec__.loader.exec_module(module)
    assert module.triton is None

    class OnGPU(torch.Tensor):
        is_cuda = True

    x = torch.ones(1).as_subclass(OnGPU)
    assert kernels.runs_on(x) == (kernels.triton is not None)
    assert not module.runs_on(x)

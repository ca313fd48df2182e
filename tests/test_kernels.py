"""
The weight gradient's kernel against float64. Without a GPU it runs in Triton's interpreter, on CPU tensors: in a
process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_head_kernel import counted_bytes
from torch.utils._python_dispatch import TorchDispatchMode

import bench
from support import kernels, operators

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
needs_gpu = pytest.mark.gpu
DTYPES = torch.float32, torch.bfloat16


def problem(B, T, n_in, n_out, dtype, K=1, strided=False, zero_direction=False, seed=0, device="cpu"):
    """dw, x, dy, direction (K, out, in); strided: x is every second sample of a larger batch, dy has T last."""
    randn = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)
    x = randn(B * 2, T, n_in).to(dtype)[::2] if strided else randn(B, T, n_in).to(dtype)
    dy = randn(B, n_out, T).to(dtype).mT if strided else randn(B, T, n_out).to(dtype)
    dw, *direction = randn(1 + K, n_out, n_in)
    return dw.contiguous(), x, dy, torch.stack(direction) * (not zero_direction)


def errors(case, add=True, chunk=None):
    """
    The relative errors of dots and dW against float64 on the same, rounded, inputs, and whether a second run agrees.
    `chunk` replaces kernels.CHUNK.
    """
    dw, x, dy, direction = problem(**case)
    sample_dw = torch.einsum("bto,bti->boi", dy.double(), x.double())
    oracle = torch.einsum("boi,koi->bk", sample_dw, direction.double()), add * dw.double() + sample_dw.sum(0)
    scale = oracle
    if x.dtype == torch.bfloat16:  # every number of a sample's gradient is rounded: sums may cancel, their bounds not
        scale = torch.einsum("boi,koi->bk", sample_dw.abs(), direction.double().abs()), sample_dw.abs().sum(0)
    if not add:
        dw.fill_(float("nan"))
    again = dw.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "CHUNK", chunk or kernels.CHUNK)
        results = kernels.weight_gradient(dw, x, dy, direction, add), dw
        repeated = kernels.weight_gradient(again, x, dy, direction, add), again
    assert all(result.dtype == torch.float32 for result in results)
    found = [
        ((a - b).norm() / c.norm().clamp_min(1e-300)).item() for a, b, c in zip(results, oracle, scale, strict=True)
    ]
    return found, all(map(torch.equal, results, repeated))


def bound(dtype):
    return 2**-9 if dtype == torch.bfloat16 else 1e-5


CASES = {
    "one token": dict(B=1, T=1, n_in=1, n_out=1),
    "T=1": dict(B=5, T=1, n_in=40, n_out=33),
    "within a block": dict(B=3, T=9, n_in=7, n_out=5),
    "even": dict(B=4, T=32, n_in=64, n_out=32),
    "many samples": dict(B=37, T=3, n_in=33, n_out=17),
    "three directions": dict(B=4, T=20, n_in=33, n_out=17, K=3),
    "several blocks": dict(B=3, T=5, n_in=90, n_out=70, K=3),
    "strided": dict(B=3, T=21, n_in=50, n_out=35, strided=True),
}


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_dots_and_weight_gradient_equal_float64(interpreter, name, dtype):
    found, repeatable = interpreter.submit(errors, dict(CASES[name], dtype=dtype), len(name) % 2 == 0).result()
    assert max(found) < bound(dtype)
    assert repeatable


@needs_triton
@settings(max_examples=20, deadline=None)
@given(
    case=st.fixed_dictionaries(
        {
            "B": st.integers(1, 20),
            "T": st.integers(1, 40),
            "n_in": st.integers(1, 70),
            "n_out": st.integers(1, 40),
            "dtype": st.sampled_from(DTYPES),
            "K": st.integers(1, 5),
            "strided": st.booleans(),
            "seed": st.integers(0, 2**31),
        }
    ),
    add=st.booleans(),
    chunk=st.none() | st.sampled_from([100, 1000, 10000]),
)
def test_any_shape(interpreter, case, add, chunk):
    (dots_error, dw_error), repeatable = interpreter.submit(errors, case, add, chunk).result()
    allowed = bound(case["dtype"])
    # The terms of a single dot may cancel: then its own size says nothing about rounding.
    many = case["B"] * case["K"] > 3 and case["n_in"] * case["n_out"] > 100
    assert dots_error < allowed * (2 if many else 100)
    assert dw_error < allowed * 2
    assert repeatable


@needs_triton
@pytest.mark.parametrize("chunk, rows", [(1, 128), (105_000, 256), (None, 300)])
def test_parts_of_the_rows(interpreter, chunk, rows, monkeypatch):
    case = dict(B=5, T=9, n_in=40, n_out=300, dtype=torch.bfloat16, K=2)
    found, repeatable = interpreter.submit(errors, case, False, chunk).result()
    assert max(found) < 2**-9 and repeatable
    monkeypatch.setattr(kernels, "CHUNK", chunk or kernels.CHUNK)
    assert kernels.rows_at_a_time((5, 9, 40, 300), 2) == rows


def test_the_rows_of_gpt2():
    """Its layers at once, its head in five parts; what no chunk can hold, by the least number of rows."""
    for n_in, n_out in ((768, 768), (768, 2304), (768, 3072), (3072, 768)):
        assert kernels.rows_at_a_time((16, 1024, n_in, n_out), 2) == n_out
    rows = kernels.rows_at_a_time((16, 1024, 768, 50304), 2)
    assert rows % 128 == 0 and 4 * rows < 50304 <= 5 * rows and 16 * rows * 768 * 2 <= kernels.CHUNK
    assert kernels.rows_at_a_time((3, 10, 2**24, 500), 2) == 128


@needs_triton
def test_a_direction_of_zeros_gives_zeros(interpreter):
    case = dict(B=3, T=20, n_in=40, n_out=20, dtype=torch.float32, zero_direction=True)
    (dots_error, dw_error), _ = interpreter.submit(errors, case).result()
    assert dots_error == 0
    assert dw_error < 1e-5


def test_shapes_that_do_not_belong_together_are_refused():
    dw, x, dy, direction = problem(2, 3, 4, 5, torch.float32)
    for arguments in [
        (dw, x, dy[:1], direction),
        (dw, x, dy.bfloat16(), direction),
        (dw, x.double(), dy.double(), direction),
        (dw.T, x, dy, direction),
        (dw, x, dy, direction.double()),
        (dw, x, dy, direction[0]),
        (torch.zeros(4, 5).T, x, dy, direction),
    ]:
        with pytest.raises(ValueError):
            kernels.weight_gradient(*arguments, True)


# ---------------------------------------------------------------------------------------------------------------------
# The traffic on paper, beside what the interpreter's loads and stores and PyTorch's own operators move.


def size(tensor):
    return tensor.numel() * tensor.element_size()


class Sums(TorchDispatchMode):
    """Adds up what sums read and write."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ == "sum":
            self.bytes += size(args[0]) + size(result)
        return result


def moved(case, add, chunk):
    """Bytes behind the products that a call moves, and that they are on paper."""
    dw, x, dy, direction = problem(**case)
    with pytest.MonkeyPatch.context() as patch, counted_bytes() as counts, Sums() as sums:
        patch.setattr(kernels, "CHUNK", chunk or kernels.CHUNK)
        kernels.weight_gradient(dw, x, dy, direction, add)
        shape = case["B"], case["T"], case["n_in"], case["n_out"]
        _, on_paper = kernels.weight_gradient_traffic(shape, x.dtype, len(direction), add)
    return sum(counts.values()) + sums.bytes, on_paper


@needs_triton
@pytest.mark.parametrize("add, K, chunk", [(True, 1, None), (False, 2, 60_000)])
def test_the_traffic_on_paper_is_what_the_interpreter_moves(interpreter, add, K, chunk):
    case = dict(B=4, T=72, n_in=48, n_out=272, dtype=torch.bfloat16, K=K)
    found, on_paper = interpreter.submit(moved, case, add, chunk).result()
    assert found == on_paper


def test_traffic_of_the_products():
    """x and dY of two bytes a number, and the samples' gradients."""
    products, _ = kernels.weight_gradient_traffic((16, 1024, 768, 3072), torch.bfloat16, 1, False)
    assert products == 2 * 16 * 1024 * (768 + 3072) + 2 * 16 * 768 * 3072


def test_where_the_kernel_runs_it_fills_dw_and_then_adds_to_it(monkeypatch):
    """As the head's slices do; float64 is PyTorch's."""
    dw, x, dy, direction = problem(2, 3, 4, 5, torch.float32)
    calls = []
    monkeypatch.setattr(kernels, "runs_on", lambda x: True)
    monkeypatch.setattr(kernels, "weight_gradient", lambda *arguments: calls.append(arguments) or torch.ones(2, 1))
    dots, running = operators.add_samples(dw, x, dy, direction, None)
    operators.add_samples(dw, x, dy, direction, running)
    assert [call[4] for call in calls] == [False, True] and torch.equal(dots, torch.ones(2, 1))
    operators.add_samples(*(tensor.double() for tensor in (dw, x, dy, direction)), None)
    assert len(calls) == 2


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU.


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scored_step_does_not_wait_for_the_gpu(dtype):
    run = bench.Bench(bench.Knobs(device="cuda", n_layer=2, block_size=64, batch_size=4, dtype=dtype), stock=False)
    run.scored()  # compiles
    run.order2()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.scored()
        run.order2()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, n_in, n_out, K",
    [(16, 1000, 768, 768, 1), (16, 1000, 3072, 768, 3), (16, 256, 768, 50304, 1), (40, 100, 765, 770, 3)],
)
def test_layers_of_gpt2_on_a_gpu(B, T, n_in, n_out, K, dtype):
    found, repeatable = errors(dict(B=B, T=T, n_in=n_in, n_out=n_out, dtype=dtype, K=K, device="cuda"), add=K > 1)
    assert max(found) < bound(dtype)
    assert repeatable

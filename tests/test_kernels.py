"""
The Triton kernel against float64. Without a GPU it runs in Triton's interpreter, on CPU tensors: in a process of its
own, since Triton reads TRITON_INTERPRET when it is imported.
"""

import functools
import importlib.util
import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
import data_value
from data_value import add_samples
from support import kernels

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
SMALL = dict(BLOCK_OUT=16, BLOCK_IN=32, BLOCK_T=16)


@pytest.fixture(scope="module")
def interpreter():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            process.submit(torch.set_num_threads, 1).result()
        yield process


def problem(B, T, n_in, n_out, dtype, K=1, strided=False, zero_direction=False, seed=0, device="cpu"):
    """
    dw, x, dy, direction (K, out, in); `strided`: x is every second sample of a larger batch, dy has T and out
    exchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B * (1 + strided), T, n_in, generator=generator).to(device, dtype)[:: 1 + strided]
    dy = torch.randn(B, *((n_out, T) if strided else (T, n_out)), generator=generator).to(device, dtype)
    dw, *direction = torch.randn(1 + K, n_out, n_in, generator=generator).to(device)
    direction = torch.stack(direction)
    return dw.contiguous(), x, dy.mT if strided else dy, direction * (not zero_direction)


def relative_error(ours, oracle):
    return ((ours - oracle).norm() / oracle.norm().clamp_min(1e-300)).item()


def errors(case, **options):
    """The relative errors of dots and dW against float64 on the same, rounded, inputs; whether a second run agrees."""
    dw, x, dy, direction = problem(**case)
    sample_dw = torch.einsum("bto,bti->boi", dy.double(), x.double())
    oracle = torch.einsum("boi,koi->bk", sample_dw, direction.double()), dw.double() + sample_dw.sum(0)
    again = dw.clone()
    results = kernels.add_samples_triton(dw, x, dy, direction, **options), dw
    repeated = kernels.add_samples_triton(again, x, dy, direction, **options), again
    assert all(result.dtype == torch.float32 for result in results)
    return [relative_error(*pair) for pair in zip(results, oracle, strict=True)], all(
        map(torch.equal, results, repeated)
    )


def drawn_cases(n):
    draw = random.Random(0)
    for _ in range(n):
        B, T, n_in, n_out = draw.randint(1, 7), draw.randint(1, 40), draw.randint(1, 70), draw.randint(1, 70)
        yield dict(B=B, T=T, n_in=n_in, n_out=n_out, strided=draw.random() < 0.5), draw.choice([1, 2, 3, B])


CASES = {
    "one token": (dict(B=1, T=1, n_in=1, n_out=1), 1),
    "one sample": (dict(B=1, T=37, n_in=40, n_out=33), 4),
    "T=1": (dict(B=5, T=1, n_in=40, n_out=33), 2),
    "below the tile": (dict(B=3, T=9, n_in=7, n_out=5), 1),
    "even": (dict(B=4, T=32, n_in=64, n_out=48), 1),
    "even, split": (dict(B=4, T=32, n_in=64, n_out=48), 2),
    "even widths": (dict(B=3, T=21, n_in=64, n_out=48), 1),
    "uneven splits": (dict(B=7, T=20, n_in=33, n_out=17), 3),
    "three directions": (dict(B=4, T=20, n_in=33, n_out=17, K=3), 2),
    "four, even": (dict(B=4, T=32, n_in=64, n_out=48, K=4), 1),
    "a sample a split": (dict(B=6, T=20, n_in=33, n_out=17), 6),
    "strided": (dict(B=3, T=21, n_in=50, n_out=35, strided=True), 2),
    **{f"drawn {i}": case for i, case in enumerate(drawn_cases(6))},
}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_dots_and_weight_gradient_equal_float64(interpreter, name, dtype):
    case, splits = CASES[name]
    found, repeatable = interpreter.submit(errors, dict(case, dtype=dtype), splits=splits, tile=SMALL).result()
    assert max(found) < 1e-5
    assert repeatable


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    case=st.fixed_dictionaries(
        {
            "B": st.integers(1, 6),
            "T": st.integers(1, 40),
            "n_in": st.integers(1, 70),
            "n_out": st.integers(1, 40),
            "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
            "K": st.integers(1, 5),
            "strided": st.booleans(),
            "seed": st.integers(0, 2**31),
        }
    ),
    splits=st.none() | st.integers(1, 7),
)
def test_any_shape(interpreter, case, splits):
    (dots_error, dw_error), repeatable = interpreter.submit(errors, case, splits=splits, tile=SMALL).result()
    # The terms of a single dot may cancel: then its own size says nothing about rounding.
    assert dots_error < (1e-5 if case["B"] * case["K"] > 3 and case["n_in"] * case["n_out"] > 100 else 1e-3)
    assert dw_error < 1e-5
    assert repeatable


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tiles_of_a_gpu(interpreter, dtype):
    case = dict(B=2, T=130, n_in=200, n_out=150, dtype=dtype)
    found, repeatable = interpreter.submit(errors, case).result()
    assert max(found) < 1e-5
    assert repeatable


@needs_triton
def test_a_direction_of_zeros_gives_zeros(interpreter):
    case = dict(B=3, T=20, n_in=40, n_out=20, dtype=torch.float32, zero_direction=True)
    (dots_error, dw_error), _ = interpreter.submit(errors, case, splits=2, tile=SMALL).result()
    assert dots_error == 0
    assert dw_error < 1e-5


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("unit", [(), ("B", "samples"), ("B", "samples", "T", "OUT", "dy_stride_t")], ids=str)
def test_compiles_for_a_gpu_that_is_not_there(dtype, capability, K, unit, tmp_path, monkeypatch):
    """As GPT-2's layers would have it, also where numbers are 1, which Triton makes constants of."""
    if kernels.triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, tile = kernels.linear_grad_kernel, dict(kernels.TILES[dtype])
    options = {name: tile.pop(name) for name in list(tile) if not name.startswith("BLOCK")}
    constants = dict(
        tile, x_stride_c=1, dy_stride_c=1, IN=768, K=K, ROOM=K, EVEN="T" not in unit, ADD=True, UPCAST=False
    )
    constants |= dict.fromkeys(unit, 1)
    pointer = {"x_ptr": dtype, "dy_ptr": dtype}
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = types[pointer.get(name, torch.float32)] if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else kind
        if name not in ("B", "samples", *constants):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = kernels.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    product = {torch.float32: "fma.rn.f32", torch.bfloat16: "mma.sync" if capability == 80 else "wgmma.mma_async"}
    if "OUT" not in unit:  # one row of one token needs no matrix product
        assert product[dtype] in compiled.asm["ptx"]
        assert "cp.async" in compiled.asm["ptx"]
    assert "cubin" in compiled.asm
    # Two programs find room in a processor.
    assert 2 * compiled.metadata.shared < {80: 164, 90: 228}[capability] * 1024


@needs_triton
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
            kernels.add_samples_triton(*arguments)


def test_splits_fill_the_chip():
    """GPT-2's layers, 16 samples of 1,024 tokens, on an A100: 36 tiles, 108, 144, and the head's 2,358."""
    assert [kernels.choose_splits(tiles, 16, 1024, 108) for tiles in (36, 108, 144, 2358)] == [3, 1, 2, 1]
    assert kernels.choose_splits(36, 1, 1024, 108) == 1
    assert kernels.choose_splits(36, 0, 1024, 108) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The choice, with stand-ins for the kernel and the clock.


def plain_kernel(dw, x, dy, direction):
    return add_samples(dw, x, dy, direction, (dw * direction).sum((1, 2)))[0]


def wrong_dots(dw, x, dy, direction):
    return plain_kernel(dw, x, dy, direction) * 1.001


def wrong_weight_gradient(dw, x, dy, direction):
    dots = plain_kernel(dw, x, dy, direction)
    dw[-1, -1] += 1
    return dots


def not_a_number(dw, x, dy, direction):
    return plain_kernel(dw, x, dy, direction) * float("nan")


def failing(dw, x, dy, direction):
    raise RuntimeError("no compiler\nand more lines")


def compared(kernel, kernel_ms=1.0, plain_ms=2.0, shapes=((2, 8, 6, 4), (2, 8, 6, 4), (1, 8, 4, 6))):
    def timer(run):
        run()
        return plain_ms if run.func is add_samples else kernel_ms

    return kernels.compare(torch.device("cpu"), list(shapes), torch.float32, add_samples, kernel, timer)


def test_the_faster_correct_version_is_chosen():
    use_triton, reason = compared(plain_kernel)
    assert use_triton
    assert (
        "by the Triton kernel: 3.00 ms by the kernel, 6.00 ms by plain PyTorch" in reason
    )  # twice one shape, once another
    use_triton, reason = compared(plain_kernel, kernel_ms=2.5)
    assert not use_triton
    assert "by plain PyTorch: 7.50 ms by the kernel, 6.00 ms" in reason


@pytest.mark.parametrize("kernel", [wrong_dots, wrong_weight_gradient, not_a_number, failing])
def test_a_wrong_kernel_is_not_chosen_however_fast(kernel):
    use_triton, reason = compared(kernel)
    assert not use_triton
    assert ("fails, RuntimeError: no compiler" if kernel is failing else "relative error is") in reason
    assert "\n" not in reason


def test_the_choice_draws_no_random_numbers():
    before = torch.get_rng_state()
    compared(plain_kernel)
    assert torch.equal(before, torch.get_rng_state())


def test_where_the_kernel_is_used_the_operators_give_the_same(monkeypatch):
    def kernel(dw, x, dy, direction):
        sample_dw = torch.einsum("bto,bti->boi", dy, x)
        dw += sample_dw.sum(0)
        return torch.einsum("boi,koi->bk", sample_dw, direction)

    x, dy, direction, weight = (torch.randn(*shape) for shape in ((3, 600, 4), (3, 600, 6), (2, 6, 4), (6, 4)))
    linear = x, dy, direction
    head = x, weight, torch.randint(6, (3, 600)), direction, True
    monkeypatch.setitem(data_value.SLICE, "cpu", 1)  # slices of 512 tokens
    expected = data_value.linear_grad(*linear), data_value.head_loss(*head)
    monkeypatch.setattr(data_value, "use_triton", True)
    monkeypatch.setattr(data_value, "add_samples_triton", kernel)
    found = data_value.linear_grad(*linear), data_value.head_loss(*head)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_without_a_gpu_or_triton_the_choice_says_so(monkeypatch):
    choose = functools.partial(kernels.choose, shapes=[(2, 8, 6, 4)], dtype=torch.float32, plain=add_samples)
    assert choose("cpu") == (False, "weight gradients by plain PyTorch: cpu is no CUDA device")
    monkeypatch.setattr(kernels, "triton", None)
    assert choose("cuda") == (False, "weight gradients by plain PyTorch: triton is not installed")


def test_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("without", kernels.__file__))
    module.__spec__.loader.exec_module(module)
    assert module.triton is None
    assert not module.choose("cuda", [], torch.float32, add_samples)[0]


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU.


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)], ids=str)
@pytest.mark.parametrize("n_in, n_out", [(768, 768), (768, 2304), (768, 3072), (3072, 768), (768, 50304), (765, 770)])
def test_layers_of_gpt2_on_a_gpu(n_in, n_out, dtype, tolerance):
    B, T = (2, 256) if n_out == 50304 else (16, 1024)
    found, repeatable = errors(dict(B=B, T=T, n_in=n_in, n_out=n_out, dtype=dtype, device="cuda"))
    assert max(found) < tolerance
    assert repeatable


@needs_triton
@pytest.mark.gpu
def test_the_choice_on_a_gpu():
    _, reason = kernels.choose("cuda", [(16, 1024, 768, 768), (16, 1024, 768, 3072)], torch.bfloat16, add_samples)
    print(reason)
    assert "relative error is" in reason
    assert "ms by the kernel" in reason


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("use_triton", [False, True])
def test_a_scored_step_does_not_wait_for_the_gpu(monkeypatch, use_triton):
    monkeypatch.setattr(data_value, "use_triton", use_triton)
    run = bench.Bench(bench.Knobs(device="cuda", n_layer=2, block_size=64, batch_size=4, dtype="bfloat16"), stock=False)
    run.scored()  # compiles
    run.order2()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.scored()
        run.order2()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""
The weight gradient's kernels against float64. Without a GPU they run in Triton's interpreter, on CPU tensors: in a
process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

import functools
import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import data_value
from support import kernels, operators
from support.kernels import BMM, PLAIN, Candidate
from support.operators import add_samples

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
needs_gpu = pytest.mark.gpu
SMALL = [Candidate("pointers", 32, 32, 32), Candidate("descriptors", 32, 32, 32), BMM]
ALL = [
    (capability, dtype, candidate)
    for capability, tiles in kernels.TILES.items()
    for dtype, listed in tiles.items()
    for candidate in listed
]


def problem(B, T, n_in, n_out, dtype, K=1, layout="", zero_direction=False, seed=0, device="cpu"):
    """
    dw, x, dy, direction (K, out, in); layout 'strided': x is every second sample of a larger batch, dy has T and out
    exchanged; 'aligned': the same of x, and rows that TMA can read.
    """
    randn = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)

    def rows(*shape):
        wide = *shape[:2], -(-shape[2] // 8) * 8
        return randn(wide if layout == "aligned" else shape).to(dtype)[:, :, : shape[2]]

    x = rows(B * 2, T, n_in)[::2] if layout else rows(B, T, n_in)
    dy = rows(B, n_out, T).mT if layout == "strided" else rows(B, T, n_out)
    dw, *direction = randn(1 + K, n_out, n_in)
    return dw.contiguous(), x, dy, torch.stack(direction) * (not zero_direction)


def errors(case, candidate, add=True, splits=1, chunk=None, twice=True):
    """
    The relative errors of dots and dW against float64 on the same, rounded, inputs, whether a second run agrees, and
    whether the candidate itself was used. `splits` replaces the rule for them, `chunk` kernels.CHUNK.
    """
    dw, x, dy, direction = problem(**case)
    sample_dw = torch.einsum("bto,bti->boi", dy.double(), x.double())
    oracle = torch.einsum("boi,koi->bk", sample_dw, direction.double()), add * dw.double() + sample_dw.sum(0)
    scale = oracle
    if candidate == BMM and x.dtype == torch.bfloat16:  # it rounds every number: sums may cancel, but not their bounds
        scale = torch.einsum("boi,koi->bk", sample_dw.abs(), direction.double().abs()), sample_dw.abs().sum(0)
    if not add:
        dw.fill_(float("nan"))
    again, used = dw.clone(), []
    with pytest.MonkeyPatch.context() as patch:
        if splits:
            patch.setattr(kernels, "choose_splits", lambda tiles, B, *_: min(splits, B))
        patch.setattr(kernels, "CHUNK", chunk or kernels.CHUNK)
        for name in ("launch_tiles", "launch_bmm"):
            launch = getattr(kernels, name)
            patch.setattr(kernels, name, lambda *args, launch=launch: used.append(args[5]) or launch(*args))
        results = kernels.weight_gradient(dw, x, dy, direction, add, candidate), dw
        repeated = (kernels.weight_gradient(again, x, dy, direction, add, candidate), again) if twice else results
    assert all(result.dtype == torch.float32 for result in results)
    repeatable = all(map(torch.equal, results, repeated))
    found = [
        ((a - b).norm() / c.norm().clamp_min(1e-300)).item() for a, b, c in zip(results, oracle, scale, strict=True)
    ]
    return found, repeatable, used[0] == candidate


def bound(candidate, dtype):
    return 2**-9 if candidate == BMM and dtype == torch.bfloat16 else 1e-5


# a shape and the number of splits
CASES = {
    "one token": (dict(B=1, T=1, n_in=1, n_out=1), 1),
    "T=1": (dict(B=5, T=1, n_in=40, n_out=33), 2),
    "below the tile": (dict(B=3, T=9, n_in=7, n_out=5, layout="aligned"), 1),
    "even, split": (dict(B=4, T=32, n_in=64, n_out=32), 2),
    "even widths": (dict(B=2, T=21, n_in=32, n_out=64), 1),
    "splits within samples": (dict(B=7, T=80, n_in=32, n_out=24), 3),
    "a sample a split": (dict(B=6, T=40, n_in=33, n_out=17, layout="aligned"), 6),
    "three directions": (dict(B=4, T=20, n_in=33, n_out=17, K=3, layout="aligned"), 3),
    "four, even": (dict(B=2, T=32, n_in=32, n_out=32, K=4), 1),
    "strided": (dict(B=3, T=21, n_in=50, n_out=35, layout="strided"), 2),
    "aligned": (dict(B=3, T=41, n_in=50, n_out=35, layout="aligned"), 2),
}
DESCRIBED = (
    "below the tile",
    "even, split",
    "splits within samples",
    "a sample a split",
    "three directions",
    "aligned",
)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("candidate", SMALL, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_dots_and_weight_gradient_equal_float64(interpreter, name, candidate, dtype):
    case, splits = CASES[name]
    add = len(name) % 2 == 0
    case = dict(case, dtype=dtype)
    found, repeatable, used = interpreter.submit(errors, case, candidate, add, splits, twice="split" in name).result()
    assert max(found) < bound(candidate, dtype)
    assert repeatable
    if name in DESCRIBED:
        assert used


@needs_triton
@settings(max_examples=12, deadline=None)
@given(
    case=st.fixed_dictionaries(
        {
            "B": st.integers(1, 6),
            "T": st.integers(1, 40),
            "n_in": st.integers(1, 70),
            "n_out": st.integers(1, 40),
            "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
            "K": st.integers(1, 5),
            "layout": st.sampled_from(["", "strided", "aligned"]),
            "seed": st.integers(0, 2**31),
        }
    ),
    candidate=st.sampled_from(SMALL),
    add=st.booleans(),
    splits=st.integers(1, 7),
    chunk=st.none() | st.sampled_from([100, 1000, 10000]),
)
def test_any_shape(interpreter, case, candidate, add, splits, chunk):
    arguments = case, candidate, add, splits, chunk, False
    (dots_error, dw_error), _, _ = interpreter.submit(errors, *arguments).result()
    allowed = bound(candidate, case["dtype"])
    # The terms of a single dot may cancel: then its own size says nothing about rounding.
    many = case["B"] * case["K"] > 3 and case["n_in"] * case["n_out"] > 100
    assert dots_error < allowed * (2 if many else 100)
    assert dw_error < allowed * 2


@needs_triton
@pytest.mark.parametrize("chunk", [10_000, 70_000, None])
def test_bmm_in_chunks_of_samples_and_rows(interpreter, chunk):
    """128 rows of one sample, all rows of some, all rows of all."""
    case = dict(B=5, T=9, n_in=40, n_out=300, dtype=torch.bfloat16, K=2)
    found, repeatable, _ = interpreter.submit(errors, case, BMM, False, 1, chunk).result()
    assert max(found) < 2**-9
    assert repeatable


def test_chunks_stay_in_the_cache():
    """GPT-2's layers, and what no chunk can hold: the least that the rule makes."""
    for shape in [(16, 1024, 768, 768), (16, 1024, 768, 3072), (5, 1024, 768, 50304), (480, 1024, 1600, 6400)]:
        samples, rows = kernels.chunks(shape, 2)
        assert 2**23 < samples * rows * shape[2] * 2 <= kernels.CHUNK
        assert 1 <= samples <= shape[0] and 1 <= rows <= shape[3]
        assert samples == shape[0] or rows == shape[3] or rows % 128 == 0
    assert kernels.chunks((3, 10, 2**24, 500), 2) == (1, 128)


@needs_triton
@pytest.mark.parametrize(
    "candidate, dtype",
    [
        (Candidate("descriptors", 128, 256, 64), torch.bfloat16),
        *((one, dtype) for dtype, one in kernels.POINTERS.items()),
    ],
    ids=str,
)
def test_the_tiles_of_a_gpu(interpreter, candidate, dtype):
    case = dict(B=2, T=70, n_in=264, n_out=136, dtype=dtype)
    found, _, used = interpreter.submit(errors, case, candidate, twice=False).result()
    assert max(found) < 1e-5
    assert used


@needs_triton
def test_a_direction_of_zeros_gives_zeros(interpreter):
    case = dict(B=3, T=20, n_in=40, n_out=20, dtype=torch.float32, zero_direction=True)
    for candidate in SMALL:
        (dots_error, dw_error), _, _ = interpreter.submit(errors, case, candidate, splits=2).result()
        assert dots_error == 0
        assert dw_error < 1e-5


@needs_triton
def test_shapes_that_do_not_belong_together_are_refused():
    dw, x, dy, direction = problem(2, 3, 4, 5, torch.float32)
    candidate = SMALL[0]
    for arguments in [
        (dw, x, dy[:1], direction, True, candidate),
        (dw, x, dy.bfloat16(), direction, True, candidate),
        (dw, x.double(), dy.double(), direction, True, candidate),
        (dw.T, x, dy, direction, True, candidate),
        (dw, x, dy, direction.double(), True, candidate),
        (dw, x, dy, direction[0], True, candidate),
        (torch.zeros(4, 5).T, x, dy, direction, True, candidate),
        (dw, x, dy, direction, True, PLAIN),
    ]:
        with pytest.raises(ValueError):
            kernels.weight_gradient(*arguments)


def test_what_tma_can_read():
    x = torch.zeros(4, 6, 64, dtype=torch.bfloat16)
    assert kernels.describable(x) and kernels.describable(x[::2]) and kernels.describable(x[:, :, 8:16])
    assert not kernels.describable(x.mT) and not kernels.describable(x[:, :, 4:16])
    assert not kernels.describable(torch.zeros(4, 6, 50257, dtype=torch.bfloat16))
    assert not kernels.describable(x[:0]) and not kernels.describable(x[:1].expand(4, -1, -1))


def test_splits_fill_the_chip():
    """GPT-2's layers, 16 samples of 1,024 tokens: 128 x 128 tiles on an A100, 128 x 256 ones on an H100."""
    assert [kernels.choose_splits(tiles, 16, 1024, 1, 108) for tiles in (36, 108, 144, 2358)] == [3, 1, 2, 1]
    assert [kernels.choose_splits(tiles, 16, 1024, 16, 132) for tiles in (18, 54, 72, 1179)] == [7, 2, 3, 1]
    assert kernels.choose_splits(36, 1, 1024, 1, 108) == 1
    assert kernels.choose_splits(36, 0, 1024, 1, 108) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The traffic on paper, beside what the interpreter's loads and stores and PyTorch's own operators move.


class Bytes(TorchDispatchMode):
    """Adds up what operators read and write; products are left to the caller, and views and empty tensors move none."""

    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("sum", "add_"):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.counted[name] = self.counted.get(name, 0) + sum(map(size, [*tensors, result]))
        elif name in ("zeros", "new_zeros", "zero_"):
            self.counted[name] = self.counted.get(name, 0) + size(result)
        return result


def size(tensor):
    return tensor.numel() * tensor.element_size()


def moved(case, candidate, add, splits, chunk):
    """Bytes of the L2 cache that a call moves, bmm's products aside, and those of them that are of directions."""
    from triton.runtime.interpreter import InterpreterBuilder

    dw, x, dy, direction = problem(**case)
    counted, start, end = {}, direction.data_ptr(), direction.data_ptr() + size(direction)

    def count(pointers, mask):
        places = pointers.data[
            np.broadcast_to(
                mask.data if hasattr(mask, "data") and not isinstance(mask, np.ndarray) else mask, pointers.data.shape
            )
        ]
        width = pointers.dtype.element_ty.primitive_bitwidth // 8
        kind = "direction" if ((places >= start) & (places < end)).any() else "other"
        counted[kind] = counted.get(kind, 0) + places.size * width

    with pytest.MonkeyPatch.context() as patch:
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        patch.setattr(
            InterpreterBuilder,
            "create_masked_load",
            lambda self, ptrs, mask, *args, **kwargs: count(ptrs, mask) or load(self, ptrs, mask, *args, **kwargs),
        )
        patch.setattr(
            InterpreterBuilder,
            "create_masked_store",
            lambda self, ptrs, value, mask, *args, **kw: (
                count(ptrs, mask) or store(self, ptrs, value, mask, *args, **kw)
            ),
        )
        patch.setattr(kernels, "choose_splits", lambda tiles, B, *_: splits)
        patch.setattr(kernels, "CHUNK", chunk or kernels.CHUNK)
        with Bytes(counted):
            kernels.weight_gradient(dw, x, dy, direction, add, candidate)
        B, T, n_in, n_out = shape = case["B"], case["T"], case["n_in"], case["n_out"]
        K, dtype = len(direction), x.dtype
        _, l2 = kernels.weight_gradient_traffic(shape, dtype, K, add, candidate, 1)
        directions = kernels.direction_traffic(shape, dtype, K, candidate, 1)
        if candidate == BMM:
            l2 -= kernels.operand_traffic(shape, dtype, 128, 256) + dtype.itemsize * B * n_in * n_out
    return sum(counted.values()), counted["direction"], l2, directions


@needs_triton
@pytest.mark.parametrize("candidate", SMALL, ids=str)
@pytest.mark.parametrize("add, splits, K, chunk", [(True, 1, 1, None), (False, 3, 2, 20_000), (True, 2, 1, 6_000)])
def test_the_traffic_on_paper_is_what_the_interpreter_moves(interpreter, candidate, add, splits, K, chunk):
    case = dict(B=4, T=72, n_in=48, n_out=72, dtype=torch.bfloat16, K=K)
    total, directions, l2, paper = interpreter.submit(moved, case, candidate, add, splits, chunk).result()
    assert directions == paper
    assert total == l2


def test_memory_on_paper():
    """x and dY of two bytes a number, dW written, a direction read, 16 dots."""
    expected = 2 * 16 * 1024 * (768 + 3072) + 2 * 4 * 768 * 3072 + 4 * 16
    for candidate in (BMM, kernels.POINTERS[torch.bfloat16]):
        memory, _ = kernels.weight_gradient_traffic((16, 1024, 768, 3072), torch.bfloat16, 1, False, candidate, 132)
        assert memory == expected
    with pytest.raises(ValueError):
        kernels.weight_gradient_traffic((16, 1024, 768, 3072), torch.bfloat16, 1, False, PLAIN, 132)


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler makes of them.


def fast(capability, dtype, candidate, K):
    """Compiled by make test: two of each GPU's candidates, the others with -m slow."""
    return K == 1 and candidate in kernels.TILES[capability][dtype][: 2 if capability == (9, 0) else 1]


@needs_triton
@pytest.mark.parametrize(
    "capability, dtype, candidate, K",
    [
        pytest.param(*one, K, marks=[] if fast(*one, K) else pytest.mark.slow, id=f"{one[0]}-{one[1]}-{one[2]}-{K}")
        for one in ALL
        for K in (1, 4)
    ],
)
def test_compiles_for_a_gpu_that_is_not_there(capability, dtype, candidate, K, tmp_path, monkeypatch):
    if kernels.triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = kernels.compiled(candidate, capability, dtype, K)
    loop = "\n".join(made["loop"])
    # The addresses of four directions may cost a few accesses.
    assert made["local_in_loop"] <= (8 if K > 1 else 0)
    assert made["shared"] <= {(8, 0): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227}[capability] * 1024
    if dtype == torch.float32:
        assert "FFMA" in loop and "LDGSTS" in loop
    elif candidate.kind == "descriptors":
        # In the one loop the parts of later steps are asked for, and those of the first steps before it.
        assert loop.count("UTMALDG") > 0
        assert made["sass"].count("UTMALDG") >= 2 * candidate.num_stages
        if capability == (9, 0):  # products overlap: a step waits once
            assert loop.count("WARPGROUP.DEPBAR") == 1 < loop.count("HGMMA")
        else:
            assert "UTCHMMA" in loop
    else:
        assert "LDGSTS" in loop
        assert ("HGMMA" if capability == (9, 0) else "HMMA") in loop


@needs_triton
@pytest.mark.parametrize(
    "candidate", [kernels.POINTERS[torch.bfloat16], kernels.TILES[9, 0][torch.bfloat16][0]], ids=str
)
def test_compiles_for_ragged_shapes(candidate, tmp_path, monkeypatch):
    if kernels.triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "HGMMA" in "\n".join(kernels.compiled(candidate, (9, 0), torch.bfloat16, even=False)["loop"])


def test_a_loop_is_found_and_its_local_accesses():
    """A loop over T with one access to local memory, a sample's dot with another, and a loop beside them."""
    lines = [
        "STL [R1], R2", ".L_x_1:", "LDL R3, [R1]", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA `(.L_x_2)",
        "LDL R5, [R1]", "LDG.E R6, [R2]", ".L_x_2:", "@P1 BRA `(.L_x_1)",
        ".L_x_3:", "STL [R1], R2", "@P2 BRA `(.L_x_3)", "EXIT",
    ]  # fmt: skip
    sass = "\n".join(line if line.startswith(".") else f"  /*0000*/  {line} ;" for line in lines)
    assert kernels.loop_over_T(sass) == [lines[2], lines[3], lines[4], lines[8]]


# ---------------------------------------------------------------------------------------------------------------------
# The choice, with stand-ins for the kernels and the clock.

SHAPES = [(2, 8, 6, 4), (1, 8, 4, 6)]
FIRST, SECOND = Candidate("pointers", 16, 32, 16), Candidate("descriptors", 16, 32, 16)


def correct(dw, x, dy, direction, add, candidate):
    sample_dw = torch.einsum("bto,bti->boi", dy, x)
    dw.copy_(sample_dw.sum(0) + (dw if add else 0))
    return torch.einsum("boi,koi->bk", sample_dw, direction)


def wrong_dots(*arguments):
    return correct(*arguments) * 1.001


def wrong_weight_gradient(dw, *arguments):
    dots = correct(dw, *arguments)
    dw[-1, -1] += 1
    return dots


def adds_to_nothing(dw, x, dy, direction, add, candidate):
    return correct(dw, x, dy, direction, False, candidate)


def dots_not_a_number(*arguments):
    return correct(*arguments) * float("nan")


def weight_gradient_not_a_number(dw, *arguments):
    dots = correct(dw, *arguments)
    dw[0, 0] = float("nan")
    return dots


def failing(*arguments):
    raise RuntimeError("no compiler\nand more lines")


def compared(monkeypatch, implementations, times, seconds=20.0, clock=None):
    """compare's answer for {candidate: function} and {(candidate, in): ms} on the CPU."""
    last = []

    def weight_gradient(*arguments, candidate):
        last[:] = [candidate]
        return implementations[candidate](*arguments, candidate)

    def plain(*arguments):
        last[:] = [PLAIN]
        return add_samples(*arguments)

    def timer(run):
        run()
        return times[last[0]]

    monkeypatch.setattr(kernels, "weight_gradient", weight_gradient)
    if clock:
        monkeypatch.setattr(kernels.time, "monotonic", clock)
    listed = [PLAIN, *implementations]
    table, reason, complete = kernels.compare(
        torch.device("cpu"), SHAPES, torch.float32, plain, 2, listed, timer, seconds
    )
    assert complete == ("were left out" not in reason)
    return table, reason


def test_the_fastest_correct_candidate_of_each_shape_is_chosen(monkeypatch):
    table, reason = compared(monkeypatch, {FIRST: correct, SECOND: correct}, {FIRST: 1.5, SECOND: 1.0, PLAIN: 2.0})
    assert table == {(6, 4): SECOND, (4, 6): SECOND}
    assert f"6 -> 4, 2 x 8 tokens: {SECOND} ({SECOND} 1.000 ms; {FIRST} 1.500 ms; plain 2.000 ms)" in reason
    table, reason = compared(monkeypatch, {FIRST: correct}, {FIRST: 2.5, PLAIN: 2.0})
    assert set(table.values()) == {PLAIN}


def test_a_candidate_may_serve_one_shape_and_fail_at_another(monkeypatch):
    def small(*arguments):
        return correct(*arguments) if arguments[1].shape[2] == 6 else failing()

    table, reason = compared(monkeypatch, {FIRST: small}, {FIRST: 1.0, PLAIN: 2.0})
    assert table == {(6, 4): FIRST, (4, 6): PLAIN}
    assert f"not {FIRST}: RuntimeError: no compiler" in reason


WRONG = [wrong_dots, wrong_weight_gradient, adds_to_nothing, dots_not_a_number, weight_gradient_not_a_number, failing]


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_not_chosen_however_fast(monkeypatch, kernel):
    table, reason = compared(monkeypatch, {FIRST: kernel, SECOND: correct}, {FIRST: 0.1, SECOND: 1.0, PLAIN: 2.0})
    assert set(table.values()) == {SECOND}
    assert f"not {FIRST}: {'RuntimeError: no compiler' if kernel is failing else 'relative error'}" in reason
    assert "more lines" not in reason


def test_bmm_may_round_and_nothing_else_may():
    assert kernels.tolerance(BMM, torch.bfloat16) == 2**-8
    assert kernels.tolerance(FIRST, torch.bfloat16) == 1e-4
    assert kernels.tolerance(BMM, torch.float32) == 1e-5


def test_no_candidate_is_begun_when_the_time_is_over(monkeypatch):
    """The clock goes on by 6 s whenever it is read: at 0, then before each of six timings."""
    ticks = iter(range(0, 1000, 6))
    times = {FIRST: 1.5, SECOND: 1.0, PLAIN: 2.0}
    table, reason = compared(
        monkeypatch, {FIRST: correct, SECOND: correct}, times, seconds=20, clock=lambda: float(next(ticks))
    )
    assert table == {(6, 4): FIRST, (4, 6): PLAIN}
    assert "3 timings of 6 were left out after 20 s" in reason


def test_the_choice_draws_no_random_numbers(monkeypatch):
    before = torch.get_rng_state()
    compared(monkeypatch, {FIRST: correct}, {FIRST: 1.0, PLAIN: 2.0})
    assert torch.equal(before, torch.get_rng_state())


def test_the_report_has_every_shape_and_candidate():
    rows = list(kernels.candidates_report("cpu", [SHAPES[0], *SHAPES], torch.float32, 2, add_samples))
    assert [row["candidate"] for row in rows] == ["cuBLAS, no dots", "plain"] * 2
    for row in rows:
        B, T, n_in, n_out = row["shape"]
        assert row["failure"] == "" and row["error"] < 1e-5
        assert row["tflops"] == pytest.approx(2 * B * T * n_in * n_out / (row["ms"] / 1e3) / 1e12)


def remembering(tmp_path, monkeypatch, key="this GPU", calls=None, complete=True):
    monkeypatch.setattr(kernels, "cache_file", lambda: str(tmp_path / "folder" / "kernels.json"))

    def choose_now():
        calls.append(1)
        return {(6, 4): FIRST, (4, 6): PLAIN}, "chosen", complete

    return kernels.remembered(key, SHAPES, [FIRST, SECOND, PLAIN], choose_now)


def test_a_choice_is_remembered_for_this_gpu_alone(tmp_path, monkeypatch):
    calls = []
    table, reason = remembering(tmp_path, monkeypatch, calls=calls)
    assert (table, reason, len(calls)) == ({(6, 4): FIRST, (4, 6): PLAIN}, "chosen", 1)
    again, reason = remembering(tmp_path, monkeypatch, calls=calls)
    assert again == table and len(calls) == 1 and "as chosen before" in reason and f"6 -> 4: {FIRST}" in reason
    remembering(tmp_path, monkeypatch, "another GPU", calls)
    assert len(calls) == 2
    remembering(tmp_path, monkeypatch, calls=calls)
    assert len(calls) == 2
    assert set(json.loads((tmp_path / "folder" / "kernels.json").read_text())) == {"this GPU", "another GPU"}


@pytest.mark.parametrize("text", ["{", "[1]", '{"this GPU": ["no such candidate", "plain"]}', '{"this GPU": 3}'])
def test_a_damaged_file_is_ignored_and_written_anew(tmp_path, monkeypatch, text):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kernels.json").write_text(text)
    calls = []
    table, reason = remembering(tmp_path, monkeypatch, calls=calls)
    assert calls and table[6, 4] == FIRST and "kernels.json: ignored, damaged" in reason
    assert "as chosen before" in remembering(tmp_path, monkeypatch, calls=calls)[1]


def test_a_choice_that_cannot_be_kept_is_used(tmp_path, monkeypatch):
    (tmp_path / "folder").write_text("a file where a folder should be")
    calls = []
    table, reason = remembering(tmp_path, monkeypatch, calls=calls)
    assert table[6, 4] == FIRST and "the choice is not remembered" in reason


def test_a_choice_that_ran_out_of_time_is_used_and_not_kept(tmp_path, monkeypatch):
    calls = []
    table, reason = remembering(tmp_path, monkeypatch, calls=calls, complete=False)
    assert table[6, 4] == FIRST and "the next start tries the rest" in reason
    assert not (tmp_path / "folder").exists()
    remembering(tmp_path, monkeypatch, calls=calls)
    assert len(calls) == 2


def test_torch_has_a_cache_folder():
    assert os.path.isabs(kernels.cache_file())


def test_where_a_kernel_is_used_the_operators_give_the_same(monkeypatch):
    x, dy, direction, weight = (torch.randn(*shape) for shape in ((3, 600, 4), (3, 600, 6), (2, 6, 4), (6, 4)))
    linear = x, dy, direction
    head = x, weight, torch.randint(6, (3, 600)), direction, True
    monkeypatch.setitem(operators.SLICE, "cpu", 1)  # slices of 512 tokens
    expected = operators.linear_grad(*linear), operators.head_loss(*head)
    calls = []
    monkeypatch.setattr(
        kernels, "weight_gradient", lambda *arguments: calls.append(arguments[4:]) or correct(*arguments)
    )
    monkeypatch.setattr(operators, "weight_gradients", {(4, 6): FIRST})
    found = operators.linear_grad(*linear), operators.head_loss(*head)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert calls == [(False, FIRST), (False, FIRST), *[(True, FIRST)] * 5]  # the head's slices: the first fills dW
    monkeypatch.setattr(operators, "weight_gradients", {(4, 6): PLAIN, (6, 4): FIRST})
    torch.testing.assert_close(operators.linear_grad(*linear), expected[0], rtol=0, atol=0)


def test_without_a_gpu_or_triton_the_choice_says_so(monkeypatch):
    choose = functools.partial(kernels.choose, shapes=[(2, 8, 6, 4)], dtype=torch.float32, plain=add_samples)
    assert choose("cpu") == ({}, "weight gradients by plain PyTorch: cpu is no CUDA device")
    monkeypatch.setattr(kernels, "triton", None)
    assert choose("cuda") == ({}, "weight gradients by plain PyTorch: triton is not installed")


def test_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("without", kernels.__file__))
    module.__spec__.loader.exec_module(module)
    assert module.triton is None
    assert module.choose("cuda", [], torch.float32, add_samples)[0] == {}


def test_every_gpu_has_candidates_of_different_names():
    for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]:
        for dtype in kernels.POINTERS:
            listed = kernels.candidates(capability, dtype)
            assert listed[:2] == [PLAIN, BMM] and len({*map(str, listed)}) == len(listed)
            assert (capability < (8, 0)) == (len(listed) == 2)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU.


def few(capability, dtype, candidates=kernels.candidates):
    """The candidates down to the first tile: make gpu compiles and times the others, at GPT-2's shapes."""
    return candidates(capability, dtype)[:3]


def candidates_here(dtype):
    here = torch.cuda.is_available() and kernels.triton is not None
    capability = torch.cuda.get_device_capability() if here else (9, 0)
    return [one for one in kernels.candidates(capability, dtype) if one != PLAIN]


@needs_triton
@needs_gpu
@pytest.mark.parametrize("kind", ["pointers", "descriptors", "bmm", "plain"])
def test_a_scored_step_does_not_wait_for_the_gpu(monkeypatch, kind):
    listed = [one for one in [PLAIN, *candidates_here(torch.bfloat16)] if one.kind == kind]
    if not listed:
        pytest.skip(f"this GPU has no candidate of the kind '{kind}'")
    knobs = bench.Knobs(device="cuda", n_layer=2, block_size=64, batch_size=4, dtype="bfloat16")
    run = bench.Bench(knobs, stock=False)
    shapes = data_value.weight_gradient_shapes(run.model, knobs)
    monkeypatch.setattr(operators, "weight_gradients", {shape[2:]: listed[0] for shape in shapes})
    run.scored()  # compiles
    run.order2()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.scored()
        run.order2()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layers_here():
    """
    (dtype, candidate, in, out, K): GPT-2's layers for every candidate, compiled as for the timings of make gpu, and
    ragged rows, of which TMA can read the first, for one candidate of each kind.
    """
    for dtype in kernels.POINTERS:
        kinds = set()
        for candidate in candidates_here(dtype):
            yield from ((dtype, candidate, *layer, 1) for layer in ((768, 768), (768, 50304), (3072, 768)))
            if candidate.kind not in kinds:
                yield dtype, candidate, *((776, 776) if candidate.kind == "descriptors" else (765, 770)), 3
            kinds.add(candidate.kind)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype, candidate, n_in, n_out, K", layers_here(), ids=str)
def test_layers_of_gpt2_on_a_gpu(dtype, candidate, n_in, n_out, K):
    B, T = (2, 256) if n_out == 50304 else (16, 1000)
    case = dict(B=B, T=T, n_in=n_in, n_out=n_out, dtype=dtype, K=K, device="cuda")
    found, repeatable, used = errors(case, candidate, add=K > 1, splits=None)
    assert max(found) < kernels.tolerance(candidate, dtype)
    assert repeatable and used


@needs_triton
@needs_gpu
def test_the_choice_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "cache_file", lambda: str(tmp_path / "kernels.json"))
    monkeypatch.setattr(kernels, "candidates", few)
    shapes = [(16, 1024, 768, 768), (16, 1024, 768, 3072)]
    table, reason = kernels.choose("cuda", shapes, torch.bfloat16, add_samples)
    print(reason)
    assert set(table) == {(768, 768), (768, 3072)} and " ms" in reason
    assert kernels.choose("cuda", shapes, torch.bfloat16, add_samples)[0] == table


@needs_triton
@needs_gpu
def test_a_table_of_candidates_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "candidates", few)
    rows = list(kernels.candidates_report("cuda", [(2, 256, 768, 384)], torch.bfloat16, 1, add_samples))
    assert [row["candidate"] for row in rows][:2] == ["cuBLAS, no dots", "plain"] and len(rows) > 3
    for row in rows:
        print(row)
        assert row["failure"] == "" and row["ms"] > 0

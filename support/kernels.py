"""
The weight gradient of a linear layer with its dot products, for NVIDIA GPUs: dW = sum_i dY_i^T X_i, (out, in), and
<dY_i^T X_i, D_k> for every sample i and direction k. There are four ways, and `choose` times them at start-up.

'pointers', any GPU: a program owns a tile of dW and keeps its sum in registers: over T for one sample, then <sum,
direction's tile>, then the next sample. A sample's dot product is the difference of two such numbers, so that the extra
work is one multiplication in T more for each direction and no sample's gradient is ever written. Where dW has too few
tiles to fill the chip the samples are split as well, and each split has its own sum.

'descriptors', Hopper: the same with larger tiles, loaded by the TMA unit, whose bounds replace the masks, and
multiplied by wgmma. One flat loop over (sample, T): the parts of the next sample are on their way while this one's dot
is taken. A split may begin within a sample; its dot is then the sum of two parts.

'bmm': torch.bmm writes the samples' gradients in the dtype of x, in chunks that stay in the L2 cache, and one kernel
adds them up and dots them. For bfloat16 it rounds every sample's gradient, as autocast rounds the sum's.

'plain': operators.add_samples by PyTorch alone.

Nothing is added atomically: two runs agree bit by bit.

Which tile, on paper, for an H100 (132 processors of 4,096 bfloat16 operations a cycle, 228 KB of shared memory and 64K
registers each; 3 TB/s from memory, 5.5 TB/s from the L2 cache, a guess: support/budget.py):
- operands: out * in * T products of 2 operations read (out + in) * T * 2 bytes: 128 x 128 reads one byte in 64
  operations, 10 TB/s at 650 TFLOP/s; 128 x 256 one in 85, 7.6 TB/s. The cache gives that only as far as it serves
  neighbours, which read the same parts, together.
- the direction: a tile of 128 x 256 is 128 KB, which no neighbour reads: 24 bytes a cycle for each processor, 5,500
  cycles once for a sample of T = 1,024, which takes 25,000 at 650 TFLOP/s. A fifth more time where nothing hides it. Of
  128 x 128, with 4 warps and 255 registers, two programs have room on a processor: one multiplies while the other takes
  its dot.
- so neither is the better one on paper, and both are timed.
- registers: a 128 x 256 sum takes 128 of a thread's 255. The direction is read by quarters of columns, so that 32 more
  are needed and no sum leaves its registers inside the loop over T (`python -m support.kernels` lists what does).

    table, reason = choose(device, shapes, dtype, add_samples)          # at start-up; print the reason
    dots = weight_gradient(dw, x, dy, direction, add, candidate)        # (B, K), and dw (+)= sum_i dY_i^T X_i
"""

import functools
import hashlib
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch

from support.files import atomic_write

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # some platforms have none: `choose` says so
    triton = None

# ---------------------------------------------------------------------------------------------------------------------
# The candidates.


class Candidate(NamedTuple):
    """A way to compute it, with the tile of dW and the part of T that is taken at a time."""

    kind: str
    block_out: int = 0
    block_in: int = 0
    block_t: int = 0
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None

    def __str__(self):
        if not self.block_t:
            return self.kind
        tile = f"{self.block_out}x{self.block_in}x{self.block_t}"
        return f"{self.kind} {tile}, {self.num_warps} warps, {self.num_stages} stages"


PLAIN, BMM = Candidate("plain"), Candidate("bmm")
CUBLAS = Candidate("cuBLAS, no dots")  # one product of the whole batch: no candidate, but what to compare with

# Where TMA cannot read x or dY. float32 runs on the ordinary units, which keep their operands in registers too.
POINTERS = {
    torch.bfloat16: Candidate("pointers", 128, 128, 64, 8, 3),
    torch.float32: Candidate("pointers", 64, 64, 16, 4, 3),
}
FLOAT32 = [POINTERS[torch.float32], Candidate("pointers", 128, 64, 16, 8, 3)]
# {capability: {dtype: the tiles, the most promising one first}}. Of tiles of 128 x 128 by pointers one program has room
# on a processor, of half of it two, of which one multiplies while the other takes its dot.
TILES = {
    (8, 0): {
        torch.bfloat16: [
            POINTERS[torch.bfloat16],
            Candidate("pointers", 64, 128, 32, 4, 4),
            Candidate("pointers", 128, 64, 32, 4, 4),
        ],
        torch.float32: FLOAT32,
    },
    (8, 9): {  # 100 KB of shared memory
        torch.bfloat16: [
            Candidate("pointers", 128, 128, 32, 8, 3),
            Candidate("pointers", 64, 128, 32, 4, 4),
            Candidate("pointers", 128, 128, 64, 8, 2),
        ],
        torch.float32: FLOAT32,
    },
    (9, 0): {
        torch.bfloat16: [
            Candidate("descriptors", 128, 256, 64, 8, 3),
            Candidate("descriptors", 128, 128, 64, 4, 3),
            Candidate("descriptors", 256, 128, 64, 8, 3),
            Candidate("descriptors", 128, 256, 128, 8, 2),
            Candidate("descriptors", 128, 128, 64, 8, 3, 128),
            POINTERS[torch.bfloat16],
        ],
        torch.float32: FLOAT32,
    },
    (10, 0): {
        torch.bfloat16: [
            Candidate("descriptors", 128, 256, 64, 8, 3),
            Candidate("descriptors", 128, 128, 64, 4, 3),
            POINTERS[torch.bfloat16],
        ],
        torch.float32: FLOAT32,
    },
}


def candidates(capability, dtype):
    """The candidates for a GPU's (major, minor): those without a tile, which take little to compile, then the tiles."""
    major, minor = capability
    known = {8: (8, 0) if minor == 0 else (8, 9), 9: (9, 0), 10: (10, 0)}
    tiles = TILES[known.get(major, (8, 9))] if major >= 8 else {}  # of other chips: what needs least
    return [PLAIN, BMM, *tiles.get(dtype, ())]


# ---------------------------------------------------------------------------------------------------------------------
# The kernels.

if triton is not None:

    @triton.jit
    def quarters(tile):
        """The four quarters of a tile's columns."""
        ROWS: tl.constexpr = tile.shape[0]
        COLS: tl.constexpr = tile.shape[1]
        left, right = tile.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()
        a, b = left.reshape(ROWS, 2, COLS // 4).permute(0, 2, 1).split()
        c, d = right.reshape(ROWS, 2, COLS // 4).permute(0, 2, 1).split()
        return a, b, c, d

    @triton.jit
    def dots_of_part(
        part, corner_ptr, stride, rows_left, cols_left,
        IN: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        """<part, what lies at corner_ptr>, of which rows_left and cols_left are there, for K at a distance: (ROOM,)"""
        rows = tl.arange(0, part.shape[0])
        cols = tl.arange(0, part.shape[1])
        inside = (rows < (part.shape[0] if EVEN else rows_left))[:, None]
        inside = inside & (cols < (part.shape[1] if EVEN else cols_left))[None, :]
        dots = tl.zeros((ROOM,), dtype=tl.float32)
        for k in tl.range(0, K, disable_licm=True):
            direction = tl.load(corner_ptr + (rows[:, None] * IN + cols[None, :]), mask=inside, other=0.0)
            dots = tl.where(tl.arange(0, ROOM) == k, tl.sum(part * direction), dots)
            corner_ptr += stride
        return dots

    @triton.jit
    def dots_of_tile(
        total, corner_ptr, stride, rows_left, cols_left,
        IN: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        """The same of a whole tile, by quarters: registers have no room for a second tile."""
        COLS: tl.constexpr = total.shape[1] // 4
        a, b, c, d = quarters(total)
        dots = dots_of_part(a, corner_ptr, stride, rows_left, cols_left, IN, K, ROOM, EVEN)
        dots += dots_of_part(b, corner_ptr + COLS, stride, rows_left, cols_left - COLS, IN, K, ROOM, EVEN)
        dots += dots_of_part(c, corner_ptr + 2 * COLS, stride, rows_left, cols_left - 2 * COLS, IN, K, ROOM, EVEN)
        dots += dots_of_part(d, corner_ptr + 3 * COLS, stride, rows_left, cols_left - 3 * COLS, IN, K, ROOM, EVEN)
        return dots

    @triton.jit
    def store_part(part, corner_ptr, rows_left, cols_left, add, IN: tl.constexpr, EVEN: tl.constexpr):
        """Write a part of dW, or add it to what is there."""
        rows = tl.arange(0, part.shape[0])
        cols = tl.arange(0, part.shape[1])
        inside = (rows < (part.shape[0] if EVEN else rows_left))[:, None]
        inside = inside & (cols < (part.shape[1] if EVEN else cols_left))[None, :]
        at = corner_ptr + (rows[:, None] * IN + cols[None, :])
        if add:
            part += tl.load(at, mask=inside, other=0.0)
        tl.store(at, part, mask=inside)

    @triton.jit
    def store_tile(total, corner_ptr, rows_left, cols_left, add, IN: tl.constexpr, EVEN: tl.constexpr):
        COLS: tl.constexpr = total.shape[1] // 4
        a, b, c, d = quarters(total)
        store_part(a, corner_ptr, rows_left, cols_left, add, IN, EVEN)
        store_part(b, corner_ptr + COLS, rows_left, cols_left - COLS, add, IN, EVEN)
        store_part(c, corner_ptr + 2 * COLS, rows_left, cols_left - 2 * COLS, add, IN, EVEN)
        store_part(d, corner_ptr + 3 * COLS, rows_left, cols_left - 3 * COLS, add, IN, EVEN)

    # A last slice of one sample needs no kernel of its own: what may be 1 is not made a constant then.
    @triton.jit(do_not_specialize=["B", "T", "samples", "add"])
    def pointers_kernel(
        x_ptr, dy_ptr, direction_ptr, dw_ptr, dots_ptr, B, T, OUT,
        x_stride_b, x_stride_t, x_stride_c, dy_stride_b, dy_stride_t, dy_stride_c, samples, add,
        IN: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr, EVEN: tl.constexpr,
        UPCAST: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        """
        x (B, T, IN), dy (B, T, OUT), direction (K, OUT, IN), dw (splits, OUT, IN) to fill or, where it is one, to `add`
        to, dots (tiles, B, K); `samples` of a split; ROOM is the power of two for K numbers. EVEN: T, OUT and IN are
        multiples of the tile. As constants the masks, and the distance IN between rows, take no registers.
        """
        # A tile's corner is an int64 scalar and the offsets within it are int32, so that no tensor is too large.
        tile = tl.program_id(0).to(tl.int64)
        split = tl.program_id(1).to(tl.int64)
        # Neighbours share columns of dY, the wide one in the head, so that it is read once.
        row = tile // tl.cdiv(IN, BLOCK_IN) * BLOCK_OUT
        col = tile % tl.cdiv(IN, BLOCK_IN) * BLOCK_IN
        rows = tl.arange(0, BLOCK_OUT)
        cols = tl.arange(0, BLOCK_IN)
        times = tl.arange(0, BLOCK_T)
        rows_in = rows < (BLOCK_OUT if EVEN else OUT - row)
        cols_in = cols < (BLOCK_IN if EVEN else IN - col)
        corner = row * IN + col

        first = split * samples
        dy_sample = dy_ptr + first * dy_stride_b + row * dy_stride_c
        x_sample = x_ptr + first * x_stride_b + col * x_stride_c
        dot = dots_ptr + (tile * B + first) * K
        total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        ks = tl.arange(0, ROOM)
        before = tl.zeros((ROOM,), dtype=tl.float32)
        for _ in tl.range(0, tl.minimum(samples, B - first), disable_licm=True):
            dy_part = dy_sample + (rows[:, None] * dy_stride_c + times[None, :] * dy_stride_t)  # (BLOCK_OUT, BLOCK_T)
            x_part = x_sample + (times[:, None] * x_stride_t + cols[None, :] * x_stride_c)  # (BLOCK_T, BLOCK_IN)
            for t in range(0, T, BLOCK_T):
                times_in = times < (BLOCK_T if EVEN else T - t)
                dy = tl.load(dy_part, mask=rows_in[:, None] & times_in[None, :], other=0.0)
                x = tl.load(x_part, mask=times_in[:, None] & cols_in[None, :], other=0.0)
                if UPCAST:
                    dy = dy.to(tl.float32)
                    x = x.to(tl.float32)
                # 'ieee' is for float32. Three TF32 products would be faster, but tensor cores cut off what they add,
                # and a running sum whose differences should hold to 1e-5 cannot afford errors of one sign.
                total = tl.dot(dy, x, total, input_precision="ieee")
                dy_part += BLOCK_T * dy_stride_t
                x_part += BLOCK_T * x_stride_t
            # Read again for every sample: it comes from the cache.
            size = tl.cast(OUT, tl.int64) * IN
            part = direction_ptr + corner
            after = dots_of_tile(total, part, size, OUT - row, IN - col, IN, K, ROOM, EVEN)
            tl.store(dot + ks, after - before, mask=ks < K)
            before = after
            dy_sample += dy_stride_b
            x_sample += x_stride_b
            dot += K
        store_tile(total, dw_ptr + split * OUT * IN + corner, OUT - row, IN - col, add, IN, EVEN)

    @triton.jit(do_not_specialize=["B", "steps", "length", "add"])
    def descriptors_kernel(
        x_desc, dy_desc, direction_ptr, dw_ptr, dots_ptr, B, steps, OUT, length, add, HOPPER: tl.constexpr,
        IN: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr, EVEN: tl.constexpr,
        UPCAST: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        """
        The same from descriptors of x and dy, by blocks (1, BLOCK_T, ...), which give zeros outside. A sample takes
        `steps` parts of T, a split `length` parts of all B * steps. dots (2, tiles, B, K) starts as zeros; neighbouring
        splits, which may share a sample, take turns at its planes. EVEN: OUT and IN are multiples of the tile.
        """
        tile = tl.program_id(0)
        split = tl.program_id(1)
        row = tile // tl.cdiv(IN, BLOCK_IN) * BLOCK_OUT
        col = tile % tl.cdiv(IN, BLOCK_IN) * BLOCK_IN
        corner = row.to(tl.int64) * IN + col
        first = split * length
        last = tl.minimum(first + length, B * steps)
        dots = dots_ptr + ((split % 2 * tl.num_programs(0) + tile).to(tl.int64) * B) * K
        total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        ks = tl.arange(0, ROOM)
        before = tl.zeros((ROOM,), dtype=tl.float32)
        for step in tl.range(first, last, disable_licm=True):
            sample = step // steps
            t = step - sample * steps
            dy = dy_desc.load([sample, t * BLOCK_T, row]).reshape(BLOCK_T, BLOCK_OUT)
            x = x_desc.load([sample, t * BLOCK_T, col]).reshape(BLOCK_T, BLOCK_IN)
            if UPCAST:
                dy = dy.to(tl.float32)
                x = x.to(tl.float32)
            total = tl.dot(dy.T, x, total, input_precision="ieee")
            # Otherwise a Hopper would wait for the product inside the `if`, and with products under way across a branch
            # ptxas lets no two overlap anywhere. These two cost nothing and make it wait here, once a step.
            if HOPPER:
                total = total.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
            end = (t + 1 == steps) | (step + 1 == last)
            if end:
                size = tl.cast(OUT, tl.int64) * IN
                part = direction_ptr + corner
                after = dots_of_tile(total, part, size, OUT - row, IN - col, IN, K, ROOM, EVEN)
                tl.store(dots + sample * K + ks, after - before, mask=ks < K)
                before = after
        store_tile(total, dw_ptr + split.to(tl.int64) * OUT * IN + corner, OUT - row, IN - col, add, IN, EVEN)

    @triton.jit(do_not_specialize=["B", "samples"])
    def add_and_dot_kernel(
        products_ptr, direction_ptr, dw_ptr, dots_ptr, B, samples, size, direction_stride,
        K: tl.constexpr, ROOM: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """
        products (samples, size), direction K rows of `size` at a distance, dw (size,) to ADD to or to fill, dots
        (programs, B, K), of whose B these samples are the first.
        """
        program = tl.program_id(0).to(tl.int64)
        places = program * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        ks = tl.arange(0, ROOM)
        rows = direction_ptr + ks.to(tl.int64)[:, None] * direction_stride + places[None, :]
        direction = tl.load(rows, mask=(ks < K)[:, None] & inside[None, :], other=0.0)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        if ADD:
            total += tl.load(dw_ptr + places, mask=inside, other=0.0)
        product = products_ptr + places
        dot = dots_ptr + program * B * K
        for _ in range(0, samples):
            one = tl.load(product, mask=inside, other=0.0).to(tl.float32)
            total += one
            tl.store(dot + ks, tl.sum(one[None, :] * direction, axis=1), mask=ks < K)
            product += size
            dot += K
        tl.store(dw_ptr + places, total, mask=inside)


def weight_gradient(dw, x, dy, direction, add, candidate):
    """
    dw = sum_i dY_i^T X_i, (out, in) float32, or that much more where `add` is set, in place; returns every sample's
    share dotted with each direction, (B, K) float32. x (B, T, in) and dy (B, T, out) are both bfloat16 or both float32,
    with any strides; direction (K, out, in) is float32. Where TMA cannot read x or dy (`describable`), the pointers'
    tile is used in a descriptors candidate's place.

    Raises ValueError for shapes, dtypes or strides other than these, and for the candidate 'plain'.
    """
    B, T, n_in = x.shape
    n_out = dy.shape[-1]
    if dy.shape != (B, T, n_out) or x.dtype != dy.dtype or x.dtype not in POINTERS:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and dy {tuple(dy.shape)} {dy.dtype} do not belong together")
    for name, matrix, shape in (("dw", dw, (n_out, n_in)), ("direction", direction, (len(direction), n_out, n_in))):
        if matrix.shape != shape or matrix.dtype != torch.float32 or not matrix.is_contiguous():
            raise ValueError(f"{name} must be a contiguous float32 {shape}, not {matrix.dtype} {matrix.shape}")
    if candidate.kind == "descriptors" and not (describable(x) and describable(dy)):
        candidate = POINTERS[x.dtype]
    launch = dict(pointers=launch_tiles, descriptors=launch_tiles, bmm=launch_bmm)
    if candidate.kind not in launch:
        raise ValueError(f"'{candidate}' is not computed here")
    with torch.cuda.device_of(x):
        return launch[candidate.kind](dw, x, dy, direction, add, candidate)


def describable(x):
    """Whether TMA can read x (B, T, C): it begins, and goes on in B and T, at multiples of 16 bytes."""
    aligned = all(stride * x.element_size() % 16 == 0 and stride > 0 for stride in x.stride()[:2])
    return x.stride(2) == 1 and aligned and x.data_ptr() % 16 == 0 and x.numel() > 0


def processors(device):
    """The multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def plan(shape, candidate, processors):
    """
    (tiles, splits, length) for (B, T, in, out): the tiles of dW, into how many parts the samples are split, and how
    many samples ('pointers') or parts of T ('descriptors') a split has.
    """
    B, T, n_in, n_out = shape
    tiles = -(-n_out // candidate.block_out) * -(-n_in // candidate.block_in)
    steps = -(-T // candidate.block_t) if candidate.kind == "descriptors" else 1
    splits = choose_splits(tiles, B, T, steps, processors)
    length = max(1, -(-B * steps // splits))
    return tiles, max(1, -(-B * steps // length)), length


@functools.cache
def choose_splits(tiles, B, T, steps, processors):
    """
    Into how many parts to split B samples, or rather their B * steps parts: as many as take least time, counted in
    tokens that one processor after the other goes through. To write a part's tile and read it again is worth 1,024
    tokens, whatever the tile: 4 bytes twice at 3 TB/s against 2 operations a token at 798 TFLOP/s are 1,064 on an H100
    (on an A100, 2 TB/s and 312 TFLOP/s, 624).
    """

    def tokens(splits):
        waves = -(-tiles * splits // processors)
        return waves * (-(-B * steps // splits) * T / steps + (1024 if splits > 1 else 0))

    return min(range(1, B + 1), key=tokens, default=1)


def launch_tiles(dw, x, dy, direction, add, candidate):
    (B, T, n_in), n_out, K = x.shape, dy.shape[2], len(direction)
    tiles, splits, length = plan((B, T, n_in, n_out), candidate, processors(x.device))
    target, onto = (dw, int(add)) if splits == 1 else (dw.new_empty(splits, n_out, n_in), 0)
    block_out, block_in, block_t = candidate.block_out, candidate.block_in, candidate.block_t
    even = n_out % block_out == 0 and n_in % block_in == 0
    # The interpreter has no product of bfloat16 matrices; in float32 it is the same one, whose products are exact.
    upcast = triton.knobs.runtime.interpret and x.dtype == torch.bfloat16
    modes = dict(IN=n_in, K=K, ROOM=triton.next_power_of_2(K), UPCAST=upcast)
    modes |= dict(BLOCK_OUT=block_out, BLOCK_IN=block_in, BLOCK_T=block_t)
    modes |= dict(num_warps=candidate.num_warps, num_stages=candidate.num_stages, maxnreg=candidate.maxnreg)
    if candidate.kind == "descriptors":
        dots = dw.new_zeros(2 if splits > 1 else 1, tiles, B, K)
        x_desc = TensorDescriptor.from_tensor(x, [1, block_t, block_in])
        dy_desc = TensorDescriptor.from_tensor(dy, [1, block_t, block_out])
        steps = triton.cdiv(T, block_t)
        hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
        descriptors_kernel[(tiles, splits)](
            x_desc, dy_desc, direction, target, dots, B, steps, n_out, length, onto, hopper, EVEN=even, **modes
        )
    else:
        dots = dw.new_empty(1, tiles, B, K)
        even = even and T % block_t == 0
        pointers_kernel[(tiles, splits)](
            x, dy, direction, target, dots, B, T, n_out, *x.stride(), *dy.stride(), length, onto, EVEN=even, **modes
        )
    if splits > 1 and add:
        dw += target.sum(0)
    elif splits > 1:
        torch.sum(target, 0, out=dw)
    return dots.sum((0, 1))


CHUNK = 24 * 2**20  # bytes of samples' gradients that stay in the L2 cache: 40 MB on an A100, 50 MB on an H100
BLOCK = 4096  # of their elements in a program


def chunks(shape, itemsize):
    """
    (samples, rows): of so many samples and rows of dW 'bmm' makes the gradients at a time, for (B, T, in, out). All
    rows where several samples' fit: x is then read once, and dW and D once a chunk. Else all samples if they can be.
    """
    B, _, n_in, n_out = shape
    samples = CHUNK // (n_out * n_in * itemsize)
    if samples >= min(B, 2):
        return min(B, samples), n_out
    rows = max(128, CHUNK // (B * n_in * itemsize) // 128 * 128)
    return max(1, min(B, CHUNK // (rows * n_in * itemsize))), min(n_out, rows)


def launch_bmm(dw, x, dy, direction, add, candidate):
    (B, T, n_in), n_out, K = x.shape, dy.shape[2], len(direction)
    samples, rows = chunks((B, T, n_in, n_out), x.element_size())
    room = triton.next_power_of_2(K)
    block = max(1024, BLOCK // room)
    programs = [triton.cdiv(min(rows, n_out - row) * n_in, block) for row in range(0, n_out, rows)]
    products = x.new_empty(samples * rows * n_in)  # one buffer, so that it stays in the cache
    dots, first = dw.new_empty(sum(programs), B, K), 0
    for row, n in zip(range(0, n_out, rows), programs, strict=True):
        for i in range(0, B, samples):
            part_x, part_dy_T = x[i : i + samples], dy[i : i + samples, :, row : row + rows].mT
            part = products[: len(part_x) * part_dy_T.shape[1] * n_in].view(len(part_x), -1, n_in)
            torch.bmm(part_dy_T, part_x, out=part)
            add_and_dot_kernel[(n,)](
                part, direction[:, row:], dw[row:], dots[first:, i:], B, len(part), part[0].numel(), n_out * n_in,
                K=K, ROOM=room, ADD=add or i > 0, BLOCK=block,
            )  # fmt: skip
        first += n
    return dots.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Its traffic, on paper. A shape is (B, T, in, out); `processors` are the GPU's, which decide on the splits.


def weight_gradient_traffic(shape, dtype, K, add, candidate, processors):
    """
    (memory_bytes, l2_bytes) of `weight_gradient` and the sums behind it. From memory come x, dY, the directions and,
    where `add` is set, dW, once each; dW and the dots go there. From the L2 cache every tile comes as often as it is
    loaded: dY once for each column of tiles, x once for each row of them (`operand_traffic`), the directions as
    `direction_traffic` says; partial sums are written and read there. Raises ValueError for the candidate 'plain'.
    """
    B, T, n_in, n_out = shape
    weight, dots = 4 * n_out * n_in, 4 * B * K
    memory = dtype.itemsize * B * T * (n_in + n_out) + weight * (1 + add + K) + dots
    l2 = direction_traffic(shape, dtype, K, candidate, processors)
    if candidate.kind == "bmm":
        samples, rows = chunks(shape, dtype.itemsize)
        passes = -(-B // samples)
        block = max(1024, BLOCK // next_power_of_2(K))
        programs = sum(-(-min(rows, n_out - row) * n_in // block) for row in range(0, n_out, rows))
        l2 += operand_traffic(shape, dtype, 128, 256)  # cuBLAS's best tile, a guess
        l2 += 2 * dtype.itemsize * B * n_out * n_in  # the samples' gradients, written and read
        l2 += weight * (2 * passes - 1 + add) + dots * (2 * programs + 1)
        return memory, l2
    tiles, splits, _ = plan(shape, candidate, processors)
    l2 += operand_traffic(shape, dtype, candidate.block_out, candidate.block_in)
    planes, written = 1, B
    if candidate.kind == "descriptors":
        planes = min(splits, 2)
        written = planes * B + pieces(shape, candidate, processors)  # begun as zeros
    l2 += 4 * K * tiles * (written + planes * B) + dots
    # Each split's sum is written and read; their sum then goes to dW, or to where it is added to dW from.
    return memory, l2 + weight * (1 + add if splits == 1 else 2 * splits + (4 if add else 1))


def operand_traffic(shape, dtype, block_out, block_in):
    """Bytes of x and dY that tiles of this size load."""
    B, T, n_in, n_out = shape
    return dtype.itemsize * B * T * (n_out * -(-n_in // block_in) + n_in * -(-n_out // block_out))


def direction_traffic(shape, dtype, K, candidate, processors):
    """
    Bytes of the directions that are loaded: all of them for every sample and once more where a split begins within a
    sample; by 'bmm' for every chunk of samples. All but the first time they come from the L2 cache.
    """
    B, _, n_in, n_out = shape
    if candidate.kind == "bmm":
        times = -(-B // chunks(shape, dtype.itemsize)[0])
    else:
        times = pieces(shape, candidate, processors)
    return 4 * K * n_out * n_in * times


def pieces(shape, candidate, processors):
    """How many samples the splits have in all, parts of samples counted as samples."""
    if candidate.kind == "plain":
        raise ValueError("'plain' has no tiles")
    B, T = shape[:2]
    if candidate.kind == "pointers":
        return B
    steps = -(-T // candidate.block_t)
    _, splits, length = plan(shape, candidate, processors)
    ends = [(i * length, min((i + 1) * length, B * steps)) for i in range(splits)]
    return sum(-(-end // steps) - start // steps for start, end in ends)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


# ---------------------------------------------------------------------------------------------------------------------
# Which one to use.

# Relative errors against float64 on equal inputs. Tensor cores round their sums worse than float32 does. 'bmm' rounds
# every number of a sample's gradient to 8 bits, by 2^-9 of it at most.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-4}
BMM_TOLERANCE = 2**-8


def tolerance(candidate, dtype):
    return BMM_TOLERANCE if candidate.kind == "bmm" and dtype == torch.bfloat16 else TOLERANCES[dtype]


def problem(shape, dtype, K, device):
    """dw, x, dy, direction for (B, T, in, out), of normal numbers; no random state but its own is touched."""
    B, T, n_in, n_out = shape
    randn = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    x, dy = randn(B, T, n_in, dtype=dtype), randn(B, T, n_out, dtype=dtype)
    return torch.full((n_out, n_in), float("nan"), device=device), x, dy, randn(K, n_out, n_in)


def exact(x, dy, direction):
    """Dots (B, K) and twice dW in float64, a sample at a time."""
    direction, dots = direction.double(), []
    dw = direction.new_zeros(direction.shape[1:])
    for sample_x, sample_dy in zip(x, dy, strict=True):
        product = sample_dy.double().T @ sample_x.double()
        dots.append((direction * product).sum((1, 2)))
        dw += product
    return torch.stack(dots), 2 * dw


def implementation(candidate, plain):
    """run(dw, x, dy, direction, add) -> dots, or None"""
    if candidate == CUBLAS:

        def run(dw, x, dy, direction, add):
            product = torch.mm(dy.flatten(0, 1).T, x.flatten(0, 1))
            if add is not None:
                dw.copy_(product + dw if add else product)

        return run
    if candidate == PLAIN:

        def run(dw, x, dy, direction, add):
            return plain(dw, x, dy, direction, (dw * direction).sum((1, 2)) if add else None)[0]

        return run
    return functools.partial(weight_gradient, candidate=candidate)


def measure(candidate, shape, dtype, K, device, plain, timer):
    """
    {'ms', 'error'}: the time where dW holds nothing yet, and the larger relative error of dots and dW against float64,
    dW computed and then added to once more.
    """
    run = implementation(candidate, plain)
    dw, x, dy, direction = problem(shape, dtype, K, device)
    run(dw, x, dy, direction, False)
    found = run(dw, x, dy, direction, True), dw
    expected = exact(x, dy, direction)
    errors = [
        (ours - oracle).norm() / oracle.norm() for ours, oracle in zip(found, expected, strict=True) if ours is not None
    ]
    del expected
    add = None if candidate == CUBLAS else False  # None: the product alone
    return dict(error=torch.stack(errors).max().item(), ms=timer(lambda: run(dw, x, dy, direction, add)))


def attempt(candidate, shape, dtype, K, device, plain, timer):
    """A row: shape, candidate, and ms, tflops and error, or None and the reason in `failure`."""
    row = dict(shape=shape, candidate=candidate, ms=None, tflops=None, error=None, failure="")
    try:
        row |= measure(candidate, shape, dtype, K, device, plain, timer)
    except Exception as error:  # compilers and drivers raise all kinds, and the plain version is there
        return row | dict(failure=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.120}")
    B, T, n_in, n_out = shape
    row["tflops"] = 2 * B * T * n_in * n_out / row["ms"] / 1e9
    if candidate != CUBLAS and not row["error"] <= tolerance(candidate, dtype):
        row["failure"] = f"relative error {row['error']:.1e}"
    return row


def cuda_ms(run, repeats=9):
    """Median milliseconds of `run()` on the current CUDA device, launched ahead, after two runs to warm up."""
    events = []
    for _ in range(2 + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[2:])


def candidates_report(device, shapes, dtype, K, plain):
    """
    Yields the rows of `attempt`, candidates by name, for every shape (B, T, in, out) and candidate of `device`, which
    on a CPU is `plain` alone, operators.add_samples; first cuBLAS's own weight gradient in `dtype`, without dots, to
    compare with.
    """
    device, listed, timer = torch.device(device), [PLAIN], wall_ms
    if device.type == "cuda":
        listed, timer = candidates(torch.cuda.get_device_capability(device), dtype), cuda_ms
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for shape in dict.fromkeys(shapes):
            for candidate in [CUBLAS, *listed]:
                yield attempt(candidate, shape, dtype, K, device, plain, timer) | dict(candidate=str(candidate))


def wall_ms(run, repeats=9):
    """As cuda_ms, on a CPU."""
    times = []
    for _ in range(2 + repeats):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def choose(device, shapes, dtype, plain, K=1, seconds=20.0):
    """
    ({(in, out): candidate}, reason): for each of `shapes`, [(B, T, in, out), ...], the fastest candidate on `device`
    that is correct, in `dtype` and with K directions; `plain` is operators.add_samples. Empty where nothing but
    `plain` can be used. The reason is lines to print, with the figures. After so many seconds no further candidate is
    tried. The choice is kept for this GPU and these versions in a file of torch's cache folder; where it is found, no
    time is taken.
    """
    device = torch.device(device)
    by_plain = "weight gradients by plain PyTorch:"
    if device.type != "cuda":
        return {}, f"{by_plain} {device.type} is no CUDA device"
    if triton is None:
        return {}, f"{by_plain} triton is not installed"
    if dtype not in POINTERS:
        return {}, f"{by_plain} there is no kernel for {dtype}"
    capability = torch.cuda.get_device_capability(device)
    listed = candidates(capability, dtype)
    versions = [torch.cuda.get_device_name(device), capability, torch.__version__, triton.__version__]
    with open(__file__, "rb") as file:
        versions.append(hashlib.sha256(file.read()).hexdigest())
    shapes = sorted(set(map(tuple, shapes)))
    key = json.dumps([*versions, str(dtype), K, shapes])

    def choose_now():
        found = compare(device, shapes, dtype, plain, K, listed, cuda_ms, seconds)
        torch.cuda.synchronize()  # an error that outlives its candidate ends the run before a choice is kept
        torch.cuda.empty_cache()
        return found

    with torch.cuda.device(device):
        return remembered(key, shapes, listed, choose_now)


def compare(device, shapes, dtype, plain, K, listed, timer, seconds):
    """`choose` among the `listed` candidates, by `timer(run) -> ms`; and whether all of them were timed."""
    started, rows, untried = time.monotonic(), [], 0
    for candidate in listed:
        for shape in shapes:  # what a candidate has compiled serves several
            if time.monotonic() - started < seconds:
                rows.append(attempt(candidate, shape, dtype, K, device, plain, timer))
            else:
                untried += 1
    table, lines = {}, []
    for shape in shapes:
        B, T, n_in, n_out = shape
        tried = sorted((row for row in rows if row["shape"] == shape and not row["failure"]), key=lambda row: row["ms"])
        best = tried[0]["candidate"] if tried else PLAIN
        table[n_in, n_out] = best
        figures = "; ".join(f"{row['candidate']} {row['ms']:.3f} ms" for row in tried)
        lines.append(f"weight gradient {n_in} -> {n_out}, {B} x {T} tokens: {best} ({figures})")
    failures = {row["candidate"]: row["failure"] for row in rows if row["failure"]}
    lines += [f"not {candidate}: {failure}" for candidate, failure in failures.items()]
    if untried:
        lines.append(f"{untried} timings of {len(listed) * len(shapes)} were left out after {seconds:.0f} s")
    return table, "\n".join(lines), not untried


def cache_file():
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return os.path.join(cache_dir(), "data_value_kernels.json")


def remembered(key, shapes, listed, choose_now):
    """
    What choose_now() -> (table, reason, whether it is complete) once gave for `key`, from the cache file; else it is
    called, and kept if it is complete: the next start finds the kernels compiled and has time for the others.
    """
    path, names, notes = cache_file(), {str(candidate): candidate for candidate in listed}, []
    try:
        with open(path, encoding="utf-8") as file:
            kept = json.load(file)
        if not isinstance(kept, dict):
            raise ValueError("not a JSON object")
        if key in kept:
            lines, table = [f"weight gradients as chosen before, from {path}"], {}
            for (_, _, n_in, n_out), name in zip(shapes, kept[key], strict=True):
                table[n_in, n_out] = names[name]
                lines.append(f"weight gradient {n_in} -> {n_out}: {name}")
            return table, "\n".join(lines)
    except FileNotFoundError:
        kept = {}
    except Exception as error:  # a damaged file has all kinds
        kept = {}
        notes.append(f"{path}: ignored, damaged ({type(error).__name__}: {error})")
    table, reason, complete = choose_now()
    if not complete:
        return table, "\n".join([reason, *notes, "the choice is not remembered: the next start tries the rest"])
    kept[key] = [str(table[n_in, n_out]) for _, _, n_in, n_out in shapes]
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(kept, indent=1).encode())
    except (Exception, SystemExit) as error:  # a UserError too
        notes.append(f"the choice is not remembered: {error}")
    return table, "\n".join([reason, *notes])


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler makes of the candidates: python -m support.kernels, without a GPU.


def compiled(candidate, capability, dtype, K=1, even=True, **constants):
    """
    {'registers', 'spill', 'shared', 'local_in_loop', 'loop'} of a candidate, compiled for a GPU of this (major, minor)
    as GPT-2's layers would have it: registers and bytes of spill stores of a thread, bytes of shared memory, the
    accesses to local memory inside the loop over T, and that loop's instructions. `constants` replace arguments.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    descriptors = candidate.kind == "descriptors"
    kernel = descriptors_kernel if descriptors else pointers_kernel
    constants |= dict(IN=768, K=K, ROOM=next_power_of_2(K), EVEN=even, UPCAST=False)
    constants |= dict(BLOCK_OUT=candidate.block_out, BLOCK_IN=candidate.block_in, BLOCK_T=candidate.block_t)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    kinds = dict(
        x_ptr=f"*{name}",
        dy_ptr=f"*{name}",
        x_desc=f"tensordesc<{name}[1,{candidate.block_t},{candidate.block_in}]>",
        dy_desc=f"tensordesc<{name}[1,{candidate.block_t},{candidate.block_out}]>",
    )
    constants |= dict(HOPPER=capability[0] == 9) if descriptors else dict(x_stride_c=1, dy_stride_c=1)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else kinds.get(name, pointer)
        if name not in constants and (pointer == "*fp32" or "stride" in name or name == "OUT"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = dict(num_warps=candidate.num_warps, num_stages=candidate.num_stages, maxnreg=candidate.maxnreg)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([os.path.join(tools, "cuobjdump"), "-res-usage", file.name]).stdout
        sass = run([os.path.join(tools, "nvdisasm"), "-c", file.name]).stdout
    loop = loop_over_T(sass)
    widths = [int(width or 32) // 8 for width in re.findall(r"\bSTL(?:\.(64|128))? ", sass)]
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spill=sum(widths),
        shared=binary.metadata.shared,
        local_in_loop=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop),
        loop=loop,
        sass=sass,
    )


PRODUCT = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|FFMA2?)\b")


def loop_over_T(sass):
    """
    The instructions of nvdisasm's text that a thread goes through again and again from product to product without
    reading a direction or writing a result (LDG, STG), which it does once a sample.
    """
    blocks, targets, block = [[]], {}, 0
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if label:
            blocks.append([])
            targets[label.group(1)] = len(blocks) - 1
        elif found:
            blocks[-1].append(found.group(1))
            if re.search(r"\b(BRA|EXIT)\b", found.group(1)):
                blocks.append([])
    follows = [set() for _ in blocks]
    for block, lines in enumerate(blocks):
        last = lines[-1] if lines else ""
        jump = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", last)
        if jump:
            follows[block].add(targets[jump.group(1)])
        if block + 1 < len(blocks) and not re.match(r"(BRA `|EXIT)", last):
            follows[block].add(block + 1)
    outside = {i for i, lines in enumerate(blocks) if any(re.search(r"\b(LDG|STG)\b", line) for line in lines)}

    def reached(start):
        found, queue = set(), [start]
        while queue:
            new = follows[queue.pop()] - outside - found
            found |= new
            queue += new
        return found

    ways = [reached(block) for block in range(len(blocks))]
    products = [i for i, lines in enumerate(blocks) if any(map(PRODUCT.search, lines)) and i in ways[i]]
    loop = {j for i in products for j in ways[i] if i in ways[j]}
    return [line for block in sorted(loop) for line in blocks[block]]


def main():
    print(f"triton {triton.__version__}; registers and bytes of a thread, bytes of shared memory of a program")
    print(f"{'':6}{'':10}{'candidate':48}{'K':>2}{'registers':>11}{'spilled':>9}{'in loop':>9}{'shared':>9}")
    for capability, tiles in TILES.items():
        for dtype, listed in tiles.items():
            for candidate in listed:
                for K in (1, 4):
                    row = compiled(candidate, capability, dtype, K)
                    figures = f"{row['registers']:11}{row['spill']:9}{row['local_in_loop']:9}{row['shared']:9}"
                    name = str(dtype).removeprefix("torch.")
                    print(f"{capability[0]}.{capability[1]:<4}{name:10}{candidate!s:48}{K:2}{figures}", flush=True)


if __name__ == "__main__":
    main()

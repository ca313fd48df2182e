"""
The weight gradient of a linear layer with its dot products as one Triton kernel, for GPUs.

A program owns a tile of dW, (out, in), and keeps its sum in registers: over T for one sample, then <sum, direction's
tile>, then the next sample. A sample's dot product is the difference of two such numbers, so that the extra work is
one multiplication in T and no sample's gradient is ever written. Where dW has too few tiles to fill the chip the
samples are split as well; each split then has its own sum. Nothing is added atomically: two runs agree bit by bit.

    use_triton, reason = choose(device, shapes, add_samples)      # at start-up; print the reason
    dots = add_samples_triton(dw, x, dy, direction)               # (B,); dw += sum_i dY_i^T X_i
"""

import functools
import statistics
from collections import Counter

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: `choose` says so
    triton = None

# Of dW (out, in), and how much of T a step takes. bfloat16: the tensor cores' usual tile; its 64 KB of shared memory
# and at most 128 registers a thread let two programs share a processor, so that one computes while the other takes its
# dot. float32 runs on the ordinary units, whose operands live in registers: smaller tiles.
TILES = {
    torch.bfloat16: dict(BLOCK_OUT=128, BLOCK_IN=128, BLOCK_T=32, num_warps=8, num_stages=4),
    torch.float32: dict(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_T=16, num_warps=4, num_stages=3),
}

if triton is not None:

    @triton.jit
    def linear_grad_kernel(
        x_ptr,  # (B, T, IN)
        dy_ptr,  # (B, T, OUT)
        direction_ptr,  # (OUT, IN)
        dw_ptr,  # (OUT, IN), or (splits, OUT, IN) to be filled
        dots_ptr,  # (tiles, B)
        B,
        T,
        IN,
        OUT,
        x_stride_b,
        x_stride_t,
        x_stride_c,
        dy_stride_b,
        dy_stride_t,
        dy_stride_c,
        samples,  # of a split
        ACCUMULATE: tl.constexpr,
        UPCAST: tl.constexpr,
        BLOCK_OUT: tl.constexpr,
        BLOCK_IN: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        tile = tl.program_id(0)
        split = tl.program_id(1).to(tl.int64)
        # Neighbours share dY's columns and X is small, so that a wave of programs reads little more than its inputs.
        tiles_in = tl.cdiv(IN, BLOCK_IN)
        rows = (tile // tiles_in).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # int64: no offset overflows
        cols = (tile % tiles_in).to(tl.int64) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        times = tl.arange(0, BLOCK_T)
        inside = (rows < OUT)[:, None] & (cols < IN)[None, :]
        offsets = rows[:, None] * IN + cols[None, :]
        dy_offsets = rows[:, None] * dy_stride_c + times[None, :] * dy_stride_t  # (BLOCK_OUT, BLOCK_T): transposed
        x_offsets = times[:, None] * x_stride_t + cols[None, :] * x_stride_c

        first = split * samples
        dy_sample = dy_ptr + first * dy_stride_b
        x_sample = x_ptr + first * x_stride_b
        dots_sample = dots_ptr + tile.to(tl.int64) * B + first
        total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        before = 0.0
        for _ in range(0, tl.minimum(samples, B - first)):
            dy_part = dy_sample
            x_part = x_sample
            for t in range(0, T, BLOCK_T):
                dy = tl.load(dy_part + dy_offsets, mask=(rows < OUT)[:, None] & (times < T - t)[None, :], other=0.0)
                x = tl.load(x_part + x_offsets, mask=(times < T - t)[:, None] & (cols < IN)[None, :], other=0.0)
                if UPCAST:
                    dy = dy.to(tl.float32)
                    x = x.to(tl.float32)
                total = tl.dot(dy, x, total, input_precision="ieee")
                dy_part += BLOCK_T * dy_stride_t
                x_part += BLOCK_T * x_stride_t
            # Read again for every sample: it comes from the cache, and registers have no room for two tiles.
            after = tl.sum(total * tl.load(direction_ptr + offsets, mask=inside, other=0.0))
            tl.store(dots_sample, after - before)
            before = after
            dy_sample += dy_stride_b
            x_sample += x_stride_b
            dots_sample += 1

        dw = dw_ptr + split * OUT * IN + offsets
        if ACCUMULATE:
            total += tl.load(dw, mask=inside, other=0.0)
        tl.store(dw, total, mask=inside)

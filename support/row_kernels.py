"""
The cross-entropy of the head's logits as one Triton kernel, for NVIDIA GPUs.

A program owns a row of logits, those of one token. A first loop over the vocabulary finds the row's maximum and the sum
of its exponentials, in float32 whatever the logits are; a second loop writes the gradient over the logits. So the
logits stay in the dtype of the product that made them and nothing of their size is made beside them.

torch.compile inside the operator could fuse the same passes. The kernel is chosen because it writes in place for
certain, its bytes are known beforehand and counted in a test, two graphs less are compiled at the start, and Triton's
interpreter tests the very same code without a GPU.

    losses = cross_entropy_rows(logits, targets, 1 / len(logits), True)     # (N,); logits now hold the gradient
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # some platforms have none: `runs_on` says so
    triton = None

# The bytes of a row that a program takes at a time, and its warps: two loads of 16 bytes a thread. With two programs on
# a processor 32 KB are on their way, more than the 18 KB that an H100's memory delivers within its latency (3 TB/s over
# 132 processors, some 0.8 us). More programs would read slower the second time: two rows of GPT-2's 50,304 bfloat16
# logits, 100 KB each, on each processor are 27 MB, and the L2 cache holds 50 MB (an A100's 22 of 40 MB). So much of the
# second pass comes from there.
BLOCK_BYTES, WARPS = 2**14, 16

if triton is not None:

    @triton.jit
    def cross_entropy_kernel(
        logits_ptr, targets_ptr, losses_ptr, stride, V, scale, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """logits (N, V) with rows `stride` apart, targets (N,) int64, losses (N,) float32; a program for each row."""
        row = tl.program_id(0).to(tl.int64)
        logits = logits_ptr + row * stride
        cols = tl.arange(0, BLOCK)
        target = tl.load(targets_ptr + row)
        # Before the gradient takes its place. A target outside the vocabulary makes the loss NaN.
        of_target = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)

        maximum = -float("inf")
        total = tl.zeros((BLOCK,), dtype=tl.float32)  # of exp(logit - maximum), for each column of the block
        for start in range(0, V, BLOCK):
            part = tl.load(logits + start + cols, mask=cols < V - start, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(maximum, tl.max(part))
            shift = tl.where(larger == -float("inf"), 0.0, larger)  # inf - inf would be NaN
            total = total * tl.exp(maximum - shift) + tl.exp(part - shift)
            maximum = larger
        sum_exp = tl.sum(total)
        # The difference first: both may be large, and it is not.
        tl.store(losses_ptr + row, tl.log(sum_exp) + (maximum - of_target))

        if BACKWARD:
            factor = scale / sum_exp
            last = (tl.cdiv(V, BLOCK) - 1) * BLOCK
            for back in range(0, V, BLOCK):  # backwards: the cache holds the row's end if it holds anything of it
                start = last - back
                inside = cols < V - start
                part = tl.load(logits + start + cols, mask=inside, other=-float("inf")).to(tl.float32)
                gradient = tl.exp(part - maximum) * factor - tl.where(cols == target - start, scale, 0.0)
                tl.store(logits + start + cols, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def runs_on(x):
    """Whether a kernel of this file takes x: on a GPU, bfloat16 or float32, and triton is installed."""
    return x.is_cuda and triton is not None and x.dtype in (torch.bfloat16, torch.float32)


def cross_entropy_rows(logits, targets, scale, backward):
    """
    logits (N, V), bfloat16 or float32, with any distance between rows, and targets (N,) int64 -> each row's
    cross-entropy in nats, (N,) float32. With `backward` the logits become (softmax - onehot) * scale, in place.

    Raises ValueError for other shapes, dtypes or strides.
    """
    N, V = logits.shape
    if logits.dtype not in (torch.bfloat16, torch.float32) or logits.stride(1) != 1:
        raise ValueError(f"logits must be bfloat16 or float32 with columns side by side, not {logits.dtype}")
    if targets.shape != (N,) or targets.dtype != torch.int64 or not targets.is_contiguous():
        raise ValueError(f"targets must be {N} int64 in a row, not {targets.dtype} {tuple(targets.shape)}")
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    block = min(BLOCK_BYTES // logits.element_size(), triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(N,)](
            logits, targets, losses, logits.stride(0), V, scale, BACKWARD=backward, BLOCK=block, num_warps=WARPS
        )
    return losses


def cross_entropy_rows_traffic(logits, targets, scale, backward):
    """
    (memory_bytes, l2_bytes) of the call with these arguments. The logits are read once, with `backward` a second time,
    and their gradient is written; each row also reads its target, its target's logit (which memory sends with the row)
    and writes its loss. The second reading counts as memory's too: half of the L2 cache would hold all rows at work,
    but nothing says that it does.
    """
    N, V = logits.shape
    passes = 3 if backward else 1
    memory = passes * N * V * logits.element_size() + N * (8 + 4)
    return memory, memory + N * logits.element_size()

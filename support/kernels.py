"""
Two Triton kernels for NVIDIA GPUs: one adds up the samples' weight gradients and dots them, one is the head's
cross-entropy.

The weight gradient of a linear with its dot products: dW = sum_i dY_i^T X_i, (out, in), and <dY_i^T X_i, D_k> for every
sample i and direction k. torch.bmm writes the samples' gradients, in the dtype of x, and one kernel reads them once,
adds them up and dots them. For bfloat16 each sample's gradient is rounded, as autocast rounds the sum's.

The obvious rival never writes a sample's gradient: a program keeps a tile of dW in registers and dots it after every
sample. It was built, for A100s and with TMA and wgmma for Hopper. On an H100 it was slower at every shape of GPT-2
(study/h100.md): its products reach 70% of cuBLAS's speed, and they wait while a sample is dotted.

The cross-entropy of the head's logits. A program owns a row of logits, those of one token. A first loop over the
vocabulary finds the row's maximum and the sum of its exponentials, in float32 whatever the logits are; a second loop
writes the gradient over the logits. So the logits stay in the dtype of the product that made them and nothing of their
size is made beside them. (torch.compile inside the operator could fuse the same passes. The kernel writes in place for
certain, its bytes are known beforehand, and Triton's interpreter tests it without a GPU.)

Nothing is added atomically: two runs agree bit by bit.

    dots = weight_gradient(dw, x, dy, direction, add)                       # (B, K), and dw (+)= sum_i dY_i^T X_i
    losses = cross_entropy_rows(logits, targets, 1 / len(logits), True)     # (N,); logits now hold the gradient
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # some platforms have none: `runs_on` says so
    triton = None

DTYPES = torch.bfloat16, torch.float32


def runs_on(x):
    """Whether the kernels take x: on a GPU, bfloat16 or float32, and triton is installed."""
    return x.is_cuda and triton is not None and x.dtype in DTYPES


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient

# Bytes of samples' gradients that exist at a time: GPT-2's layers are done at once (75 MB for 16 samples of 768 x
# 3,072), the head's 1.2 GB in five parts. Parts that stay in the L2 cache are slower, too small for the whole chip.
CHUNK = 2**28
BLOCK = 2048  # of a sample's numbers that a program takes at a time

if triton is not None:

    @triton.jit(do_not_specialize=["B", "add"])
    def add_and_dot_kernel(
        products_ptr, direction_ptr, dw_ptr, dots_ptr, B, size, direction_stride, add,
        K: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """
        products (B, size), direction K rows of `size` at a distance, dw (size,) to fill or to `add` to, dots (programs,
        B, K); ROOM is the power of two for K numbers.
        """
        program = tl.program_id(0).to(tl.int64)
        places = program * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        ks = tl.arange(0, ROOM)
        rows = direction_ptr + ks.to(tl.int64)[:, None] * direction_stride + places[None, :]
        direction = tl.load(rows, mask=(ks < K)[:, None] & inside[None, :], other=0.0)
        total = tl.load(dw_ptr + places, mask=inside & (add != 0), other=0.0)
        product = products_ptr + places
        dot = dots_ptr + program * B * K
        for _ in range(0, B):
            one = tl.load(product, mask=inside, other=0.0).to(tl.float32)
            total += one
            tl.store(dot + ks, tl.sum(one[None, :] * direction, axis=1), mask=ks < K)
            product += size
            dot += K
        tl.store(dw_ptr + places, total, mask=inside)


def rows_at_a_time(shape, itemsize):
    """Of so many rows of dW the gradients of all samples are made at a time, for (B, T, in, out): a multiple of 128."""
    B, _, n_in, n_out = shape
    parts = -(-n_out * B * n_in * itemsize // CHUNK)
    return min(n_out, -(-n_out // max(1, parts) // 128) * 128)


def parts_of(shape, K, itemsize):
    """(the rows of a part, the numbers of a program's block, the programs of each part) for (B, T, in, out)."""
    _, _, n_in, n_out = shape
    rows, block = rows_at_a_time(shape, itemsize), max(512, BLOCK // room_for(K))
    return rows, block, [-(-min(rows, n_out - row) * n_in // block) for row in range(0, n_out, rows)]


def room_for(K):
    """The power of two that has room for K."""
    return 1 << (K - 1).bit_length()


def weight_gradient(dw, x, dy, direction, add):
    """
    dw = sum_i dY_i^T X_i, (out, in) float32, or that much more where `add` is set, in place; returns every sample's
    share dotted with each direction, (B, K) float32. x (B, T, in) and dy (B, T, out) are both bfloat16 or both float32,
    with any strides; direction (K, out, in) is float32.

    Raises ValueError for shapes, dtypes or strides other than these.
    """
    B, T, n_in = x.shape
    n_out, K = dy.shape[-1], len(direction)
    if dy.shape != (B, T, n_out) or x.dtype != dy.dtype or x.dtype not in DTYPES:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and dy {tuple(dy.shape)} {dy.dtype} do not belong together")
    for name, matrix, shape in (("dw", dw, (n_out, n_in)), ("direction", direction, (K, n_out, n_in))):
        if matrix.shape != shape or matrix.dtype != torch.float32 or not matrix.is_contiguous():
            raise ValueError(f"{name} must be a contiguous float32 {shape}, not {matrix.dtype} {matrix.shape}")
    rows, block, programs = parts_of((B, T, n_in, n_out), K, x.element_size())
    products, dots, first = x.new_empty(B * rows * n_in), dw.new_empty(sum(programs), B, K), 0
    with torch.cuda.device_of(x):
        for row, n in zip(range(0, n_out, rows), programs, strict=True):
            size = min(rows, n_out - row) * n_in
            part = products[: B * size].view(B, -1, n_in)
            torch.bmm(dy[:, :, row : row + rows].mT, x, out=part)
            add_and_dot_kernel[(n,)](
                part, direction[:, row:], dw[row:], dots[first:], B, size, n_out * n_in, int(add),
                K=K, ROOM=room_for(K), BLOCK=block,
            )  # fmt: skip
            first += n
    return dots.sum(0)


def weight_gradient_traffic(shape, dtype, K, add):
    """
    Bytes of (the products, what follows them) of `weight_gradient` for (B, T, in, out). x and dY are read (x once, as
    if the parts of the rows shared it) and the samples' gradients written; these are read, the directions too and,
    where `add` is set, dW, which is written; each program's dots are written, read and added up.
    """
    B, T, n_in, n_out = shape
    _, _, programs = parts_of(shape, K, dtype.itemsize)
    gradients, dots = dtype.itemsize * B * n_out * n_in, 4 * B * K * (2 * sum(programs) + 1)
    return dtype.itemsize * B * T * (n_in + n_out) + gradients, gradients + 4 * n_out * n_in * (1 + add + K) + dots


# ---------------------------------------------------------------------------------------------------------------------
# The head's cross-entropy

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


def cross_entropy_rows(logits, targets, scale, backward):
    """
    logits (N, V), bfloat16 or float32, with any distance between rows, and targets (N,) int64 -> each row's
    cross-entropy in nats, (N,) float32. With `backward` the logits become (softmax - onehot) * scale, in place.

    Raises ValueError for other shapes, dtypes or strides.
    """
    N, V = logits.shape
    if logits.dtype not in DTYPES or logits.stride(1) != 1:
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
    Bytes of the call with these arguments. The logits are read once, with `backward` a second time, and their gradient
    is written; each row also reads its target and writes its loss.
    """
    N, V = logits.shape
    return (3 if backward else 1) * N * V * logits.element_size() + N * (8 + 4)

"""
The weight gradient of a linear layer with its dot products as one Triton kernel, for NVIDIA GPUs.

A program owns a tile of dW, (out, in), and keeps its sum in registers: over T for one sample, then <sum, direction's
tile>, then the next sample. A sample's dot product is the difference of two such numbers, so that the extra work is
one multiplication in T more for each direction and no sample's gradient is ever written. Where dW has too few tiles to
fill the chip the samples are split as well, and each split has its own sum. Nothing is added atomically: two runs agree
bit by bit.

    use_triton, reason = choose(device, shapes, dtype, add_samples)     # at start-up; print the reason
    dots = add_samples_triton(dw, x, dy, direction)                     # (B, K), and dw += sum_i dY_i^T X_i
"""

import functools
import statistics
from collections import Counter

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # some platforms have none: `choose` says so
    triton = None

# The tile of dW and the part of T that is taken at a time. bfloat16: 128 registers for each of 256 threads and 64 KB of
# shared memory (96 on an H100) leave room for two programs on a processor, so that one multiplies while the other takes
# its dot. With one direction, what spills for it is read outside the loop over T, but for five registers on an A100.
# float32 runs on the ordinary units, which keep their operands in registers too: smaller tiles.
TILES = {
    torch.bfloat16: dict(BLOCK_OUT=128, BLOCK_IN=128, BLOCK_T=64, num_warps=8, num_stages=3, maxnreg=128),
    torch.float32: dict(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_T=16, num_warps=4, num_stages=3),
}

if triton is not None:

    @triton.jit
    def linear_grad_kernel(
        x_ptr, dy_ptr, direction_ptr, dw_ptr, dots_ptr, B, T, OUT,
        x_stride_b, x_stride_t, x_stride_c, dy_stride_b, dy_stride_t, dy_stride_c, samples,
        IN: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr,
        UPCAST: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        """
        x (B, T, IN), dy (B, T, OUT), direction (K, OUT, IN), dw (OUT, IN) to ADD to or (splits, OUT, IN) to fill, dots
        (tiles, B, K); `samples` of a split; ROOM is the power of two for K numbers. EVEN: T, OUT and IN are multiples
        of the tile. As constants the masks, and the distance IN between rows, take no registers.
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
        inside = rows_in[:, None] & cols_in[None, :]
        corner = row * IN + col
        offsets = rows[:, None] * IN + cols[None, :]

        first = split * samples
        dy_sample = dy_ptr + first * dy_stride_b + row * dy_stride_c
        x_sample = x_ptr + first * x_stride_b + col * x_stride_c
        dot = dots_ptr + (tile * B + first) * K
        total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        ks = tl.arange(0, ROOM)
        before = tl.zeros((ROOM,), dtype=tl.float32)
        for _ in range(0, tl.minimum(samples, B - first)):
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
            # Read again for every sample: it comes from the cache, and registers have no room for a second tile.
            after = tl.zeros((ROOM,), dtype=tl.float32)
            part = direction_ptr + corner
            for k in range(0, K):
                product = tl.sum(total * tl.load(part + offsets, mask=inside, other=0.0))
                after = tl.where(ks == k, product, after)
                part += tl.cast(OUT, tl.int64) * IN
            tl.store(dot + ks, after - before, mask=ks < K)
            before = after
            dy_sample += dy_stride_b
            x_sample += x_stride_b
            dot += K

        dw = dw_ptr + split * OUT * IN + corner + offsets
        if ADD:
            total += tl.load(dw, mask=inside, other=0.0)
        tl.store(dw, total, mask=inside)


def add_samples_triton(dw, x, dy, direction, splits=None, tile=None):
    """
    Add dY_i^T X_i of every sample to dw, (out, in) float32, in place; returns every sample's share dotted with each
    direction, (B, K) float32. x (B, T, in) and dy (B, T, out) are both bfloat16 or both float32, with any strides;
    direction (K, out, in) is float32. `splits` and `tile` replace the rule below and the entry of TILES.

    Raises ValueError for shapes, dtypes or strides other than these.
    """
    B, T, n_in = x.shape
    n_out = dy.shape[-1]
    if dy.shape != (B, T, n_out) or x.dtype != dy.dtype or x.dtype not in TILES:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and dy {tuple(dy.shape)} {dy.dtype} do not belong together")
    for name, matrix, shape in (("dw", dw, (n_out, n_in)), ("direction", direction, (len(direction), n_out, n_in))):
        if matrix.shape != shape or matrix.dtype != torch.float32 or not matrix.is_contiguous():
            raise ValueError(f"{name} must be a contiguous float32 {shape}, not {matrix.dtype} {matrix.shape}")
    tile = tile or TILES[x.dtype]
    block_out, block_in, block_t = tile["BLOCK_OUT"], tile["BLOCK_IN"], tile["BLOCK_T"]
    tiles = triton.cdiv(n_out, block_out) * triton.cdiv(n_in, block_in)
    if splits is None:
        gpu = torch.cuda.get_device_properties(x.device) if x.is_cuda else None  # None: the interpreter
        splits = choose_splits(tiles, B, T, gpu.multi_processor_count if gpu else 1)
    samples = triton.cdiv(B, splits) or 1
    splits = triton.cdiv(B, samples) or 1
    target = dw if splits == 1 else dw.new_empty(splits, n_out, n_in)
    K = len(direction)
    dots = dw.new_empty(tiles, B, K)
    even = n_out % block_out == 0 and n_in % block_in == 0 and T % block_t == 0
    # The interpreter has no product of bfloat16 matrices; in float32 it is the same one, whose products are exact.
    upcast = triton.knobs.runtime.interpret and x.dtype == torch.bfloat16
    modes = dict(IN=n_in, K=K, ROOM=triton.next_power_of_2(K), EVEN=even, ADD=splits == 1, UPCAST=upcast)
    with torch.cuda.device_of(x):
        linear_grad_kernel[(tiles, splits)](
            x, dy, direction, target, dots, B, T, n_out, *x.stride(), *dy.stride(), samples, **modes, **tile
        )
    if splits > 1:
        dw += target.sum(0)
    return dots.sum(0)


@functools.cache
def choose_splits(tiles, B, T, processors):
    """
    Into how many parts to split B samples: the fewest that take least time, counted in tokens that one processor after
    the other goes through. To write a part's tile and read it again is worth 1,024 tokens: 128 KB at 2 TB/s by 108
    processors against 128 x 128 multiply-adds a token at 312 TFLOP/s would be 600 on an A100, and 1,200 on an H100.
    """

    def tokens(splits):
        waves = -(-tiles * splits // processors)
        return waves * (-(-B // splits) * T + (1024 if splits > 1 else 0))

    return min(range(1, B + 1), key=tokens, default=1)


# ---------------------------------------------------------------------------------------------------------------------
# Whether to use it.

# B, T, in, out: all ragged, only T, none; without and (on a GPU of a hundred processors) with splits.
CHECKS = [(3, 70, 200, 150), (16, 100, 200, 150), (4, 100, 256, 384), (2, 128, 256, 384), (16, 128, 256, 384)]
PLAIN = "weight gradients by plain PyTorch"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-4}  # on equal inputs: tensor cores round their sums worse


def choose(device, shapes, dtype, plain, K=1):
    """
    (use_triton, reason): whether `add_samples_triton` runs on `device`, agrees with `plain` - data_value.add_samples,
    computing in float64 - and is the faster one over `shapes`, [(B, T, in, out), ...], one for every call in a step,
    in `dtype` and with K directions. The reason is a line to print, with the figures. No random state but its own is
    touched.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return False, f"{PLAIN}: {device.type} is no CUDA device"
    if triton is None:
        return False, f"{PLAIN}: triton is not installed"
    if dtype not in TILES:
        return False, f"{PLAIN}: the kernel has no {dtype}"
    with torch.cuda.device(device):
        return compare(device, shapes, dtype, plain, add_samples_triton, cuda_ms, K)


def compare(device, shapes, dtype, plain, kernel, timer, K=1):
    """`choose` for any two implementations and `timer(run) -> ms`."""
    generator = torch.Generator(device).manual_seed(0)

    def problem(B, T, n_in, n_out, dtype):
        randn = functools.partial(torch.randn, generator=generator, device=device)
        dw, direction = randn(n_out, n_in), randn(K, n_out, n_in)
        return dw, randn(B, T, n_in, dtype=dtype), randn(B, T, n_out, dtype=dtype), direction

    errors = {}
    for check_dtype, tolerance in TOLERANCES.items():
        for shape in CHECKS:
            dw, x, dy, direction = problem(*shape, check_dtype)
            exact, exact_direction = dw.double(), direction.double()
            exact_dots, _ = plain(exact, x, dy, exact_direction, (exact * exact_direction).sum((1, 2)))
            try:
                dots = kernel(dw, x, dy, direction)
            except Exception as error:  # compilers and drivers raise all kinds, and the plain version is there
                message = str(error).partition("\n")[0]
                return False, f"{PLAIN}: the kernel fails, {type(error).__name__}: {message}"
            for ours, theirs in ((dots, exact_dots), (dw, exact)):
                error = ((ours - theirs).norm() / theirs.norm()).item()
                if not error <= tolerance:
                    return False, f"{PLAIN}: the kernel's relative error is {error:.1e} in {check_dtype} at {shape}"
                errors[check_dtype] = max(error, errors.get(check_dtype, 0.0))

    kernel_ms = plain_ms = 0.0
    for shape, count in Counter(shapes).items():
        dw, x, dy, direction = problem(*shape, dtype)
        kernel_ms += count * timer(functools.partial(kernel, dw, x, dy, direction))
        plain_ms += count * timer(functools.partial(plain, dw, x, dy, direction, None))
    faster, figures = kernel_ms < plain_ms, ", ".join(f"{error:.1e}" for error in errors.values())
    return faster, (
        f"{'weight gradients by the Triton kernel' if faster else PLAIN}: {kernel_ms:.2f} ms by the kernel, "
        f"{plain_ms:.2f} ms by plain PyTorch; the kernel's relative error is {figures} (float32, bfloat16)"
    )


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

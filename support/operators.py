"""
The two sums over samples that decide what scoring costs: the weight gradient with its dots, and the head with its loss.
torch.compile sees each as one node. On a CPU PyTorch computes them, on a GPU kernels.py.
"""

import torch

from support import kernels


def operator(function):
    """
    The function of tensors as torch.ops.data_value.<its name>, which torch.compile sees as one node; to be called
    without grad; `.function` is the function itself. (custom_op does the same, and checks at every call that no output
    is an input, 1% of a step at the demo's shape; a test does it once.)
    """
    name = f"data_value::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", function)
    registered = getattr(torch.ops.data_value, function.__name__)
    registered.function = function
    return registered


@operator
def linear_grad(x: torch.Tensor, dy: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    x (B, T, in), dy (B, T, out), direction (K, out, in) -> the weight gradient sum_i dY_i^T X_i, (out, in), and every
    sample's share of it dotted with each direction, (B, K), in the direction's dtype.
    """
    dw = torch.empty_like(direction[0])
    dots, _ = add_samples(dw, x, dy, direction, None)
    return dw, dots


@torch.library.register_fake("data_value::linear_grad")
def _(x, dy, direction):
    return torch.empty_like(direction[0]), direction.new_empty(len(x), len(direction))


def add_samples(dw, x, dy, direction, running):
    """
    Add dY_i^T X_i of every sample to dw, (out, in), in place. `running` is <dw, direction> for each direction, (K,), or
    None for a dw that holds nothing yet; returns every sample's share dotted with each direction, (B, K), and the next
    `running`: <dw, direction> with these samples, (K,), or where a kernel has run, which needs no such number, (0,).

    The weight gradient may as well be accumulated one sample at a time; <dw, direction> after each sample then gives
    the sample's dot as a difference: for each direction one multiplication in T more than without it. (A buffer for
    each sample's share costs two more passes over memory; blocks of rows that stay in cache cost more in small matrix
    products than they save.)
    """
    if kernels.runs_on(x) and dw.dtype == torch.float32:
        dots = kernels.weight_gradient(dw, x, dy, direction, running is not None)
        return dots, dots.new_empty(0)
    # What follows takes few calls: what Python takes between two of them, the cores of a CPU wait.
    flat_direction = direction.flatten(1)
    beta = 0 if running is None else 1
    if running is None and dw.numel() <= 2**16:
        # Sums of a small weight, up to eight, each with one sample of every part, grow side by side in the cache.
        parts = -(-len(x) // 8)
        x_parts, dy_T_parts = x.chunk(parts), dy.mT.chunk(parts)
        lanes = len(x_parts[0])
        sums = dw.new_empty(lanes, *dw.shape)
        dots = dw.new_zeros(lanes + len(x), len(direction))  # of each sum and direction, after each of its samples
        flat_sums, direction_T = sums.flatten(1), flat_direction.T
        for part_x, part_dy_T, part_dots in zip(x_parts, dy_T_parts, dots[lanes:].chunk(parts), strict=True):
            n = len(part_x)  # the last part may be smaller
            add_products(sums[:n], part_dy_T, part_x, beta)
            torch.mm(flat_sums[:n], direction_T, out=part_dots)
            beta = 1
        torch.sum(sums, 0, out=dw)
        return dots[lanes:] - dots[:-lanes], dots[-lanes:].sum(0)
    dots = list(dw.new_zeros(len(direction)) if running is None else running)
    flat_dw, directions = dw.view(-1), flat_direction.unbind()
    for sample_x, sample_dy_T in zip(x.unbind(), dy.mT.unbind(), strict=True):
        add_products(dw, sample_dy_T, sample_x, beta)
        dots += [torch.dot(flat_dw, one) for one in directions]  # as one product they are slower
        beta = 1
    dots = torch.stack(dots).view(1 + len(x), -1)
    return dots.diff(dim=0), dots[-1]


def add_products(sums, a, b, beta=1):
    """sums = beta * sums + a @ b, one product or several, accumulated in the dtype of sums, in place."""
    one = sums.dim() == 2
    if a.dtype != sums.dtype == torch.float32 and sums.is_cuda:  # only there has a product of bfloat16 a float32 result
        (torch.addmm if one else torch.baddbmm)(sums, a, b, out_dtype=sums.dtype, beta=beta, out=sums)
    else:
        (sums.addmm_ if one else sums.baddbmm_)(a.to(sums.dtype), b.to(sums.dtype), beta=beta)


# Logits that may exist at a time, or 512 tokens' where that is more: a slice reads the weight twice, and reads and
# writes all of dW. On a GPU they may be bfloat16, 2 GB, and half as many of float32: GPT-2's batch of 16 x 1,024 tokens
# has 824M logits, 1.65 GB, and is one slice. A stock model has the logits and their gradient at once, twice as much.
SLICE = {"cpu": 2**23, "cuda": 2**30}


def head_slice(B, T, V, device_type, dtype):
    """
    The samples of a slice of logits of `dtype`, and of each so many tokens at a time: all T of them unless the slice is
    of one sample.
    """
    logits = SLICE.get(device_type, 2**28)
    if device_type == "cuda":
        logits = logits * 2 // dtype.itemsize
    tokens = max(512, logits // V)
    return min(B, max(1, tokens // T)), min(T, tokens)


@operator
def head_loss(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, direction: torch.Tensor | None, backward: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    x (B, T, C), weight (V, C), targets (B, T), direction (K, V, C) or None -> the mean token loss, and its gradients
    with respect to x (B, T, C), to weight (V, C) and to alpha (B, K) where `backward` is set (K = 0 without a
    direction).
    """
    B, T, C = x.shape
    V = len(weight)
    loss, dx, dw, dots = head_results(x, weight, targets, direction, backward)
    loss.zero_(), dots.zero_()
    fused, running, beta = kernels.runs_on(x), None, 0
    samples, length = head_slice(B, T, V, x.device.type, x.dtype)
    for i in range(0, B, samples):
        for t in range(0, T, length):
            part = slice(i, i + samples), slice(t, t + length)
            dy = None  # frees the previous slice's logits: two tensors of this size are never there at once
            if fused:  # the logits stay as the product gives them; their gradient takes their place
                dy = x[part] @ weight.T
                scale, index = 1 / (B * T), targets[part].contiguous().view(-1)
                loss += kernels.cross_entropy_rows(dy.flatten(0, 1), index, scale, backward).sum()
                if not backward:
                    continue
                add_products(dx[part].view(-1, C), dy.flatten(0, 1), weight, beta=0)
            else:
                index = targets[part].unsqueeze(2)
                dy = (x[part] @ weight.T).to(loss.dtype)  # the logits; in place their exponentials, then their gradient
                target, largest = dy.gather(2, index), dy.amax(2, keepdim=True)
                total = dy.sub_(largest).exp_().sum(2, keepdim=True)
                loss += (total.log() + (largest - target)).sum()
                if not backward:
                    continue
                dy = dy.scatter_add_(2, index, -total).div_(total * (B * T)).to(x.dtype)
                dx[part] = dy @ weight
            if direction is None:
                add_products(dw, dy.flatten(0, 1).T, x[part].flatten(0, 1), beta)
                beta = 1
            else:
                part_dots, running = add_samples(dw, x[part], dy, direction, running)
                dots[part[0]] += part_dots
    return loss / (B * T), dx, dw, dots


@torch.library.register_fake("data_value::head_loss")
def head_results(x, weight, targets, direction, backward):
    """
    Room for the loss and for the gradients of x, weight and alpha, none of these without backward. Where the kernel of
    rows runs, dx is rounded to the dtype of x, as autocast rounds such products, and so is dw of a plain step in one
    slice.
    """
    B, T, _ = x.shape
    K = 0 if direction is None else len(direction)
    full = torch.promote_types(x.dtype, torch.float32)
    rounded = x.dtype if kernels.runs_on(x) else full
    one_slice = head_slice(B, T, len(weight), x.device.type, x.dtype) == (B, T)
    dtypes = full, rounded, rounded if K == 0 and one_slice else full, full
    shapes = ((), x.shape, weight.shape, (B, K)) if backward else ((), (0,), (0,), (0,))
    return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))

"""
The value of every training sample, from the backward pass that trains on it.

Give sample i its own weights theta + sum_k alpha_ik * D_k and look at alpha = 0: d l_i / d alpha_ik = <grad l_i, D_k>.
So zeros of shape (B, K) that the forward pass carries and never uses receive, as their gradient, the dot product of
every sample's gradient with each of K directions D_k. The layers below know how to compute that derivative from what
their weight gradient needs anyway. Autograd sums it over layers and over the two uses of a tied weight, because a
derivative is linear.

It is cheap. A linear's weight gradient is a sum over samples, sum_i dY_i^T X_i. On a CPU it is summed one sample at a
time, and <sum so far, D_k> is taken after each: sample i's dot product is the difference of two such numbers. For each
direction that is one multiplication in T more (support/operators.py). On a GPU the samples' gradients are written, and
the kernel that adds them up dots them (support/kernels.py).

With G = grad of the mean loss of m validation windows, eta the learning rate, c the clipping coefficient and B the
batch:

    value_i = eta * c / B * <grad l_i, D>        D = G ('sgd') or P * G ('adam'), P = AdamW's 1 / (sqrt(v_hat) + eps)

is the decrease of the validation loss, in nats, that sample i causes at this step to first order: the first-order
In-Run Data Shapley of arXiv 2406.11011 (Sec. 4.1; its sign is the opposite, since its utility is the change of the
loss). To second order G is taken at the midpoint of the step: `retreat_to_midpoint`.

    dots = dot_products(model, x, y, x_val, y_val)        # (B,): nothing else is needed for a single batch
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from support.operators import head_loss, linear_grad

# ---------------------------------------------------------------------------------------------------------------------
# The layers. Each is its torch.nn namesake until alpha, (B, K), is given; it then holds K directions beside each of its
# parameters. X is the input (B, T, in), dY the gradient of the output (B, T, out). Under autocast a linear casts its
# own operands, as autocast would, and saves the cast ones; weight gradients and dot products accumulate in float32
# (float64 for float64 weights).


class Linear(nn.Linear):
    def forward(self, x, alpha=None):
        if alpha is None:
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias, alpha, self.weight_direction, self.bias_direction)


def _autocast(*tensors):
    """The tensors as autocast would pass them to a matrix product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, alpha, weight_direction, bias_direction):
        x, weight, bias = _autocast(x, weight, bias)
        ctx.save_for_backward(x, weight, weight_direction, bias_direction)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, weight_direction, bias_direction = ctx.saved_tensors
        db, bias_dot = _bias_grad(dy, bias_direction)  # first: a small dY, just made, is still in the cache
        dx = dy @ weight
        dw, dot = linear_grad(x, dy, weight_direction)
        return dx, dw, db, dot + bias_dot, None, None


def _dot(samples, direction):
    """(B, out), (K, out) -> (B, K). A product `@` would be bfloat16 when compiled under autocast."""
    return (samples[:, None] * direction).sum(2)


def _bias_grad(dy, direction):
    """A bias's gradient, (out,), and every sample's share of it dotted with each direction; None, 0 without one."""
    if direction is None:
        return None, 0
    sample_db = dy.sum(1, dtype=direction.dtype)
    return sample_db.sum(0), _dot(sample_db, direction)


class Embedding(nn.Embedding):
    def forward(self, idx, alpha=None):
        """idx (B, T) or, for positions that all samples share, (T,) -> (B, T, C); (T,) without alpha -> (T, C)."""
        if alpha is None:
            return super().forward(idx)
        return _Embedding.apply(idx, self.weight, alpha, self.weight_direction)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, weight, alpha, direction):
        ctx.save_for_backward(idx, direction)
        return F.embedding(idx, weight).expand(len(alpha), -1, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        idx, direction = ctx.saved_tensors
        dot = torch.stack([F.embedding(idx, one).mul(dy).sum((1, 2)) for one in direction.unbind()], 1)
        if idx.dim() == 1:
            dy = dy.sum(0)
        dw = torch.ops.aten.embedding_dense_backward(dy, idx, direction.shape[1], -1, False)
        return None, dw, dot, None


class LayerNorm(nn.LayerNorm):
    def forward(self, x, alpha=None):
        if alpha is None:
            return super().forward(x)
        return _LayerNorm.apply(x, self.weight, self.bias, alpha, self.weight_direction, self.bias_direction, self.eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, alpha, weight_direction, bias_direction, eps):
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd, weight_direction, bias_direction)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd, weight_direction, bias_direction = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        if x.is_cuda:
            mask = [True, True, bias is not None]
            dx, dw, db = backward(dy, x, weight.shape, mean, rstd, weight, bias, mask)
            dots = layer_norm_dots(dy, x, mean, rstd, weight_direction, bias_direction)
            return dx, dw, db if bias is not None else None, dots, None, None, None
        dx, _, _ = backward(dy, x, weight.shape, mean, rstd, weight, None, [True, False, False])
        sample_dw = (x - mean).mul_(rstd).mul_(dy).sum(1)  # (B, C)
        db, bias_dot = _bias_grad(dy, bias_direction)
        return dx, sample_dw.sum(0), db, _dot(sample_dw, weight_direction) + bias_dot, None, None, None


def layer_norm_dots(dy, x, mean, rstd, weight_direction, bias_direction):
    """
    dy and x (B, T, C), mean and rstd (B, T, 1), the directions (K, C), that of the bias None without one -> the dots,
    (B, K). A token's part is the sum over its row of dY * (xhat * D_w + D_b), and dx needs two such sums anyway. So
    torch.compile makes one kernel of all of them, of dW, db, the residual's addition and the casts. It reads x and dY
    once: 16 bytes for a number of x by inductor's count, as in a stock model. (With a bias, torch 2.13 makes two
    kernels, 22 bytes; 2.11 does not.) Sums over T of every sample, (B, C), would be kernels of their own: 26 bytes.
    """
    xhat = (x - mean) * rstd
    shifts = [0] * len(weight_direction) if bias_direction is None else bias_direction.unbind()
    changes = zip(weight_direction.unbind(), shifts, strict=True)  # of the output, along each direction
    return torch.stack([(dy * (xhat * scale + shift)).sum(2).sum(1) for scale, shift in changes], 1)


class LossHead(Linear):
    """
    The last linear and the cross-entropy behind it. Without targets it is a Linear; with targets (B, T) it returns
    the mean token loss, and the logits of only a slice of the tokens exist at a time: a slice's part of the gradients
    is formed when its logits are there, in the forward pass, and the backward pass only scales the sums.
    """

    def forward(self, x, targets=None, alpha=None):
        if targets is None:
            return super().forward(x)
        if not torch.is_grad_enabled():
            return head_loss(*_autocast(x, self.weight), targets, None, False)[0]
        return _LossHead.apply(x, self.weight, targets, alpha, self.weight_direction if alpha is not None else None)


class _LossHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, alpha, direction):
        loss, *gradients = head_loss(*_autocast(x, weight), targets, direction, True)
        ctx.save_for_backward(*gradients)
        ctx.scored = alpha is not None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dw, dot = (gradient.mul_(dloss) for gradient in ctx.saved_tensors)
        return dx, dw, None, dot if ctx.scored else None, None


# ---------------------------------------------------------------------------------------------------------------------
# The directions.


def attach_directions(model, n_directions=1):
    """
    Give every layer of `model` a buffer beside each of its parameters to hold that parameter's slice of K =
    n_directions directions, and return {parameter: buffer (K, *parameter.shape)}. A tied parameter has one buffer,
    shared. Call it when the model is on its device; it may be called again. The buffers are not in the state dict.

    Raises ValueError naming every trainable parameter that is not held by one of this file's layers: its part of the
    dot products would be missing.
    """
    buffers = {}
    for module in model.modules():
        if isinstance(module, (Linear, Embedding, LayerNorm)):
            module.register_buffer("bias_direction", None)  # where there is no bias
            for name, p in module.named_parameters(recurse=False):
                buffers.setdefault(p, torch.zeros(n_directions, *p.shape, dtype=p.dtype, device=p.device))
                module.register_buffer(f"{name}_direction", buffers[p], persistent=False)
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p not in buffers]
    if missed:
        raise ValueError(f"no values without parameters that no layer of data_value.py holds: {', '.join(missed)}")
    return buffers


@contextmanager
def eval_mode(model):
    """The model in eval mode. Where it is in it already nothing is changed, which would take Python a millisecond."""
    training = model.training
    if training:
        model.eval()
    yield
    if training:
        model.train()


def validation_gradient(model, x_val, y_val, micro_batch_size=None):
    """
    G, {parameter: gradient} of the mean loss of the windows x_val, y_val, (m, T), with the model in eval mode and
    `.grad` untouched, and that loss, a scalar tensor in nats. At most `micro_batch_size` windows are computed at a
    time. Of no windows at all, the gradient is zero.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    gradient, total = None, params[0].new_zeros(())
    size = micro_batch_size or max(1, len(x_val))
    with eval_mode(model):
        for i in range(0, len(x_val), size):
            x, y = x_val[i : i + size], y_val[i : i + size]
            loss = model(x, y)[1] * (len(x) / len(x_val))
            part = torch.autograd.grad(loss, params)
            total += loss.detach()
            if gradient is None:
                gradient = part
            else:
                torch._foreach_add_(gradient, part)
    gradient = gradient or [torch.zeros_like(p) for p in params]  # a rank may have none of few windows
    return dict(zip(params, gradient, strict=True)), total


def mean_gradient(gradients):
    """The mean of a list of {parameter: gradient}."""
    if len(gradients) == 1:
        return gradients[0]
    return {p: torch.stack([gradient[p] for gradient in gradients]).mean(0) for p in gradients[0]}


def precondition(rows, gradients, means, moments, beta2, eps, correction, stepped):
    """
    rows = gradients / (sqrt(v') + eps) for lists of tensors, one of each parameter's shape: v' as `set_direction` has
    it is made of `means` and of `moments`, AdamW's exp_avg_sq, with `correction`, its 1 - beta2^t, a scalar tensor. In
    place and a parameter at a time, so that the smaller ones stay in the cache: up to six passes, which torch.compile
    makes one.
    """
    for row, g, mean, v in zip(rows, gradients, means, moments, strict=True):
        if stepped:
            torch.div(v, correction, out=row)
        else:
            torch.mul(v, beta2, out=row).addcmul_(mean, mean, value=1 - beta2).div_(correction)
        torch.div(g, row.sqrt_().add_(eps), out=row)


def set_direction(
    buffers, gradient, optimizer=None, row=0, stepped=False, without=None, mean=None, precondition=precondition
):
    """
    Fill one of the K rows of the buffers of `attach_directions` with D. Without an optimizer D = G. With an AdamW, D =
    P * G for the next step: v' = beta2 * v + (1 - beta2) * G^2 and its bias correction, so that a fresh state does not
    give 1 / eps; or, `stepped`, for the step just taken, whose v is known. `mean` takes the place of G in v', so that
    the directions of several groups average to that of all. The part of the parameter `without` is zero. `precondition`
    is the function above or torch.compile of it.
    """
    mean = mean or gradient
    if optimizer is None:
        for p, g in gradient.items():
            buffers[p][row].copy_(g)
    for group in optimizer.param_groups if optimizer else ():
        beta2, eps, params = group["betas"][1], group["eps"], group["params"]
        if params[0] in optimizer.state:  # all parameters take every step
            step = optimizer.state[params[0]]["step"]
            moments = [optimizer.state[p]["exp_avg_sq"] for p in params]
        else:  # the zeros that its state begins with
            step, moments = torch.zeros((), device=params[0].device), [torch.zeros_like(p) for p in params]
        correction = 1 - beta2 ** (step + (not stepped))
        rows = [buffers[p][row] for p in params]
        gradients, means = [gradient[p] for p in params], [mean[p] for p in params]
        precondition(rows, gradients, means, moments, beta2, eps, correction, stepped)
    if without is not None:
        buffers[without][row].zero_()


class Directions:
    """
    The directions of a run and what they are made of. For each of the validation `sets`, each kind of
    knobs.value_direction ('sgd', 'adam'; '-wte' behind either: without the tied embedding) and each of the val_groups
    of a set's windows there is one; `names` has them in order, '<set>:<kind>'. With val_average, a half-life in
    iterations, they are made of a running average of validation gradients. `gradients` are the latest, a {parameter:
    gradient} for each group of each set.
    """

    def __init__(self, model, sets, knobs):
        self.kinds, self.groups, self.half_life = knobs.value_direction.split(","), knobs.val_groups, knobs.val_average
        self.names = [f"{name}:{kind}" for name in sets for kind in self.kinds for _ in range(self.groups)]
        self.tied = model.lm_head.weight
        self.buffers = attach_directions(model, len(self.names))
        self.gradients = []
        self.precondition = torch.compile(precondition, fullgraph=True, dynamic=False, disable=not knobs.compile)

    def alpha(self, batch_size):
        """The zeros (batch_size, K) whose gradient will be the dot products."""
        return torch.zeros(batch_size, len(self.names), device=self.tied.device, requires_grad=True)

    def update(self, fresh, iter_num):
        """
        Store the gradients of the iterator `fresh` of (gradient, loss), or mix them into the running averages of the
        iterations before `iter_num`. Returns the mean loss, a scalar tensor.
        """
        if self.half_life and self.gradients:
            x = math.log(2) / self.half_life
            weight = math.expm1(-x) / math.expm1(-x * (iter_num + 1))  # (1 - d) / (1 - d^t), as Adam's bias correction
            losses = []
            for old, (new, loss) in zip(self.gradients, fresh, strict=True):
                torch._foreach_lerp_(list(old.values()), [new[p] for p in old], weight)
                losses.append(loss)
        else:
            self.gradients = []  # frees the old ones before as many new ones are computed
            self.gradients, losses = zip(*fresh, strict=True)
        return torch.stack(losses).mean()

    def gradient(self):
        """G of the first set: the mean of its groups' gradients."""
        return mean_gradient(self.gradients[: self.groups])

    def fill(self, optimizer, stepped=False):
        """Fill the model's buffers: for the step that `optimizer` is about to take or, `stepped`, has just taken."""
        row = 0
        for i in range(0, len(self.gradients), self.groups):
            groups = self.gradients[i : i + self.groups]
            mean = mean_gradient(groups)
            for kind in self.kinds:
                adamw = optimizer if kind.startswith("adam") else None
                without = self.tied if kind.endswith("-wte") else None
                for gradient in groups:
                    set_direction(self.buffers, gradient, adamw, row, stepped, without, mean, self.precondition)
                    row += 1

    def state(self):
        """What a checkpoint keeps: the running averages, as lists of tensors in the order of the parameters."""
        return [list(gradient.values()) for gradient in self.gradients] if self.half_life else []

    def load_state(self, state, params):
        for gradient in state:
            self.gradients.append({p: g.to(p.device) for p, g in zip(params, gradient, strict=True)})


@torch.no_grad()
def retreat_to_midpoint(optimizer):
    """
    Undo half of what the batch contributed to the step just taken. `optimizer` is SGD without momentum, or AdamW; the
    parameters' `.grad` is still the step's. With delta_N the step and delta_0 what momentum and
    decay would have made it without any sample, they then are theta + (delta_0 + delta_N) / 2: where the validation
    gradient gives the Shapley values of the quadratic utility. For SGD it is G + H delta_N / 2, Theorem 4 of
    arXiv 2406.11011, up to third order in the learning rate.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "betas" not in group:
                p.add_(p.grad, alpha=group["lr"] / 2)
                continue
            (beta1, beta2), state = group["betas"], optimizer.state[p]
            share = (1 - beta1) / (1 - beta1 ** state["step"])  # of .grad in the corrected momentum
            scale = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            p.add_(torch.div(p.grad, scale, out=scale).mul_(share * (group["lr"] / 2)))


def dot_products(model, x, y, x_val, y_val):
    """
    <grad l_i, G> for every sample i of the batch x, y, (B, T), where l_i is its mean token loss and G the gradient of
    the mean loss of the windows x_val, y_val, (m, T): a (B,) tensor. No parameter's `.grad` changes. `model` is built
    of this file's layers and `model(x, y, alpha)` returns (anything, mean loss); raises ValueError for a trainable
    parameter outside them.
    """
    buffers = attach_directions(model)
    gradient, _ = validation_gradient(model, x_val, y_val)
    set_direction(buffers, gradient)
    alpha = next(iter(buffers.values())).new_zeros(len(x), 1, requires_grad=True)
    _, loss = model(x, y, alpha)
    (dots,) = torch.autograd.grad(loss, alpha)
    return dots[:, 0] * len(x)

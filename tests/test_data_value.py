"""Dot products and gradients against the slow obvious twin: one autograd backward per sample, plain PyTorch."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data_value
from data_value import attach_directions, dot_products, set_direction, validation_gradient
from model import GPT, GPTConfig
from support import operators


def relative_error(ours, oracle):
    return ((ours.double() - oracle).norm() / oracle.norm()).item()


def tokens(vocab_size, *shape):
    return torch.randint(vocab_size, shape)


def trained_model(dtype=torch.float64, steps=5, **shape):
    """A small GPT moved off its initialisation, so that no bias is zero and no layer norm the identity."""
    model = GPT(GPTConfig(**shape)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x = tokens(shape["vocab_size"], 4, shape["block_size"])
        model(x, x.flip(1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def brute_force(model, x, y, direction):
    """<grad l_i, direction> with a batch of one at a time, in float64, without alpha."""
    model = copy.deepcopy(model).double()
    dots = []
    for i in range(len(x)):
        _, loss = model(x[i : i + 1], y[i : i + 1])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        dots.append(sum((g * d.double()).sum() for g, d in zip(gradient, direction, strict=True)))
    return torch.stack(dots)


def validation_oracle(model, x_val, y_val):
    model = copy.deepcopy(model).double().eval()
    losses = [model(x[None], y[None])[1] for x, y in zip(x_val, y_val, strict=True)]
    return torch.autograd.grad(sum(losses) / len(losses), list(model.parameters()))


shapes = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 3),
        "n_head": st.integers(1, 3),
        "head": st.integers(2, 9),
        "T": st.integers(1, 12),
        "B": st.integers(1, 6),
        "m": st.integers(1, 5),
        "vocab_size": st.integers(2, 70),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@settings(max_examples=25, deadline=None)
@given(s=shapes)
def test_dots_equal_batch_of_one_autograd(dtype, tolerance, s):
    torch.manual_seed(s["seed"])
    T, B, m, V = s["T"], s["B"], s["m"], s["vocab_size"]
    shape = dict(block_size=T + 1, vocab_size=V, n_layer=s["n_layer"], n_head=s["n_head"], bias=s["bias"])
    model = trained_model(dtype, n_embd=s["n_head"] * s["head"], **shape)
    x, y, x_val, y_val = tokens(V, B, T), tokens(V, B, T), tokens(V, m, T), tokens(V, m, T)
    direction = validation_oracle(model, x_val, y_val)
    oracle = brute_force(model, x, y, direction)
    dots = dot_products(model, x, y, x_val, y_val)
    assert dots.shape == (B,) and all(p.grad is None for p in model.parameters())
    # Cauchy-Schwarz bounds what rounding can do where a small batch's dots cancel to nearly nothing
    scale = sum((d**2).sum() for d in direction).item()
    assert (dots.double() - oracle).norm() <= tolerance * max(oracle.norm().item(), scale)


@pytest.mark.parametrize("shape", [(16, 128, 64, 4), (8, 256, 96, 2)])
def test_float32_error_at_a_real_size(shape):
    torch.manual_seed(0)
    B, T, C, n_layer = shape
    model = trained_model(torch.float32, block_size=T, vocab_size=257, n_layer=n_layer, n_head=4, n_embd=C)
    x, y, x_val, y_val = (tokens(257, n, T) for n in (B, B, 4, 4))
    oracle = brute_force(model, x, y, validation_oracle(model, x_val, y_val))
    assert relative_error(dot_products(model, x, y, x_val, y_val), oracle) < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 20),
    T=st.integers(1, 5),
    widths=st.sampled_from([(3, 2), (256, 256), (257, 256)]),  # below, at and above where samples go side by side
    K=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    begun=st.booleans(),
)
def test_weight_gradients_and_dots_of_every_sample(B, T, widths, K, dtype, begun):
    torch.manual_seed(B)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    n_out, n_in = widths
    x, dy = torch.randn(B, T, n_in + 1).to(dtype)[:, :, 1:], torch.randn(T, B, n_out).to(dtype).transpose(0, 1)
    direction, start = torch.randn(K, n_out, n_in, dtype=full), torch.randn(n_out, n_in, dtype=full)
    shares = torch.einsum("bto,bti->boi", dy.double(), x.double())
    oracle = torch.einsum("boi,koi->bk", shares, direction.double())

    dw = start.clone() if begun else torch.full_like(start, float("nan"))
    before = torch.einsum("oi,koi->k", start, direction) if begun else None
    dots, running = operators.add_samples(dw, x, dy, direction, before)
    total = shares.sum(0) + (start if begun else 0)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4  # the difference of two sums in float32
    # a dot with a standard normal direction is of its factor's size, but a single one may cancel
    assert dots.shape == (B, K) and (dots - oracle).norm() < tolerance * shares.norm()
    assert relative_error(dw, total) < tolerance
    exact = torch.einsum("oi,koi->k", total, direction.double())
    assert (running - exact).norm() < tolerance * total.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_in, n_out", [(5, 7), (300, 250)])
def test_a_linears_gradients_and_dots_are_as_good_as_its_factors(n_in, n_out, dtype, bias):
    """Under autocast the factors are rounded to bfloat16, their sums are not."""
    torch.manual_seed(0)
    B, T, K, full = 9, 40, 2, torch.promote_types(dtype, torch.float32)
    linear = data_value.Linear(n_in, n_out, bias=bias).to(full)
    buffers = attach_directions(linear, K)
    for buffer in buffers.values():
        buffer.normal_()
    x, dy = torch.randn(B, T, n_in).to(dtype), torch.randn(B, T, n_out).to(dtype)
    alpha = torch.zeros(B, K, dtype=full, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = linear(x.to(full), alpha)
    y.backward(dy)
    sample_dw = torch.einsum("bto,bti->boi", dy.double(), x.double())
    oracle = torch.einsum("boi,koi->bk", sample_dw, linear.weight_direction.double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(linear.weight.grad, sample_dw.sum(0)) < tolerance
    if bias:
        oracle += torch.einsum("bto,ko->bk", dy.double(), linear.bias_direction.double())
        assert relative_error(linear.bias.grad, dy.double().sum((0, 1))) < tolerance
    assert relative_error(alpha.grad, oracle) < tolerance


def test_float64_sums_of_float32_factors_on_a_gpu():
    """The kernel's oracle. A GPU has no such product, and says so as a CPU does to one that claims to be a GPU."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    for several in ((), (2,)):
        a, b, sums = (torch.randn(*several, *shape) for shape in ((3, 4), (4, 5), (3, 5)))
        sums = sums.double().as_subclass(OnGPU)
        expected = sums + a.double() @ b.double()
        operators.add_products(sums, a, b)
        assert relative_error(sums, expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, C", [(3, 5), (9, 5), (1, 2**14)])
def test_the_operators_are_what_their_schemas_say(B, C, dtype):
    """No output is an input or changes one, and the shapes that torch.compile is told are those that come."""
    x, dy, direction = torch.randn(B, 4, C, dtype=dtype), torch.randn(B, 4, 6, dtype=dtype), torch.randn(2, 6, C)
    torch.library.opcheck(operators.linear_grad.default, (x, dy, direction))
    weight, targets = direction[0].to(dtype, copy=True), torch.randint(6, (B, 4))
    for backward, given_direction in ((False, None), (True, None), (True, direction)):
        torch.library.opcheck(operators.head_loss.default, (x, weight, targets, given_direction, backward))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_head_is_the_cross_entropy_however_sure_it_is(scale, dtype, tolerance):
    """With a large scale probabilities are 0 or 1 in float32, and losses run to thousands of nats."""
    torch.manual_seed(0)
    x, weight, targets = (scale * torch.randn(3, 7, 5)).to(dtype), torch.randn(11, 5).to(dtype), tokens(11, 3, 7)
    targets[0, :4] = (x[0, :4] @ weight.T).argmax(1)  # some are right
    loss, dx, dw, _ = operators.head_loss(x, weight, targets, None, True)
    exact_x, exact_weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    oracle = F.cross_entropy((exact_x @ exact_weight.T).flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(oracle, (exact_x, exact_weight))
    assert relative_error(loss, oracle) < tolerance and oracle > scale
    for ours, exact in zip((dx, dw), gradients, strict=True):
        assert relative_error(ours, exact) < tolerance


def test_the_heads_loss_is_no_difference_of_large_numbers():
    """Logits that share an offset of 4,096, of which float32 holds steps of 1 / 2,048, and a loss of hundredths."""
    x = torch.cat([torch.full((1, 9, 1), 4096.0), torch.randint(2048, (1, 9, 1)) / 2048], 2)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 8.0]])
    logits = (x.double() @ weight.double().T).flatten(0, 1)
    targets = logits.argmax(1)
    loss = operators.head_loss(x, weight, targets[None], None, False)[0]
    assert relative_error(loss, F.cross_entropy(logits, targets)) < 1e-6


class _LiveStorages(TorchDispatchMode):
    """The most tensors of at least `numel` elements, each with a storage of its own, that are alive at a time."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.storages, self.most = numel, {}, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= self.numel * out.element_size():
            reference = StorageWeakRef(out.untyped_storage())
            self.storages[reference.cdata] = reference
        alive = [reference for reference in self.storages.values() if not reference.expired()]
        self.most = max(self.most, len(alive))
        return out


@pytest.mark.parametrize("K", [None, 0, 2], ids=["evaluated", "plain", "scored"])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1), (torch.bfloat16, 2)])  # 2: while one is converted
def test_only_one_tensor_of_a_slice_of_logits_exists_at_a_time(monkeypatch, K, dtype, most):
    monkeypatch.setitem(operators.SLICE, "cpu", 1)  # slices of 512 tokens
    x, weight, targets = torch.randn(2, 1024, 4, dtype=dtype), torch.randn(50, 4, dtype=dtype), tokens(50, 2, 1024)
    direction = torch.randn(K, 50, 4) if K else None
    operator = operators.head_loss.default  # of which the mode would see one node
    with _LiveStorages(512 * 50) as live:
        cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        operator.redispatch(cpu, x, weight, targets, direction, K is not None)
    assert live.most == most


def test_untied_head_and_a_weight_used_three_times():
    """The derivative is linear: nothing in the layers may assume that a weight is used once."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = data_value.Embedding(11, 8)
            self.layer = data_value.Linear(8, 8)
            self.head = data_value.Linear(8, 11)

        def forward(self, x, y, alpha=None):
            h = self.embed(x, alpha)
            for _ in range(3):
                h = torch.tanh(self.layer(h, alpha))
            logits = self.head(h, alpha)
            return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())

    torch.manual_seed(0)
    model = Net().double()
    x, y, x_val, y_val = tokens(11, 5, 7), tokens(11, 5, 7), tokens(11, 3, 7), tokens(11, 3, 7)
    oracle = brute_force(model, x, y, validation_oracle(model, x_val, y_val))
    assert relative_error(dot_products(model, x, y, x_val, y_val), oracle) < 1e-10


def scored_backward(model, batches, autocast=None):
    """What train.py does with the micro-batches of a step: the dots of all their samples, the gradient in `.grad`."""
    dots = []
    for x, y in batches:
        alpha = torch.zeros(len(x), 1, dtype=next(model.parameters()).dtype, requires_grad=True)
        with autocast or nullcontext():
            loss = model(x, y, alpha)[1] / len(batches)
        loss.backward()
        dots.append(alpha.grad[:, 0] * len(x) * len(batches))
    return torch.cat(dots)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("micro_steps", [1, 4])
def test_gradients_with_scoring_equal_those_without(bias, micro_steps):
    torch.manual_seed(1)
    shape = dict(block_size=10, vocab_size=31, n_layer=2, n_head=2, n_embd=12, bias=bias)
    model = trained_model(**shape)
    x, y, x_val, y_val = tokens(31, 8, 10), tokens(31, 8, 10), tokens(31, 3, 10), tokens(31, 3, 10)
    plain = torch.autograd.grad(model(x, y)[1], list(model.parameters()))

    model.zero_grad()
    buffers = attach_directions(model)
    gradient, _ = validation_gradient(model, x_val, y_val, micro_batch_size=2)
    set_direction(buffers, gradient)
    batches = list(zip(x.chunk(micro_steps), y.chunk(micro_steps), strict=True))
    dots = scored_backward(model, batches)
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-13)
    oracle = brute_force(model, x, y, validation_oracle(model, x_val, y_val))
    assert relative_error(dots, oracle) < 1e-10


def test_scoring_changes_neither_the_loss_nor_the_dropout_masks():
    shape = dict(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8, dropout=0.5)
    model = trained_model(**shape).train()
    x, y = tokens(20, 4, 8), tokens(20, 4, 8)
    torch.manual_seed(7)
    plain = torch.autograd.grad(model(x, y)[1], list(model.parameters()))
    buffers = attach_directions(model)
    torch.manual_seed(7)
    gradient, _ = validation_gradient(model, x, y)  # draws no random numbers
    assert model.training
    set_direction(buffers, gradient)
    model.zero_grad()
    scored_backward(model, [(x, y)])
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-13)


def test_bfloat16_autocast_accumulates_in_float32():
    torch.manual_seed(2)
    model = trained_model(torch.float32, steps=30, block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
    x, y, x_val, y_val = tokens(65, 8, 32), tokens(65, 8, 32), tokens(65, 4, 32), tokens(65, 4, 32)
    oracle = brute_force(model, x, y, validation_oracle(model, x_val, y_val))
    buffers = attach_directions(model)
    with torch.autocast("cpu", torch.bfloat16):
        gradient, _ = validation_gradient(model, x_val, y_val)
    assert all(g.dtype == torch.float32 for g in gradient.values())
    set_direction(buffers, gradient)
    whole = scored_backward(model, [(x, y)], torch.autocast("cpu", torch.bfloat16))
    assert relative_error(whole, oracle) < 0.02
    parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
    in_four = scored_backward(model, parts, torch.autocast("cpu", torch.bfloat16))
    assert relative_error(in_four, whole.double()) < 0.005  # what bfloat16 rounds differently in smaller products


def test_a_parameter_outside_the_layers_is_refused_by_name():
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    model.scale = nn.Parameter(torch.ones(4))
    model.extra = nn.Conv1d(4, 4, 3)
    x = tokens(5, 2, 4)
    with pytest.raises(ValueError, match=r"scale, extra.weight, extra.bias"):
        dot_products(model, x, x, x, x)
    model.extra.requires_grad_(False)
    model.scale.requires_grad_(False)
    assert dot_products(model, x, x, x, x).shape == (2,)


def test_directions_stay_out_of_checkpoints_and_the_tied_weight_has_one():
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    keys = set(model.state_dict())
    buffers = attach_directions(model)
    assert set(model.state_dict()) == keys
    assert model.lm_head.weight_direction is model.transformer.wte.weight_direction
    assert set(buffers) == set(model.parameters())
    assert attach_directions(model).keys() == buffers.keys()

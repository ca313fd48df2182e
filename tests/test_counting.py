"""What support/counting.py counts, beside counts by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support import kernels, operators
from support.counting import AsOnGPU, Count, compiled, count, on_meta


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def index(*shape):
    return empty(*shape, dtype=torch.int64)


a, b, row = empty(6, 10), empty(6, 10), empty(1, 10)
half, square = empty(6, 10, dtype=torch.bfloat16), empty(10, 10)
BY_HAND = {  # bytes of 60 numbers: 240
    "pointwise": (lambda: a + b, 3 * 240),
    "casts": (lambda: a.to(torch.bfloat16), 240 + 120),
    "in place": (lambda: a.exp_(), 2 * 240),
    "in place, of two": (lambda: a.sub_(b), 3 * 240),
    "broadcast": (lambda: a + row, 2 * 240 + 40),
    "expanded, read once": (lambda: a + row.expand(6, 10), 2 * 240 + 40),
    "views": (lambda: a.view(10, 6).T[:3].unsqueeze(0).detach(), 0),
    "part of a tensor": (lambda: a[:3] + b[:3], 3 * 120),
    "reduction": (lambda: a.sum(1), 240 + 24),
    "empty": (lambda: torch.empty_like(a), 0),
    "zeros": (lambda: torch.zeros_like(a), 240),
    "copy": (lambda: a.copy_(half), 120 + 240),
    "zero_": (lambda: a.zero_(), 240),
    "gather": (lambda: a.gather(1, index(6, 1)), 48 + 2 * 24),
    "embedding": (lambda: torch.nn.functional.embedding(index(4), a), 32 + 2 * 4 * 40),
    "scatter": (lambda: a.scatter_add_(1, index(6, 1), empty(6, 1)), 48 + 24 + 2 * 24),
    "product": (lambda: a @ square, 240 + 400 + 240),
    "product, out=": (lambda: torch.mm(a, square, out=b), 240 + 400 + 240),
    "added product": (lambda: torch.addmm(a, b, square), 2 * 240 + 400 + 240),
    "added product, beta=0": (lambda: torch.addmm(a, b, square, beta=0, out=a), 240 + 400 + 240),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_bytes_by_hand(name):
    run, expected = BY_HAND[name]
    with Count() as counter:
        run()
    assert sum(counts["bytes"] for counts in counter.parts.values()) == expected


def test_operations_are_those_of_products():
    x, dy = empty(4, 7, 3), empty(28, 5)
    with Count("products", "weight", "rest") as counter:
        x @ empty(3, 5)  # 2 * 28 * 3 * 5
        torch.bmm(x, empty(4, 3, 2))  # 2 * 4 * 7 * 3 * 2
        dy.T @ x.view(28, 3)  # 2 * 5 * 28 * 3
        x * 2
    operations = {part: counts["operations"] for part, counts in counter.parts.items()}
    assert operations == {"products": 2 * 28 * 15 + 2 * 4 * 42, "weight": 2 * 15 * 28, "rest": 0}


def head(B, T, C, V, direction=None):
    bfloat16 = dict(dtype=torch.bfloat16)
    return empty(B, T, C, **bfloat16), empty(V, C, **bfloat16), index(B, T), direction, True


def bytes_a_logit(arguments):
    (B, T, _), (V, _) = arguments[0].shape, arguments[1].shape
    return {part: counts["bytes"] / (B * T * V) for part, counts in count("head_loss", arguments).items()}


def test_the_head_by_pytorch_alone_moves_50_bytes_a_logit(monkeypatch):
    """
    The product's 2, to float32 6, amax 4, sub_ 8, exp_ 8, sum 4, div_ 8, to bfloat16 6, two products that read it 4.
    What goes beyond them is of the weights, in slices, and of x.
    """
    monkeypatch.setattr(kernels, "runs_on", lambda x: False)
    for C, within in ((768, 2), (8, 0.1)):
        with AsOnGPU(), Count() as counter:
            operators.head_loss.function(*head(16, 1024, C, 50304))
        bytes_moved = sum(counts["bytes"] for counts in counter.parts.values())
        assert bytes_moved / (16 * 1024 * 50304) == pytest.approx(50, abs=within)


def test_the_head_with_kernels_moves_12_bytes_a_logit():
    """6 without the products, and 1 more in all for the weights, in slices, and x."""
    parts = bytes_a_logit(head(16, 1024, 768, 50304))
    assert parts["head softmax"] == pytest.approx(6, abs=0.01)
    assert sum(parts.values()) < 13.1
    assert sum(bytes_a_logit(head(16, 1024, 8, 50304)).values()) == pytest.approx(12, abs=0.05)


def test_a_weight_gradient_writes_that_of_every_sample_and_reads_it_once():
    B, T, n_in, n_out, K = 16, 1024, 768, 3072, 2
    x, dy = empty(B, T, n_in, dtype=torch.bfloat16), empty(B, T, n_out, dtype=torch.bfloat16)
    parts = count("linear_grad", (x, dy, empty(K, n_out, n_in)))
    assert parts["dW"]["operations"] == 2 * B * T * n_in * n_out
    gradients = 2 * B * n_in * n_out
    assert parts["dW"]["bytes"] == 2 * B * T * (n_in + n_out) + gradients
    assert parts["dots"]["bytes"] == pytest.approx(gradients + 4 * n_in * n_out * (1 + K), rel=0.05)


def test_what_the_compiler_would_launch():
    """Chains of pointwise operators are one kernel; of a gather and a scatter, the touched elements count."""
    eager = torch.autocast("cpu", enabled=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, w = torch.empty(64, 8, requires_grad=True), torch.empty(8, 8)
        places, rows = torch.zeros(64, dtype=torch.int64), torch.empty(1000, 8, requires_grad=True)
        chain, _ = compiled(lambda: ((x.sin() * 2) @ w).sum(), eager, 0)
        lookup, _ = compiled(lambda: torch.nn.functional.embedding(places, rows).sin().sum(), eager, 0)
    X, W, loss, of_places = 4 * 64 * 8, 4 * 8 * 8, 4, 8 * 64
    assert chain["forward"] == chain["dX"] == dict(bytes=2 * X + W, operations=2 * 64 * 8 * 8)
    # sin * 2; the sum; its gradient; that times 2 cos
    assert chain["pointwise"]["bytes"] == 2 * X + (X + loss) + (loss + X) + 3 * X
    # the rows of X, kept, and their sum; then they are added to zeros
    assert lookup["embeddings"]["bytes"] == (of_places + 2 * X + loss) + (of_places + loss + X + 2 * X)
    assert lookup["pointwise"]["bytes"] == 4 * 1000 * 8


def test_on_meta_keeps_shape_strides_and_dtype():
    tensor = on_meta(torch.empty(3, 4, dtype=torch.bfloat16).T)
    assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type) == ((4, 3), (1, 4), torch.bfloat16, "meta")

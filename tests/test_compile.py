"""torch.compile with scoring: one graph each for validation, training and evaluation, and the numbers of eager."""

import shutil
from contextlib import nullcontext

import pytest
import torch

from data_value import attach_directions, set_direction, validation_gradient
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")


def steps(model, net, buffers, n, autocast, B=4, m=2, T=16):
    """Losses, dots and graphs compiled so far, for n scored steps with an evaluation after each."""
    optimizer = model.configure_optimizers("adamw", 0.1, 1e-3, (0.9, 0.95))
    results, graphs = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        x, y, x_val, y_val = (torch.randint(50, (k, T), generator=generator) for k in (B, B, m, m))
        with autocast:
            gradient, _ = validation_gradient(net, x_val, y_val)
        set_direction(buffers, gradient, optimizer)
        alpha = torch.zeros(B, 1, requires_grad=True)
        with autocast:
            loss = net(x, y, alpha)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        with torch.no_grad(), autocast:
            test_loss = net(x, y)[1]
        model.train()
        results.append(torch.cat([alpha.grad[:, 0] * B, loss.detach()[None], test_loss[None]]))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return torch.stack(results), graphs


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-3), (torch.bfloat16, 2e-2)])
def test_compiled_scoring_equals_eager_and_does_not_recompile(dtype, tolerance):
    autocast = torch.autocast("cpu", dtype) if dtype else nullcontext()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16))
        buffers = attach_directions(model)
        net = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        results, graphs = steps(model, net, buffers, 4, autocast)
        runs.append(results)
    torch.testing.assert_close(runs[1], runs[0], rtol=tolerance, atol=tolerance / 100)
    assert graphs == [3, 3, 3, 3]

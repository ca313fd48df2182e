"""
torch.compile with scoring: one graph each for validation, training and evaluation and for AdamW's direction of each of
its two groups (matrices decay, the rest does not); and the numbers of eager.
"""

import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_train import TINY, call, corpus, home  # noqa: F401 (fixtures)

import train
import trial
from data_value import attach_directions, precondition, set_direction, validation_gradient
from model import GPT, GPTConfig
from support.configurator import configure
from support.processes import Ranks
from support.values import read_log

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")


def steps(model, net, scale, buffers, n, autocast, B=4, m=2, T=16):
    """Losses, dots and graphs compiled so far, for n scored steps with an evaluation after each."""
    optimizer = model.configure_optimizers("adamw", 0.1, 1e-3, (0.9, 0.95))
    results, graphs = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        x, y, x_val, y_val = (torch.randint(50, (k, T), generator=generator) for k in (B, B, m, m))
        with autocast:
            gradient, _ = validation_gradient(net, x_val, y_val)
        for k in range(2):
            set_direction(buffers, gradient, optimizer, k, precondition=scale)
        alpha = torch.zeros(B, 2, requires_grad=True)
        with autocast:
            loss = net(x, y, alpha)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        with torch.no_grad(), autocast:
            test_loss = net(x, y)[1]
        model.train()
        results.append(torch.cat([alpha.grad.flatten() * B, loss.detach()[None], test_loss[None]]))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return torch.stack(results), graphs


@pytest.mark.slow  # the runs below have the same graphs and are held to tighter bounds
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-3), (torch.bfloat16, 2e-2)])
def test_compiled_scoring_equals_eager_and_does_not_recompile(dtype, tolerance):
    autocast = torch.autocast("cpu", dtype) if dtype else nullcontext()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16))
        buffers = attach_directions(model, 2)
        options = dict(fullgraph=True, dynamic=False, disable=not compiled)
        net, scale = torch.compile(model, **options), torch.compile(precondition, **options)
        results, graphs = steps(model, net, scale, buffers, 4, autocast)
        runs.append(results)
    torch.testing.assert_close(runs[1], runs[0], rtol=tolerance, atol=tolerance / 100)
    assert graphs == [5, 5, 5, 5]


@pytest.mark.xdist_group("torch.compile")
# order 2 has the graphs of order 1 and one more
@pytest.mark.parametrize(
    "order, dtype",
    [(2, "float32"), *(pytest.param(1, dtype, marks=pytest.mark.slow) for dtype in ("float32", "bfloat16"))],
)
def test_a_run_compiles_the_model_and_adamws_direction(home, order, dtype):  # noqa: F811
    """Without biases: those of the keys have no gradient but rounding, which AdamW's scaling makes something of."""
    flags = f"{TINY} --score=True --bias=False --value_direction=sgd,adam --val_batch_size=4 --val_groups=2"
    flags += f" --value_order={order} --dtype={dtype} --max_iters=4 --eval_interval=2"
    call(train.main, f"{flags} --out_dir=out/eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call(train.main, f"{flags} --compile=True --out_dir=out/compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6 + (order == 2)  # and without alpha
    call(train.main, f"{flags} --compile=True --seed=5 --out_dir=out/again")  # another run in this process: no more
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6 + (order == 2)
    knobs = f"{TINY} --bias=False --dtype={dtype} --compile=True --out_dir=out/arm".split()
    trial.run_arm(configure(train.Knobs, knobs), Ranks())  # as under torchrun: an arm finds what others have compiled
    # an arm does not score: order 1 has no graph for that yet, order 2 has
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 7
    eager, compiled = (read_log(f"out/{name}")["dot_product"] for name in ("eager", "compiled"))
    assert np.linalg.norm(compiled - eager) < 1e-3 * np.linalg.norm(eager)

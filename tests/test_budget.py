"""bench.py --budget: the counts of a small step, the ratios' arithmetic, and what it prints."""

import json
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
from support import budget
from support.configurator import UserError, configure
from support.counting import compiled

SHAPE = dict(n_layer=1, n_head=2, n_embd=32, block_size=64, batch_size=4, val_batch_size=2, vocab_size=300)
FLAGS = [f"--{key}={value}" for key, value in SHAPE.items()]


@pytest.fixture(scope="module")
def result():
    """One layer, compiled once for all tests."""
    return json.loads(json.dumps(bench.budget_of(configure(budget.Knobs, FLAGS))))


def test_operations_by_hand(result):
    """6 a weight and token in the products (PaLM, App. B), and causal attention: 2 products forward, 5 backward."""
    tokens, C, V = 4 * 64, 32, 300
    layer = 12 * C**2
    attention = 7 * 4 * 64**2 * C
    for arm in ("stock", "plain", "scored"):
        parts = result["arms"][arm]
        for part, weights in dict(forward=layer, dX=layer, dW=layer).items():
            assert parts[part]["operations"] == 2 * weights * tokens
        assert parts["head products"]["operations"] == 4 * V * C * tokens
        assert parts["head dW"]["operations"] == 2 * V * C * tokens
        assert result["sums"][arm]["operations"] == 6 * (layer + V * C) * tokens + attention
    assert result["sums"]["order2"]["operations"] == 2 * result["sums"]["plain"]["operations"]


def test_parts(result):
    stock, plain, scored, order2 = (result["arms"][arm] for arm in budget.ARMS)
    for part in ("attention", "forward", "dX", "dW", "casts", "embeddings", "AdamW"):  # all but the head's neighbours
        assert plain[part]["bytes"] == stock[part]["bytes"]
    parameters = result["parameters"]
    assert scored["direction"]["bytes"] == pytest.approx(12 * parameters, abs=100)
    assert scored["AdamW"]["bytes"] == 28 * parameters
    assert order2["midpoint"]["bytes"] == pytest.approx(88 * parameters, rel=0.01)
    weights = 12 * 32**2 + 300 * 32
    assert scored["dots"]["bytes"] == pytest.approx((2 * 4 + 8) * weights, rel=0.1) and "dots" not in plain
    logits = 2 * 4 * 64 * 300
    assert stock["head softmax"]["bytes"] == pytest.approx(3 * logits, rel=0.6)  # and the tied weight's gradients
    assert set().union(stock, plain, scored, order2) == set(budget.PARTS)
    assert result["sums"]["val"] == result["val"] and result["arms"]["val"]["forward"]["ms"] > 0


def test_ratios(result):
    sums = result["sums"]
    for arm, parts in result["arms"].items():  # and of the validation pass
        for key in ("bytes", "operations", "ms"):
            assert sums[arm][key] == pytest.approx(sum(counts.get(key, 0) for counts in parts.values()))
    assert result["plain_over_stock_bytes"] == sums["plain"]["bytes"] / sums["stock"]["bytes"]
    assert result["scored_over_plain_time"] == sums["scored"]["ms"] / sums["plain"]["ms"]
    once, many = result["scoring_costs"]["1"], result["scoring_costs"]["120"]
    assert once == pytest.approx(result["scored_over_plain_time"] - 1)
    direction = result["arms"]["scored"]["direction"]["ms"]
    extra = sums["scored"]["ms"] - sums["plain"]["ms"] - direction
    micro = sums["plain"]["ms"] - result["arms"]["plain"]["AdamW"]["ms"]
    assert many == pytest.approx((120 * extra + direction) / (sums["plain"]["ms"] + 119 * micro))


def test_a_part_takes_the_longer_of_its_two_times():
    knobs = budget.Knobs(tflops=100.0, tb_s=2.0)
    timed = budget.with_times({"dX": dict(operations=1e12, bytes=1e9), "pointwise": dict(bytes=4e9)}, knobs)
    assert timed["dX"]["ms"] == pytest.approx(10 / budget.PRODUCTS) and timed["pointwise"]["ms"] == pytest.approx(2)


def test_table(result):
    text = "\n".join(budget.table(result))
    for word in (*budget.PARTS, *budget.ARMS, "On paper", "dotting"):
        assert word in text
    assert max(map(len, text.splitlines()[:25])) <= 120


@pytest.mark.parametrize("flag", ["--gpu=V100", "--dtype=float16", "--n_head=5", "--tb_s=-1", "--batch_size=0"])
def test_bad_knobs(flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        configure(budget.Knobs, [*FLAGS, flag])


def test_command(result, capsys, monkeypatch):
    monkeypatch.setattr(bench, "budget_of", lambda knobs: result | {"knobs": vars(knobs)})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--budget", "--json", "--gpu=H200"])
    bench.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["knobs"]["gpu"] == "H200" and printed["knobs"]["n_layer"] == 12
    assert {"plain_over_stock_bytes", "scored_over_plain_time", "arms", "guesses"} < set(printed)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--budget", "--gpu=V100"])
    with pytest.raises(UserError, match="A100 or H100 or H200"):
        bench.main()


def test_layers_by_hand():
    """A step of 5 bytes a layer and 7 more, with 2 operations a layer in another part."""
    for n_layer in (1, 2, 3, 4, 7, 12):
        depths = budget.depths(n_layer)
        assert len(depths) == len(set(depths)) and max(depths) <= max(n_layer + 1, 5)
        graphs = [({"dX": dict(bytes=5 * n + 7), "dW": dict(operations=2 * n)}, []) for n in depths]
        found = budget.layered(graphs, budget.Knobs(n_layer=n_layer))
        assert found == {"dX": dict(bytes=5 * n_layer + 7), "dW": dict(operations=2 * n_layer)}


@pytest.mark.slow
@pytest.mark.parametrize("n_layer", [6, 7])
def test_layers_follow_from_few(n_layer):
    knobs = budget.Knobs(**SHAPE | dict(n_layer=n_layer))
    with FakeTensorMode(allow_non_fake_inputs=True):
        autocast = torch.autocast("cpu", torch.bfloat16)
        graphs = [compiled(stock_loss(n), autocast, 4 * 64 * 300) for n in (*budget.depths(n_layer), n_layer)]
    expected, _ = graphs.pop()
    assert budget.layered(graphs, knobs) == expected


def stock_loss(n_layer):
    shape = {key: SHAPE[key] for key in ("n_head", "n_embd", "block_size", "vocab_size")}
    model = bench.StockGPT(bench.GPTConfig(n_layer=n_layer, **shape))
    x = torch.zeros(4, 64, dtype=torch.int64)
    return lambda: model(x, x)[1]

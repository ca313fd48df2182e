"""The study of selection at every step: its dots, its rules and its loop against slow or known twins; its tables."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_study import AtOnce, in_this_process, small  # noqa: F401

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, f"{ROOT}/study")

import foretell  # noqa: E402
import selection  # noqa: E402

import study  # noqa: E402
from data_value import Directions, validation_gradient  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from support.files import load_torch  # noqa: E402
from support.windows import WindowOrder  # noqa: E402


def test_the_dots_of_the_candidates_are_those_of_one_gradient_after_the_other():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16, bias=False))
    optimizer = model.configure_optimizers("adamw", 0.1, 1e-2, (0.9, 0.95))
    x, y, x_val, y_val = (torch.randint(20, (n, 8)) for n in (6, 6, 4, 4))
    for _ in range(3):
        selection.step(model, optimizer, x, y, 1.0)
    knobs = SimpleNamespace(value_direction="adam", val_groups=1, val_average=0, compile=False)
    directions = Directions(model, ["all"], knobs)
    directions.update([validation_gradient(model, x_val, y_val)], 0)
    directions.fill(optimizer)
    dots, loss = selection.dots_of(model, directions, x, y)

    params, oracle, losses = list(model.parameters()), [], []
    for one_x, one_y in zip(x.split(1), y.split(1), strict=True):
        losses.append(model(one_x, one_y)[1])
        gradient = torch.autograd.grad(losses[-1], params)
        oracle.append(sum((g * directions.buffers[p][0]).sum() for g, p in zip(gradient, params, strict=True)).item())
    assert min(map(abs, oracle)) > 1e-3
    np.testing.assert_allclose(dots, oracle, rtol=1e-3, atol=1e-4 * max(map(abs, oracle)))
    assert loss == pytest.approx(torch.stack(losses).mean().item()) and all(p.grad is None for p in params)


def test_the_rules():
    dots, rng = np.array([0.5, -1.0, 3.0, 0.0, 2.0, -0.1]), np.random.default_rng(0)
    assert selection.choose(dots, "top", 3, rng).tolist() == [0, 2, 4]
    assert selection.choose(dots, "negatives", 6, rng).tolist() == [0, 2, 3, 4]
    assert selection.choose(dots, "negatives", 2, rng).tolist() == [0, 2]
    assert selection.choose(dots - 9, "negatives", 6, rng).tolist() == [2]
    # the probability to be chosen for two places: as the first, or as the second after another
    p = np.exp((dots - dots.mean()) / dots.std())
    p /= p.sum()
    two = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)]
    chosen = [selection.choose(dots, "sampling", 2, rng) for _ in range(20_000)]
    assert {len(set(places)) for places in map(tuple, chosen)} == {2}
    np.testing.assert_allclose(np.bincount(np.concatenate(chosen)) / 20_000, two, atol=0.015)


def test_the_candidates_hold_the_controls_batch_and_no_window_comes_twice():
    run = selection.Run("", "", "top", 1.25, "fresh", 10, 1, 1)
    order = WindowOrder(1000, 3, 0)
    batches = [selection.candidates(order, i, run, 8) for i in range(10)]
    narrow = [selection.candidates(order, i, run._replace(rule="control", ratio=1.0), 8) for i in range(10)]
    assert all(np.array_equal(wide[:8], own) for wide, own in zip(batches, narrow, strict=True))
    assert np.array_equal(np.concatenate(narrow), order.take(0, 80)[0])
    assert len(np.unique(np.concatenate(batches))) == 100


@pytest.fixture
def tiny(small, monkeypatch):  # noqa: F811
    """A corpus, and a scored run of 20 iterations on it."""
    centre = study.CENTRE | dict(max_iters=20, learning_rate=1e-2)
    monkeypatch.setattr(foretell, "CENTRE", centre)
    monkeypatch.setattr(selection, "CENTRE", centre)
    monkeypatch.setattr(foretell, "ITERATIONS", 20)
    monkeypatch.setattr(foretell, "CHECKPOINTS", (20,))
    monkeypatch.setattr(selection, "TRIAL", foretell.TRIAL | dict(warmup_iters=1))
    monkeypatch.setattr(foretell, "ProcessPoolExecutor", AtOnce)
    texts = foretell.Knobs("tiny.jsonl", domain_field="domain", tokenizer="bytes")
    foretell.prepare(foretell.documents_of(texts), "tiny", lambda domain: True)


@pytest.mark.parametrize("start", ["", "20"])
def test_with_as_many_candidates_as_it_takes_a_run_is_train_pys(tiny, start):
    run = selection.Run("tiny", start, "control", 1.0, "fresh", 8, 1, 1)
    knobs = dict(dataset="tiny", seed=1001, max_iters=8)
    if start:
        with pytest.raises(study.UserError, match="20.pt: missing; python study/foretell.py makes it"):
            selection.train_selecting(run)
        foretell.run_scored(("tiny", "average32", 1))
        knobs |= selection.TRIAL | dict(init_from="out/foretell/tiny_s1/average32/20.pt")
    losses = foretell.run_here("out/plain", **knobs)
    plain = load_torch("out/plain/ckpt.pt", ["model"], "")["model"]
    for rule, direction in (("control", "fresh"), ("top", "fresh"), ("top", "averaged")):
        model, found = selection.train_selecting(run._replace(rule=rule, direction=direction))
        assert all(torch.equal(weight, plain[name]) for name, weight in model.state_dict().items())
        assert found["iter"][-1] == 8 and found["test_loss"][-1] == losses["test_loss"][-1]
    chosen, _ = selection.train_selecting(run._replace(rule="top", ratio=2.0))
    assert not torch.equal(chosen.lm_head.weight, plain["lm_head.weight"])


def test_the_study_goes_on_and_its_tables_have_its_numbers(tiny, monkeypatch, capsys):
    arms = [("control", 1.0, "fresh"), ("top", 2.0, "fresh"), ("negatives", 1.0, "averaged")]
    monkeypatch.setattr(selection, "CORPORA", ("tiny",))
    monkeypatch.setattr(selection, "WHOLE", 8)
    monkeypatch.setattr(selection, "REFERENCE", 4)
    monkeypatch.setattr(selection, "MEASURED", [selection.Run("tiny", "", "top", 2.0, "fresh", 8, 1, 1)])
    plan = [("", 8, (1,), True, arms), ("", 32, (1,), False, arms[:1])]

    def lines_after(rounds):
        monkeypatch.setattr(selection, "ROUNDS", plan)
        monkeypatch.setattr(
            sys, "argv", ["selection.py", "--seeds", "1", "2", f"--rounds={rounds}", "--results=lines.jsonl"]
        )
        selection.main()
        with open("lines.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    first = lines_after(1)
    lines = lines_after(2)
    assert lines[:7] == first and len(lines) == 8
    by_run = {selection.Run(*line["run"]): line for line in lines if "real" not in line}
    for run, line in by_run.items():
        assert line["iter"] == list(range(run.iterations // 8, run.iterations + 1, run.iterations // 8))
        assert run.rule != "top" or (line["batch"] == 8 and line["dot"][1] > line["dot"][0])
        assert run.rule == "control" or sum(chosen for _, chosen in line["domains"].values()) == pytest.approx(1)
    monkeypatch.setattr(sys, "argv", ["selection.py", "--tables", "--results=lines.jsonl"])
    selection.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith("| tiny | top, fresh | 2 | 2 |")]
    tops = [line for run, line in by_run.items() if run.rule == "top"]
    gains = [line["test_loss"][-1] - by_run[control_of(line)]["test_loss"][-1] for line in tops]
    assert f"{np.mean(gains):+.4f}".replace("-", "−") in rows[0]
    correlation = next(f"{line['real'][0]:.2f}" for line in lines if "real" in line)
    assert any(line.startswith(f"| tiny | top, fresh | 2 | {correlation} |") for line in printed)


def test_measuring_the_dots_changes_nothing(tiny, monkeypatch):
    run = selection.Run("tiny", "", "top", 2.0, "fresh", 8, 1, 1)
    plain, _ = selection.train_selecting(run)
    monkeypatch.setattr(selection, "REFERENCE", 4)
    model, found = selection.train_selecting(run, measured=True)
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in model.state_dict().items())
    correlation, everyone, chosen, best = found["real"]
    assert -1 <= correlation <= 1 and best >= chosen and best > everyone

    dots, real = np.array([3.0, 1.0, 2.0, 0.0]), np.array([1.0, 2.0, 3.0, -2.0])
    oracle = [np.corrcoef(dots, real)[0, 1], 1.0, 2.0, 2.5]
    assert selection.measure(dots, real, np.array([0, 2])) == pytest.approx(oracle)


def control_of(line):
    return selection.Run(*line["run"])._replace(rule="control", ratio=1.0, direction="fresh")


def test_what_an_arm_gains_for_its_time():
    control = selection.Run("wild", "640", "control", 1.0, "fresh", 64, 1, 1)
    top = control._replace(rule="top", ratio=2.0)
    lines = {control: dict(iter=[64], test_loss=[2.0], step_ms=10.0)}
    lines |= {top: dict(iter=[64], test_loss=[1.99], step_ms=20.0)}
    pairs = selection.pairs_of(lines, "640", 64, ("wild",), top[2:5])
    assert pairs == [(top, lines[top], lines[control])]
    assert selection.compared(lines, pairs)["paid"] == []  # no control has trained for as long
    lines |= {control._replace(iterations=256): dict(iter=[256], test_loss=[1.8])}
    found = selection.compared(lines, pairs)
    assert found["effect"] == [pytest.approx(-0.01)] and found["cost"] == [2.0]
    assert found["paid"] == [pytest.approx(1.99 - 1.9)] and found["longer"] == []  # 128 is half way by the logarithm

    lines[control] = dict(iter=[0, 32, 64], test_loss=[3.0, 2.5, 2.0], step_ms=10.0)
    lines[top] = dict(iter=[0, 32, 64], test_loss=[3.0, 2.0, 1.9], step_ms=30.0)
    found = selection.compared(lines, selection.pairs_of(lines, "640", 64, ("wild",), top[2:5]))
    assert found["saved"] == [0.5] and found["longer"] == [1.5]

"""The study of sizes at a tiny size: what a larger model changes, what is run, and what the tables say."""

import json
import os
import sys

import numpy as np
import pytest
from test_foretell import Here, corpora, tiny  # noqa: F401
from test_study import in_this_process, small  # noqa: F401

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, f"{ROOT}/study")

import foretell  # noqa: E402
import scale  # noqa: E402

SHAPES = {name: dict(n_layer=i, n_head=2, n_embd=16 * i) for i, name in enumerate(("0.25M", "1M", "4M"), 1)}


@pytest.fixture
def worker(tiny, monkeypatch):  # noqa: F811
    """This process as the study's worker, with runs of 20 iterations, one condition and three tiny models."""
    chosen = {"15% damaged": scale.CHOSEN["15% damaged"]._replace(start="20")}
    for name, value in dict(ITERATIONS=20, CENTRE=foretell.CENTRE, SHAPES=SHAPES, CHOSEN=chosen).items():
        monkeypatch.setattr(scale, name, value)
    monkeypatch.setattr(scale, "make_corpora", corpora)
    monkeypatch.setattr(foretell, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(scale.filters, "begin_worker", lambda: None)  # it is for a whole process


def run_study(monkeypatch, *flags):
    texts = ["--minipile=tiny.jsonl", "--wildpile=none", "--conditions", "15% damaged"]
    monkeypatch.setattr(sys, "argv", ["scale.py", *texts, "--seeds=1", "--results=lines.jsonl", *flags])
    scale.main()
    with open("lines.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_every_size_has_runs_of_its_own_model_and_the_study_goes_on_with_more_orders(worker, monkeypatch, capsys):
    before = dict(foretell.CENTRE), dict(foretell.TRIAL), foretell.scored_folder
    first = run_study(monkeypatch, "--orders=1")
    lines = run_study(monkeypatch, "--orders=2")
    assert lines[: len(first)] == first and (foretell.CENTRE, foretell.TRIAL, foretell.scored_folder) == before
    # of two sizes a scored run, and four arms of each order
    assert [len(line["run"]) for line in first] == ([4] + [10] * 4) * 2 and len(lines) == 10 + 8
    for size, shape in list(SHAPES.items())[1:]:
        with open(f"out/scale/{size}/{foretell.DAMAGED}_s1/average32/config.json", encoding="utf-8") as file:
            knobs = json.load(file)["knobs"]
        assert {key: knobs[key] for key in shape} == shape
        rate = before[0]["learning_rate"] * (16 / shape["n_embd"]) ** 0.5
        assert (knobs["learning_rate"], knobs["min_lr"]) == pytest.approx((rate, rate / 10))
    ends = [line["test_loss"][-1] for line in lines if "control" in line["run"]]
    assert len(set(ends)) == 4 and np.isfinite(ends).all()

    monkeypatch.setattr(
        sys, "argv", ["scale.py", "--tables", "--results=lines.jsonl", "--known=lines.jsonl", "--out=."]
    )
    capsys.readouterr()
    scale.main()
    said = capsys.readouterr().out
    assert "| 15% damaged | 1M | 1 | 2 |" in said and "| 15% damaged, oracle | 4M | 1 | 2 |" in said
    assert os.path.isfile("scale.png")


def test_an_arm_of_a_trial_has_half_the_peak_of_its_size(worker, monkeypatch):
    seen = []
    monkeypatch.setattr(foretell, "run_arm", lambda run: seen.append((run, dict(foretell.TRIAL))))
    _, trials = scale.plan(scale.CHOSEN.values(), "4M", 1, 1)
    scale.run_arm(trials[0])
    (run, trial), rate = *seen, foretell.CENTRE["learning_rate"]
    assert isinstance(run, foretell.Run) and run == tuple(trials[0])[:-1]
    assert trial["learning_rate"] == pytest.approx(rate / 2 / 3**0.5)


def lines_with(effect_of, size):
    """The lines of three scored runs and two orders, in which control and random end at 2.0 and 2.2."""
    lines = {}
    for seed in (1, 2, 3):
        scored, trials = scale.plan(scale.CHOSEN.values(), size, seed, 2)
        lines |= {tuple(run): dict(columns={c.column: dict(auc=AUC) for c in scale.CHOSEN.values()}) for run in scored}
        for run in trials:
            end = dict(control=2.0, random=2.2).get(run.arm) or 2.1 + effect_of(run)
            lines[tuple(run)] = dict(test_loss=[9.0, end], test_loss_prose=[9.0, end], dropped=0.25)
    return lines


AUC = dict(shuffled=0.8, foreign=0.7, duplicated=None)


def test_the_tables_of_effects_that_are_known(capsys, tmp_path):
    def effect_of(run):
        grown = dict(zip(scale.SHAPES, (0, 1, 2, 3), strict=True))[run.size]
        return -0.01 - 0.005 * grown + (0.001 if run.order == 1 else -0.001)

    own = lines_with(effect_of, "1M") | lines_with(effect_of, "4M")
    known = {run[:-1]: line for run, line in lines_with(effect_of, scale.SMALLEST).items()}
    scale.show(own, known, 2, str(tmp_path / "x.png"))
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("| wild | 4M"))
    assert row == "| wild | 4M | 3 | 6 | 2.000 | 25 | 0.80 / 0.70 / – | −0.0200 ± 0.0000 | 0.0014 |"
    assert said.count("| 15% damaged, oracle |") == 3 + 1 and "| 10M |" not in said and (tmp_path / "x.png").exists()


def test_the_line_over_sizes_is_by_tenfolds():
    points = [(10.0**k, 0.5 - 0.1 * k + e) for k in (5, 6, 7) for e in (0.01, -0.01)]
    slope, half, far, far_half = scale.line_over_sizes(points)
    assert slope == pytest.approx(-0.1) and far == pytest.approx(0.5 - 0.1 * np.log10(85e6))
    # by the textbook: residual variance 6 e^2 / 4, t of 4 degrees of freedom, squares 4
    sigma, t = (6 * 0.01**2 / 4) ** 0.5, 2.7764451
    assert half == pytest.approx(t * sigma / 4**0.5, rel=1e-4)
    assert far_half == pytest.approx(t * sigma * (1 / 6 + (np.log10(85e6) - 6) ** 2 / 4) ** 0.5, rel=1e-4)
    assert scale.line_over_sizes(points[:2]) is None and scale.line_over_sizes([(10.0, 1.0)] * 5) is None

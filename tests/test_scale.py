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

import study  # noqa: E402

REAL = {name: getattr(scale, name) for name in ("SHAPES", "CHOSEN")}
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
    scale.begin_worker()


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
        weights = [name for name in os.listdir(f"out/scale/{size}/{foretell.DAMAGED}_s1/average32") if ".pt" in name]
        assert weights == ["20.pt"]  # and none of earlier iterations
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


def test_the_smallest_model_is_that_of_foretell_and_its_runs_are_there():
    assert REAL["SHAPES"][scale.SMALLEST].items() <= study.CENTRE.items()
    known = scale.read_lines(f"{ROOT}/study/foretell.jsonl")
    for seed in (1, 2, 3):
        scored, trials = scale.plan(REAL["CHOSEN"].values(), scale.SMALLEST, seed, 4)
        assert {run[:-1] for run in (*scored, *trials)} <= known.keys()


AUC = dict(shuffled=0.8, foreign=0.7, duplicated=None)


def lines_with(effect_of, size):
    """
    The lines of three scored runs and three orders, in which control and random end at 2.0 and 2.2, on prose at 1.0 and
    1.2; the third order is another, which no table of two orders may know.
    """
    lines = {}
    for seed in (1, 2, 3):
        scored, trials = scale.plan(scale.CHOSEN.values(), size, seed, 3)
        found = dict(columns={c.column: dict(auc=AUC) for c in scale.CHOSEN.values()}, test_loss=[9.0, 2.05])
        lines |= {tuple(run): found | dict(test_loss_prose=[9.0, 1.5]) for run in scored}
        for run in trials:
            end = dict(control=2.0, random=2.2).get(run.arm) or 2.1 + effect_of(run)
            end += run.order == 3
            prose = end - 1 - 0.02 * (run.arm == "filtered")
            lines[tuple(run)] = dict(test_loss=[9.0, end], test_loss_prose=[9.0, prose], dropped=0.25 * run.order)
    return lines


def test_the_tables_of_effects_that_are_known(capsys, tmp_path):
    def effect_of(run):
        grown = dict(zip(scale.SHAPES, (0, 1, 2), strict=True))[run.size]
        swing = 0.001 if run.order == 1 else -0.001
        return -0.01 - 0.005 * grown + swing + 0.001 * (run.seed - 2)

    own = lines_with(effect_of, "1M") | lines_with(effect_of, "4M")
    own = {run: line for run, line in own.items() if run[-1] == "1M" or run[2 if len(run) == 4 else 7] < 3}
    known = {run[:-1]: line for run, line in lines_with(effect_of, scale.SMALLEST).items()}
    scale.show(own, known, 2, str(tmp_path / "x.png"))
    said = capsys.readouterr().out.splitlines()
    t2, t1 = 4.30265, 12.7062  # of Student, for 2 and 1 degrees of freedom
    half = f"{t2 * 0.001 / 3**0.5:.4f}"
    aucs = "0.80 / 0.70 / –"
    assert f"| wild | 1M | 3 | 6 | 2.000 | 0.0500 | 38 | {aucs} | −0.0150 ± {half} | 0.0014 |" in said
    assert f"| wild, for prose | 1M | 3 | 6 | 1.000 | 0.5000 | 38 | {aucs} | −0.0350 ± {half} | 0.0014 |" in said
    half = f"{t1 * 0.001 * 0.5**0.5 / 2**0.5:.4f}"  # seeds 1 and 2: −0.0205 ± 0.0005
    row = f"| 15% damaged, oracle | 4M | 2 | 4 | 2.000 | 0.0500 | 38 | – / – / – | −0.0205 ± {half} | 0.0014 |"
    assert row in said and (tmp_path / "x.png").exists()
    slope = -0.005 / np.log10(scale.weights_of("1M") / scale.weights_of("0.25M"))
    row = f"| wild | 0.25M to 1M | 3 | {slope:+.4f} ± 0.0000 |"
    assert row.replace("-", "−") in said
    assert sum("| wild | 0.25M to 4M | 2 |" in line for line in said) == 1


def test_a_slope_is_for_ten_times_the_weights_and_of_seeds_that_have_all_sizes(monkeypatch):
    monkeypatch.setattr(scale, "weights_of", dict(a=10.0, b=100.0, c=1000.0).__getitem__)
    assert scale.slopes(dict(a={1: [0.1, 0.3], 2: [0.0]}, b={1: [0.5]})) == [pytest.approx(0.3)]
    found = scale.slopes(dict(a={1: [0.0], 2: [0.0]}, b={1: [1.0], 2: [4.0]}, c={2: [2.0], 1: [2.0]}))
    assert found == [pytest.approx(1.0), pytest.approx(1.0)]
    assert scale.slopes(dict(a={1: [0.1]})) == [] and scale.slopes({}) == []


def test_the_study_needs_both_texts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", "--minipile=tiny.jsonl"])
    with pytest.raises(SystemExit):
        scale.main()
    assert "--wildpile" in capsys.readouterr().err


def test_the_page_shows_the_tables_of_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", "--tables", f"--out={tmp_path}"])
    scale.main()
    made = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    with open(f"{ROOT}/study/scale.md", encoding="utf-8") as file:
        assert [line.rstrip("\n") for line in file if line.startswith("| ")] == made and len(made) > 8

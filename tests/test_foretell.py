"""The study of trials at a tiny size: what is run, what the arms share, and what the tables say."""

import json
import os
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from test_study import in_this_process, small  # noqa: F401

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, f"{ROOT}/study")

import foretell  # noqa: E402
import foretell_tables  # noqa: E402

import study  # noqa: E402
from trial import AT_ZERO, CALIBRATION, NEAR_ZERO  # noqa: E402


class Here(nullcontext):
    """In the place of the pool of processes: the runs are this process's."""

    def __init__(self, *args):
        super().__init__(self)

    def map(self, function, runs):
        return map(function, runs)


def corpora(minipile, wildpile):
    texts = foretell.Knobs(minipile, domain_field="domain", tokenizer="bytes")
    for name, wanted in ((foretell.CLEAN, ("one", "two")), (foretell.FOREIGN, ("three",))):
        foretell.prepare(foretell.documents_of(texts), name, wanted.__contains__)
    foretell.damage(foretell.CLEAN, foretell.FOREIGN, foretell.DAMAGED, foretell.PERCENT[foretell.DAMAGED])


@pytest.fixture
def tiny(small, monkeypatch):  # noqa: F811
    sizes = dict(
        n_layer=1,
        n_embd=16,
        batch_size=8,
        max_iters=20,
        warmup_iters=2,
        learning_rate=1e-2,
        eval_interval=5,
        eval_iters=1,
    )
    conditions = ("undamaged", "damaged, unseen pool", "damaged, small pool")
    monkeypatch.setattr(foretell, "CENTRE", foretell.CENTRE | sizes)
    monkeypatch.setattr(foretell, "RETRAIN", dict(max_iters=8))
    monkeypatch.setattr(foretell, "ITERATIONS", 20)
    monkeypatch.setattr(foretell, "CHECKPOINTS", (2, 20))
    monkeypatch.setattr(foretell, "TRIAL", foretell.TRIAL | dict(warmup_iters=1))
    monkeypatch.setattr(foretell, "TEST_SETS", {})
    monkeypatch.setattr(foretell, "by_sign", study.lowest(0.4))  # so early nothing is negative
    chosen = {name: foretell.CONDITIONS[name] for name in conditions}
    chosen = {name: one._replace(start=one.start.replace("640", "20")) for name, one in chosen.items()}
    for module in (foretell, foretell_tables):
        monkeypatch.setattr(module, "CONDITIONS", chosen)
    monkeypatch.setattr(foretell_tables, "Condition", lambda corpus: chosen["undamaged"])
    monkeypatch.setattr(foretell, "make_corpora", corpora)
    monkeypatch.setattr(foretell, "ProcessPoolExecutor", Here)


def run_study(monkeypatch, rounds):
    flags = ["--minipile=tiny.jsonl", "--wildpile=none", "--seeds=1", f"--rounds={rounds}", "--results=lines.jsonl"]
    monkeypatch.setattr(sys, "argv", ["foretell.py", *flags])
    foretell.main()
    with open("lines.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_study_goes_on_with_more_orders_and_shares_its_runs(tiny, monkeypatch, capsys):
    first = run_study(monkeypatch, "1:1")
    lines = run_study(monkeypatch, "1:1,2:1")
    assert lines[: len(first)] == first and len({tuple(line["run"]) for line in lines}) == len(lines)
    arms = [foretell.Run(*line["run"]) for line in lines if len(line["run"]) > 3]
    # a retraining serves all trials of its corpus, values and pool: 3 undamaged, 4 damaged and 4 of the small pool
    assert sum(run.start == "" for run in arms) == 3 + 4 + 4
    assert sum(run.start != "" for run in arms) == 2 * (3 + 4 + 4)
    assert not os.listdir(foretell.scored_folder(foretell.DAMAGED, "arms", 1))

    by_run = {tuple(line["run"]): line for line in lines}
    for run in arms:
        line = by_run[run]
        assert line["iter"][-1] == run.iterations and np.isfinite(line["test_loss"]).all()
        assert run.arm != "control" or line["dropped"] == 0
        assert run.arm != "oracle" or 0.05 < line["dropped"] < 0.3
        assert line["coverage"]["scored"] < 70 if run.pool else line["coverage"]["scored"] == 160
    # arms of a trial begin with the same weights, those of other checkpoints with others
    begin = {run: by_run[run]["test_loss"][0] for run in arms if run.start and run.corpus == foretell.DAMAGED}
    for start in ("20", "unseen"):
        assert len({loss for run, loss in begin.items() if run.start == start}) == 1
    assert len(set(begin.values())) == 2

    # the unseen checkpoint has seen none of the windows that were scored
    folder = foretell.scored_folder(foretell.DAMAGED, "unseen", 1)
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        coverage = json.load(file)["coverage"]
    assert coverage["negative"] == coverage["scored"] == 160

    monkeypatch.setattr(sys, "argv", ["foretell_tables.py", "--results=lines.jsonl", "--out=."])
    foretell_tables.main()
    said = capsys.readouterr().out
    assert "damaged, unseen pool" in said and "without the damage series" in said and os.path.isfile("foretell.png")


def test_the_effect_is_beside_both_references_and_the_fit_is_a_line():
    order = {arm: dict(loss=[9.0, loss]) for arm, loss in dict(control=2.0, random=2.2, filtered=2.05).items()}
    assert foretell_tables.effects({(1, 1): order}, "loss") == [pytest.approx(-0.05)]
    slope, half, intercept, intercept_half, correlation = foretell_tables.fit([-1.0, 0.0, 2.0], [-1.0, 1.0, 5.0])
    assert (slope, intercept, correlation) == pytest.approx((2, 1, 1))
    assert (half, intercept_half) == pytest.approx((0, 0), abs=1e-6)


def test_the_errors_of_a_line_are_those_of_the_normal_equations():
    x, y = np.random.default_rng(0).normal(size=(2, 9))
    design = np.stack([np.ones(9), x], 1)
    (intercept, slope), squares, *_ = np.linalg.lstsq(design, y)
    intercept_sd, slope_sd = np.sqrt(squares / 7 * np.diag(np.linalg.inv(design.T @ design)))
    expected = slope, 2.3646 * slope_sd, intercept, 2.3646 * intercept_sd
    assert foretell_tables.fit(x, y)[:4] == pytest.approx(expected, rel=1e-3)


def test_what_trial_py_promises_is_what_the_studys_lines_say():
    lines = foretell_tables.read_lines(f"{ROOT}/study/foretell.jsonl")
    standard = {name: one for name, one in foretell.CONDITIONS.items() if foretell_tables.standard(name)}
    found = {name: foretell_tables.Compared(lines, condition) for name, condition in standard.items()}
    slope, *_ = foretell_tables.fit(*foretell_tables.points(found, found))
    _, _, at_zero, half, _ = foretell_tables.fit(*foretell_tables.points(found, found, "saved"))
    assert round(slope, 1) == CALIBRATION and abs(AT_ZERO - at_zero) < half
    near = [np.mean(one.saved) for one in found.values() if abs(np.mean(one.foretold)) < 0.004]
    assert len(near) == 7 and (round(min(near), 2), round(max(near), 2)) == NEAR_ZERO


def lines_of(condition, losses):
    """{run: line} of {(seed, order, whether it is a trial): the final losses of control, random and filtered}."""
    lines = {(condition.corpus, condition.values, seed): {} for seed, _, _ in losses}
    for (seed, order, trial), three in losses.items():
        for arm, loss in zip(("control", "random", "filtered"), three, strict=True):
            run = tuple(foretell.run_of(condition, arm, seed, order, trial))
            lines[run] = dict(run=run, iter=[0, 200, 400], dropped=0.4, test_loss=[5.0, loss + 0.1, loss])
    return lines


def test_means_by_seed_have_an_interval_over_seeds_and_one_order_has_no_verdict():
    drops = {(1, 1): 0.010, (1, 2): 0.014, (2, 1): 0.030}  # of the trials; the retrained ones are ten times as large
    losses = {(*key, True): (2.0, 2.0, 2.0 - drop) for key, drop in drops.items()}
    losses |= {(*key, False): (2.0, 2.0, 2.0 - 10 * drop) for key, drop in drops.items()}
    condition = foretell.CONDITIONS["undamaged"]
    one = foretell_tables.Compared(lines_of(condition, losses), condition)
    row = foretell_tables.seeds_table({"undamaged": one}).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    half = 12.706 * np.std([0.012, 0.030], ddof=1) / 2**0.5
    assert cells[:3] == ["undamaged", "−0.0120, −0.0300", f"−0.0210 ± {half:.4f}"] and cells[3] == "−0.1200, −0.3000"
    assert one.verdicts(2.0) == {1: "cannot tell"}


def test_verdicts_after_the_first_four_orders_and_after_all():
    drops = [0.01, 0.0, -0.01, 0.01, 0.05, 0.05, 0.05, 0.05]  # four orders cannot tell
    losses = {(1, order, True): (2.0, 2.0, 2.0 - drop) for order, drop in enumerate(drops, 1)}
    losses |= {(1, order, False): (2.0, 2.0, 1.9 - 0.001 * order) for order in (1, 2)}
    condition = foretell.CONDITIONS["undamaged"]
    one = foretell_tables.Compared(lines_of(condition, losses), condition)
    assert (one.verdicts(2.0, 4), one.verdicts(2.0)) == ({1: "cannot tell"}, {1: "helps"})
    assert foretell_tables.outcomes_table({"undamaged": one}, 2.0).splitlines()[2:] == [
        "| four orders | cannot tell | 0 | 0 | 0 | 1 |",
        "| all orders | helps | 1 | 0 | 0 | 0 |",
    ]


def test_every_eighth_document_of_the_large_corpus_and_prose_is_one_domain(tmp_path):
    rows = [dict(text=str(i), domain=("books", "svg")[i // 8 % 2]) for i in range(32)]
    (tmp_path / "wild.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(foretell.wild_documents(str(tmp_path / "wild.jsonl")))
    assert found == [("0", "prose"), ("8", "svg"), ("16", "prose"), ("24", "svg")]


def test_damage_of_a_kind_and_share():
    ids = np.arange(100_000)
    for percent in ((5, 5, 5), (15, 0, 0), (0, 15, 0), (5 / 3,) * 3):
        shares = np.bincount(study.damage_of(ids, percent), minlength=4)[1:] / 1000
        assert shares == pytest.approx(percent, abs=0.3)
    assert not study.damage_of(ids, ()).any()

"""The study of the trial's defaults at a tiny size: what a variant changes, what is run, and what the tables say."""

import json
import os
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from test_foretell import Here, corpora, tiny  # noqa: F401
from test_study import in_this_process, small  # noqa: F401
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, f"{ROOT}/study")

import foretell  # noqa: E402
import trial_defaults  # noqa: E402
from trial_defaults import Variant, trial_of  # noqa: E402

VARIANTS = [Variant(), Variant("kept", 0.25), Variant(share=0.2)]


@pytest.fixture
def worker(tiny, monkeypatch):  # noqa: F811
    """This process as one of the study's workers, with runs of 20 iterations, two conditions and three variants."""
    chosen = {name: trial_defaults.CHOSEN[name]._replace(start="20") for name in ("undamaged", "15% damaged")}
    for name, value in dict(ITERATIONS=20, CENTRE=foretell.CENTRE, VARIANTS=VARIANTS, CHOSEN=chosen).items():
        monkeypatch.setattr(trial_defaults, name, value)
    monkeypatch.setattr(trial_defaults, "make_corpora", corpora)
    monkeypatch.setattr(foretell, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(trial_defaults.filters, "begin_worker", lambda: None)  # it is for a whole process
    for name in ("scored_folder", "WEIGHTS"):
        monkeypatch.setattr(foretell, name, getattr(foretell, name))
    trial_defaults.begin_worker()
    foretell.TEST_SETS.clear()  # there are no novels here


def test_a_kept_optimiser_begins_with_the_state_of_the_scored_run_and_a_fresh_one_with_none(worker):
    corpora("tiny.jsonl", None)
    condition = trial_defaults.CHOSEN["undamaged"]
    foretell.run_scored((condition.corpus, condition.values, 4))
    checkpoint = torch.load(f"{trial_defaults.scored_folder(condition.corpus, condition.values, 4)}/20.pt")
    first, rates = {}, {}

    def note(optimizer, args, kwargs):
        if variant not in first:
            first[variant] = deepcopy(optimizer.state_dict()["state"])
        rates.setdefault(variant, []).append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(note)
    try:
        for variant in VARIANTS:
            trial_defaults.run_arm(trial_of(variant, condition, "control", 4, 1))
    finally:
        hook.remove()
    fresh, kept, longer = VARIANTS
    theirs = checkpoint["optimizer"]["state"]
    assert first[fresh] == first[longer] == {} and first[kept].keys() == theirs.keys() and len(theirs) > 3
    for key, state in theirs.items():
        assert first[kept][key]["step"] == state["step"] == 20 and state["exp_avg"].any()
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(first[kept][key][name], state[name])
    top = foretell.CENTRE["learning_rate"]
    assert [rates[variant][0] for variant in VARIANTS] == pytest.approx([top / 2, top / 4, top / 2])
    assert [len(rates[variant]) for variant in VARIANTS] == [2, 2, 4]


def run_study(monkeypatch, *flags):
    texts = ["--minipile=tiny.jsonl", "--wildpile=none"]
    monkeypatch.setattr(sys, "argv", ["trial_defaults.py", *texts, "--seeds=1", "--results=lines.jsonl", *flags])
    trial_defaults.main()
    with open("lines.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_study_goes_on_with_more_orders_and_its_variants_share_one_retraining(worker, monkeypatch, capsys):
    first = run_study(monkeypatch, "--orders=1", "--retrainings=1")
    lines = run_study(monkeypatch, "--orders=2", "--retrainings=1")
    assert lines[: len(first)] == first
    # two scored runs, three arms of two conditions in three variants, and in the retraining
    assert [len(line["run"]) for line in first] == [3] * 2 + [11] * 18 + [9] * 6 and len(lines) == 26 + 18
    ends = {tuple(line["run"]): line["test_loss"][-1] for line in lines}
    assert np.isfinite(list(ends.values())).all()
    controls = [ends[trial_of(variant, trial_defaults.CHOSEN["undamaged"], "control", 4, 1)] for variant in VARIANTS]
    assert len(set(controls)) == 3

    monkeypatch.setattr(sys, "argv", ["trial_defaults.py", "--tables", "--results=lines.jsonl", "--known=lines.jsonl"])
    capsys.readouterr()
    trial_defaults.main()
    said = capsys.readouterr().out
    assert "| kept, 0.25, 0.1 |" in said and "| retrained |" in said


def lines_of(effect_of):
    """Lines of the plan, in which control and random end at 2.0 and 2.2, and the filtered arm beside their mean."""
    lines = {}
    for scored, runs in trial_defaults.plan((4, 5), 2, 2):
        lines |= {tuple(run): {} for run in scored}
        for run in runs:
            end = dict(control=2.0, random=2.2).get(run.arm) or 2.1 + effect_of(run)
            lines[tuple(run)] = dict(test_loss=[9.0, end], test_loss_novels=[9.0, end])
    return lines


def test_the_tables_of_effects_that_are_known(capsys):
    def effect_of(run):
        size = dict(minipile_damaged_15=-0.02).get(run.corpus, -0.03 if "novels" in run.column else 0.01)
        swing = 0.001 if run.order == 1 else -0.001
        return (size if run.start else 2 * size) + swing

    trial_defaults.print_tables(lines_of(effect_of), {})
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| fresh, 0.5, 0.1")]
    effects, agreement, by_condition = rows
    assert effects[2].startswith("+0.0100 ± ") and effects[3].startswith("−0.0200 ± ") and effects[1] == "4"
    assert effects[5:9] == ["0.0014"] * 4 and effects[9:11] == ["+7.1", "−14.1"]
    assert agreement[1:9] == ["64", "6 of 6", "2.0", "2.0", "2.0", "1.00", "2.00", "0.0000"]
    assert by_condition == [*agreement[:2], "3 of 3", *agreement[3:]]
    assert agreement[9:] == ["0.0028", "0.0028 |"]


def test_agreement_is_a_line_through_zero():
    same, correlation, slope, left = trial_defaults.agreement(np.array([1.0, -1.0, 2.0]), np.array([2.0, 1.0, 3.0]))
    assert same == 2 and slope == pytest.approx(7 / 6)
    assert left == pytest.approx(np.sqrt(np.mean((np.array([2, 1, 3]) - 7 / 6 * np.array([1, -1, 2])) ** 2)))
    assert correlation == pytest.approx(np.corrcoef([1, -1, 2], [2, 1, 3])[0, 1])

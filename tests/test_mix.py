"""The study of the mix of domains at a tiny size: what the two arms drop, what is run, and what the tables say."""

import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_foretell import corpora, tiny  # noqa: F401
from test_study import in_this_process, small  # noqa: F401

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, f"{ROOT}/study")

import foretell  # noqa: E402
import mix  # noqa: E402

import study  # noqa: E402
from support.values import load_values  # noqa: E402


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3)), min_size=1), st.integers(0, 9))
def test_shuffled_within_keeps_every_groups_numbers(pairs, seed):
    number, group = np.array(pairs).T
    found = mix.shuffled_within(number, group, np.random.default_rng(seed))
    assert sorted(zip(found, group, strict=True)) == sorted(pairs)


def test_windows_of_a_group_are_in_another_order():
    number, group = np.arange(200), np.arange(200) % 2
    found = mix.shuffled_within(number, group, np.random.default_rng(0))
    assert (found != number).mean() > 0.9 and np.array_equal(found % 2, group)


def lowest(folder, column="", key="value"):
    """load_values of a run in which 40% are below zero: so early nothing is."""
    sample_id, value, visits = load_values(folder, column, key)
    return sample_id, value - np.quantile(value, 0.4), visits


def run_study(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["mix.py", "--results=mix.jsonl", "--known=known.jsonl", *flags])
    mix.main()
    with open("mix.jsonl", encoding="utf-8") as file:
        return {tuple(line["run"]): line for line in map(json.loads, file)}


def test_both_arms_drop_as_many_windows_as_the_sign_and_the_mix_as_many_of_each_domain(tiny, monkeypatch, capsys):  # noqa: F811
    for module in (foretell, mix):
        monkeypatch.setattr(module, "ITERATIONS", 20, raising=False)
        monkeypatch.setattr(module, "make_corpora", corpora)
        monkeypatch.setattr(module, "by_sign", study.by_sign)
    monkeypatch.setattr(study, "load_values", lowest)
    monkeypatch.setattr(mix, "CONDITION", foretell.CONDITIONS["undamaged"])
    monkeypatch.setattr(foretell, "RETRAIN", dict(max_iters=8, eval_interval=4))
    texts = ["--minipile=tiny.jsonl", "--wildpile=none", "--seeds=1"]
    foretell_flags = [*texts, "--rounds=1:1", "--results=known.jsonl", "--conditions", "undamaged"]
    monkeypatch.setattr(sys, "argv", ["foretell.py", *foretell_flags])
    foretell.main()
    lines = run_study(monkeypatch, *texts, "--orders=1")
    scored = lines.pop((mix.CONDITION.corpus, mix.CONDITION.values, 1))["domains"]
    assert sorted(run[4:6] for run in lines) == [("mix", ""), ("mix", "20"), ("within", ""), ("within", "20")]
    assert {round(line["dropped"], 3) for line in lines.values()} == {0.4}

    # what the mix rejects of each domain, beside what the sign does
    run = foretell.Run(*next(run for run in lines if run[4] == "mix"))
    folder = foretell.scored_folder(run.corpus, run.values, run.seed)
    sample_id, by_sign = study.by_sign(folder, run.column)
    same_id, number = mix.rule_of(run)(folder, run.column)
    domain = mix.domains_of(folder, sample_id)
    assert np.array_equal(sample_id, same_id) and len(set(domain)) == 2
    assert scored == {
        name: [(domain == d).sum(), (by_sign[domain == d] < 0).sum()] for d, name in enumerate(("one", "two"))
    }
    for d in set(domain):
        assert (number[domain == d] < 0).sum() == (by_sign[domain == d] < 0).sum() > 0
    assert ((number < 0) != (by_sign < 0)).any()
    again = mix.rule_of(run._replace(order=2))(folder, run.column)[1]
    assert ((again < 0) != (number < 0)).any()  # an order of its own

    assert len(run_study(monkeypatch, *texts, "--orders=1")) == len(lines) + 1
    run_study(monkeypatch, *texts, "--orders=2")  # whose control, random drops and filtered arm are this study's own
    capsys.readouterr()
    run_study(monkeypatch, "--tables")
    said = capsys.readouterr().out
    assert said.count("| the mix of domains alone | 1 | 2 |") == 2 and "| one | " in said


def test_the_domains_in_what_is_kept():
    scored = [dict(domains=dict(a=[60, 30], b=[40, 10])), dict(domains=dict(a=[50, 40], b=[50, 10]))]
    rows = mix.domains_table(scored).splitlines()[2:]
    assert rows[0].startswith("| a | 55.0 ± ") and " | 65.0 ± " in rows[0]
    assert f" | {100 * np.mean([30 / 60, 10 / 50]):.1f} ± " in rows[0]
    assert f" | {100 * np.mean([30 / 60, 40 / 50]):.1f} ± " in rows[1]


def test_the_tables_of_effects_that_are_known():
    lines = {(mix.CONDITION.corpus, mix.CONDITION.values, seed): {} for seed in (1, 2)}
    ends = dict(control=2.0, random=2.2, filtered=2.05, mix=2.08, within=2.09)
    for seed, order in ((1, 1), (1, 2), (2, 1)):
        for arm, end in ends.items():
            run = foretell.run_of(mix.CONDITION, arm, seed, order, False)
            last = end + 0.01 * seed * (arm == "filtered")
            lines[tuple(run)] = dict(iter=[0, 200, 400], test_loss=[5.0, last + 0.3, last])
    retrained, none = (
        mix.orders_of(lines, mix.CONDITION, trial, (*mix.REFERENCES, *mix.ARMS)) for trial in (False, True)
    )
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in mix.table(retrained, False).splitlines()[2:]]
    sign, alone, within_domains, less, *_ = rows
    assert sign[:3] == ["the sign", "2", "3"] and sign[3].startswith("−0.0367 ± ") and sign[4].startswith("−0.0350 ± ")
    assert alone[3:5] == ["−0.0200 ± 0.0000"] * 2 and within_domains[3:5] == ["−0.0100 ± 0.0000"] * 2
    assert less[0] == "the sign − the mix of domains alone" and less[3].startswith("−0.0167 ± ")
    # the references' final loss, 0.02 above the arm's, came that much earlier
    assert alone[5].startswith(f"+{100 * (1 - (400 - 200 * 0.02 / 0.3) / 400):.0f} ± ")
    head, _, *curves = mix.curves_table(retrained).splitlines()
    assert head == "| dropped by | iteration 200 | iteration 400 |"
    assert curves[1] == "| the mix of domains alone | −0.0200 ± 0.0000 | −0.0200 ± 0.0000 |"
    assert mix.table(none, True) == "no order has all five arms yet" and not mix.curves_table(none)


def test_a_study_without_texts_says_what_it_needs(tmp_path, monkeypatch, capsys):
    (tmp_path / "known.jsonl").write_text("")
    monkeypatch.setattr(sys, "argv", ["mix.py", f"--known={tmp_path}/known.jsonl"])
    with pytest.raises(SystemExit):
        mix.main()
    assert "name both --minipile and --wildpile, or give --tables" in capsys.readouterr().err


def test_why_md_shows_the_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mix.py", "--tables"])
    mix.main()
    made = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    with open(f"{ROOT}/study/why.md", encoding="utf-8") as file:
        assert len(made) == 31 and not set(made) - set(file.read().splitlines())

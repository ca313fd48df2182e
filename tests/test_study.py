"""The study's own arithmetic against slow twins, and its scripts at a tiny size."""

import itertools
import json
import os
import sys
import textwrap
from concurrent.futures import Future
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, f"{ROOT}/study")

import fidelity  # noqa: E402
import filters  # noqa: E402
import filters_tables  # noqa: E402
import foretell  # noqa: E402
import foretell_tables  # noqa: E402
import selection  # noqa: E402
import tables  # noqa: E402
import trial_defaults  # noqa: E402

import prepare_owt  # noqa: E402
import study  # noqa: E402
import train  # noqa: E402

MAINS = {"prepare_owt.py": prepare_owt.main, "train.py": train.main}


class AtOnce(nullcontext):
    """In the place of a pool of threads or processes: what is submitted runs at once, in this thread."""

    def __init__(self, *_):
        super().__init__()

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def map(self, function, runs):
        return map(function, runs)

    def shutdown(self, **_):
        pass

    def __enter__(self):
        return self


@pytest.fixture
def in_this_process(monkeypatch):
    """The study's scripts run without processes of their own, which take seconds to start."""

    def script(name, *flags):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *flags])
            MAINS[name]()

    monkeypatch.setattr(study, "script", script)
    monkeypatch.setattr(study, "ThreadPoolExecutor", AtOnce)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_the_exact_shapley_values_against_all_orders_of_arrival(n, seed):
    utility = np.random.default_rng(seed).normal(size=2**n)
    oracle = np.zeros(n)
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        present = 0
        for i in order:
            oracle[i] += (utility[present | 1 << i] - utility[present]) / len(orders)
            present |= 1 << i
    np.testing.assert_allclose(fidelity.shapley(utility), oracle, rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auc_against_all_pairs(pairs):
    value, bad = np.array([v for v, _ in pairs], float), np.array([b for _, b in pairs])
    if bad.all() or not bad.any():
        assert study.auc(value, bad, ~bad) is None
        return
    oracle = np.mean([(b < g) + 0.5 * (b == g) for b in value[bad] for g in value[~bad]])
    assert study.auc(value, bad, ~bad) == pytest.approx(oracle)


def test_a_saving_is_a_share_of_the_controls_iterations_and_negative_where_the_control_is_ahead():
    iters = [0, 100, 200]
    assert tables.saving(iters, [5.0, 2.0, 1.0], [5.0, 3.0, 2.0]) == pytest.approx(0.5)
    assert tables.saving(iters, [5.0, 3.0, 2.0], [5.0, 2.0, 1.0]) == pytest.approx(-0.5)
    assert tables.saving(iters, [5.0, 2.0, 1.0], [5.0, 2.0, 1.0]) == 0


def test_an_interval_is_students():
    mean, half = tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * np.sqrt(2.5 / 5))
    assert tables.interval([1.0]) == (1.0, None)


@pytest.fixture
def small(tmp_path, monkeypatch, in_this_process):
    """The study of 6 iterations on a text of a few pages, three domains."""
    monkeypatch.chdir(tmp_path)
    with open(textwrap.__file__, encoding="utf-8") as file:
        paragraphs = file.read().split("\n\n")
    with open("tiny.jsonl", "w", encoding="utf-8") as file:
        for i, text in enumerate(paragraphs * 10):
            file.write(json.dumps(dict(text=text, domain=("one", "two", "three")[i % 3])) + "\n")
    sizes = dict(n_layer=1, n_embd=16, batch_size=8, max_iters=6, warmup_iters=2, eval_interval=2, eval_iters=1)
    monkeypatch.setattr(study, "CENTRE", study.CENTRE | sizes | dict(log_interval=2))
    monkeypatch.setattr(study, "RETRAIN", dict(max_iters=4, eval_interval=2))


def test_a_script_runs_in_a_process_of_its_own_and_what_it_says_is_told_where_it_fails():
    with pytest.raises(study.UserError, match="train.py --no_knob=1.*there is no knob 'no_knob'"):
        study.script("train.py", "--no_knob=1")


def run_study(monkeypatch, *flags):
    texts = ["--source=tiny.jsonl", "--foreign=three", "--single=two"]
    monkeypatch.setattr(sys, "argv", ["study.py", *texts, "--results=results.jsonl", "--seeds=1", *flags])
    study.main()
    with open("results.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_study_goes_on_and_runs_nothing_twice(small, monkeypatch, capsys):
    scored = {key: study.SCORED_DAMAGED[key] for key in ("m16", "m1 fixed")}
    trained = {key: study.TRAINED_DAMAGED[key] for key in ("control", "random", "oracle", "failed")}
    monkeypatch.setattr(study, "SCORED_DAMAGED", scored)
    monkeypatch.setattr(study, "TRAINED_DAMAGED", {})
    assert len(run_study(monkeypatch, "--plans=damaged")) == 2
    monkeypatch.setattr(study, "TRAINED_DAMAGED", trained)
    lines = {line["name"]: line for line in run_study(monkeypatch, "--plans=damaged")}
    assert set(lines) == {*scored, *(f"then {name}" for name in trained)}
    monkeypatch.setattr(study, "script", None)
    assert len(run_study(monkeypatch, "--plans=damaged")) == len(lines)

    column = lines["m16"]["columns"]["all:adam"]
    assert 0 <= column["negative"] <= 1 and set(column["auc"]) == set(study.DAMAGE)
    assert lines["then control"]["dropped"] == 0 and lines["then oracle"]["dropped"] == pytest.approx(0.15, abs=0.1)
    assert lines["then failed"]["coverage"]["touchable"] < 0.5
    for name in trained:
        assert len(lines[f"then {name}"]["test_loss_two"]) == 3

    # what was replaced, and nothing else
    clean, damaged = (
        study.open_split(f"data/study_tiny_{c}", "train", study.load_meta(f"data/study_tiny_{c}"))
        for c in ("clean", "damaged")
    )
    ids = np.arange(len(clean) // study.T - 1)
    before, after = (tokens.windows(ids, study.T)[:, :-1] for tokens in (clean, damaged))
    kind = study.damage_of(ids)
    assert np.array_equal(before[kind == 0], after[kind == 0])
    assert np.array_equal(np.sort(before[kind == 1]), np.sort(after[kind == 1])) and (before != after)[kind == 1].any()
    assert len(np.unique(after[kind == 3], axis=0)) <= 8
    assert 0.1 < (kind > 0).mean() < 0.2

    monkeypatch.setattr(sys, "argv", ["tables.py", "--results=results.jsonl", "--out=tables"])
    tables.main()
    assert "m1 fixed" in capsys.readouterr().out


def test_what_a_filter_goes_by(small, monkeypatch):
    monkeypatch.setattr(study, "SCORED_CLEAN", {"m16": study.SCORED_CLEAN["m16"]})
    monkeypatch.setattr(study, "TRAINED_CLEAN", {})
    run_study(monkeypatch, "--plans=clean")
    folder, corpus = "out/study/study_tiny_clean_s1/m16", "data/study_tiny_clean"
    ids, value, _ = study.load_values(folder)
    found = {rule: rule(folder)[1] for rule in (study.beyond_error, study.within_domain, study.by_document)}
    log = study.read_log(folder)
    order = np.argsort(log["sample_id"].ravel())
    groups = (log["scale"][:, :, None] * log["dot_product"][:, :, :4]).reshape(-1, 4)[order]
    np.testing.assert_allclose(found[study.beyond_error], value + groups.std(1, ddof=1) / 2, rtol=1e-5)
    domain = study.window_domains(corpus, "train", ids, study.T, study.load_meta(corpus))
    dropped, share = found[study.within_domain] < 0, (value < 0).mean()
    for d in np.unique(domain):
        assert abs(dropped[domain == d].mean() - share) <= 1 / (domain == d).sum()
        assert value[(domain == d) & dropped].max(initial=-1) <= value[(domain == d) & ~dropped].min()
    starts = np.load(f"{corpus}/train_docs.npy")["start"]
    place = np.array([max(d for d in range(len(starts)) if starts[d] <= i * study.T + study.T // 2) for i in ids])
    for d in set(place):
        np.testing.assert_allclose(found[study.by_document][place == d], value[place == d].mean())


def test_every_knob_of_the_plans_is_one_of_train_py():
    plans = [*study.SCORED_DAMAGED.values(), *study.SCORED_CLEAN.values(), *study.SCORED_CONFIRM.values()]
    plans += [study.CENTRE, study.RETRAIN]
    plans += [knobs for plan in (study.TRAINED_DAMAGED, study.TRAINED_CLEAN) for *_, knobs in plan.values()]
    known = set(train.Knobs.__dataclass_fields__) | {"random"}  # the study's own word for drop_random
    assert not [key for plan in plans for key in plan if key not in known]


def test_the_readme_shows_the_tables_that_tables_py_makes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", f"--out={tmp_path}"])
    tables.main()
    printed = capsys.readouterr().out
    assert {"study_minipile_damaged.png", "study_minipile_clean_domains.png"} <= set(os.listdir(tmp_path))
    with open(f"{ROOT}/study/README.md", encoding="utf-8") as file:
        rows = [line.split("|") for line in file if line.startswith("| ") and not line.startswith("| ---")]
    made = [line.split("|") for line in printed.splitlines()]

    def left_out_columns(row, whole):
        """Is the row a printed one, perhaps without some of its columns?"""
        cells = iter(whole)
        return all(cell in cells for cell in row[:-1])

    assert len(rows) > 100 and not [row for row in rows if not any(left_out_columns(row, whole) for whole in made)]


@pytest.mark.parametrize(
    "page, script, flag",
    [
        ("foretell.md", foretell_tables, "--out={}"),
        ("filters.md", filters_tables, "--out={}"),
        ("selection.md", selection, "--tables"),
        ("trial_defaults.md", trial_defaults, "--tables"),
    ],
)
def test_a_page_shows_the_tables_that_its_script_makes(page, script, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [page, flag.format(tmp_path)])
    script.main()
    made = set(capsys.readouterr().out.splitlines())
    with open(f"{ROOT}/study/{page}", encoding="utf-8") as file:
        rows = [line.rstrip("\n") for line in file if line.startswith("| ")]
    assert len(rows) > 20 and not set(rows) - made


def test_fidelity_agrees_with_itself_on_a_small_step(tmp_path, monkeypatch, in_this_process):
    """At a small learning rate the exact values of a step with everything frozen are the second-order ones."""
    monkeypatch.chdir(tmp_path)
    with open("tiny.jsonl", "w", encoding="utf-8") as file:
        for i in range(300):
            file.write(json.dumps(dict(text=f"line {i} of {i * i} and more words {i % 7} to learn " * 3)) + "\n")
    study.script("prepare_owt.py", "--source=tiny.jsonl", "--tokenizer=bytes")
    for name, value in dict(B=4, M=4, BATCHES=1, STAGES=dict(early=5)).items():
        monkeypatch.setattr(fidelity, name, value)
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "--dataset=tiny", "--results=f.jsonl"])
    fidelity.main()
    with open("f.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 6
    for line in lines:
        optimizer = line["condition"][3]
        if line["condition"][1] > 1e-3:
            continue
        own = "adam, order 2" if optimizer == "adamw" else "sgd, order 2"
        assert line[f"a: {own}"][0] > 0.999 and line[f"a: {own}"][1] == 1


# ---------------------------------------------------------------------------------------------------------------------
# filters.py.


def test_dsir_weighs_a_window_by_the_words_and_pairs_of_words_that_it_has(monkeypatch):
    raw, wanted = ["The cat, sat.", "dogs bark", "a cat\x00 a cat"], ["the cat barks", "cat"]

    def windows(texts):
        rows = [list(text.encode().ljust(16)) for text in texts]
        rows[0][-1] = 256  # the end of a document
        return np.array(rows)

    def grams(text):
        words = "".join(f" {c} " if c in ",.\x00" else c for c in text.lower()).split(" ")
        words = [word for word in words if word]
        return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]

    bags = [[gram for text in texts for gram in grams(text)] for texts in (raw, wanted)]
    oracle = []
    for text in raw:
        total = 0.0
        for gram in grams(text):
            p, q = (bag.count(gram) / len(bag) for bag in bags[::-1])
            total += np.log(p + 1e-8) - np.log(q + 1e-8)
        oracle.append(total)
    assert len({gram: filters.words_of(windows([gram]))[0][0] for gram in {*bags[0], *bags[1]}}) > 8  # no collision
    np.testing.assert_allclose(filters.importance(*map(filters.words_of, map(windows, (raw, wanted)))), oracle)


def test_the_value_model_is_a_ridge_regression_that_has_not_seen_the_document(monkeypatch):
    monkeypatch.setattr(filters, "MODEL_BUCKETS", 64)
    rng = np.random.default_rng(0)
    windows, document = rng.integers(0, 5, size=(60, 8)), np.arange(60) // 4
    features, y = filters.bytes_of(windows), rng.normal(size=60)
    counts = np.array([np.bincount(row, minlength=64) for row in features], float)
    oracle = np.linalg.solve(counts.T @ counts + 30 * np.eye(64), counts.T @ y)
    np.testing.assert_allclose(filters.ridge(features, y, 30.0, 200), oracle, rtol=1e-6, atol=1e-9)
    assert features.shape == (60, 8 + 7 + 6 + 5)
    alike = np.array([[1, 2, 3, 4, 1, 2, 3, 4]])  # the same n-grams twice
    assert sorted(filters.bytes_of(alike)[0, :4]) == sorted(filters.bytes_of(alike)[0, 4:8])

    predicted = filters.out_of_fold(features, y, document)
    other = np.where(document == 3, y + 100, y)  # its own values do not matter to a document
    again = filters.out_of_fold(features, other, document)
    np.testing.assert_allclose(predicted[document == 3], again[document == 3])
    assert not np.allclose(predicted, again)


@pytest.fixture
def small_filters(small, monkeypatch):
    monkeypatch.setattr(study, "CENTRE", study.CENTRE | dict(max_iters=20, learning_rate=3e-2))
    monkeypatch.setattr(foretell, "CENTRE", study.CENTRE)
    monkeypatch.setattr(foretell, "CHECKPOINTS", (20,))
    monkeypatch.setattr(foretell, "ITERATIONS", 20)
    monkeypatch.setattr(foretell, "TEST_SETS", dict(tiny_clean="all,one,two"))
    monkeypatch.setattr(filters, "ITERATIONS", 20)
    monkeypatch.setattr(foretell, "TRIAL", filters.TRIAL | dict(warmup_iters=1))
    monkeypatch.setattr(filters, "TRIAL", foretell.TRIAL)
    monkeypatch.setattr(filters, "SOURCES", {"tiny": ("tiny_clean", ("one", "two", "three"))})
    monkeypatch.setattr(filters_tables, "SOURCES", filters.SOURCES)
    monkeypatch.setattr(filters, "FEW", (16,))
    monkeypatch.setattr(filters_tables, "FEW", (16,))
    monkeypatch.setattr(filters, "SHARES", (0.3,))
    monkeypatch.setattr(filters_tables, "SHARES", (0.3,))
    monkeypatch.setattr(foretell, "ProcessPoolExecutor", AtOnce)
    # every scored run and an arm of each kind, once
    kinds = (
        "control",
        "random",
        "sign",
        "highest quarter",
        "model",
        "one sign",
        "one DSIR",
        "three both",
        "beyond error",
    )
    plan = [
        (range(1, 2), values, [arm for arm in arms if arm[1] in kinds and arm[2] != 0.25])
        for _, values, arms in filters.rounds_of("tiny")
    ]
    monkeypatch.setattr(filters, "rounds_of", lambda source: plan)


def run_filters(monkeypatch):
    flags = ["--source=tiny.jsonl", "--seeds=1", "--results=filters.jsonl", "--known=foretell.jsonl"]
    monkeypatch.setattr(sys, "argv", ["filters.py", *flags])
    filters.main()
    with open("filters.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_arms_of_the_filters_and_their_tables(small_filters, monkeypatch, capsys):
    evaluation = train.test_losses
    monkeypatch.setattr(train, "test_losses", filters.losses_at_the_end(evaluation))
    lines = run_filters(monkeypatch)
    scored = {line["run"][2]: line for line in lines if len(line["run"]) == 3}
    arms = {tuple(line["run"][3:]): line for line in lines if len(line["run"]) == 6}
    assert set(scored) == {"main", "others", "16 windows", "errors", "again"}
    with np.load("out/filters/tiny_s1/main.npz") as scores:
        value, one = scores["sign"], scores["one sign"]
        share = {name: (scores[name] < 0).mean() for name in scores}
        np.testing.assert_array_equal(scores["one both"] < 0, (value < 0) & (one < 0))
        np.testing.assert_array_equal(scores["one either"] < 0, (value < 0) | (one < 0))
        np.testing.assert_array_equal(scores["one sum"] < 0, value + one < 0)
        assert value[scores["highest quarter"] < 0].min() > value[scores["highest quarter"] >= 0].max()
    assert all(0 < share[name] < 1 for name in ("sign", "one sign", "one both"))
    assert share["highest quarter"] == pytest.approx(0.25, abs=0.03)
    assert share["one DSIR"] == pytest.approx(share["one sign"], abs=0.02)
    for (values, score, lowest), line in arms.items():
        if score not in ("control", "random") and values == "main":
            assert line["dropped"] == pytest.approx(lowest or share[score], abs=0.02)
        assert {f"test_loss_{target}" for target in (["three"] if values == "others" else ["one", "two"])} < set(line)
    assert arms["main", "control", 0.0]["dropped"] == 0
    assert arms["main", "random", 0.0]["dropped"] == arms["main", "sign", 0.0]["dropped"]

    # an arm with its first evaluation ends as without it
    monkeypatch.setattr(train, "test_losses", evaluation)
    again = filters.run_arm("foretell.jsonl", filters.Arm("tiny", 1, 1, "main", "one DSIR", 0.0))
    assert again.pop("seconds") > 0 and again == {key: arms["main", "one DSIR", 0.0][key] for key in again}

    # an arm of foretell.py is the same, and is taken from there
    for score in ("random", "sign"):
        arm = filters.Arm("tiny", 1, 1, "main", score, 0.0)
        theirs, found = filters.same_arm(arm), arms["main", score, 0.0]
        line = foretell.run_arm(theirs)
        assert {key: line[key][-1] for key in found if key.startswith("test_loss")}.items() <= found.items()
        with open("foretell.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(run=theirs, **line)) + "\n")
        again = filters.run_arm("foretell.jsonl", arm)
        assert again.pop("taken") and again.pop("seconds") > 0 and again.items() <= found.items()

    before = len(lines)
    monkeypatch.setattr(filters, "run_here", None)  # nothing is run twice
    assert len(run_filters(monkeypatch)) == before
    monkeypatch.setattr(sys, "argv", ["filters_tables.py", "--results=filters.jsonl", "--out=."])
    filters_tables.main()
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| negative |"))
    gap = arms["main", "sign", 0.0]["test_loss"] - arms["main", "control", 0.0]["test_loss"]
    assert f"{gap:+.4f}".replace("-", "−") in row and os.path.isfile("filters.png")
    assert "| negative beyond its error |" in printed and "| DSIR, as many |" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| one | DSIR |"))
    less = [
        arms["main", "one DSIR", 0.0][key] - arms["main", "one sign", 0.0][key]
        for key in ("test_loss_one", "test_loss")
    ]
    assert row == f"| one | DSIR | {less[0]:+.4f} | {less[1]:+.4f} | 1 |".replace("-", "−")


def test_the_filters_need_a_source_that_they_know(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["filters.py", "--source=other.parquet"])
    with pytest.raises(study.UserError, match="other.parquet.*minipile, wildpile"):
        filters.main()

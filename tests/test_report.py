"""The report on runs made by hand: its numbers against those worked out on paper, its figures, what it refuses."""

import json
import os

import matplotlib.image
import numpy as np
import pytest
import tiktoken
import torch

import report
from prepare_owt import write_checksums
from support import figures
from support.configurator import UserError
from support.corpus import Tokens
from support.values import write_values

KNOBS = dict(
    init_from="scratch",
    data_dir="data",
    dataset="tiny",
    block_size=8,
    batch_size=4,
    gradient_accumulation_steps=1,
    max_iters=40,
    eval_interval=10,
    eval_iters=2,
    log_interval=10,
    seed=1,
    score=False,
    val_batch_size=2,
    value_direction="sgd",
    filter_from="",
    filter_pool="scored",
    filter_negative=False,
    drop_random=0.0,
    learning_rate=1e-3,
)
CONTROL = dict(filter_from="out/baseline")
FILTERED = dict(filter_from="out/baseline", filter_negative=True)
COVERAGE = dict(corpus=1000, scored=160, negative=40, eligible=120, touchable=1.0)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(folder, losses, scored=False, fingerprint="abc", coverage=None, **knobs):
    """A run evaluated every 10 iterations with the given test losses."""
    os.makedirs(folder)
    knobs = {**KNOBS, **knobs, "out_dir": folder, "score": scored}
    if knobs["filter_from"]:
        coverage = coverage or COVERAGE
    with open(f"{folder}/config.json", "w") as file:
        json.dump(dict(knobs=knobs, fingerprint=fingerprint, coverage=coverage), file)
    with open(f"{folder}/metrics.jsonl", "w") as file:
        for k, loss in enumerate(losses):
            file.write(json.dumps({"iter": 10 * k, "test_loss": loss}) + "\n")
            if k + 1 < len(losses):
                line = {"iter": 10 * k, "loss": loss, "lr": 1e-3, "step_ms": 900.0 if k == 0 else 120.0 + k}
                if scored:  # the line of iteration 0 speaks of one step, those after it of ten each
                    line |= {"negative": 1.0 if k == 0 else 0.25, "val_ms": 20.0, "step_ms": line["step_ms"] + 20}
                file.write(json.dumps(line) + "\n")
    return folder


def make_log(folder, values, sample_id):
    """The dot-product log and the values of a run: values, sample_id (k, B)."""
    k, B = values.shape
    os.makedirs(f"{folder}/dot_prod")
    log = dict(iter=torch.arange(k), lr=torch.full((k,), 0.5).double(), clip=torch.ones(k).double())
    log |= dict(sample_id=torch.tensor(sample_id), dot_product=torch.tensor(values * B / 0.5, dtype=torch.float32))
    torch.save(log | dict(directions=["all:sgd"]), f"{folder}/dot_prod/dot_prod_log_iter_{k}.pt")
    write_values(folder)


TEXT = [b"plain te", b"xt with ", b"$math$ \\", b"\n\ttab\x00\x07\xff", b"\xe4\xb8\xad \xc3\xa9", b"\xff\xfe\r\n_^{}"]


@pytest.fixture
def corpus(monkeypatch):
    """A corpus of 40 windows of 8 bytes, two domains, that prepare_owt.py's functions are made to give."""
    text = b"".join(part.ljust(8)[:8] for part in TEXT) * 7
    os.makedirs("data/tiny")
    np.frombuffer(text[: 40 * 8 + 1], np.uint8).astype("<u2").tofile("data/tiny/train.bin")
    write_checksums("data/tiny/train.bin", "data/tiny/train.crc")
    meta = dict(fingerprint="abc", tokenizer="bytes", domains=["even", "odd"])
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(report, "load_meta", lambda folder: meta)
    monkeypatch.setattr(report, "open_split", lambda folder, split, meta: Tokens("data/tiny/train.bin"))
    monkeypatch.setattr(report, "window_domains", lambda folder, split, ids, block_size, meta: ids % 2)
    monkeypatch.setattr(report, "get_tokenizer", lambda name: encoding)
    return meta


def make_baseline(losses=(5, 4, 3, 2.5, 2), **knobs):
    """A scored run whose window i has the value i - 10 micronats, each of 40 windows visited four times."""
    make_run("out/baseline", losses, scored=True, **knobs)
    sample_id = np.stack([np.random.default_rng(i).permutation(40) for i in range(4)]).reshape(40, 4)
    make_log("out/baseline", (sample_id - 10) * 1e-6 / 4, sample_id)
    return "out/baseline"


@pytest.fixture
def no_figures(monkeypatch):
    """For a test that looks at the table and the notes alone."""
    monkeypatch.setattr(report, "write_figures", lambda *args: {})


def rows_of(*folders, reference=None, target_loss=None):
    """{name: row} of the table; the reference is the first group if it is not named."""
    groups = report.group_runs([report.read_run(folder) for folder in folders])
    return {row["name"]: row for row in report.compare(groups, reference or next(iter(groups)), target_loss)}


def printed(capsys, *argv):
    """What the command prints: {head of a column: cell} for each row by its name, and the notes below the table."""
    report.main(argv)
    table, notes = capsys.readouterr().out.split("\n\n")
    head, rule, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    assert all(set(cell) == {"-"} for cell in rule)
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}, notes


def test_the_first_crossing_is_interpolated_and_passes_over_losses_that_are_not_finite():
    iters, losses = np.array([0, 10, 20, 30, 40]), np.array([5.0, 4.0, 3.0, 3.5, 2.0])
    assert report.first_crossing(iters, losses, 3.25) == 17.5
    assert report.first_crossing(iters, losses, 3.0) == 20
    assert report.first_crossing(iters, losses, 2.75) == 35
    assert report.first_crossing(iters, losses, 6.0) == 0
    assert report.first_crossing(iters, losses, 1.9) is None
    assert report.first_crossing(iters, np.array([5.0, 4.0, np.nan, np.nan, np.nan]), 3.0) is None


def test_a_noisy_control_is_asked_for_its_first_crossing_too(no_figures, capsys):
    make_run("out/control", [5, 4, 2.9, 3.2, 3.0], **CONTROL)  # at its final 3.0 first at 10 + 10 * 1 / 1.1
    make_run("out/filtered", [5, 3.5, 2.5, 2.4, 2.2], **FILTERED)  # at 10 + 10 * 0.5 / 1
    rows = rows_of("out/control", "out/filtered")
    assert rows["control"]["reference"] and not rows["filtered"]["reference"]
    assert rows["control"]["iterations"]["mean"] == pytest.approx(10 + 10 / 1.1)
    assert rows["filtered"]["iterations"] == dict(mean=15, sd=None, each=[15])
    assert rows["filtered"]["saved"]["mean"] == pytest.approx(1 - 15 / (10 + 10 / 1.1))
    assert rows["control"]["saved"]["mean"] == 0 and rows["control"]["final_loss"]["mean"] == 3.0
    cells, _ = printed(capsys, "out/filtered", "out/control")
    assert cells["filtered"] == {
        "run": "filtered",
        "seeds": "1",
        "iterations to the final test loss of control": "15",
        "saved": "21.4%",
        "final test loss": "2.2000",
        "negative windows": "–",
        "eligible / scored / corpus windows": "120 / 160 / 1,000",
        "touchable draws": "100%",
        "step, ms": "122.5",
        "validation pass, ms": "–",
    }
    assert cells["control"]["saved"] == "reference"


def test_test_set_goes_by_the_loss_of_one_of_the_validation_sets(no_figures, capsys):
    for name, arm, losses in (("control", CONTROL, [5, 4, 3, 2, 1]), ("filtered", FILTERED, [5, 3, 1, 1, 1])):
        folder = make_run(f"out/{name}", [5, 4, 3, 2, 2], **arm, val_sets="all,odd")
        with open(f"{folder}/metrics.jsonl") as file:
            lines = [json.loads(line) for line in file]
        for line, loss in zip((line for line in lines if "test_loss" in line), losses, strict=True):
            line["test_loss_odd"] = loss
        with open(f"{folder}/metrics.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    for flags, name, saved in (
        ([], "test loss", "0.0%"),
        (["--test_set=all"], "test loss", "0.0%"),
        (["--test_set=odd"], "test loss on odd", "50.0%"),
    ):
        cells, _ = printed(capsys, "out/control", "out/filtered", *flags)
        assert cells["filtered"]["saved"] == saved
        assert {f"iterations to the final {name} of control", f"final {name}"} < set(cells["control"])
    with pytest.raises(UserError, match="no evaluation with a test_loss_even; .* needs a run with --val_sets=all,even"):
        report.main(["out/control", "--test_set=even"])


def test_a_saving_is_negative_or_absent_where_it_is(capsys):
    make_run("out/control", [5, 4, 3, 2, 1.0], **CONTROL, seed=1)
    make_run("out/late", [5, 4.5, 4, 3, 1.0, 1.0], **FILTERED, max_iters=50)
    make_run("out/never", [5, 4, 3, 2, 1.1], **CONTROL, drop_random=0.25)
    runs = ["out/control", "out/late", "out/never"]
    assert rows_of(*runs, target_loss=2)["late"]["saved"]["mean"] == pytest.approx(1 - 35 / 30)
    cells, notes = printed(capsys, *runs)
    goal = "iterations to the final test loss of control"
    assert cells["never"][goal] == "not reached" and cells["late"][goal] == "40" and cells["late"]["saved"] == "0.0%"
    assert "late differs from the reference in more than its windows: max_iters 50 (not 40)." in notes
    rows = rows_of(*runs, target_loss=0.5)  # nor does the reference reach it
    assert rows["control"]["iterations"]["each"] == [None] and rows["late"]["saved"]["mean"] is None
    rows = rows_of(*runs, target_loss=7)
    assert rows["late"]["iterations"]["each"] == [0] and rows["late"]["saved"]["each"] == [None]
    for target in (2, 0.5, 7):
        cells, _ = printed(capsys, *runs, f"--target_loss={target}")  # the figures as well
        assert "iterations to the target test loss" in cells["late"]


def test_the_reference_is_the_named_run_or_the_control_or_the_first(no_figures, capsys):
    make_run("out/baseline", [5, 4, 3, 2.5, 2])
    make_run("out/control", [5, 4, 3, 2.5, 2], **CONTROL)
    make_run("out/filtered", [5, 4, 3, 2, 1], **FILTERED)
    runs = ["out/baseline", "out/filtered", "out/control"]
    for folders, name in (
        (runs, "control"),
        (runs[:2], "baseline"),
        (runs[1::-1], "filtered"),
        ([*runs, "--reference=out/filtered/"], "filtered"),
        ([*runs, "out/control/"], "control"),  # the same folder twice is one run
    ):
        cells, _ = printed(capsys, *folders)
        assert [run for run, row in cells.items() if row["saved"] == "reference"] == [name]
    with pytest.raises(UserError, match="--reference=out/other: not among the runs; add it"):
        report.main([*runs, "--reference=out/other"])


def test_seeds_are_averaged_and_each_compared_with_the_reference_of_its_seed(no_figures, capsys):
    make_run("out/control_s1", [5, 4, 3, 2.5, 2.0], **CONTROL, seed=1)
    make_run("out/control_s2", [5, 4, 3, 2.5, 1.0], **CONTROL, seed=2)
    make_run("out/filtered_s1", [5, 4, 2, 1, 1], **FILTERED, seed=1)  # 2.0 at 20: saves 1/2 of seed 1's 40
    make_run("out/filtered_s2", [5, 4, 2, 1, 1], **FILTERED, seed=2)  # 1.0 at 30: saves 1/4 of seed 2's 40
    make_run("out/filtered_s3", [5, 4, 2.5, 1.5, 1], **FILTERED, seed=3)  # 2.0 at 25: saves 3/8 of the first one's 40
    runs = [f"out/control_s{s}" for s in (1, 2)] + [f"out/filtered_s{s}" for s in (1, 2, 3)]
    rows = rows_of(*runs)
    assert rows["filtered"]["saved"]["each"] == pytest.approx([1 / 2, 1 / 4, 3 / 8])
    assert rows["filtered"]["saved"]["mean"] == pytest.approx(3 / 8)
    assert rows["filtered"]["saved"]["sd"] == pytest.approx(1 / 8)
    assert rows["filtered"]["target"]["each"] == [2.0, 1.0, 2.0] and rows["control"]["seeds"] == [1, 2]
    cells, notes = printed(capsys, *runs)
    assert cells["filtered"]["saved"] == "37.5 ± 12.5%" and cells["control"]["final test loss"] == "1.5000 ± 0.7071"
    assert cells["filtered"]["seeds"] == "3" and "±: standard deviation over seeds" in notes


def test_a_mean_saving_needs_every_seed(capsys):
    for seed, losses in ((1, [5, 1.0]), (2, [5, 3.0])):
        make_run(f"out/control_s{seed}", [5, 2.0], **CONTROL, seed=seed, max_iters=10)
        make_run(f"out/filtered_s{seed}", losses, **FILTERED, seed=seed, max_iters=10)
    cells, _ = printed(capsys, *(f"out/{arm}_s{seed}" for arm in ("control", "filtered") for seed in (1, 2)))
    assert "not reached (1 of 2 did)" in cells["filtered"].values() and cells["filtered"]["saved"] == "–"


def test_arms_by_the_values_of_different_runs_are_no_seeds_of_each_other():
    for m in (1, 16):
        for seed in (1, 2):
            make_run(f"out/m{m}_s{seed}", [5, 2], scored=True, val_batch_size=m, seed=seed, max_iters=10)
            arm = dict(FILTERED, filter_from=f"out/m{m}_s{seed}", seed=seed, max_iters=10)
            make_run(f"out/filtered_m{m}_s{seed}", [5, 2], **arm)
    make_run("out/again", [5, 2], **dict(FILTERED, filter_from="out/m1_s1", max_iters=10))  # a seed it has already
    make_run("out/big", [5, 2], **dict(FILTERED, filter_from="out/m1_s1", max_iters=10, learning_rate=1.0, seed=3))
    names = sorted((f"out/{name}" for name in os.listdir("out")), reverse=True)
    groups = report.group_runs([report.read_run(name) for name in names])
    assert [[run.folder for run in runs] for runs in groups.values()] == [
        ["out/m1_s2", "out/m1_s1"],
        ["out/m16_s2", "out/m16_s1"],
        ["out/filtered_m1_s2", "out/filtered_m1_s1"],
        ["out/filtered_m16_s2", "out/filtered_m16_s1"],
        ["out/big"],
        ["out/again"],
    ]


@pytest.mark.parametrize(
    "folders, name",
    [
        (["out/control_s1", "out/control_s2"], "control"),
        (["out/control-seed1337", "out/control-seed1338"], "control"),
        (["out/control/1", "out/control/2"], "control"),
        (["out/control/s1", "out/control/s2"], "control"),
        (["s1/bias", "s2/bias"], "bias"),
        (["out/gpt2"], "gpt2"),
        (["out/_x/"], "x"),
    ],
)
def test_names_of_groups(folders, name):
    assert report.group_name(folders) == name


def test_one_scored_run_alone_has_its_share_of_negatives_its_costs_and_four_files(capsys, corpus):
    cells, notes = printed(capsys, make_baseline())
    row = cells["baseline"]
    assert (row["negative windows"], row["step, ms"], row["validation pass, ms"]) == ("25.0%", "122.5", "20.0")
    assert "Values in the figures: out/baseline, column all:sgd." in notes and "Figures: out/report" in notes
    assert sorted(os.listdir("out/report")) == ["loss.png", "report.png", "values.png", "windows.txt"]
    for name in ("loss.png", "report.png", "values.png"):
        image = matplotlib.image.imread(f"out/report/{name}")[..., :3]
        assert image.shape[1] > 1000 and image.std() > 0.1


def test_the_windows_are_text_with_escapes_for_what_no_font_has(no_figures, corpus):
    scored = report.read_scored(report.read_run(make_baseline()))
    headings, texts = zip(*scored["highest"] + scored["lowest"], strict=True)
    assert len(scored["highest"]) == len(scored["lowest"]) == 5
    assert headings[0] == "+2.90e−05 nats in 4 visits, window 39, odd"
    assert (headings[5], texts[5]) == ("−1.00e−05 nats in 4 visits, window 0, even", "plain tex")
    assert any("$math$ \\↵" in text for text in texts)
    assert any("↵\\ttab\\x00\\x07\\xff" in text for text in texts)  # each control character and byte escaped
    assert any("\\u4e2d é" in text for text in texts)  # no glyph for the one, one for the other


def test_windows_txt_begins_a_line_where_the_window_does(capsys, corpus):
    printed(capsys, make_baseline(), "--out=elsewhere")
    with open("elsewhere/windows.txt", encoding="utf-8") as file:
        highest, lowest = file.read().split("Lowest values\n\n")
    assert highest.startswith("Highest values\n\n+2.90e−05 nats in 4 visits, window 39, odd\n    ")
    assert lowest.startswith("−1.00e−05 nats in 4 visits, window 0, even\n    plain tex\n\n")
    assert "↵\n    \\ttab\\x00" in highest + lowest


def test_names_and_texts_in_any_script_can_be_drawn(corpus):
    corpus["domains"] = ["小说 हिन्दी ภาษาไทย 🦊", "$math$ _{x}"]
    report.main([make_baseline()])
    assert os.path.isfile("out/report/values.png") and os.path.isfile("out/report/report.png")
    assert figures.printable("a小🦊é\r\n") == "a\\u5c0f\\U0001f98aé↵"


def test_values_come_from_the_first_run_that_has_them(no_figures, capsys, corpus):
    make_run("out/unfinished", [5, 4], scored=True, learning_rate=1.0)
    make_run("out/control", [5, 4, 3, 2.5, 2], **CONTROL)
    _, notes = printed(capsys, "out/control", "out/unfinished", make_baseline())
    assert "Values in the figures: out/baseline, " in notes


def test_without_scores_there_are_no_value_figures(capsys):
    make_run("out/control", [5, 4, 3, 2.5, 2], **CONTROL)
    _, notes = printed(capsys, "out/control")
    assert os.listdir("out/report") == ["loss.png"] and "no value figures" in notes


def test_without_the_corpus_there_is_no_text(capsys):
    _, notes = printed(capsys, make_baseline())
    assert sorted(os.listdir("out/report")) == ["loss.png", "report.png", "values.png"]
    assert "The corpus tiny is not here" in notes


def test_another_corpus_in_its_place_is_refused(corpus):
    corpus["fingerprint"] = "other"
    with pytest.raises(UserError, match="data/tiny: not the corpus that out/baseline was trained on"):
        report.main([make_baseline()])


def test_values_without_a_spread_can_be_drawn(corpus):
    make_run("out/flat", [5, 5], scored=True, max_iters=1)
    make_log("out/flat", np.zeros((1, 4)), np.arange(4)[None])
    report.main(["out/flat"])
    assert len(os.listdir("out/report")) == 4


def test_more_domains_than_fit_are_cut_to_the_largest():
    ax = figures.Figure().subplots()
    domain = np.repeat(np.arange(20), np.arange(1, 21))
    figures.draw_domains(ax, np.linspace(-1, 1, len(domain)), domain, [f"domain {d}" for d in range(20)])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 14 and {"domain 19\n0% of 20", "domain 6\n100% of 7"} < set(labels)


def test_an_unfinished_run_is_marked(no_figures, capsys):
    make_run("out/control", [5, 4, 3, 2.5, 2], **CONTROL)
    make_run("out/filtered", [5, 3.5, 3], **FILTERED)
    with open("out/filtered/metrics.jsonl", "a") as file:
        file.write('{"iter": 30, "test_l')  # being written as we read
    cells, notes = printed(capsys, "out/control", "out/filtered")
    assert cells["filtered"]["final test loss"] == "3.0000"
    assert "out/filtered has not ended: 20 of 40 iterations." in notes and "out/control has not ended" not in notes


def test_a_run_that_diverged_has_no_number_and_is_no_reference(capsys):
    make_run("out/control", [5, 4, float("nan"), float("nan"), float("nan")], **CONTROL)
    make_run("out/filtered", [5, 4, 3, 2, 1], **FILTERED)
    with pytest.raises(UserError, match="control: its test loss ends at nan; give a --target_loss"):
        report.main(["out/control", "out/filtered"])
    cells, _ = printed(capsys, "out/control", "out/filtered", "--target_loss=2")
    assert cells["control"]["final test loss"] == "nan"
    assert cells["control"]["iterations to the target test loss"] == "not reached"


def test_json_is_the_table_with_null_for_what_is_not_finite(capsys):
    make_run("out/control", [5, 4, 3, 2, float("nan")], **CONTROL)
    make_run("out/filtered", [5, 3, 2, 2, 1], **FILTERED, seed=2, max_iters=50)
    report.main(["out/control", "out/filtered", "--reference=out/filtered", "--target_loss=3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == {"loss.png": "out/report/loss.png"} and "has not ended: 40 of 50" in found["notes"][2]
    control, filtered = found["rows"]
    assert filtered == {
        "name": "filtered",
        "reference": True,
        "arm": "treatment",
        "coverage": COVERAGE,
        "folders": ["out/filtered"],
        "seeds": [2],
        "target": {"mean": 3, "sd": None, "each": [3]},
        "iterations": {"mean": 10, "sd": None, "each": [10]},
        "saved": {"mean": 0, "sd": None, "each": [0]},
        "final_loss": {"mean": 1, "sd": None, "each": [1]},
        "negative_windows": {"mean": None, "sd": None, "each": [None]},
        "step_ms": {"mean": 122.5, "sd": None, "each": [122.5]},
        "validation_ms": {"mean": None, "sd": None, "each": [None]},
    }
    assert control["final_loss"] == {"mean": None, "sd": None, "each": [None]} and control["saved"]["mean"] == -1


def test_different_corpora_are_refused():
    make_run("out/a", [5, 4])
    make_run("out/b", [5, 4], fingerprint="xyz", dataset="pile")
    with pytest.raises(UserError, match="out/a and out/b were trained on different corpora"):
        report.main(["out/a", "out/b"])


def test_what_is_no_run_is_refused():
    os.makedirs("out/empty")
    for folder in ("out/empty", "out/missing"):
        with pytest.raises(UserError, match=f"{folder}/config.json: no such file.*train.py .*--out_dir={folder}"):
            report.main([folder])
    make_run("out/a", [5, 4])
    os.remove("out/a/metrics.jsonl")
    with pytest.raises(UserError, match="out/a/metrics.jsonl: no such file"):
        report.main(["out/a"])


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "metrics.jsonl",
            '{"iter": 0, "test_loss": 5}\n{"iter": 1, "lo\n',
            "metrics.jsonl, line 2: .*--init_from=resume",
        ),
        ("metrics.jsonl", '{"iter": 0, "test_loss": 5}\n[]\n', "metrics.jsonl, line 2: not what train.py writes"),
        ("metrics.jsonl", '{"iter": 0, "test_loss": null}\n', "metrics.jsonl, line 1"),
        ("metrics.jsonl", '{"iter": 0, "loss": 5, "step_ms": 1}\n', "1 training lines and no evaluation .*resume"),
        ("metrics.jsonl", "", "0 training lines and no evaluation"),
        ("config.json", "{", "out/a/config.json: not what train.py writes"),
        ("config.json", '{"knobs": {}}', r"config.json: not what train.py writes \(KeyError"),
    ],
)
def test_damaged_files_are_refused(name, text, message):
    make_run("out/a", [5, 4])
    with open(f"out/a/{name}", "w") as file:
        file.write(text)
    with pytest.raises(UserError, match=message):
        report.main(["out/a"])

"""The report on runs made by hand: its numbers against those worked out on paper, its figures, what it refuses."""

import io
import json
import multiprocessing
import os
import runpy
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

import report
from prepare_owt import write_checksums
from support import figures
from support.configurator import UserError
from support.corpus import DOCUMENT, Tokens
from support.values import write_values

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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
    monkeypatch.setitem(figures.RC, "savefig.dpi", 60)  # which takes a third of the time


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
    write_values(folder, folder)


TEXT = [b"plain te", b"xt with ", b"$math$ \\", b"\n\ttab\x00\x07\xff", b"\xe4\xb8\xad \xc3\xa9", b"\xff\xfe\r\n_^{}"]


@pytest.fixture
def corpus(monkeypatch):
    """A corpus of 40 windows of 8 bytes, two domains, that prepare_owt.py's functions are made to give."""
    text = b"".join(part.ljust(8)[:8] for part in TEXT) * 7
    tokens = np.frombuffer(text[: 40 * 8 + 1], np.uint8).astype("<u2")
    tokens[[99, 119, 320]] = 256  # ends of text
    os.makedirs("data/tiny")
    tokens.tofile("data/tiny/train.bin")
    write_checksums("data/tiny/train.bin", "data/tiny/train.crc")
    documents = np.zeros(3, DOCUMENT)  # of 100, 20 and 201 tokens
    documents["start"], documents["domain"] = [0, 100, 120], [0, 1, 0]
    np.save("data/tiny/train_docs.npy", documents)
    meta = dict(fingerprint="abc", tokenizer="bytes", domains=["even", "odd"])
    monkeypatch.setattr(report, "load_meta", lambda folder: meta)
    monkeypatch.setattr(report, "open_split", lambda folder, split, meta: Tokens("data/tiny/train.bin"))
    monkeypatch.setattr(report, "window_domains", lambda folder, split, ids, block_size, meta: ids % 2)
    return meta


def make_baseline(folder="out/baseline", losses=(5, 4, 3, 2.5, 2), sign=1, **knobs):
    """A scored run whose window i has the value i - 10 micronats, each of 40 windows visited four times."""
    make_run(folder, losses, scored=True, **knobs)
    sample_id = np.stack([np.random.default_rng(i).permutation(40) for i in range(4)]).reshape(40, 4)
    make_log(folder, sign * (sample_id - 10) * 1e-6 / 4, sample_id)
    return folder


def edit_values(folder, **arrays):
    """Put these arrays in the place of those of values.npz."""
    with np.load(f"{folder}/values.npz") as found:
        np.savez(f"{folder}/values.npz", **dict(found) | arrays)


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


def shown(out="out/report"):
    """The files of a report; what begins with a dot is its lock."""
    return sorted(name for name in os.listdir(out) if not name.startswith("."))


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
        "bits per byte": "–",
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
            line |= {"test_loss_odd": loss, "test_bpb": 0.5, "test_bpb_odd": loss / 2}
        with open(f"{folder}/metrics.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    for flags, name, saved, bits in (
        ([], "test loss", "0.0%", "0.5000"),
        (["--test_set=all"], "test loss", "0.0%", "0.5000"),
        (["--test_set=odd"], "test loss on odd", "50.0%", "0.5000"),
    ):
        cells, _ = printed(capsys, "out/control", "out/filtered", *flags)
        assert cells["filtered"]["saved"] == saved and cells["filtered"]["bits per byte"] == bits
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
    cells, notes = printed(capsys, make_baseline(), "--out=elsewhere")
    row = cells["baseline"]
    assert (row["negative windows"], row["step, ms"], row["validation pass, ms"]) == ("25.0%", "122.5", "20.0")
    assert "Values in the figures: out/baseline, column all:sgd." in notes and "Figures: elsewhere" in notes
    assert shown("elsewhere") == ["loss.png", "report.png", "values.png", "windows.txt"]
    for name in ("loss.png", "report.png", "values.png"):
        image = matplotlib.image.imread(f"elsewhere/{name}")[..., :3]
        assert image.shape[1] > 300 and image.std() > 0.1
    with open("elsewhere/windows.txt", encoding="utf-8") as file:
        highest, lowest = file.read().split("Lowest values\n\n")
    assert highest.startswith("Highest values\n\n+2.90e−05 nats in 4 visits, window 39, odd\n    ")
    assert lowest.startswith("−1.00e−05 nats in 4 visits, window 0, even\n    plain tex\n\n")
    assert "↵\n    \\ttab\\x00" in highest + lowest  # a line begins where the window has one


def test_the_windows_are_text_with_escapes_for_what_does_not_print(no_figures, corpus):
    scored = report.read_scored(report.read_run(make_baseline()))
    highest, lowest = scored["windows"]["Highest values"], scored["windows"]["Lowest values"]
    headings, texts = zip(*highest, *lowest, strict=True)
    assert len(highest) == len(lowest) == 5
    assert headings[0] == "+2.90e−05 nats in 4 visits, window 39, odd"
    assert (headings[5], texts[5]) == ("−1.00e−05 nats in 4 visits, window 0, even", "plain tex")
    assert any("$math$ \\↵" in text for text in texts)
    assert any("↵\\ttab\\x00\\x07\\xff" in text for text in texts)  # each control character and byte escaped
    assert any("中 é" in text for text in texts)  # in their own script, whatever the fonts have


def font_of(path, family, characters):
    """A font of this name with a square for each of the characters."""
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(c): "square" for c in characters})
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((900, 0), (900, 800), (100, 800)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyf({name: pen.glyph() for name in (".notdef", "square")})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "square"), (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable(dict(familyName=family, styleName="Regular"))
    builder.setupOS2(usWeightClass=500)
    builder.setupPost()
    builder.save(path)


@pytest.mark.filterwarnings("error")
def test_names_and_texts_in_any_script_are_drawn_without_boxes_or_warnings(corpus, capfd):
    accents = "Z" + "\u0301" * 40
    corpus["domains"] = ["小说 हिन्दी ภาษาไทย 🦊\u200d🦊 שלום \u202eabc", f"$math$ _{{x}}\n\x07 {accents}"]
    baseline = make_baseline()
    os.rename(baseline, "out/基线🦊")
    report.main(["out/基线🦊"])
    assert len(shown()) == 4 and not capfd.readouterr().err
    with open("out/report/windows.txt", encoding="utf-8") as file:
        text = file.read()
    assert "小说 हिन्दी ภาษาไทย 🦊\u200d🦊 שלום \\u202eabc\n" in text and f"$math$ _{{x}}↵\\x07 {accents}\n" in text


def test_a_character_is_drawn_with_a_font_of_the_system_that_has_it_or_else_as_an_escape(monkeypatch):
    text = "a小🦊é\r\n"
    assert figures.families_for(text) == ["DejaVu Sans"]
    assert figures.printable(text) == "a小🦊é↵"
    assert figures.printable(text, ["DejaVu Sans"]) == "a\\u5c0f\\U0001f98aé↵"
    assert figures.printable("e\u0301\u0301\u0301\u0301", ["DejaVu Sans"]) == "e\u0301\u0301\u0301\\u0301"
    font_of("squares.ttf", "Squares", "小说")
    monkeypatch.setattr(figures.font_manager.fontManager, "ttflist", [*figures.font_manager.fontManager.ttflist])
    figures.font_manager.fontManager.addfont("squares.ttf")
    families = figures.families_for(text)
    assert families == ["DejaVu Sans", "Squares"] and figures.printable(text, families) == "a小\\U0001f98aé↵"
    with figures.rc_context({"font.family": families}):
        wide = figures.shorten("小" * 200, 90, 2).split("\n")
        assert len(wide) == 2 and len(wide[0]) == 45 and wide[1].endswith("小…")
        assert figures.shorten("a b  c", 90, 2) == "a b c"


def test_values_come_from_the_first_run_that_has_them(no_figures, capsys, corpus):
    make_run("out/unfinished", [5, 4], scored=True, learning_rate=1.0)
    make_run("out/control", [5, 4, 3, 2.5, 2], **CONTROL)
    _, notes = printed(capsys, "out/control", "out/unfinished", make_baseline())
    assert "Values in the figures: out/baseline, " in notes


def test_the_time_of_a_step_with_and_without_its_validation_pass_is_told():
    *_, line = report.read_run(make_run("out/run", [5, 4, 3], scored=True)).lines
    assert (line["step_ms"], line["val_ms"], line["plain_ms"]) == (141.0, 20.0, 121.0)


def test_without_scores_there_are_no_value_figures(capsys):
    make_run("out/control", [5, 4, 3, 2.5, 2], **CONTROL)
    _, notes = printed(capsys, "out/control")
    assert shown() == ["loss.png"] and "no value figures" in notes


def test_another_corpus_in_its_place_is_refused(corpus):
    corpus["fingerprint"] = "other"
    with pytest.raises(UserError, match="data/tiny: not the corpus that out/baseline was trained on"):
        report.main([make_baseline()])


def test_without_the_corpus_there_is_no_text_and_values_without_a_spread_can_be_drawn(capsys):
    make_run("out/flat", [5, 5], scored=True, max_iters=1)
    make_log("out/flat", np.zeros((1, 4)), np.arange(4)[None])
    _, notes = printed(capsys, "out/flat")
    assert shown() == ["loss.png", "report.png", "values.png"] and "The corpus tiny is not here" in notes


def test_more_domains_than_fit_are_cut_to_the_largest():
    ax = figures.Figure().subplots()
    domain = np.repeat(np.arange(20), np.arange(1, 21))
    figures.draw_domains(ax, np.linspace(-1, 1, len(domain)), domain, [f"domain {d}" for d in range(20)])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 14 and {"domain 19\n0% of 20", "domain 6\n100% of 7"} < set(labels)


def test_the_scored_windows_are_a_data_set_of_text_and_values(no_figures, corpus, capsys):
    datasets = pytest.importorskip("datasets")
    value, visits = 1e-6 * (np.arange(40) - 10), np.full(40, 4)
    both, errors = np.stack([value, -value], 1), np.stack([value**2, np.arange(40) / 7], 1)
    edit_values(make_baseline(), columns=np.array(["all:sgd", "odd:sgd"]), value=value, values=both, errors=errors)
    found = {}
    for name, flags in (("a.jsonl", []), ("new/a.parquet", []), ("odd.jsonl", ["--filter_column=odd:sgd"])):
        column = "odd:sgd" if flags else "all:sgd"
        _, notes = printed(capsys, "out/baseline", f"--export={name}", *flags)
        kind = name.split(".")[1].replace("jsonl", "json")
        found[name] = list(datasets.load_dataset(kind, data_files=name, split="train", cache_dir="cache"))
        kept = sum(row["kept"] for row in found[name])
        assert f"Export: {name}, 40 windows by {column}, {kept} of them kept." in notes
    assert found["a.jsonl"] == found["new/a.parquet"] and not os.path.exists("a.jsonl.tmp")
    rows = {key: [row[key] for row in found["a.jsonl"]] for key in found["a.jsonl"][0]}
    assert rows["sample_id"] == list(range(40)) and rows["visits"] == visits.tolist()
    assert rows["value"] == value.tolist() and rows["error"] == errors[:, 0].tolist()
    assert rows["kept"] == (value >= 0).tolist() and rows["domain"] == ["even", "odd"] * 20
    assert rows["start"] == list(range(0, 320, 8)) and rows["end"] == list(range(9, 329, 8))
    assert rows["text"][0] == "plain tex" and rows["text"][12] == "pla<|endoftext|>n tex"
    assert rows["text"][4] == "中 é  \ufffd"  # the first byte of the next window is none of UTF-8
    odd = found["odd.jsonl"]
    assert [row["value"] for row in odd] == (-value).tolist() and odd[7]["error"] == 1 and odd[7]["kept"]


def test_a_document_has_the_values_of_its_tokens(no_figures, corpus, capsys):
    sample_id = np.array([0, 3, 12, 13, 14, 39])
    value, visits = np.array([1e-6, 3e-6, -9e-6, 2e-6, 5e-7, 8e-6]), np.array([1, 2, 3, 4, 5, 6])
    edit_values(make_baseline(), sample_id=sample_id, value=value, visits=visits)
    owner = np.repeat([0, 1, 2], [100, 20, 201])  # of every token
    expected = np.zeros((3, 3))  # value, visits and number of the scored tokens of each document
    for i, v, n in zip(sample_id, value, visits, strict=True):
        for token in range(i * 8 + 1, i * 8 + 9):
            expected[owner[token]] += v / 8, n, 1
    printed(capsys, "out/baseline", "--export=documents.jsonl", "--export_by=document")
    with open("documents.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert [row["document"] for row in rows] == [0, 1, 2] and [row["domain"] for row in rows] == ["even", "odd", "even"]
    assert [row["value"] for row in rows] == pytest.approx(expected[:, 0])
    assert [row["visits"] for row in rows] == pytest.approx(expected[:, 1] / expected[:, 2])
    assert [row["scored_tokens"] for row in rows] == expected[:, 2].tolist()
    assert [row["kept"] for row in rows] == [True, False, True]
    assert [(row["start"], row["end"]) for row in rows] == [(0, 100), (100, 120), (120, 321)]
    assert rows[0]["text"].startswith("plain text with $math$ \\") and rows[0]["text"].endswith("pla")
    edit_values("out/baseline", sample_id=np.array([39]), value=value[:1], visits=visits[:1])
    printed(capsys, "out/baseline", "--export=documents.jsonl", "--export_by=document")
    with open("documents.jsonl", encoding="utf-8") as file:
        (row,) = [json.loads(line) for line in file]  # the others have no scored token
    assert row["document"] == 2 and row["value"] == pytest.approx(1e-6)


def test_what_cannot_be_exported_or_written_is_refused_before_anything_is_written(corpus):
    make_run("out/control", [5, 4], **CONTROL)
    make_baseline()
    open("file", "w").close()
    os.mkdir("folder.jsonl")
    for argv, message in (
        ("out/control --export=x.jsonl", "--export=x.jsonl: No run has values"),
        ("out/baseline --export=x.json", "--export=x.json: expected a file whose name ends in .jsonl or .parquet"),
        ("out/baseline --export=folder.jsonl", "--export=folder.jsonl: expected a file"),
        ("out/baseline --export=x.jsonl --filter_column=z", "values.npz: has no column 'z', only all:sgd"),
        ("out/baseline --export=file/x.jsonl", "file/x.jsonl: could not be written"),
        ("out/baseline --out=file", "file: could not be written"),
        ("out/baseline --out=file/report --export=x.jsonl", "file/report: could not be written"),
        ("out/baseline --out=/proc/report", "/proc/report: could not be written"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(argv.split())
        assert not os.path.exists("out/report") and not [name for name in os.listdir() if name.startswith("x")]
    os.rename("data/tiny", "data/other")
    with pytest.raises(UserError, match="--export=x.jsonl: The corpus tiny is not here"):
        report.main(["out/baseline", "--export=x.jsonl"])
    assert not os.path.exists("out/report")


def test_reports_into_one_folder_at_once_leave_one_of_them_whole(corpus, monkeypatch, capfd):
    def draw(rows, *others):
        time.sleep(0.05)
        return {name: rows[0]["name"].encode() for name in "123456789"}

    monkeypatch.setattr(figures, "draw_figures", draw)
    runs = [make_baseline(f"out/{name}") for name in "abcd"]
    context = multiprocessing.get_context("fork")
    several = [context.Process(target=report.main, args=([run, "--export=x.jsonl"],)) for run in runs]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0] * 4 and not capfd.readouterr().err
    written = set()
    for name in shown():
        with open(f"out/report/{name}") as file:
            written.add(file.read())
    assert len(shown()) == 9 and len(written) == 1  # all from the same run
    with open("x.jsonl", encoding="utf-8") as file:
        assert len([json.loads(line) for line in file]) == 40
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


def test_a_stream_of_another_encoding_gets_escapes(monkeypatch):
    for seed, loss in ((1, 3.0), (2, 4.0)):
        make_run(f"out/度量 é_s{seed}", [5, loss], seed=seed, max_iters=10)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["report.py", "out/度量 é_s1", "out/度量 é_s2"])
    runpy.run_path(f"{ROOT}/report.py", run_name="__main__")
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "| \\u5ea6\\u91cf \\xe9" in text and "3.5000 \\xb1 0.7071" in text


def test_a_folder_with_brackets_and_lines_that_end_as_on_windows_are_read(no_figures, capsys, corpus):
    folder = make_baseline("out/[v2] a")
    with open(f"{folder}/metrics.jsonl") as file:
        text = file.read()
    with open(f"{folder}/metrics.jsonl", "w", newline="\r\n") as file:
        file.write(text)
    cells, _ = printed(capsys, f"{folder}/")
    assert cells["[v2] a"]["final test loss"] == "2.0000" and cells["[v2] a"]["negative windows"] == "25.0%"


def test_an_unfinished_run_is_marked(no_figures, capsys):
    make_run("out/control", [5, 4, 3, 2.5, 2], **CONTROL)
    make_run("out/filtered", [5, 3.5, 3], **FILTERED)
    with open("out/filtered/metrics.jsonl", "a") as file:
        file.write('{"iter": 30, "test_l')  # being written as we read
    cells, notes = printed(capsys, "out/control", "out/filtered")
    assert cells["filtered"]["final test loss"] == "3.0000"
    assert "out/filtered has not ended: 20 of 40 iterations." in notes and "out/control has not ended" not in notes


def test_a_run_that_diverged_has_no_number_and_is_no_reference(capsys):
    make_run("out/control", [float("inf"), 4, float("nan"), float("nan"), float("nan")], **CONTROL)
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
        "bits_per_byte": {"mean": None, "sd": None, "each": [None]},
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
            "metrics.jsonl: damaged.* line 2 .*--init_from=resume",
        ),
        ("metrics.jsonl", '{"iter": 0, "test_loss": 5}\n[]\n', "metrics.jsonl: damaged, or not written"),
        ("metrics.jsonl", '{"iter": 0, "test_loss": null}\n', "metrics.jsonl: damaged.*NoneType"),
        ("metrics.jsonl", '{"iter": 0, "loss": 5, "step_ms": 1}\n', "1 training lines and no evaluation .*resume"),
        ("metrics.jsonl", "", "0 training lines and no evaluation"),
        ("config.json", "{", "out/a/config.json: damaged"),
        ("config.json", '{"knobs": {}}', r"config.json: damaged, or not written by this script \(KeyError"),
    ],
)
def test_damaged_files_are_refused(name, text, message):
    make_run("out/a", [5, 4])
    with open(f"out/a/{name}", "w") as file:
        file.write(text)
    with pytest.raises(UserError, match=message):
        report.main(["out/a"])

"""
Runs of train.py -> a table and figures: what a filter saved, and what the values behind it look like.

    python report.py out/baseline                                    # one run: its loss, its values, its windows
    python report.py out/baseline out/control out/filtered           # and what the filter saved against the control
    python report.py out/control_s* out/filtered_s*                  # runs that differ only in their seed: averaged
    python report.py out/baseline --export=valued.jsonl              # its windows as text, which a filter keeps

The reference is the control, which draws from the scored windows and rejects none, or else the first run. Its final
test loss is the target. A run, the reference too, reaches it at its first evaluation at or below it, interpolated
linearly from the one before. `saved` is the share of the iterations of the reference of the same seed, or else of the
first one, that a run does not need. The iterations of the run that scored the windows are not counted.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from support.configurator import check
from support.corpus import get_tokenizer, load_meta, open_split, window_domains
from support.export import export, read_column
from support.figures import number, printable, write_figures
from support.files import atomic_write, reading
from support.run_folder import FREE_KNOBS
from support.values import load_values, read_log

# knobs that may differ between the runs of a group
FREE = FREE_KNOBS - {"max_iters", "filter_from", "filter_column"} | {"seed"}
ARM = ("score", "val", "filter", "drop_random")  # beginnings of the knobs that make the arms of a comparison


@dataclass(eq=False)
class Run:
    folder: str
    config: dict
    knobs: dict
    iters: np.ndarray  # (e,) iterations before each evaluation
    losses: np.ndarray  # (e,) test losses, nats per token
    lines: list  # the training lines of metrics.jsonl; plain_ms is step_ms without the validation pass
    has_values: bool
    bits_per_byte: float | None  # of the last evaluation; runs of older code do not tell it
    arm: str  # 'treatment', 'control' or 'plain'


def read_run(folder, test_set="all"):
    """The run in `folder`, its losses on `test_set`, 'all' or one of its val_sets. Raises UserError if it is none."""
    config_path, metrics_path = os.path.join(folder, "config.json"), os.path.join(folder, "metrics.jsonl")
    mend = f"train a run there, python train.py config/<...>.py --out_dir={folder}, or go on with --init_from=resume"
    with reading(config_path, mend), open(config_path, encoding="utf-8") as file:
        config = json.load(file)
        knobs, _, _ = config["knobs"], config["fingerprint"], config["coverage"]
        treated, drawn = knobs["filter_negative"] or knobs["drop_random"] > 0, knobs["filter_from"]
    key = "test_loss" if test_set == "all" else f"test_loss_{test_set}"
    with reading(metrics_path, mend), open(metrics_path, encoding="utf-8", errors="replace") as file:
        texts = file.read().split("\n")[:-1]  # train.py may be writing the last line
        lines = json.loads("[" + ",\n".join(texts) + "]")  # as one array: an error tells the line
        found = {line["iter"]: float(line[key]) for line in lines if key in line}
        bits = [line.get(key.replace("loss", "bpb", 1)) for line in lines if key in line]
        lines = [line for line in lines if "test_loss" not in line]
        lines = [line | dict(plain_ms=line["step_ms"] - line.get("val_ms", 0)) for line in lines]
    mend = mend if test_set == "all" else f"--test_set={test_set} needs a run with --val_sets=all,{test_set}"
    check(found, f"{metrics_path}: {len(lines)} training lines and no evaluation with a {key}; {mend}")
    iters, losses = np.array(list(found)), np.array(list(found.values()))
    losses[np.isinf(losses)] = np.nan  # no axis can show it
    has_values = os.path.isfile(os.path.join(folder, "values.npz"))
    arm = "treatment" if treated else "control" if drawn else "plain"
    return Run(folder, config, knobs, iters, losses, lines, has_values, bits[-1], arm)


def group_key(config):
    """What the runs of a group share: the knobs that are not FREE, and those of the run behind filter_from."""
    knobs = {key: value for key, value in config["knobs"].items() if key not in FREE}
    source = os.path.join(knobs["filter_from"], "config.json")
    knobs["filter_from"] = bool(knobs["filter_from"])
    if knobs["filter_from"] and os.path.isfile(source):
        with open(source, encoding="utf-8") as file:
            knobs["filter_from"] = group_key(json.load(file))
    return json.dumps(knobs, sort_keys=True)


def group_runs(runs):
    """{name: runs that differ only in their seed}, in order. No seed is twice in a group."""
    groups, times = {}, Counter()
    for run in runs:
        key = group_key(run.config)
        times[key, run.knobs["seed"]] += 1
        groups.setdefault((key, times[key, run.knobs["seed"]]), []).append(run)
    names = [group_name([run.folder for run in group]) for group in groups.values()]
    if len(set(names)) < len(names):
        names = [group[0].folder for group in groups.values()]
    return dict(zip(names, groups.values(), strict=True))


def group_name(folders):
    """A folder's own name; for control_s1, control_s2, or for s1 and s2 in a folder control, 'control'."""
    folders = [os.path.abspath(folder) for folder in folders]
    name = os.path.commonprefix([os.path.basename(folder) for folder in folders])
    if len(folders) > 1:
        name = re.sub(r"(^|[_.-]+)(seed|s)?[_.-]*\d*$", "", name) or os.path.basename(os.path.dirname(folders[0]))
    return name.lstrip("_")  # a legend leaves out names that begin with _


def first_crossing(iters, losses, target):
    """Iterations to the first of the losses (e,) at or below `target`, interpolated from the one before, or None."""
    iters, losses = iters[np.isfinite(losses)], losses[np.isfinite(losses)]
    below = np.flatnonzero(losses <= target)
    if len(below) == 0:
        return None
    two = [below[0], max(below[0] - 1, 0)]
    return float(np.interp(target, losses[two], iters[two]))


def spread(each):
    """{mean, sd, each} of a number per run; None for one that is absent or not finite, and then for all of them."""
    each = [None if x is None or not np.isfinite(x) else float(x) for x in each]
    known = [] if None in each else each
    return dict(mean=np.mean(known) if known else None, sd=np.std(known, ddof=1) if len(known) > 1 else None, each=each)


def compare(groups, reference, target_loss=None):
    """A row for each group: what its runs are, and the `spread` of their numbers. Shares are fractions, times in ms."""
    by_seed = {run.knobs["seed"]: run for run in groups[reference]}
    rows = []
    for group, runs in groups.items():
        numbers = []
        for run in runs:
            theirs = by_seed.get(run.knobs["seed"], groups[reference][0])
            target = float(theirs.losses[-1]) if target_loss is None else target_loss
            check(np.isfinite(target), f"{reference}: its test loss ends at {target}; give a --target_loss=<nats>")
            iterations, whole = (first_crossing(one.iters, one.losses, target) for one in (run, theirs))
            saved = 1 - iterations / whole if iterations is not None and whole else None
            found = dict(target=target, iterations=iterations, saved=saved, final_loss=run.losses[-1])
            negative = np.mean(load_values(run.folder)[1] < 0) if run.has_values else None
            found |= dict(bits_per_byte=run.bits_per_byte, negative_windows=negative)
            for key, name in dict(step_ms="plain_ms", validation_ms="val_ms").items():
                found[key] = np.median([line.get(name, np.nan) for line in run.lines] or np.nan)
            numbers.append(found)
        row = dict(name=group, reference=group == reference, arm=runs[0].arm, coverage=runs[0].config["coverage"])
        row |= dict(runs=runs, folders=[run.folder for run in runs], seeds=[run.knobs["seed"] for run in runs])
        rows.append(row | {key: spread([found[key] for found in numbers]) for key in numbers[0]})
    return rows


def table(rows, loss, goal):
    """The rows as a Markdown table. `loss` and `goal` are the names of the test loss and of the target."""
    lines = [["run", "seeds", f"iterations to the {goal}", "saved", f"final {loss}", "bits per byte"]]
    lines[0] += ["negative windows", "eligible / scored / corpus windows", "touchable draws", "step, ms"]
    lines[0] += ["validation pass, ms"]
    for row in rows:
        each, cover = row["iterations"]["each"], row["coverage"]
        some = f" ({len(each) - each.count(None)} of {len(each)} did)" if len(each) > 1 else ""
        saved = "reference" if row["reference"] else number(row["saved"], ".1%")
        line = [row["name"], str(len(each)), number(row["iterations"], ",.0f", "not reached" + some), saved]
        line += [number(row["final_loss"], ".4f", "nan"), number(row["bits_per_byte"], ".4f")]
        line += [number(row["negative_windows"], ".1%"), "–", "–"]
        if cover:
            line[-2:] = "{eligible:,} / {scored:,} / {corpus:,}".format(**cover), f"{cover['touchable']:.0%}"
        lines.append([*line, number(row["step_ms"], ".1f"), number(row["validation_ms"], ".1f")])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def remarks(rows):
    """What a reader of the table must know of the runs, as a list of sentences."""
    notes = ["Step: median, without the validation pass. ±: standard deviation over seeds. Coverage: the first seed's."]
    theirs = next(row["runs"][0].knobs for row in rows if row["reference"])
    for row in rows:
        for run in row["runs"]:
            if run.iters[-1] < run.knobs["max_iters"]:
                notes.append(f"{run.folder} has not ended: {run.iters[-1]:,} of {run.knobs['max_iters']:,} iterations.")
        pairs = [(key, value, theirs.get(key)) for key, value in row["runs"][0].knobs.items() if key not in FREE]
        differ = [f"{key} {a} (not {b})" for key, a, b in pairs if a != b and not key.startswith(ARM)]
        if differ:
            notes.append(f"{row['name']} differs from the reference in more than its windows: {', '.join(differ)}.")
    return notes


def trial_of(folder):
    """What trial.py has found with the run in `folder`, as a list of one sentence or none."""
    path = os.path.join(folder, "trial", "trial.json")
    if not os.path.isfile(path):
        return []
    with reading(path, f"make it again with python trial.py {folder}"), open(path, encoding="utf-8") as file:
        found = json.load(file)
    return [f"Trial of {folder}: {found['says']} Figure: {found['figure']}"] if "says" in found else []


def read_scored(run):
    """
    What figures and export show of a scored run: sample_id, value, visits (n,), the log; if its corpus is here, also
    tokens, encoding, documents, domains (names), domain (n,), and some windows, {title: list of (heading, text)}.
    """
    sample_id, value, visits = load_values(run.folder)
    scored = dict(sample_id=sample_id, value=value, visits=visits, log=read_log(run.folder))
    folder, T = os.path.join(run.knobs["data_dir"], run.knobs["dataset"]), run.knobs["block_size"]
    if not os.path.isdir(folder):
        return scored
    meta = load_meta(folder)
    same = meta["fingerprint"] == run.config["fingerprint"]
    check(same, f"{folder}: not the corpus that {run.folder} was trained on; prepare that one again")
    tokens, encoding = open_split(folder, "train", meta), get_tokenizer(meta["tokenizer"])
    pieces = np.array_split(sample_id, len(value) // 2**20 + 1)  # so that memory does not grow with the windows
    domain = np.concatenate([window_domains(folder, "train", ids, T, meta) for ids in pieces])
    scored |= dict(tokens=tokens, encoding=encoding, domains=meta["domains"], domain=domain)
    scored["documents"] = np.load(os.path.join(folder, "train_docs.npy"), mmap_mode="r")
    order = np.argsort(value, kind="stable")
    scored["windows"] = {"Highest values": [], "Lowest values": []}
    for shown, chosen in zip(scored["windows"].values(), (order[::-1][:5], order[:5]), strict=True):
        for i, window in zip(chosen, tokens.windows(sample_id[chosen], T).tolist(), strict=True):
            nats = f"{value[i]:+.2e} nats in {visits[i]} visit{'s' * int(visits[i] != 1)}".replace("-", "−")
            heading = f"{nats}, window {sample_id[i]}, {meta['domains'][domain[i]]}"
            shown.append((printable(heading), printable(encoding.decode(window, errors="backslashreplace"))))
    return scored


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run", help="a run's folder")
    parser.add_argument("--target_loss", type=float, metavar="NATS", help="default: the reference's final test loss")
    parser.add_argument("--test_set", default="all", metavar="SET", help="go by the test loss of one of the val_sets")
    parser.add_argument("--reference", metavar="RUN", help="default: the control among the runs, or the first run")
    parser.add_argument("--out", default="out/report", metavar="FOLDER", help="for the figures; default: out/report")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the table")
    parser.add_argument("--export", metavar="FILE", help="write the scored windows to a .jsonl or .parquet file")
    parser.add_argument("--export_by", choices=["window", "document"], default="window", help="the rows of --export")
    parser.add_argument("--filter_column", default="", metavar="NAME", help="--export goes by another column of values")
    args = parser.parse_args(argv)
    fits = not args.export or (args.export.endswith((".jsonl", ".parquet")) and not os.path.isdir(args.export))
    check(fits, f"--export={args.export}: expected a file whose name ends in .jsonl or .parquet")
    runs = {os.path.realpath(folder): read_run(folder, args.test_set) for folder in args.runs}
    first, *others = runs.values()
    for run in others:
        what = f"{first.folder} and {run.folder} were trained on different corpora; report each by itself"
        check(run.config["fingerprint"] == first.config["fingerprint"], what)
    controls = [path for path, run in runs.items() if run.arm == "control"]
    chosen = os.path.realpath(args.reference) if args.reference else [*controls, *runs][0]
    check(chosen in runs, f"--reference={args.reference}: not among the runs; add it to them")
    groups = group_runs(runs.values())
    reference = next(name for name, group in groups.items() if runs[chosen] in group)
    rows = compare(groups, reference, args.target_loss)
    notes = remarks(rows) + [note for run in runs.values() for note in trial_of(run.folder)]
    loss = "test loss" if args.test_set == "all" else f"test loss on {args.test_set}"
    goal = f"final {loss} of {reference}" if args.target_loss is None else f"target {loss}"
    run = next((run for run in runs.values() if run.has_values), None)
    scored = read_scored(run) if run else {}
    if not scored:
        notes.append("No run has values (values.npz of a run with --score=True that has ended): no value figures.")
    else:
        notes.append(f"Values in the figures: {run.folder}, column {scored['log']['directions'][0]}.")
        if "windows" not in scored:
            notes.append(f"The corpus {run.knobs['dataset']} is not here: no domains and no windows as text.")
    check(not args.export or "windows" in scored, f"--export={args.export}: {notes[-1]}")
    exported = scored | read_column(run.folder, args.filter_column) if args.export else {}
    # opened first, so that nothing is written where the export cannot be
    with atomic_write(args.export, f".{os.getpid()}") if args.export else nullcontext() as file:
        files = write_figures(args.out, rows, loss, goal, scored)
        if args.export:
            files["export"] = args.export
            count, kept = export(file, args.export, args.export_by, exported, run.knobs["block_size"])
            column = args.filter_column or scored["log"]["directions"][0]
            notes.append(f"Export: {args.export}, {count:,} {args.export_by}s by {column}, {kept:,} of them kept.")
    if args.json:
        shown = [{key: value for key, value in row.items() if key != "runs"} for row in rows]
        print(json.dumps(dict(rows=shown, notes=notes, files=files), indent=1, allow_nan=False))
    else:
        print(table(rows, loss, goal), "", *notes, f"Figures: {args.out}", sep="\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack a character
    main()

"""
Runs of train.py -> a table and figures: what a filter saved, and what the values behind it look like.

    python report.py out/baseline                                    # one run: its loss, its values, its windows
    python report.py out/baseline out/control out/filtered           # and what the filter saved against the control
    python report.py out/control_s* out/filtered_s*                  # runs that differ only in their seed: averaged
    python report.py out/a out/b --target_loss=3.2 --out=out/report

The reference is the control, which draws from the scored windows and rejects none; without a control it is the first
run. Its final test loss is the target. A run reaches the target at its first evaluation at or below it, interpolated
linearly from the evaluation before; so does the reference. `saved` is the share of the reference's iterations that a
run does not need. It is compared with the reference of its own seed; without one, with the first reference. The
iterations of the run that scored the windows are not counted.
"""

import argparse
import json
import math
import os
import re
from dataclasses import dataclass

import numpy as np

from support.configurator import UserError
from support.corpus import get_tokenizer, load_meta, open_split, window_domains
from support.figures import number, printable, write_figures
from support.run_folder import FREE_KNOBS
from support.values import load_values, read_log

FREE = FREE_KNOBS - {"max_iters"} | {"seed"}  # knobs that may differ between the runs of a group
ARM = ("score", "val", "filter", "drop_random")  # beginnings of the knobs that make the arms of a comparison


@dataclass
class Run:
    folder: str
    config: dict
    knobs: dict
    iters: np.ndarray  # (e,) iterations before each evaluation
    losses: np.ndarray  # (e,) test losses, nats per token
    lines: list  # the training lines of metrics.jsonl
    has_values: bool

    @property
    def drops(self):
        return self.knobs["filter_negative"] or self.knobs["drop_random"] > 0


def read_run(folder, test_set="all"):
    """
    The run in `folder`, with its losses on the whole test split or on `test_set`, one of its val_sets. Raises UserError
    where the folder holds no run, a file is damaged or nothing was evaluated.
    """
    config_path, metrics_path = os.path.join(folder, "config.json"), os.path.join(folder, "metrics.jsonl")
    for path in (config_path, metrics_path):
        if not os.path.isfile(path):
            mend = f"train it with python train.py config/<...>.py --out_dir={folder}"
            raise UserError(f"{path}: no such file, so {folder} is not the folder of a run; {mend}")
    mend = f"go on with it, python train.py ... --init_from=resume --out_dir={folder}, or train it anew"
    losses, lines, where = {}, [], config_path
    key = "test_loss" if test_set == "all" else f"test_loss_{test_set}"
    try:
        with open(config_path, encoding="utf-8") as file:
            config = json.load(file)
        knobs, _, _ = config["knobs"], config["fingerprint"], config["coverage"]
        with open(metrics_path, encoding="utf-8", errors="replace") as file:
            for n, text in enumerate(file, 1):
                where = f"{metrics_path}, line {n}"
                if not text.endswith("\n"):
                    break  # train.py is writing it
                line = json.loads(text)
                if "test_loss" in line:
                    losses[int(line["iter"])] = float(line.get(key, math.nan))
                else:
                    lines.append(line | {"step_ms": line["step_ms"] - line.get("val_ms", 0)})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: not what train.py writes ({type(error).__name__}: {error}); {mend}") from error
    if not losses:
        raise UserError(f"{metrics_path}: {len(lines)} training lines and no evaluation of the test loss; {mend}")
    if all(map(math.isnan, losses.values())):
        found = f"--test_set={test_set}: {folder} was trained with --val_sets={knobs['val_sets']}"
        raise UserError(f"{found}; train it with --val_sets=all,{test_set}")
    iters = sorted(losses)
    has_values = knobs["score"] and os.path.isfile(os.path.join(folder, "values.npz"))
    return Run(folder, config, knobs, np.array(iters), np.array([losses[i] for i in iters]), lines, has_values)


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
    groups = {}
    for run in runs:
        key = group_key(run.config), 1
        while run.knobs["seed"] in [other.knobs["seed"] for other in groups.get(key, [])]:
            key = key[0], key[1] + 1
        groups.setdefault(key, []).append(run)
    names = [group_name([run.folder for run in group]) for group in groups.values()]
    if len(set(names)) < len(names):
        names = [group[0].folder for group in groups.values()]
    return dict(zip(names, groups.values(), strict=True))


def group_name(folders):
    """A folder's own name; for control_s1, control_s2, or for s1 and s2 in a folder control, 'control'."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(names) > 1:
        shared = re.sub(r"(^|[_.-]+)(seed|s)?[_.-]*\d*$", "", os.path.commonprefix(names))
        names = [shared or os.path.basename(os.path.dirname(os.path.abspath(folders[0])))]
    return names[0].lstrip("_")  # a legend leaves out names that begin with _


def first_crossing(iters, losses, target):
    """Iterations to the first of the losses (e,) at or below `target`, interpolated from the one before, or None."""
    iters, losses = iters[np.isfinite(losses)], losses[np.isfinite(losses)]
    below = np.flatnonzero(losses <= target)
    if len(below) == 0:
        return None
    two = [below[0], max(below[0] - 1, 0)]
    return float(np.interp(target, losses[two], iters[two]))


def compare(groups, reference, target_loss=None):
    """
    A row of the table for each group: its runs, and lists of one number a run, None where a run has no such number.
    Losses in nats per token, shares as fractions, times in ms. Raises UserError where a reference's loss is not finite.
    """
    by_seed = {run.knobs["seed"]: run for run in groups[reference]}
    rows = []
    for name, runs in groups.items():
        numbers = []
        for run in runs:
            theirs = by_seed.get(run.knobs["seed"], groups[reference][0])
            target = float(theirs.losses[-1]) if target_loss is None else target_loss
            if not math.isfinite(target):
                raise UserError(f"{reference}: its test loss ends at {target}; give a --target_loss=<nats>")
            iterations, whole = (first_crossing(one.iters, one.losses, target) for one in (run, theirs))
            saved = 1 - iterations / whole if iterations is not None and whole else None
            negative = np.mean(load_values(run.folder)[1] < 0) if run.has_values else None
            found = dict(target=target, iterations=iterations, saved=saved, loss=run.losses[-1], negative=negative)
            for key in ("step_ms", "val_ms"):
                times = [line[key] for line in run.lines if key in line]
                found[key] = np.median(times) if times else None
            numbers.append(found)
        row = dict(name=name, runs=runs, reference=name == reference)
        rows.append(row | {key: [found[key] for found in numbers] for key in numbers[0]})
    return rows


def table(rows, loss, goal):
    """The rows as a Markdown table. `loss` and `goal` are the names of the test loss and of the target."""
    head = ["run", "seeds", f"iterations to the {goal}", "saved", f"final {loss}", "negative windows"]
    head += ["eligible / scored / corpus windows", "touchable draws", "step, ms", "validation pass, ms"]
    lines = [head]
    for row in rows:
        each, cover = row["iterations"], row["runs"][0].config["coverage"]
        some = f" ({len(each) - each.count(None)} of {len(each)} did)" if len(each) > 1 else ""
        saved = "reference" if row["reference"] else number(row["saved"], ".1%")
        line = [row["name"], str(len(each)), number(each, ",.0f", "not reached" + some), saved]
        line += [number(row["loss"], ".4f"), number(row["negative"], ".1%")]
        line += ["{eligible:,} / {scored:,} / {corpus:,}".format(**cover) if cover else "–"]
        line += [f"{cover['touchable']:.0%}" if cover else "–"]
        lines.append([*line, number(row["step_ms"], ".1f"), number(row["val_ms"], ".1f")])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def remarks(groups, reference):
    """What a reader of the table must know of the runs, as a list of sentences."""
    notes = ["Step: median, without the validation pass. ±: standard deviation over seeds. Coverage: the first seed's."]
    theirs = groups[reference][0].knobs
    for name, runs in groups.items():
        for run in runs:
            if run.iters[-1] < run.knobs["max_iters"]:
                notes.append(f"{run.folder} has not ended: {run.iters[-1]:,} of {run.knobs['max_iters']:,} iterations.")
        pairs = [(key, value, theirs.get(key)) for key, value in runs[0].knobs.items() if key not in FREE]
        differ = [f"{key} {a} (not {b})" for key, a, b in pairs if a != b and not key.startswith(ARM)]
        if differ:
            notes.append(f"{name} differs from {reference} in more than its windows: {', '.join(differ)}.")
    return notes


def read_scored(run):
    """
    What the figures show of a scored run: value (n,) and the log; where its corpus is on this machine, also domains
    (names), domain (n,) and the windows `highest` and `lowest` as (heading, text). Raises UserError for another corpus.
    """
    sample_id, value, visits = load_values(run.folder)
    scored = dict(value=value, log=read_log(run.folder))
    folder, T = os.path.join(run.knobs["data_dir"], run.knobs["dataset"]), run.knobs["block_size"]
    if not os.path.isdir(folder):
        return scored
    meta = load_meta(folder)
    if meta["fingerprint"] != run.config["fingerprint"]:
        raise UserError(f"{folder}: not the corpus that {run.folder} was trained on; prepare that one again")
    tokens, encoding = open_split(folder, "train", meta), get_tokenizer(meta["tokenizer"])
    scored |= dict(domains=meta["domains"], domain=window_domains(folder, "train", sample_id, T, meta))
    order = np.argsort(value, kind="stable")
    k = min(5, max(1, len(order) // 2))
    for side, chosen in dict(highest=order[::-1][:k], lowest=order[:k]).items():
        scored[side] = []
        for i, window in zip(chosen, tokens.windows(sample_id[chosen], T).tolist(), strict=True):
            nats = f"{value[i]:+.2e} nats in {visits[i]} visit{'s' * int(visits[i] != 1)}".replace("-", "−")
            heading = f"{nats}, window {sample_id[i]}, {meta['domains'][scored['domain'][i]]}"
            text = encoding.decode_bytes(window).decode("utf-8", errors="backslashreplace")
            scored[side].append((heading, printable(text)))
    return scored


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run", help="a run's folder")
    parser.add_argument("--target_loss", type=float, metavar="NATS", help="default: the reference's final test loss")
    parser.add_argument("--test_set", default="all", metavar="SET", help="go by the test loss of one of the val_sets")
    parser.add_argument("--out", default="out/report", metavar="FOLDER", help="for the figures; default: out/report")
    args = parser.parse_args(argv)
    runs = [read_run(folder, args.test_set) for folder in {os.path.realpath(path): path for path in args.runs}.values()]
    for run in runs:
        if run.config["fingerprint"] != runs[0].config["fingerprint"]:
            found = "were trained on different corpora, so their losses do not compare"
            raise UserError(f"{runs[0].folder} and {run.folder} {found}; run report.py on each by itself")
    groups = group_runs(runs)
    controls = [name for name, (run, *_) in groups.items() if run.knobs["filter_from"] and not run.drops]
    reference = [*controls, *groups][0]
    rows, notes = compare(groups, reference, args.target_loss), remarks(groups, reference)
    loss = "test loss" if args.test_set == "all" else f"test loss on {args.test_set}"
    goal = f"final {loss} of {reference}" if args.target_loss is None else f"target {loss}"

    run = next((run for run in runs if run.has_values), None)
    scored = read_scored(run) if run else {}
    if not scored:
        notes.append("No run has values (values.npz of a run with --score=True that has ended): no value figures.")
    else:
        notes.append(f"Values in the figures: {run.folder}, column {scored['log']['directions'][0]}.")
    if scored and "domain" not in scored:
        notes.append(f"The corpus {run.knobs['dataset']} is not here, so there are no domains and no windows as text.")
    write_figures(args.out, rows, loss, goal, scored)
    print(table(rows, loss, goal), "", *notes, f"Figures: {args.out}", sep="\n")


if __name__ == "__main__":
    main()

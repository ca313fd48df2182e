"""
Runs of train.py -> a table and figures: what a filter saved, and what the values behind it look like.

    python report.py out/baseline                                    # one run: its loss, its values, its windows
    python report.py out/baseline out/control out/filtered           # and what the filter saved against the control
    python report.py out/control_s* out/filtered_s*                  # runs that differ only in their seed: averaged
    python report.py out/a out/b --reference=out/a --target_loss=3.2 --out=out/report --json

How a saving is measured: the reference (the control among the runs, which draws from the scored windows and rejects
none; the first run if there is no control) ends at some test loss. Every run is asked after how many iterations it
was there: at its *first* evaluation at or below that loss, interpolated linearly from the evaluation before. The
reference is asked in the same way (a noisy curve may pass its own final loss before its end), and its answer is the
whole of which the saving is a share. A run is compared with the reference of its own seed, or with the mean of the
references where there is none of that seed. The iterations of the run that scored the windows are not counted.

Writes to --out: loss.png; where a run is scored also values.png (histogram, by domain, over the run), windows.txt
(the highest and the lowest windows as text) and report.png (the loss, the histogram and the windows in one figure).
The table goes to stdout as Markdown; with --json a JSON object goes there instead, and nothing else.
"""

import argparse
import functools
import json
import math
import os
import re
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.patches import Patch

from support.configurator import UserError
from support.corpus import get_tokenizer, load_meta, open_split, window_domains
from support.files import atomic_write
from support.values import columns_of, load_values, read_log

# ---------------------------------------------------------------------------------------------------------------------
# Runs, and groups of runs that differ only in their seed.

HOUSEKEEPING = {"out_dir", "init_from", "data_dir", "device", "compile", "log_interval", "checkpoint_interval"}
HOUSEKEEPING |= {"wandb_log", "wandb_project", "wandb_run_name", "process_timeout"}
# what makes an arm of the comparison; neither these nor scoring change a step, given its batch
ARM = {"score", "val_batch_size", "val_sets", "val_windows", "val_groups", "val_interval", "val_average"}
ARM |= {"value_direction", "value_order"}
ARM |= {"filter_from", "filter_column", "filter_pool", "filter_negative", "filter_lowest", "drop_random"}


@dataclass
class Run:
    folder: str
    config: dict
    iters: np.ndarray  # (e,) iterations before each evaluation
    losses: np.ndarray  # (e,) test losses, nats per token
    lines: list  # the training lines of metrics.jsonl
    test_set: str = ""  # whose losses they are; '': the whole test split's

    @property
    def knobs(self):
        return self.config["knobs"]

    @property
    def has_values(self):
        return self.knobs["score"] and os.path.isfile(os.path.join(self.folder, "values.npz"))


@dataclass
class Group:
    name: str
    runs: list

    @property
    def arm(self):
        knobs = self.runs[0].knobs
        if knobs["filter_negative"] or knobs.get("filter_lowest") or knobs["drop_random"]:
            return "treatment"
        return "control" if knobs["filter_from"] else "plain"

    def curve(self):
        """
        iters (e,) that all runs were evaluated at, the mean test loss there (e,), and its standard deviation or None.
        """
        iters = functools.reduce(np.intersect1d, [run.iters for run in self.runs])
        losses = np.stack([run.losses[np.searchsorted(run.iters, iters)] for run in self.runs])
        return iters, losses.mean(0), losses.std(0, ddof=1) if len(losses) > 1 else None


def read_run(folder, test_set=""):
    """
    The run in `folder`, its losses those of the whole test split or of `test_set`, one of the run's val_sets. A last
    line of metrics.jsonl without its line end is still being written, and left out. Raises UserError where the folder
    holds no run of train.py, a file is damaged or nothing was evaluated.
    """
    config_path, metrics_path = os.path.join(folder, "config.json"), os.path.join(folder, "metrics.jsonl")
    for path in (config_path, metrics_path):
        if not os.path.isfile(path):
            mend = f"train it with python train.py config/<...>.py --out_dir={folder}"
            raise UserError(f"{path}: no such file, so {folder} is not the folder of a run; {mend}")
    mend = f"go on with it, python train.py ... --init_from=resume --out_dir={folder}, or train it anew"
    evaluations, lines, where = {}, [], config_path
    key = f"test_loss_{test_set}" if test_set else "test_loss"
    try:
        with open(config_path, encoding="utf-8") as file:
            config = json.load(file)
        config["knobs"]["max_iters"], config["fingerprint"], config["coverage"]
        with open(metrics_path, encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, 1):
                where = f"{metrics_path}, line {number}"
                if not text.endswith("\n"):
                    break
                line = json.loads(text)
                if "test_loss" in line:
                    evaluations[int(line["iter"])] = float(line.get(key, math.nan))
                else:
                    line["iter"], line["loss"], line["step_ms"]
                    lines.append(line)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: not what train.py writes ({type(error).__name__}: {error}); {mend}") from error
    if not evaluations:
        raise UserError(f"{metrics_path}: {len(lines)} training lines and no evaluation of the test loss; {mend}")
    if test_set and all(map(math.isnan, evaluations.values())):
        found = f"--test_set={test_set}: {folder} was trained with --val_sets={config['knobs'].get('val_sets', 'all')}"
        raise UserError(f"{found}; train it with --val_sets=all,{test_set}")
    iters = np.array(sorted(evaluations))
    return Run(folder, config, iters, np.array([evaluations[i] for i in iters]), lines, test_set)


def group_key(config):
    """What the runs of a group share: the knobs but the seed and what is bound to it, those of filter_from too."""
    knobs = {key: value for key, value in config["knobs"].items() if key not in HOUSEKEEPING | {"seed"}}
    source = os.path.join(knobs["filter_from"], "config.json")
    knobs["filter_from"] = bool(knobs["filter_from"])
    if knobs["filter_from"] and os.path.isfile(source):
        with open(source, encoding="utf-8") as file:
            knobs["filter_from"] = group_key(json.load(file))
    return json.dumps(knobs, sort_keys=True)


def group_runs(runs):
    """The runs as groups, in order; no seed is twice in a group."""
    groups = []  # of (key, runs)
    for run in runs:
        key, seed = group_key(run.config), run.knobs["seed"]
        open_to_it = (g for k, g in groups if k == key and seed not in [member.knobs["seed"] for member in g])
        group = next(open_to_it, None)
        if group is None:
            groups.append((key, group := []))
        group.append(run)
    names = [group_name([run.folder for run in group]) for _, group in groups]
    if len(set(names)) < len(names):
        names = [group[0].folder for _, group in groups]
    return [Group(name, group) for name, (_, group) in zip(names, groups, strict=True)]


def group_name(folders):
    """A folder's own name; for control_s1, control_s2, or for s1 and s2 in a folder control, 'control'."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(names) > 1:
        shared = re.sub(r"(^|[_.-]+)(seed|s)?[_.-]*\d*$", "", os.path.commonprefix(names))
        names = [shared or os.path.basename(os.path.dirname(os.path.abspath(folders[0])))]
    return names[0].lstrip("_")  # a leading _ keeps a name out of matplotlib's legends


def pick_reference(groups, folder):
    """The group that holds the run `folder`; without one the control, or the first. Raises UserError if absent."""
    if not folder:
        return next((group for group in groups if group.arm == "control"), groups[0])
    for group in groups:
        if os.path.realpath(folder) in [os.path.realpath(run.folder) for run in group.runs]:
            return group
    runs = ", ".join(run.folder for group in groups for run in group.runs)
    raise UserError(f"--reference={folder}: not among the runs ({runs}); add it to them")


# ---------------------------------------------------------------------------------------------------------------------
# The table.


def first_crossing(iters, losses, target):
    """
    Iterations to `target`: the first evaluation at or below it, interpolated linearly from the one before; None if
    there is none. iters, losses: (e,).
    """
    iters, losses = iters[np.isfinite(losses)], losses[np.isfinite(losses)]
    below = np.flatnonzero(losses <= target)
    if len(below) == 0:
        return None
    k = below[0]
    if k == 0:
        return float(iters[0])
    share = (losses[k - 1] - target) / (losses[k - 1] - losses[k])
    return float(iters[k - 1] + share * (iters[k] - iters[k - 1]))


def compare(groups, reference, target_loss=None):
    """
    A row of the table for each group: {name, folders, seeds, ...}, where every number that varies within a group is
    {mean, sd, each}: sd None for one run, mean None where a run has no such number. Losses in nats per token, shares
    as fractions, times in ms. Raises UserError where the reference ended at no finite loss and no target is given.
    """
    by_seed = {run.knobs["seed"]: (run.iters, run.losses) for run in reference.runs}
    rows = []
    for group in groups:
        numbers = []
        for run in group.runs:
            iters, losses = by_seed.get(run.knobs["seed"], reference.curve()[:2])
            target = float(losses[-1]) if target_loss is None else target_loss
            if not math.isfinite(target):
                raise UserError(f"{reference.name}: its test loss ends at {target}; give a --target_loss=<nats>")
            iterations, whole = first_crossing(run.iters, run.losses, target), first_crossing(iters, losses, target)
            saved = 1 - iterations / whole if iterations is not None and whole else None
            compared = dict(target=target, iterations=iterations, saved=saved)
            numbers.append(compared | dict(final_loss=run.losses[-1], best_loss=np.nanmin(run.losses)) | measure(run))
        row = dict(name=group.name, reference=group is reference, arm=group.arm)
        row |= dict(folders=[run.folder for run in group.runs], seeds=[run.knobs["seed"] for run in group.runs])
        row |= dict(coverage=group.runs[0].config["coverage"])
        row |= dict(ended=all(run.iters[-1] >= run.knobs["max_iters"] for run in group.runs))
        rows.append(row | {key: spread([of_run[key] for of_run in numbers]) for key in numbers[0]})
    return rows


def measure(run):
    """
    What a run's files say of its values and its speed: shares of negative draws and windows (None without scores) and
    ms of a step without its validation pass and of that pass, medians over the training lines but the first.
    """
    scored = [line for line in run.lines if line.get("negative") is not None]
    steps = np.diff([line["iter"] for line in scored], prepend=-1)  # a line speaks of those since the line before
    draws = np.average([line["negative"] for line in scored], weights=steps) if scored else None
    windows = np.mean(load_values(run.folder)[1] < 0) if run.has_values else None
    warm = run.lines[1:] or run.lines  # the first waits for compilation and caches
    step_ms = np.median([line["step_ms"] - line.get("val_ms", 0) for line in warm]) if warm else None
    validation_ms = np.median([line["val_ms"] for line in warm]) if warm and "val_ms" in warm[0] else None
    return dict(negative_draws=draws, negative_windows=windows, step_ms=step_ms, validation_ms=validation_ms)


def spread(values):
    each = [None if value is None or not math.isfinite(value) else float(value) for value in values]
    mean = None if None in each else float(np.mean(each))
    return dict(mean=mean, sd=float(np.std(each, ddof=1)) if mean is not None and len(each) > 1 else None, each=each)


def number(cell, form, scale=1.0, unit="", absent="–"):
    """'12.3 ± 0.4%' of {mean, sd}."""
    if cell["mean"] is None:
        return absent
    sd = "" if cell["sd"] is None else f" ± {scale * cell['sd']:{form.lstrip('+')}}"
    return f"{scale * cell['mean']:{form}}{sd}{unit}".replace("-", "−")


def reach(row):
    """The iterations to the target as text: a mean only where every seed reached it."""
    each = row["iterations"]["each"]
    some = f" ({sum(i is not None for i in each)} of {len(each)} did)" if len(each) > 1 else ""
    return number(row["iterations"], ",.0f", absent="not reached" + some)


def table(rows, target_loss):
    """The rows of `compare` as a Markdown table."""
    to = "the reference's final loss" if target_loss is None else f"a test loss of {target_loss:g}"
    head = f"run|seeds|iterations to {to}|saved|final test loss|best test loss|negative draws|negative windows|"
    cells = [(head + "eligible / scored / corpus windows|touchable draws|step, ms|validation pass, ms").split("|")]
    for row in rows:
        cover, validation = row["coverage"], number(row["validation_ms"], ".1f")
        if row["validation_ms"]["mean"] is not None:
            validation += f" (+{row['validation_ms']['mean'] / row['step_ms']['mean']:.0%})"
        saved = "reference" if row["reference"] else number(row["saved"], ".1f", 100, "%")
        final = number(row["final_loss"], ".4f") + ("" if row["ended"] else " *")
        line = [row["name"], str(len(row["seeds"])), reach(row), saved, final, number(row["best_loss"], ".4f")]
        line += [number(row[key], ".1f", 100, "%") for key in ("negative_draws", "negative_windows")]
        line += ["{eligible:,} / {scored:,} / {corpus:,}".format(**cover) if cover else "–"]
        line += [f"{cover['touchable']:.0%}" if cover else "–", number(row["step_ms"], ".1f"), validation]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells)


def remarks(groups, rows, target_loss):
    """What a reader of the table must know: the rule, then what is particular about these runs. A list of sentences."""
    reference, its_row = next((group, row) for group, row in zip(groups, rows, strict=True) if row["reference"])
    notes = []
    if reference.runs[0].test_set:
        notes.append(f"Test losses are those of {reference.runs[0].test_set} alone.")
    if len(groups) > 1:
        to = f"the final test loss of {reference.name} ({number(its_row['target'], '.4f')})"
        notes.append(
            f"Iterations to {to if target_loss is None else f'a test loss of {target_loss:g}'}: the first evaluation "
            "at or below it, interpolated linearly from the one before, by one rule for every run. Saved: the share "
            f"fewer than {reference.name} itself takes by that rule ({reach(its_row)}). The iterations of the run that "
            "scored the windows are not counted."
        )
    if any(len(group.runs) > 1 for group in groups):
        notes.append(
            "±: standard deviation over seeds. Each run is compared with the reference run of its own seed, or with "
            "the references' mean curve where there is none. Coverage: the first seed's."
        )
    notes.append("Step: median, without the validation pass of the values; that pass beside it, in % of the rest.")
    for group in groups:
        knobs, ours, coverage = group.runs[0].knobs, reference.runs[0].knobs, group.runs[0].config["coverage"]
        for run in group.runs:
            if run.iters[-1] < run.knobs["max_iters"]:
                reached = f"{run.iters[-1]:,} of {run.knobs['max_iters']:,} iterations"
                notes.append(f"* {run.folder} has not ended ({reached}): its last test loss stands for its final one.")
        differ = [key for key in knobs if key not in HOUSEKEEPING | ARM | {"seed"} and knobs[key] != ours.get(key)]
        if differ:
            changes = ", ".join(f"{key} {knobs[key]} (not {ours.get(key)})" for key in differ)
            notes.append(f"{group.name} differs from {reference.name} in more than its windows: {changes}.")
        if coverage and coverage["touchable"] < 0.5:
            share = f"only {coverage['touchable']:.0%} of the draws"
            notes.append(f"{group.name}: its filter can touch {share}; the others are of unscored windows.")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# The figures. Each draw_ function fills axes of its caller's.

# fmt: off
RC = {
    "font.size": 8.5, "legend.fontsize": 8, "lines.linewidth": 1.5, "hatch.linewidth": 0.6, "savefig.dpi": 200,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.formatter.useoffset": False,
    "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.08,
    "text.parse_math": False,  # a $ in a window's text or a folder's name is a dollar
}
# fmt: on
# told apart in grey by dashes and markers too; the reference is black and dashed, what nobody compares is light
COMPARED = [("#0064b0", "-", "o"), ("#d9730d", "-.", "s"), ("#2f9e6e", (0, (1, 1)), "^"), ("#b06ab3", (0, (6, 2)), "D")]
NEGATIVE = dict(facecolor="#b2432f", edgecolor="white", hatch="/////", linewidth=0)
POSITIVE = dict(facecolor="#a9c7e4", linewidth=0)


def draw_loss(ax, groups, rows, target_loss):
    """Test loss against iterations, a band of a standard deviation for several seeds, and the savings below."""
    reference, others = next(row for row in rows if row["reference"]), [row for row in rows if not row["reference"]]
    marked = [row for row in others if row["arm"] == "treatment"] or others or rows
    end, low, high = 1, math.inf, -math.inf
    whose = groups[0].runs[0].test_set
    whose = f" on {whose}" if whose else ""
    for place, (group, row) in enumerate(zip(groups, rows, strict=True)):
        iters, mean, sd = group.curve()
        iters, mean, sd = (a if a is None else a[np.isfinite(mean)] for a in (iters, mean, sd))
        color, linestyle, marker = "0.62", ("-", ":")[place % 2], None
        if row in marked:
            color, linestyle, marker = COMPARED[marked.index(row) % len(COMPARED)]
        elif row is reference:
            color, linestyle = "black", "--"
        label = row["name"] + (" (reference)" if row is reference and others else "")
        label += f", {len(row['seeds'])} seeds ± sd" if sd is not None else ""
        every = max(1, len(iters) // 12)
        ax.plot(iters, mean, color=color, linestyle=linestyle, marker=marker, ms=3.5, markevery=every, label=label)
        if sd is not None:
            ax.fill_between(iters, mean - sd, mean + sd, color=color, alpha=0.18, linewidth=0)
        end, low = max(end, iters[-1]), min(low, mean.min())
        # the steep fall of the first iterations would leave no room for the rest: it is cut off
        high = max(high, np.interp(0.15 * group.runs[0].knobs["max_iters"], iters, mean))
    ax.set(xlabel="iteration", ylabel=f"test loss{whose} (nats per token)", xlim=(0, end * 1.02))
    if others:
        target = reference["target"]["mean"]
        what = f"final test loss of {reference['name']}" if target_loss is None else "target test loss"
        ax.axhline(target, color="0.35", linewidth=0.8, linestyle=(0, (1, 2)), label=f"{what}: {target:.3f}")
        low, high = min(low, target), max(high, target)
    line = max(high - low, 1e-6) / 14  # about the height of a line of text
    for place, row in enumerate(marked if others else []):
        mark_saving(ax, row, reference, target, low - line * (1.2 + 2.3 * place), line, end)
    ax.set_ylim(low - line * (1 + 2.3 * (len(marked) if others else 0)), high + line)
    ax.legend(frameon=False, loc="upper right")


def mark_saving(ax, row, reference, target, y, line, end):
    """At height y an arrow from the reference's iterations to the target to those of `row`; a line below, its text."""
    whole, iterations = reference["iterations"]["mean"], row["iterations"]["mean"]
    over = dict(va="center", bbox=dict(facecolor="white", edgecolor="none", pad=1.5))  # over the lines of other rows
    if row["saved"]["mean"] is None:
        result = f"not reached by {reference['name']}" if whole is None else "no saving: reached before the first step"
        result = reach(row) if iterations is None else result
        ax.text(end, y - 0.6 * line, f"{row['name']}: {result}", ha="right", **over)
        return
    change = {"mean": -row["saved"]["mean"], "sd": row["saved"]["sd"]}
    left, right = sorted((whole, iterations))
    for x in (left, right):
        ax.plot([x, x], [y, target], color="0.35", linewidth=0.8, linestyle=(0, (1, 2)))
    arrow = dict(arrowstyle="-|>", color="black", linewidth=1.0, shrinkA=0, shrinkB=0, mutation_scale=8)
    ax.annotate("", xy=(iterations, y), xytext=(whole, y), arrowprops=arrow)
    x, side = (right, "right") if left + right > end else (left, "left")
    ax.text(x, y - line, f"{row['name']}: {number(change, '+.1f', 100, '%')} iterations", ha=side, **over)


def in_powers(values):
    """Values in nats divided by the power of ten that suits the largest of them, and the unit: '10⁻³ nats'."""
    largest = np.abs(values).max()
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    unit = f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))} nats" if power else "nats"
    return values / 10.0**power, unit


def draw_histogram(ax, value):
    """Values of windows, (n,) in nats, from the 0.5th to the 99.5th percentile; a bar is on one side of zero."""
    low, high = np.percentile(value, [0.5, 99.5])
    beyond = ((value < low) | (value > high)).mean()
    shown, unit = in_powers(value[(value >= low) & (value <= high)])
    width = max(np.ptp(np.append(shown, 0)), 1e-12) / 60
    edges = np.arange(math.floor(min(shown.min(), 0) / width), math.floor(max(shown.max(), 0) / width) + 2) * width
    counts, _ = np.histogram(shown, edges)
    negative = edges[:-1] < -width / 2
    ax.bar(edges[:-1][~negative], counts[~negative], width, align="edge", **POSITIVE)
    ax.bar(edges[:-1][negative], counts[negative], width, align="edge", **NEGATIVE)
    ax.axvline(0, color="black", linewidth=1)
    share = (value < 0).mean()
    labels = [f"below zero: {share:.1%}", f"zero or above: {1 - share:.1%}"]
    ax.legend([Patch(**NEGATIVE), Patch(**POSITIVE)], labels, frameon=False, loc="upper right")
    ax.set_ylim(0, counts.max() * 1.25)
    ax.set(xlabel=f"value of a window ({unit}; {beyond:.1%} lie beyond the axis)", ylabel="windows")


def draw_domains(ax, value, domain, names):
    """
    A box for each domain, the share of negative windows lowest on top: quartiles, and the 5th to the 95th percentile.
    value (n,) in nats, domain (n,) index in `names`. Of more than 14 domains the smallest are put together.
    """
    present, sizes = np.unique(domain, return_counts=True)
    large = present[np.argsort(-sizes)[: 14 if len(present) <= 14 else 13]]
    parts = {names[d]: value[domain == d] for d in large}
    parts = dict(sorted(parts.items(), key=lambda part: -(part[1] < 0).mean()))
    if len(large) < len(present):
        parts = {f"{len(present) - len(large)} others": value[~np.isin(domain, large)]} | parts
    quantiles = np.stack([np.percentile(part, [5, 25, 50, 75, 95]) for part in parts.values()])
    quantiles, unit = in_powers(quantiles)
    boxes = [dict(zip(("whislo", "q1", "med", "q3", "whishi"), row, strict=True)) for row in quantiles]
    look = dict(boxprops=dict(facecolor=POSITIVE["facecolor"]), medianprops=dict(color="black", linewidth=1.5))
    ax.bxp(boxes, orientation="horizontal", showfliers=False, patch_artist=True, widths=0.6, **look)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(1, len(parts) + 1), [name if len(name) < 22 else name[:20] + "…" for name in parts])
    right = ax.get_yaxis_transform()
    for y, part in enumerate(parts.values(), 1):
        ax.text(1.02, y, f"{(part < 0).mean():.0%} of {len(part):,}", transform=right, va="center", fontsize=7.5)
    ax.text(1.02, len(parts) + 0.9, "negative", transform=right, va="center", fontsize=7.5, fontweight="bold")
    ax.set_ylim(0.4, len(parts) + 0.6)
    ax.set_xlabel(f"value of a window ({unit}): quartiles, 5th to 95th percentile")


def draw_over_run(share_ax, value_ax, log):
    """The share of negative draws, and quantiles of the draws' values, in up to 40 stretches of the run."""
    bins = np.array_split(np.arange(len(log["iter"])), min(40, len(log["iter"])))
    middle = np.array([log["iter"][bin].mean() for bin in bins])
    share_ax.plot(middle, [100 * (log["value"][bin] < 0).mean() for bin in bins], color=NEGATIVE["facecolor"])
    share_ax.set(ylabel="negative\ndraws (%)", ylim=(0, None), xlim=(0, log["iter"][-1] + 1))
    share_ax.tick_params(labelbottom=False)
    q, unit = in_powers(np.stack([np.percentile(log["value"][bin], [5, 25, 50, 75, 95]) for bin in bins], 1))
    value_ax.fill_between(middle, q[0], q[4], color="#d6e4f1", linewidth=0, label="5th to 95th percentile")
    value_ax.fill_between(middle, q[1], q[3], color="#7fa8d1", linewidth=0, label="quartiles")
    value_ax.plot(middle, q[2], color="black", label="median")
    value_ax.axhline(0, color="black", linewidth=0.8, linestyle="--")
    value_ax.set(xlabel="iteration", ylabel=f"value of a draw\n({unit})", xlim=(0, log["iter"][-1] + 1))
    value_ax.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 0.98), borderpad=0)


# ---------------------------------------------------------------------------------------------------------------------
# The windows as text.


@functools.cache
def glyphs():
    """The code points that matplotlib's monospaced font can draw."""
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans Mono")).get_charmap())


def printable(data):
    """Bytes as text on one line: line ends as ↵, and what is no UTF-8, no printable or in no font as an escape."""
    text = data.decode("utf-8", errors="backslashreplace").replace("\r\n", "\n").replace("\n", "↵")
    return "".join(c if c.isprintable() and ord(c) in glyphs() else c.encode("unicode_escape").decode() for c in text)


def extreme_windows(values, corpus, k=5):
    """
    The k windows of the highest and the k of the lowest value, fewer where there are not so many: two lists of {id,
    value, visits, domain, text}, from the highest and from the lowest on.
    """
    order = np.argsort(values[1], kind="stable")
    k, sides, T = min(k, max(1, len(order) // 2)), ([], []), corpus["block_size"]
    for side, chosen in zip(sides, (order[::-1][:k], order[:k]), strict=True):
        for i in chosen:
            sample_id, value, visits = (column[i].item() for column in values)
            tokens = corpus["tokens"].windows(np.array([sample_id]), T)[0].tolist()
            text, domain = printable(corpus["encoding"].decode_bytes(tokens)), corpus["domains"][corpus["domain"][i]]
            side.append(dict(id=sample_id, value=value, visits=visits, domain=domain, text=text))
    return sides


def heading(window):
    visits = f"{window['visits']} visit" + "s" * (window["visits"] != 1)
    value = f"{window['value']:+.2e}".replace("-", "−")
    return f"{value} nats in {visits}, window {window['id']}, {window['domain']}"


def draw_windows(ax, sides, columns=90, lines=2):
    """The highest windows on the left and the lowest on the right: the first lines of each, runs of blanks as one."""
    ax.axis("off")
    ax.set(ylim=(1 + max(map(len, sides)) * (lines + 1.6), 0), xlim=(0, 1))
    for x, title, side in zip((0, 0.51), ("Highest values", "Lowest values"), sides, strict=True):
        ax.text(x, 0, title, fontweight="bold", va="center")
        for place, window in enumerate(side):
            y = 1.6 + place * (lines + 1.6)
            ax.text(x, y, heading(window), fontsize=7.5, va="center", color="0.25")
            text = re.sub(" +", " ", window["text"]).strip()
            text = text if len(text) <= columns * lines else text[: columns * lines - 1] + "…"
            for row in range(lines):
                part = text[row * columns : (row + 1) * columns]
                ax.text(x, y + 1 + row, part, fontsize=6.2, family="DejaVu Sans Mono", va="center")


# ---------------------------------------------------------------------------------------------------------------------


def open_corpus(run, sample_id):
    """
    What the windows `sample_id` (n,) of a run were cut from: tokens, encoding, block_size, domains (names), domain
    (n,), or None where the corpus is not on this machine. Raises UserError where another one is in its place.
    """
    knobs = run.knobs
    folder = os.path.join(knobs["data_dir"], knobs["dataset"])
    if not os.path.isdir(folder):
        return None
    meta = load_meta(folder)
    if meta["fingerprint"] != run.config["fingerprint"]:
        mend = "prepare that one again (python prepare_owt.py) or move it back there"
        raise UserError(f"{folder}: not the corpus that {run.folder} was trained on; {mend}")
    domain = window_domains(folder, "train", sample_id, knobs["block_size"], meta)
    corpus = dict(tokens=open_split(folder, "train", meta), encoding=get_tokenizer(meta["tokenizer"]))
    return corpus | dict(block_size=knobs["block_size"], domains=meta["domains"], domain=domain)


def figures(groups, rows, target_loss, out):
    """
    Write the figures and windows.txt to the folder `out`; returns ({name: path}, notes on what could not be drawn).
    """
    os.makedirs(out, exist_ok=True)
    paths, notes = {}, []

    def save(fig, name):
        paths[name] = os.path.join(out, name)
        with atomic_write(paths[name]) as file:
            fig.savefig(file, format="png")
        plt.close(fig)

    fig, ax = plt.subplots(figsize=(5.6, 3.9))
    draw_loss(ax, groups, rows, target_loss)
    save(fig, "loss.png")

    run = next((run for group in groups for run in group.runs if run.has_values), None)
    if run is None:
        return paths, ["No run has values (values.npz of a run with --score=True that has ended): no value figures."]
    values, log = load_values(run.folder), read_log(run.folder)
    corpus = open_corpus(run, values[0])
    columns = list(columns_of(log["directions"]))
    several = f", its first column, {columns[0]}, of {len(columns)}" if len(columns) > 1 else ""
    notes.append(f"Values in the figures: {run.folder}{several}.")
    if corpus is None:
        folder = os.path.join(run.knobs["data_dir"], run.knobs["dataset"])
        notes.append(f"{folder}: the corpus is not here, so there are no domains and no windows as text.")

    domains = ["domains"] if corpus and len(np.unique(corpus["domain"])) > 1 else []
    fig = plt.figure(figsize=(9.6 if domains else 5.6, 6))
    mosaic = [[name, *domains] for name in ("histogram", "share", "quantiles")]
    axes = fig.subplot_mosaic(mosaic, height_ratios=[1.9, 0.7, 1.1])
    draw_histogram(axes["histogram"], values[1])
    draw_over_run(axes["share"], axes["quantiles"], log)
    if domains:
        draw_domains(axes["domains"], values[1], corpus["domain"], corpus["domains"])
    save(fig, "values.png")

    fig = plt.figure(figsize=(10.2, 6.9 if corpus else 3.9))
    mosaic = [["loss", "histogram"]] + ([["windows", "windows"]] if corpus else [])
    axes = fig.subplot_mosaic(mosaic, height_ratios=[3.9, 3.0] if corpus else None)
    draw_loss(axes["loss"], groups, rows, target_loss)
    draw_histogram(axes["histogram"], values[1])
    if corpus:
        sides = extreme_windows(values, corpus)
        draw_windows(axes["windows"], sides)
        paths["windows.txt"] = os.path.join(out, "windows.txt")
        with atomic_write(paths["windows.txt"]) as file:
            for title, side in zip(("Highest", "Lowest"), sides, strict=True):
                file.write(f"{title} values of {run.folder}\n\n".encode())
                for window in side:
                    text = window["text"].replace("↵", "↵\n    ")
                    file.write(f"{heading(window)}\n    {text}\n\n".encode())
    save(fig, "report.png")
    return paths, notes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run", help="a run's folder")
    parser.add_argument("--reference", metavar="RUN", help="default: the control among the runs, else the first")
    parser.add_argument("--target_loss", type=float, metavar="NATS", help="default: the reference's final test loss")
    parser.add_argument(
        "--test_set", default="", metavar="SET", help="go by the test loss of one of the runs' val_sets"
    )
    parser.add_argument("--out", default="out/report", metavar="FOLDER", help="for the figures; default: out/report")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the table")
    args = parser.parse_args(argv)

    test_set = "" if args.test_set == "all" else args.test_set
    runs = [read_run(folder, test_set) for folder in {os.path.realpath(path): path for path in args.runs}.values()]
    for run in runs[1:]:
        if run.config["fingerprint"] != runs[0].config["fingerprint"]:
            names = [f"{r.folder} ('{r.knobs['dataset']}')" for r in (runs[0], run)]
            found = "were trained on different corpora, so their losses do not compare"
            raise UserError(f"{names[0]} and {names[1]} {found}; run report.py on each by itself")
    groups = group_runs(runs)
    reference = pick_reference(groups, args.reference)
    rows = compare(groups, reference, args.target_loss)
    with plt.rc_context(RC):
        paths, notes = figures(groups, rows, args.target_loss, args.out)
    notes = remarks(groups, rows, args.target_loss) + notes
    if args.json:
        print(json.dumps(dict(rows=rows, notes=notes, files=paths), indent=1, allow_nan=False))
    else:
        print(table(rows, args.target_loss), "", *notes, *paths.values(), sep="\n")


if __name__ == "__main__":
    main()

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

from configurator import UserError
from data_value import load_values, read_log
from files import atomic_write
from prepare_owt import get_tokenizer, load_meta, open_split, window_domains

# ---------------------------------------------------------------------------------------------------------------------
# Runs, and groups of runs that differ only in their seed.

HOUSEKEEPING = {"out_dir", "data_dir", "device", "compile", "log_interval", "checkpoint_interval"}
HOUSEKEEPING |= {"wandb_log", "wandb_project", "wandb_run_name"}
# what makes an arm of the comparison; neither these nor scoring change a step, given its batch
ARM = {"score", "val_batch_size", "val_interval", "value_direction", "value_order"}
ARM |= {"filter_from", "filter_pool", "filter_negative", "drop_random"}


@dataclass
class Run:
    folder: str
    config: dict
    iters: np.ndarray  # (e,) iterations before each evaluation
    losses: np.ndarray  # (e,) test losses, nats per token
    lines: list  # the training lines of metrics.jsonl

    @property
    def knobs(self):
        return self.config["knobs"]

    @property
    def ended(self):
        return self.iters[-1] >= self.knobs["max_iters"]


@dataclass
class Group:
    name: str
    runs: list

    @property
    def arm(self):
        knobs = self.runs[0].knobs
        if knobs["filter_negative"]:
            return "filtered"
        return "random" if knobs["drop_random"] else "control" if knobs["filter_from"] else "plain"

    def curve(self):
        """
        iters (e,) that all runs were evaluated at, the mean test loss there (e,), and its standard deviation or None.
        """
        iters = functools.reduce(np.intersect1d, [run.iters for run in self.runs])
        losses = np.stack([run.losses[np.searchsorted(run.iters, iters)] for run in self.runs])
        return iters, losses.mean(0), losses.std(0, ddof=1) if len(losses) > 1 else None


def read_run(folder):
    """
    The run in `folder`. A last line of metrics.jsonl without its line end is still being written, and left out.

    Raises UserError where the folder holds no run of train.py, a file is damaged or nothing was evaluated.
    """
    config_path, metrics_path = os.path.join(folder, "config.json"), os.path.join(folder, "metrics.jsonl")
    for path in (config_path, metrics_path):
        if not os.path.isfile(path):
            mend = f"train it with python train.py config/<...>.py --out_dir={folder}"
            raise UserError(f"{path}: no such file, so {folder} is not the folder of a run; {mend}")
    mend = "resume the run with --init_from=resume, or train it anew"
    try:
        with open(config_path, encoding="utf-8") as file:
            config = json.load(file)
        config["knobs"]["max_iters"], config["fingerprint"], config["coverage"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{config_path}: not a run's config ({type(error).__name__}: {error}); {mend}") from error
    evaluations, lines = [], []
    with open(metrics_path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                break
            try:
                line = json.loads(text)
                if "test_loss" in line:
                    evaluations.append((int(line["iter"]), float(line["test_loss"])))
                else:
                    line["iter"], line["loss"], line["step_ms"]
                    lines.append(line)
            except (ValueError, TypeError, KeyError) as error:
                found = f"not a line of metrics ({type(error).__name__}: {error})"
                raise UserError(f"{metrics_path}, line {number}: {found}; {mend}") from error
    if not evaluations:
        found = f"{len(lines)} training lines and no evaluation of the test loss"
        raise UserError(f"{metrics_path}: {found}; go on with --init_from=resume --out_dir={folder}")
    iters, losses = zip(*sorted(dict(evaluations).items()), strict=True)
    return Run(folder, config, np.array(iters), np.array(losses), lines)


def group_runs(runs):
    """
    The runs as groups, in order: in a group all knobs are the same but the seed and what is bound to it, and so are
    those of the runs that their values come from, where these can be read. No seed is twice in a group.
    """

    def key(config):
        knobs = {k: v for k, v in config["knobs"].items() if k not in HOUSEKEEPING | {"seed", "filter_from"}}
        if knobs.get("init_from") == "resume":
            knobs["init_from"] = "scratch"
        source = config["knobs"]["filter_from"]
        path = os.path.join(source, "config.json")
        if source and os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                knobs["filter_from"] = key(json.load(file))
        else:
            knobs["filter_from"] = bool(source)
        return json.dumps(knobs, sort_keys=True)

    groups = []
    for run in runs:
        mine, seed = key(run.config), run.knobs["seed"]
        for their_key, members in groups:
            if their_key == mine and all(member.knobs["seed"] != seed for member in members):
                members.append(run)
                break
        else:
            groups.append((mine, [run]))
    names = [group_name([run.folder for run in members]) for _, members in groups]
    if len(set(names)) < len(names):
        names = [members[0].folder for _, members in groups]
    return [Group(name, members) for name, (_, members) in zip(names, groups, strict=True)]


def group_name(folders):
    """A folder's name; of several folders what their names share, without the seed: control_s1, control_s2: control."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(names) == 1:
        return names[0].lstrip("_")  # which matplotlib takes for "not in the legend"
    shared = re.sub(r"([_.-]+(seed|s)?|^(seed|s))?[_.-]*\d*$", "", os.path.commonprefix(names)).lstrip("_")
    return shared or os.path.basename(os.path.dirname(os.path.abspath(folders[0]))) or names[0]


def pick_reference(groups, folder):
    """
    The group that holds the run `folder`; without one the control, or the first. Raises UserError where it is absent.
    """
    if not folder:
        return next((group for group in groups if group.arm == "control"), groups[0])
    for group in groups:
        if any(os.path.realpath(run.folder) == os.path.realpath(folder) for run in group.runs):
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
    as fractions, times in ms.

    Raises UserError where the reference ended at no finite loss and no target is given.
    """
    by_seed = {run.knobs["seed"]: run for run in reference.runs}
    mean_iters, mean_losses, _ = reference.curve()
    rows = []
    for group in groups:
        columns = {key: [] for key in ("target", "iterations", "saved", "final_loss", "best_loss")}
        columns |= {key: [] for key in ("negative_draws", "negative_windows", "step_ms", "validation_ms")}
        for run in group.runs:
            ref = by_seed.get(run.knobs["seed"])
            ref_iters, ref_losses = (ref.iters, ref.losses) if ref else (mean_iters, mean_losses)
            target = ref_losses[-1] if target_loss is None else target_loss
            if not math.isfinite(target):
                raise UserError(f"{reference.name}: ended at a test loss of {target}; give --target_loss=<nats>")
            iterations, whole = (
                first_crossing(run.iters, run.losses, target),
                first_crossing(ref_iters, ref_losses, target),
            )
            columns["target"].append(target)
            columns["iterations"].append(iterations)
            columns["saved"].append(1 - iterations / whole if iterations is not None and whole else None)
            columns["final_loss"].append(run.losses[-1])
            columns["best_loss"].append(np.nanmin(run.losses))
            for key, value in measure(run).items():
                columns[key].append(value)
        row = {key: spread(values) for key, values in columns.items()}
        row |= dict(name=group.name, folders=[run.folder for run in group.runs], arm=group.arm)
        row |= dict(
            seeds=[run.knobs["seed"] for run in group.runs], coverage=[run.config["coverage"] for run in group.runs]
        )
        rows.append(row | dict(reference=group is reference, ended=all(run.ended for run in group.runs)))
    return rows


def spread(values):
    each = [None if value is None or not math.isfinite(value) else float(value) for value in values]
    if None in each:
        return dict(mean=None, sd=None, each=each)
    return dict(mean=float(np.mean(each)), sd=float(np.std(each, ddof=1)) if len(each) > 1 else None, each=each)


def measure(run):
    """
    What a run's files say of its values and its speed: shares of negative draws and windows (None without scores) and
    ms of a step without its validation pass and of that pass, medians over the training lines but the first.
    """
    scored = [line for line in run.lines if line.get("negative") is not None]
    # a line's share is that of the steps since the line before
    steps = np.diff([line["iter"] for line in scored], prepend=-1)
    draws = np.average([line["negative"] for line in scored], weights=steps) if scored else None
    windows = np.mean(load_values(run.folder)[1] < 0) if has_values(run) else None
    warm = run.lines[1:] or run.lines  # the first waits for compilation and caches
    validation = [line["val_ms"] for line in warm if line.get("val_ms") is not None]
    validation_ms = np.median(validation) if validation else None
    step_ms = np.median([line["step_ms"] for line in warm]) - (validation_ms or 0) if warm else None
    return dict(negative_draws=draws, negative_windows=windows, step_ms=step_ms, validation_ms=validation_ms)


def has_values(run):
    return run.knobs["score"] and os.path.isfile(os.path.join(run.folder, "values.npz"))


def number(cell, form, scale=1.0, unit="", absent="–"):
    """'12.3 ± 0.4%' of {mean, sd}."""
    if cell["mean"] is None:
        return absent
    sd = "" if cell["sd"] is None else f" ± {format(scale * cell['sd'], form)}"
    return f"{format(scale * cell['mean'], form)}{sd}{unit}".replace("-", "−")


def reach(row):
    """The cell 'iterations to the target': with several seeds a mean stands only where every one of them reached it."""
    each = row["iterations"]["each"]
    some = f" ({sum(i is not None for i in each)} of {len(each)} did)" if len(each) > 1 else ""
    return number(row["iterations"], ",.0f", absent="not reached" + some)


def table(rows, target_loss):
    """The rows as a Markdown table."""
    to = "the reference's final loss" if target_loss is None else f"a test loss of {target_loss:g}"
    head = ["run", "seeds", f"iterations to {to}", "saved", "final test loss", "best", "negative draws"]
    head += ["negative windows", "eligible / scored / corpus windows", "touchable draws", "step, ms", "validation, ms"]
    cells = [head]
    for row in rows:
        saved = "reference" if row["reference"] else number(row["saved"], ".1f", 100, "%")
        validation = number(row["validation_ms"], ".1f")
        if row["validation_ms"]["mean"] is not None:
            validation += f" (+{row['validation_ms']['mean'] / row['step_ms']['mean']:.0%})"
        cover = row["coverage"][0]
        windows, touchable = "–", "–"
        if cover:
            windows = f"{cover['eligible']:,} / {cover['scored']:,} / {cover['corpus']:,}"
            touchable = f"{cover['touchable']:.0%}"
        line = [row["name"], str(len(row["seeds"])), reach(row), saved]
        line += [number(row["final_loss"], ".4f") + ("" if row["ended"] else " *"), number(row["best_loss"], ".4f")]
        line += [number(row[key], ".1f", 100, "%") for key in ("negative_draws", "negative_windows")]
        cells.append(line + [windows, touchable, number(row["step_ms"], ".1f"), validation])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def remarks(groups, rows, target_loss):
    """What a reader of the table must know: the rule, then what is particular about these runs. A list of sentences."""
    reference, ref_row = next((g, r) for g, r in zip(groups, rows, strict=True) if r["reference"])
    notes = []
    if len(groups) > 1:
        to = f"the final test loss of {reference.name} ({number(ref_row['target'], '.4f')})"
        to = to if target_loss is None else f"a test loss of {target_loss:g}"
        notes.append(
            f"Iterations to {to}: to the first evaluation at or below it, interpolated linearly from the one before, by "
            f"one rule for every run. Saved: the share fewer than {reference.name} itself needs by that rule "
            f"({reach(ref_row)}); the iterations of a run that scored the windows are not counted."
        )
    if any(len(group.runs) > 1 for group in groups):
        notes.append(
            "±: standard deviation over seeds. Each run is compared with the reference run of its own seed, or with "
            "the references' mean curve where there is none; coverage is the first seed's."
        )
    notes.append("Step: median, without the validation pass of the values; that pass beside it, in % of the rest.")
    ours = reference.runs[0].knobs
    for group in groups:
        for run in group.runs:
            if not run.ended:
                of = f"{run.iters[-1]:,} of {run.knobs['max_iters']:,} iterations"
                notes.append(f"* {run.folder} has not ended ({of}): its last test loss stands for its final one.")
        knobs = group.runs[0].knobs
        ignored = HOUSEKEEPING | ARM | {"seed", "init_from"}
        differ = [k for k in knobs if k not in ignored and knobs[k] != ours.get(k)]
        if differ:
            changes = ", ".join(f"{key} ({knobs[key]}, not {ours.get(key)})" for key in differ)
            notes.append(f"{group.name} differs from the reference in more than its windows: {changes}.")
        for run in group.runs[:1]:
            if run.config["coverage"] and run.config["coverage"]["touchable"] < 0.5:
                share = f"{run.config['coverage']['touchable']:.0%}"
                notes.append(
                    f"{group.name}: its filter can touch only {share} of the draws; the rest are unscored windows."
                )
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# The figures. Each draw_ function fills axes of its caller's.

RC = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "text.parse_math": False,  # a $ in a window's text or a folder's name is a dollar
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
# told apart in grey by dashes and markers too; the reference is black and dashed, what nobody compares is light
COMPARED = [("#0064b0", "-", "o"), ("#d9730d", "-.", "s"), ("#2f9e6e", (0, (1, 1)), "^"), ("#b06ab3", (0, (6, 2)), "D")]
NEGATIVE = dict(facecolor="#b2432f", edgecolor="white", hatch="/////", linewidth=0)
POSITIVE = dict(facecolor="#a9c7e4", linewidth=0)


def draw_loss(ax, groups, rows, target_loss):
    """Test loss against iterations, a band of a standard deviation for several seeds, and the savings below."""
    reference = next(row for row in rows if row["reference"])
    others = [row for row in rows if not row["reference"]]
    marked = [row for row in others if row["arm"] in ("filtered", "random")] or others
    curves = [group.curve() for group in groups]
    end = max(iters[-1] for iters, _, _ in curves) or 1
    light = iter(["-", ":", "--", "-."] * len(rows))
    for row, (iters, mean, sd) in zip(rows, curves, strict=True):
        label = row["name"] + (f", {len(row['seeds'])} seeds (band: ± 1 sd)" if sd is not None else "")
        style = dict(color="0.62", linestyle=next(light), marker=None)
        if row["reference"] and len(rows) > 1:
            style = dict(color="black", linestyle="--", marker=None)
            label += " (reference)"
        elif row in marked or len(rows) == 1:
            style = dict(
                zip(("color", "linestyle", "marker"), COMPARED[marked.index(row) % 4 if others else 0], strict=True)
            )
        ax.plot(iters, mean, label=label, markersize=3.5, markevery=max(1, len(iters) // 12), **style)
        if sd is not None:
            ax.fill_between(iters, mean - sd, mean + sd, color=style["color"], alpha=0.18, linewidth=0)
    # the first tenth of a run falls too far to leave room for the rest
    finite = [mean[np.isfinite(mean)] for _, mean, _ in curves]
    low = min(losses.min() for losses in finite)
    high = max(np.interp(0.1 * end, iters, mean) for iters, mean, _ in curves if np.isfinite(mean).all())
    ax.set(xlabel="iteration", ylabel="test loss (nats per token)", xlim=(0, end * 1.02))
    target = reference["target"]["mean"]
    if others:
        low = min(low, target)
    line = max(high - low, 1e-6) / 14  # about the height of a line of text
    ax.set_ylim(low - line * (1 + 2.3 * len(marked)), high + line)
    if others:
        what = f"final test loss of {reference['name']}" if target_loss is None else "target test loss"
        ax.axhline(target, color="0.35", linewidth=0.8, linestyle=(0, (1, 2)), label=f"{what}: {target:.3f}")
    for place, row in enumerate(marked):
        mark_saving(ax, row, reference, target, low - line * (1.2 + 2.3 * place), line, end)
    ax.legend(frameon=False, loc="upper right")


def mark_saving(ax, row, reference, target, y, line, end):
    """At height y an arrow from the reference's iterations to the target to those of `row`; a line below, its text."""
    whole, iterations = reference["iterations"]["mean"], row["iterations"]["mean"]
    if iterations is None or row["saved"]["mean"] is None:
        who = row["name"] if iterations is None else f"{row['name']}: {reference['name']}"
        ax.text(end, y - 0.6 * line, f"{who}: not reached", va="center", ha="right")
        return
    change = {"mean": -row["saved"]["mean"], "sd": row["saved"]["sd"]}
    left, right = sorted((whole, iterations))
    for x in (left, right):
        ax.plot([x, x], [y, target], color="0.35", linewidth=0.8, linestyle=(0, (1, 2)))
    arrow = dict(arrowstyle="-|>", color="black", linewidth=1.0, shrinkA=0, shrinkB=0, mutation_scale=8)
    ax.annotate("", xy=(iterations, y), xytext=(whole, y), arrowprops=arrow)
    x, side = (right, "right") if left + right > end else (left, "left")
    ax.text(x, y - line, f"{row['name']}: {number(change, '+.1f', 100, '%')} iterations", va="center", ha=side)


def in_powers(*arrays):
    """The arrays divided by the power of ten that suits their largest number, and the unit: '10⁻³ nats'."""
    largest = max(np.abs(array).max(initial=0) for array in arrays)
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    unit = f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))} nats" if power else "nats"
    return *(array / 10.0**power for array in arrays), unit


def draw_histogram(ax, value):
    """Values of windows, (n,) in nats, from the 0.5th to the 99.5th percentile; a bar is on one side of zero."""
    low, high = np.percentile(value, [0.5, 99.5])
    beyond = ((value < low) | (value > high)).mean()
    (shown, unit) = in_powers(value[(value >= low) & (value <= high)])
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
    if len(large) < len(present):
        parts[f"{len(present) - len(large)} others"] = value[~np.isin(domain, large)]
    parts = dict(sorted(parts.items(), key=lambda part: -(part[1] < 0).mean()))
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
    share_ax.plot(middle, [100 * (log["value"][bin] < 0).mean() for bin in bins], color="#b2432f")
    share_ax.set(ylabel="negative\ndraws (%)", ylim=(0, None))
    share_ax.tick_params(labelbottom=False)
    quantiles = np.stack([np.percentile(log["value"][bin], [5, 25, 50, 75, 95]) for bin in bins], 1)
    quantiles, unit = in_powers(quantiles)
    value_ax.fill_between(
        middle, quantiles[0], quantiles[4], color="#d6e4f1", linewidth=0, label="5th to 95th percentile"
    )
    value_ax.fill_between(middle, quantiles[1], quantiles[3], color="#7fa8d1", linewidth=0, label="quartiles")
    value_ax.plot(middle, quantiles[2], color="black", label="median")
    value_ax.axhline(0, color="black", linewidth=0.8, linestyle="--")
    value_ax.set(xlabel="iteration", ylabel=f"value of a draw\n({unit})")
    value_ax.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


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
    sample_id, value, visits = values
    order = np.argsort(value, kind="stable")
    k = min(k, max(1, len(order) // 2))
    sides = []
    for chosen in (order[::-1][:k], order[:k]):
        side = []
        for i in chosen:
            start = sample_id[i] * corpus["block_size"]
            tokens = corpus["tokens"][start : start + corpus["block_size"] + 1]
            text = printable(corpus["encoding"].decode_bytes(tokens.tolist()))
            domain = corpus["domains"][corpus["domain"][i]]
            side.append(
                dict(id=int(sample_id[i]), value=float(value[i]), visits=int(visits[i]), domain=domain, text=text)
            )
        sides.append(side)
    return sides


def heading(window):
    visits = f"{window['visits']} visit" + "s" * (window["visits"] != 1)
    return f"{window['value']:+.2e} nats in {visits}, window {window['id']}, {window['domain']}".replace("-", "−", 1)


def draw_windows(axes, sides, columns=92, lines=2):
    """The highest windows in the left of two axes and the lowest in the right, the first lines of each."""
    for ax, title, side in zip(axes, ("Highest values", "Lowest values"), sides, strict=True):
        ax.axis("off")
        ax.set(ylim=((lines + 1.7) * len(side) + 1, 0), xlim=(0, 1))
        ax.text(0, 0.3, title, fontweight="bold", va="center")
        for place, window in enumerate(side):
            y = 1.9 + place * (lines + 1.7)
            ax.text(0, y, heading(window), fontsize=7.5, va="center", color="0.25")
            text = window["text"]
            if len(text) > columns * lines:
                text = text[: columns * lines - 1] + "…"
            for row in range(lines):
                part = text[row * columns : (row + 1) * columns]
                ax.text(0, y + 1 + row, part, fontsize=6.3, family="DejaVu Sans Mono", va="center")


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
    tokens, encoding = open_split(folder, "train", meta), get_tokenizer(meta["tokenizer"])
    return dict(
        tokens=tokens, encoding=encoding, block_size=knobs["block_size"], domains=meta["domains"], domain=domain
    )


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

    run = next((run for group in groups for run in group.runs if has_values(run)), None)
    if run is None:
        return paths, ["No run has values (values.npz of a run with --score=True that has ended): no value figures."]
    values, log = load_values(run.folder), read_log(run.folder)
    corpus = open_corpus(run, values[0])
    notes.append(f"Values in the figures: {run.folder}.")
    if corpus is None:
        folder = os.path.join(run.knobs["data_dir"], run.knobs["dataset"])
        notes.append(f"{folder}: the corpus is not here, so there are no domains and no windows as text.")

    many = corpus is not None and len(np.unique(corpus["domain"])) > 1
    left = [["histogram"], ["histogram"], ["share"], ["quantiles"]]
    fig = plt.figure(figsize=(9.6 if many else 5.6, 5.8))
    mosaic = [row + ["domains"] for row in left] if many else left
    axes = fig.subplot_mosaic(mosaic, height_ratios=[1, 0.8, 0.7, 1])
    draw_histogram(axes["histogram"], values[1])
    draw_over_run(axes["share"], axes["quantiles"], log)
    if many:
        draw_domains(axes["domains"], values[1], corpus["domain"], corpus["domains"])
    save(fig, "values.png")

    sides = extreme_windows(values, corpus) if corpus else [[], []]
    if corpus:
        paths["windows.txt"] = os.path.join(out, "windows.txt")
        with atomic_write(paths["windows.txt"]) as file:
            for title, side in zip(("Highest", "Lowest"), sides, strict=True):
                file.write(f"{title} values of {run.folder}\n\n".encode())
                for window in side:
                    text = window["text"].replace("↵", "↵\n    ")
                    file.write(f"{heading(window)}\n    {text}\n\n".encode())

    fig = plt.figure(figsize=(10.2, 6.9 if corpus else 3.9))
    mosaic = [["loss", "histogram"]] + ([["highest", "lowest"]] if corpus else [])
    axes = fig.subplot_mosaic(mosaic, height_ratios=[3.9, 3.0] if corpus else None)
    draw_loss(axes["loss"], groups, rows, target_loss)
    draw_histogram(axes["histogram"], values[1])
    if corpus:
        draw_windows((axes["highest"], axes["lowest"]), sides)
    save(fig, "report.png")
    return paths, notes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run", help="a run's folder")
    parser.add_argument(
        "--reference", metavar="RUN", help="compare with this run; default: the control, else the first"
    )
    parser.add_argument("--target_loss", type=float, metavar="NATS", help="default: the reference's final test loss")
    parser.add_argument("--out", default="out/report", metavar="FOLDER", help="for the figures; default: out/report")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the table")
    args = parser.parse_args(argv)

    runs = [read_run(folder) for folder in {os.path.realpath(folder): folder for folder in args.runs}.values()]
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

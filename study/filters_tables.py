"""
The lines of filters.py -> tables in Markdown, and a figure.

    python study/filters_tables.py       # reads study/filters.jsonl, writes study/filters.png, prints the tables

A number with an interval is the mean over scored seeds ± half of its 95% interval (Student's t). The number of a seed
is the mean over its orders of the difference of two arms of one order. Negative is better.
"""

import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from filters import FEW, SHARES, SOURCES, Arm
from tables import cell, interval, markdown

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = ("sign", "DSIR", "label", "both", "either", "sum")
REFERENCES = ("control", "random")


class Arms:
    """The lines of the arms of one source, by (values, score, share), then by (seed, order); and its scored runs."""

    def __init__(self, path, source):
        self.arms, self.scored = {}, {}
        with open(path, encoding="utf-8") as file:
            for line in map(json.loads, file):
                run = line["run"]
                if run[0] == source and len(run) == len(Arm._fields):
                    arm = Arm(*run)
                    self.arms.setdefault((arm.values, arm.score, arm.share), {})[arm.seed, arm.order] = line
                elif run[0] == source:
                    self.scored.setdefault(run[2], {})[run[1]] = line

    def beside(self, key, reference, loss):
        """
        {seed: the differences, one an order, of `loss` to the reference's}; none for the reference itself, which is one
        of REFERENCES or a key.
        """
        if reference in REFERENCES:
            reference = "others" if key[0] == "others" else "main", reference, 0.0
        ours, theirs = self.arms.get(key, {}), self.arms.get(reference, {})
        found = {}
        for seed, order in sorted(ours.keys() & theirs.keys()):
            if ours is not theirs:
                found.setdefault(seed, []).append(ours[seed, order][loss] - theirs[seed, order][loss])
        return found

    def effects(self, key, reference, loss):
        """The mean of every seed."""
        return [float(np.mean(each)) for each in self.beside(key, reference, loss).values()]

    def spread(self, key, reference, loss):
        """The standard deviation over orders of that difference, within a seed; None without two orders of one."""
        variances = [np.var(each, ddof=1) for each in self.beside(key, reference, loss).values() if len(each) > 1]
        return float(np.mean(variances) ** 0.5) if variances else None

    def values_for(self, target):
        """The scored run that has values for it: 'main' or 'others'; None where no arm goes by them."""
        found = {values for values, score, _ in self.arms if score.startswith(f"{target} ")}
        return next((values for values in ("main", "others") if values in found), None)

    def row(self, key, *losses):
        """Cells: the share dropped, the differences of these losses to both references, seeds and orders."""
        runs = self.arms[key]
        cells = [cell([100 * np.mean([line["dropped"] for line in runs.values()])], "{:.0f}")]
        for loss in losses:
            cells += [cell(self.effects(key, other, loss), "{:+.4f}") for other in REFERENCES]
        seeds = {seed for seed, _ in runs}
        return [*cells, str(len(seeds)), f"{len(runs) / len(seeds):.3g}"]

    def table(self, keys, names, *losses):
        head = ["what is dropped", "share, %"]
        head += [f"{what} beside {other}" for what in names for other in ("control", "random drops")]
        rows = [[name, *self.row(key, *losses)] for name, key in keys.items() if key in self.arms]
        return markdown([*head, "seeds", "orders"], rows) if rows else ""


def whole_table(arms):
    """Where the test set is the whole mixture."""
    names = {"as many at random": ("main", "random", 0.0), "negative": ("main", "sign", 0.0)}
    names["negative beyond its error"] = "errors", "beyond error", 0.0
    names |= {"the lowest of every domain": ("main", "within domains", 0.0)}
    names |= {
        "the highest quarter": ("main", "highest quarter", 0.0),
        "negative, of two runs": ("again", "two runs", 0.0),
    }
    names |= {"negative by the value model": ("main", "model", 0.0), "its lowest quarter": ("main", "model", 0.25)}
    return arms.table(names, ["test loss"], "test_loss")


def target_table(arms, target):
    values = arms.values_for(target)
    says = dict(sign="negative for it", DSIR="DSIR, as many", label="all other domains")
    says |= dict(both="negative for it and for the mixture", either="negative for it or for the mixture")
    says["sum"] = "negative for the sum of the two"
    keys = {"at random": (values, "random", 0.0), "negative for the mixture": (values, "sign", 0.0)}
    keys |= {says[kind]: (values, f"{target} {kind}", 0.0) for kind in KINDS}
    for n in FEW:
        for kind, name in (("sign", "negative for"), ("DSIR", "DSIR by")):
            keys[f"{name} {n} windows of it"] = f"{n} windows", f"{target} {kind}", 0.0
    return arms.table(keys, [f"loss on {target}", "on the mixture"], f"test_loss_{target}", "test_loss")


def paired_table(arms, targets):
    """Other filters beside the sign for the target, paired: in the same orders. DSIR drops as many windows."""
    rows = []
    for target in targets:
        values = arms.values_for(target)
        pairs = {"DSIR": (values, "DSIR"), "the sum of the two columns": (values, "sum")}
        pairs |= {f"DSIR by {n} windows, beside values by them": (f"{n} windows", "DSIR") for n in FEW}
        for name, (run, kind) in pairs.items():
            sign = run, f"{target} sign", 0.0
            key, losses = (run, f"{target} {kind}", 0.0), (f"test_loss_{target}", "test_loss")
            found = [arms.effects(key, sign, loss) for loss in losses]
            if found[0]:
                rows.append([target, name, *(cell(each, "{:+.4f}") for each in found), str(len(found[0]))])
    head = ["target", "dropped by", "loss on the target", "on the mixture", "seeds"]
    return f"### Beside the target's own column\n\n{markdown(head, rows)}\n" if rows else ""


def share_table(arms, target):
    """Curves: the effect against the share dropped; of the mixture without a target."""
    loss = f"test_loss_{target}" if target else "test_loss"
    kinds = [f"{target} {kind}" for kind in ("sign", "DSIR", "sum")] if target else ["sign", "random"]
    rows = []
    for share in SHARES:
        row = [f"{100 * share:.0f}"]
        for kind in kinds:
            for what in [loss, "test_loss"] if target else [loss]:
                row.append(cell(arms.effects(("main", kind, share), "control", what), "{:+.4f}"))
        rows.append(row)
    if all(set(row[1:]) == {"–"} for row in rows):
        return ""
    head = [f"{kind}: {what}" for kind in kinds for what in ("target", "mixture")] if target else kinds
    return markdown(["share dropped, %", *head], rows)


def figure(arms, targets, path):
    """The loss on every target against that on the mixture, and the latter against the share dropped."""
    curves = {name: ("main", name) for name in ("sign", "random") if ("main", name, SHARES[0]) in arms.arms}
    panels = len(targets) + bool(curves)
    rows, columns = -(-panels // 3), min(panels, 3)
    how = dict(figsize=(4.6 * columns, 4.4 * rows), squeeze=False, layout="constrained")
    axes = plt.subplots(rows, columns, **how)[1].ravel()
    for axis in axes[panels:]:
        axis.set_axis_off()
    for axis, target in zip(axes, targets, strict=False):
        tradeoff(axis, arms, target)
    for place, (name, key) in enumerate(curves.items()):
        shares = [share for share in SHARES if (*key, share) in arms.arms]
        found = [interval(arms.effects((*key, share), "control", "test_loss")) for share in shares]
        mean, half = [mean for mean, _ in found], [half or 0 for _, half in found]
        how = dict(fmt=".-", color=f"C{place}", capsize=2, label=name)
        axes[len(targets)].errorbar(100 * np.array(shares), mean, half, **how)
    if curves:
        axes[len(targets)].axhline(0, color="0.8", lw=0.8, zorder=0)
        axes[len(targets)].set(title="no target", xlabel="share dropped, %", ylabel="test loss − control's, nats")
        axes[len(targets)].legend(fontsize=8, frameon=False)
    axes[0].legend(fontsize=8, frameon=False)
    plt.savefig(path, dpi=130)
    plt.close()


def tradeoff(axis, arms, target):
    """
    What the filters change on a target and on the mixture: points with intervals, and lines of the shares. The label's
    point, far outside, would make all else small.
    """
    values, losses = arms.values_for(target), ("test_loss", f"test_loss_{target}")
    points = {"random": (values, "random", 0.0), "sign of the mixture": (values, "sign", 0.0)}
    points |= {kind: (values, f"{target} {kind}", 0.0) for kind in KINDS if kind != "label"}
    for place, (name, key) in enumerate(points.items()):
        effects = [arms.effects(key, "control", loss) for loss in losses]
        if not effects[0]:
            continue
        (x, dx), (y, dy) = map(interval, effects)
        axis.errorbar(x, y, dy or 0, dx or 0, fmt="o", color=f"C{place}", capsize=2, label=name)
        shares = [share for share in SHARES if (*key[:2], share) in arms.arms] if key[1].startswith(target) else []
        line = [
            [0, *(np.mean(arms.effects((*key[:2], share), "control", loss)) for share in shares)] for loss in losses
        ]
        axis.plot(*line, ".-", color=f"C{place}", lw=1)
    axis.axhline(0, color="0.8", lw=0.8, zorder=0)
    axis.axvline(0, color="0.8", lw=0.8, zorder=0)
    axis.set(title=target, xlabel="test loss on the mixture − control's, nats")
    axis.set_ylabel("test loss on the target − control's, nats")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=f"{HERE}/filters.jsonl")
    parser.add_argument("--out", default=HERE, help="the folder of the figure")
    args = parser.parse_args()
    for source, (_, targets) in SOURCES.items():
        arms = Arms(args.results, source)
        if not arms.arms:
            continue
        spread = arms.spread(("main", "sign", 0.0), "control", "test_loss")
        said = f"{spread:.4f} nats" if spread is not None else "unknown"
        print(f"## {source}\n\nspread over orders of sign − control, within a seed: {said}\n\n{whole_table(arms)}")
        shares = share_table(arms, "")
        print(f"{shares}\n" if shares else "", end="")
        known = [t for t in targets if arms.values_for(t)]
        for target in known:
            print(f"### {target}\n\n{target_table(arms, target)}\n{share_table(arms, target)}")
        print(paired_table(arms, known), end="")
        if known:
            name = "filters.png" if source == next(iter(SOURCES)) else f"filters_{source}.png"
            figure(arms, known, f"{args.out}/{name}")


if __name__ == "__main__":
    main()

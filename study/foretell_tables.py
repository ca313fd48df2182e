"""
The lines of foretell.py -> tables in Markdown, and the figure of what the trials foretold against what came.

    python study/foretell_tables.py     # reads study/foretell.jsonl, writes study/foretell.png, prints the tables

An effect is the filtered arm's final test loss less the mean of the control's and of the random drop's, of one order:
below zero it helps. ± is half of the 95% interval over the orders of all seeds (Student's t). Saved is the share of the
references' iterations that a retrained arm does not need to reach their final loss, as in tables.py. A condition counts
once it has two orders of the trial and one of the retraining, which has no interval then.
"""

import argparse
import json
import math
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from foretell import CONDITIONS, PERCENT, Condition, arms_of, run_of  # noqa: E402
from tables import markdown, saving  # noqa: E402

from trial import CALIBRATION, LEVEL, interval, judge, t_quantile, thresholds  # noqa: E402

SERIES = ("undamaged", "5% damaged", "15% damaged", "30% damaged")
REFERENCES = ("control", "random")


def read_lines(path):
    """{tuple of the run's fields: line}."""
    with open(path, encoding="utf-8") as file:
        return {tuple(line["run"]): line for line in map(json.loads, file)}


def orders_of(lines, condition, trial, arms):
    """{(seed, order): {arm: line}} of the orders that have all of the arms."""
    seeds = sorted({run[2] for run in lines if len(run) == 3})
    found = {}
    for key in ((seed, order) for seed in seeds for order in range(1, 100)):
        some = {arm: lines.get(tuple(run_of(condition, arm, *key, trial))) for arm in arms}
        if None not in some.values():
            found[key] = some
    return found


def effects(orders, target, arm="filtered"):
    """[the arm's final loss less the mean of the references'], one an order."""
    finals = [{name: line[target][-1] for name, line in order.items()} for order in orders.values()]
    return [order[arm] - np.mean([order[name] for name in REFERENCES]) for order in finals]


def said(values, form="{:+.4f}"):
    """'−0.0123 ± 0.0040'."""
    half = f" ± {form.format(half_interval(values)).lstrip('+')}" if len(values) > 1 else ""
    return (form.format(np.mean(values)) + half).replace("-", "−")


def half_interval(values):
    """Half of the 95% interval of the mean; nan for a single value."""
    _, bounds = interval(values, 0.05)
    return (bounds[1] - bounds[0]) / 2 if bounds else np.nan


def by_seed(values, orders):
    """The mean of each seed, a list, of values (n,), one for each (seed, order) of the orders (n)."""
    seeds = sorted({seed for seed, _ in orders})
    return [np.mean([x for x, key in zip(values, orders, strict=True) if key[0] == seed]) for seed in seeds]


class Compared:
    """The trials and the retraining of a condition: lists with a number for each order."""

    def __init__(self, lines, condition):
        self.condition, target, arms = condition, condition.target, arms_of(condition)
        self.trials, self.retrained = (orders_of(lines, condition, trial, arms) for trial in (True, False))
        self.whole = len(self.trials) > 1 and len(self.retrained) > 0
        self.foretold, self.realised = (effects(orders, target) for orders in (self.trials, self.retrained))
        self.oracle = None
        if condition.corpus in PERCENT:
            self.oracle = [effects(orders, target, "oracle") for orders in (self.trials, self.retrained)]
        self.saved, self.curves = [], []  # the references', (iters, losses)
        for order in self.retrained.values():
            iters, ours = order["filtered"]["iter"], order["filtered"][target]
            theirs = np.mean([order[name][target] for name in REFERENCES], 0)
            self.saved.append(saving(iters, ours, theirs))
            self.curves.append((iters, theirs))

    def verdicts(self, slope, most=math.inf):
        """
        What trial.py would say after the first `most` orders of each seed, {seed: verdict}, if `slope` is its
        CALIBRATION and its thresholds go by the retrained references' curves (it has the scored run's).
        """
        found, limits = {}, np.mean([thresholds(*curve, slope) for curve in self.curves], 0)
        for seed in sorted({seed for seed, _ in self.trials}):
            orders = [order for (theirs, i), order in self.trials.items() if theirs == seed and i <= most]
            if len(orders) == 1:  # no interval, no verdict
                continue
            arms = (*REFERENCES, "filtered")
            losses = {arm: [order[arm][self.condition.target][-1] for order in orders] for arm in arms}
            found[seed] = judge(losses, *limits, LEVEL)["verdict"]
        return found

    def outcome(self, verdict):
        """'right', 'wrong', 'withheld', or 'undecidable' where the realised effect has no interval or one with zero."""
        mean = np.mean(self.realised)
        if verdict == "cannot tell":
            return "withheld"
        if not abs(mean) > half_interval(self.realised):
            return "undecidable"
        return "right" if (verdict == "helps") == (mean < 0) else "wrong"


def fit(x, y):
    """
    The line by least squares: (slope, half of its 95% interval, intercept, half of its, correlation); None for two
    points.
    """
    x, y = np.asarray(x), np.asarray(y)
    if len(x) < 3:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    spread = np.sqrt(((y - slope * x - intercept) ** 2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    half = t_quantile(0.975, len(x) - 2) * spread
    intercept_half = half * np.mean(x**2) ** 0.5  # the slope's, times the root mean square of x
    return slope, half, intercept, intercept_half, np.corrcoef(x, y)[0, 1]


def standard(name):
    """Whether the trial is as it is by default: from the run's last weights, a tenth of its iterations."""
    return (CONDITIONS[name].start, CONDITIONS[name].share) == (Condition("").start, Condition("").share)


def points(found, names, realised="realised"):
    """(foretold, realised): the means of the conditions."""
    return tuple(np.array([np.mean(getattr(found[name], key)) for name in names]) for key in ("foretold", realised))


def oracles(found, names):
    """The same of the oracles; conditions with one retraining have one."""
    both = [[np.mean(each) for each in found[name].oracle] for name in names if found[name].oracle]
    return tuple(np.array(both).reshape(-1, 2).T)


def conditions_table(found, slope):
    rows = []
    for name, one in found.items():
        verdicts = one.verdicts(slope)
        row = [name, f"{100 * np.mean([order['filtered']['dropped'] for order in one.trials.values()]):.0f}"]
        row += [str(len(one.foretold)), said(one.foretold), ", ".join(verdicts.values())]
        row += [str(len(one.realised)), said(one.realised), said(np.multiply(100, one.saved), "{:+.0f}")]
        row += [" / ".join(said(each) for each in one.oracle) if one.oracle else "–"]
        rows.append([*row, ", ".join(one.outcome(verdict) for verdict in verdicts.values())])
    head = ["condition", "dropped, %", "orders", "trial, nats", "verdicts, by seed", "orders", "retrained, nats"]
    return markdown([*head, "iterations saved, %", "oracle: trial / retrained, nats", "the verdicts were"], rows)


def fits_table(found):
    """Lines from trial nats to retrained nats, of several sets of conditions."""
    names = [name for name in found if standard(name)]
    sets = {"all standard trials": names, "without the damage series": [n for n in names if n not in SERIES]}
    sets["without any damage"] = [n for n in names if CONDITIONS[n].corpus not in PERCENT]
    sets["judged on all text"] = [n for n in names if CONDITIONS[n].target == "test_loss"]
    sets |= {f"without {name}": [n for n in names if n != name] for name in names}
    sets["every condition, variants too"] = list(found)
    rows = []
    for label, some in sets.items():
        rows.append([label, str(len(some)), *line_cells(*points(found, some))])
    with_oracles = [np.concatenate(both) for both in zip(points(found, names), oracles(found, names), strict=True)]
    rows.insert(2, ["standard trials, and the oracles'", str(len(with_oracles[0])), *line_cells(*with_oracles)])
    line = fit(*points(found, names, "saved"))
    if line:
        slope, half, intercept, intercept_half, correlation = line
        row = ["all standard trials, to iterations saved", str(len(names)), f"{slope:.0f} ± {half:.0f} % a 0.01 nats"]
        rows.append([*row, f"{100 * intercept:+.0f} ± {100 * intercept_half:.0f} %", f"{correlation:.2f}", "–"])
    rows = [[cell.replace("-", "−") if i > 1 else cell for i, cell in enumerate(row)] for row in rows]
    return markdown(["conditions", "number", "slope", "intercept, nats", "correlation", "slope through zero"], rows)


def line_cells(x, y):
    line = fit(x, y)
    if line is None:
        return ["–"] * 4
    slope, half, intercept, intercept_half, correlation = line
    through_zero = (x * y).sum() / (x * x).sum()
    cells = [f"{slope:.1f} ± {half:.1f}", f"{intercept:+.4f} ± {intercept_half:.4f}"]
    return [*cells, f"{correlation:.2f}", f"{through_zero:.1f}"]


def outcomes_table(found, slope):
    """How often the verdicts were right, by verdict; of the standard trials also after their first four orders."""
    names, counts = [name for name in found if standard(name)], {}
    others, every = [name for name in found if name not in names], math.inf
    for label, some, most in (("four orders", names, 4), ("all orders", names, every), ("variants", others, every)):
        for name in some:
            for verdict in found[name].verdicts(slope, most).values():
                row = counts.setdefault((label, verdict), dict(right=0, wrong=0, undecidable=0, withheld=0))
                row[found[name].outcome(verdict)] += 1
    rows = [[label, verdict, *map(str, row.values())] for (label, verdict), row in counts.items()]
    return markdown(["trials", "verdict", "right", "wrong", "undecidable", "withheld"], rows)


def seeds_table(found):
    """The means of every seed and their interval over seeds, of standard trials that have at least two retrained."""
    rows = []
    for name, one in found.items():
        cells = []
        for effect, orders in ((one.foretold, one.trials), (one.realised, one.retrained)):
            means = by_seed(effect, orders)
            cells += [", ".join(said([mean]) for mean in means), said(means)]
        if len(means) > 1 and standard(name):
            rows.append([name, *cells])
    head = ["condition", "trial, by seed", "over seeds", "retrained, by seed", "over seeds"]
    return markdown(head, rows) if rows else ""


def spreads_table(lines):
    """The standard deviation over orders of filtered less control, paired and as if the arms had other orders."""
    rows = []
    for label, trial in (("trial", True), ("retraining", False)):
        paired, unpaired = [], []
        for condition in dict.fromkeys(CONDITIONS.values()):
            if trial and condition.share != 0.1:
                continue
            orders = orders_of(lines, condition, trial, ("control", "filtered"))
            for seed in {seed for seed, _ in orders}:
                mine = [order for (theirs, _), order in orders.items() if theirs == seed]
                control, filtered = ([o[arm]["test_loss"][-1] for o in mine] for arm in ("control", "filtered"))
                if len(mine) > 1:
                    paired.append(np.var(np.subtract(filtered, control), ddof=1))
                    unpaired.append(np.var(filtered, ddof=1) + np.var(control, ddof=1))
        if paired:
            rows.append([label, *(f"{np.mean(each) ** 0.5:.4f}" for each in (paired, unpaired)), str(len(paired))])
    return markdown(["", "paired, nats", "unpaired, nats", "conditions and seeds"], rows)


def draw(found, path):
    """
    Left: foretold against realised, with 95% intervals and the line of the standard trials. Right: what trials from
    other weights and of other shares foretell, in the place of the standard one.
    """
    fig, (ax, right) = plt.subplots(1, 2, figsize=(13, 6), width_ratios=[1.7, 1], layout="constrained")
    names = [name for name in found if standard(name)]
    (x, y), (ox, oy) = points(found, names), oracles(found, names)
    for number, name in enumerate(names, 1):
        one, at = found[name], (np.mean(found[name].foretold), np.mean(found[name].realised))
        bars = dict(xerr=half_interval(one.foretold), yerr=half_interval(one.realised))
        ax.errorbar(*at, **bars, fmt="o", color="C0", markersize=4, elinewidth=0.5, label=f"{number}  {name}")
        ax.annotate(str(number), at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    ax.plot(ox, oy, "^", color="C2", markersize=6, label="oracles: the undamaged windows")
    line = fit(x, y)
    if line:
        ends = np.array([min(x.min(), ox.min(initial=0)), max(x.max(), 0)])
        ax.plot(ends, line[0] * ends + line[2], "C0-", linewidth=1, label=f"slope {line[0]:.1f} ± {line[1]:.1f}")
    for zero in (ax.axhline, ax.axvline, right.axvline):
        zero(0, color="black", linewidth=0.5, linestyle="--")
    ax.set(xlabel="foretold: effect in the trial, nats", ylabel="realised: effect after retraining, nats")
    ax.set_ylim(
        min(y.min(), oy.min(initial=0)) - 0.06, max(y.max(), 0) + 0.06
    )  # the bar of a condition with two retrainings goes beyond
    ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), handlelength=1)
    others = [name for name in found if name not in names or name in ("15% damaged", "undamaged")][::-1]
    foretold = [found[name].foretold for name in others]
    means, halves = [np.mean(each) for each in foretold], [half_interval(each) for each in foretold]
    right.errorbar(means, range(len(others)), xerr=halves, fmt="ko", markersize=4, capsize=3)
    right.set_yticks(range(len(others)), others, fontsize=8)
    right.set(xlabel="effect in the trial, nats")
    right.set_title("the same retraining, other trials", fontsize=9)
    right.locator_params(axis="x", nbins=5)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=f"{HERE}/foretell.jsonl")
    parser.add_argument("--out", default=HERE, help="the folder for the figure")
    args = parser.parse_args()
    lines = read_lines(args.results)
    compared = {name: Compared(lines, condition) for name, condition in CONDITIONS.items()}
    found = {name: one for name, one in compared.items() if one.whole}
    waiting = [f"{name} ({len(one.trials)}, {len(one.retrained)})" for name, one in compared.items() if not one.whole]

    names = [name for name in found if standard(name)]
    line = fit(*points(found, names))
    slope = line[0] if line else CALIBRATION
    print(f"## Conditions\n\n{conditions_table(found, slope)}\n## Seeds\n\n{seeds_table(found)}")
    print(f"## Lines\n\n{fits_table(found)}")
    print(f"## Verdicts\n\n{outcomes_table(found, slope)}\n## Spread\n\n{spreads_table(lines)}")
    draw(found, f"{args.out}/foretell.png")
    if waiting:
        print(f"Not yet (orders of the trial, of the retraining): {', '.join(waiting)}.")


if __name__ == "__main__":
    main()

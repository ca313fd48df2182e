"""
The lines of study.py and fidelity.py -> tables in Markdown, and figures.

    python study/tables.py --single=novels              # reads study/*.jsonl, writes study/*.png, prints the tables

Every number is the mean over the seeds with its 95% interval (Student's t). Losses are compared with the control of the
same seed. Saved: the share of the control's iterations that a run needs less to the control's final loss; where it does
not get there, minus the share that the control needs less to the run's.
"""

import argparse
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from report import first_crossing  # noqa: E402

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values):
    """The mean and half the width of its 95% interval, None for a single value."""
    values = np.asarray(values, float)
    n = len(values)
    return float(values.mean()), float(T_975[n - 1] * values.std(ddof=1) / n**0.5) if n > 1 else None


def cell(values, form="{:.1f}", scale=1.0):
    """'12.3 ± 0.4' of a list of numbers, one a seed."""
    if not values or None in values:
        return "–"
    mean, half = interval(np.multiply(scale, values))
    return (form.format(mean) + (f" ± {form.format(half).lstrip('+')}" if half is not None else "")).replace("-", "−")


def saving(iters, losses, control):
    """The share of the control's iterations saved: losses, control (e,) at iters (e,); negative where it is ahead."""
    iters, losses, control = map(np.asarray, (iters, losses, control))
    if losses[-1] <= control[-1]:
        return 1 - first_crossing(iters, losses, control[-1]) / first_crossing(iters, control, control[-1])
    return first_crossing(iters, control, losses[-1]) / first_crossing(iters, losses, losses[-1]) - 1


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


class Lines:
    """The lines of one corpus: by name, then by seed."""

    def __init__(self, lines, corpus):
        self.by_name = {}
        for line in lines:
            if line["corpus"] == corpus:
                self.by_name.setdefault(line["name"], {})[line["seed"]] = line

    def seeds(self, *names):
        """The seeds that all of the runs have."""
        return sorted(set.intersection(*(set(self.by_name.get(name, {})) for name in names)))

    def column(self, name, column, *path):
        found = []
        for seed in self.seeds(name):
            value = self.by_name[name][seed]["columns"][column]
            for key in path:
                value = value[key]
            found.append(value)
        return found

    def against(self, name, control, key):
        """{differences of the final loss, savings, shares dropped} to the control, a number for each seed."""
        found = dict(difference=[], saved=[], dropped=[], final=[])
        for seed in self.seeds(name, control):
            ours, theirs = self.by_name[name][seed], self.by_name[control][seed]
            found["difference"].append(ours[key][-1] - theirs[key][-1])
            found["saved"].append(saving(ours["iter"], ours[key], theirs[key]))
            found["dropped"].append(ours["dropped"])
            found["final"].append(ours[key][-1])
        return found


# ---------------------------------------------------------------------------------------------------------------------


def values_table(lines, single):
    """Part 1: share of negatives and what the values find, by how they are made."""
    rows = []
    for name, runs in lines.by_name.items():
        if name.startswith("then"):
            continue
        for column in next(iter(runs.values()))["columns"]:
            one = lines.column(name, column)
            row = [name, column.removeprefix("all:"), cell([c["negative"] for c in one], scale=100)]
            row += [" / ".join(f"{100 * np.mean([c['thirds'][i]['negative'] for c in one]):.0f}" for i in range(3))]
            kinds = one[0]["auc"]
            row += [cell([c["auc"][kind] for c in one], "{:.2f}") for kind in kinds]
            found = [[part["auc"]["shuffled"] for part in c["thirds"]] for c in one]
            row += ["–" if None in found[0] else " / ".join(f"{x:.2f}" for x in np.mean(found, 0))]
            step = [run["val_ms"] / (run["step_ms"] - run["val_ms"]) for run in runs.values()]
            rows.append([*row, f"{100 * np.median(step):.0f}", str(len(one))])
    head = ["validation windows", "direction", "negative, %", "in thirds of the run"]
    head += [f"AUC {kind}" for kind in ("shuffled", "foreign", "duplicated")]
    return markdown([*head, "shuffled, in thirds", "validation pass, % of a step", "seeds"], rows)


def trained_table(lines, single, control="then control", names=None):
    """Parts 2 to 4: what a filter changes."""
    rows = []
    for name in names or [name for name in lines.by_name if name.startswith("then") and "all" not in name]:
        if not lines.seeds(name, control):
            continue
        all_, one = (lines.against(name, control, key) for key in ("test_loss", f"test_loss_{single}"))
        row = [name.removeprefix("then "), cell(all_["dropped"], "{:.0f}", 100), cell(all_["final"], "{:.3f}")]
        row += [cell(all_["difference"], "{:+.3f}"), cell(all_["saved"], "{:+.0f}", 100)]
        row += [cell(one["difference"], "{:+.3f}"), cell(one["saved"], "{:+.0f}", 100), str(len(all_["saved"]))]
        rows.append(row)
    head = ["kept by", "dropped, %", "final test loss", "beside the control", "iterations saved, %"]
    return markdown([*head, f"on {single}", "saved on it, %", "seeds"], rows)


def agreement_table(lines):
    """How far two values of the same windows agree."""
    rows = []
    labels = dict(halves="windows, one run, two halves of the validation windows", windows="windows, two runs")
    labels |= dict(documents="means of documents, two runs", domains="means of domains, two runs")
    for pair, label in labels.items():
        found = [run["agreement"][pair] for run in lines.by_name["m16 again"].values()]
        if None not in found:
            correlation, both, one, other = np.array(found).T
            row = [label, cell(list(correlation), "{:.2f}"), cell(list(one), scale=100)]
            rows.append([*row, cell(list(both), scale=100), cell(list(one * other), scale=100)])
    return markdown(["values of", "correlation", "negative, %", "in both, %", "in both by chance, %"], rows)


def fidelity_table(path):
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rows = []
    conditions = dict.fromkeys(tuple(line["condition"][1:4]) for line in lines)
    for lr, stage, optimizer in conditions:
        some = [line for line in lines if tuple(line["condition"][1:4]) == (lr, stage, optimizer)]
        for case in "ab":
            row = [optimizer, f"{lr:g}", stage, case]
            for kind in ("sgd", "sgd, order 2", "adam", "adam, order 2"):
                pairs = np.array([line[f"{case}: {kind}"] for line in some if f"{case}: {kind}" in line])
                row.append(" / ".join(f"{x:.3f}" for x in pairs.mean(0)) if len(pairs) else "–")
            rows.append([*row, str(len(some))])
    rows.sort(key=lambda row: (row[0], row[3]))
    head = ["step", "lr", "stage", "case", "'sgd'", "'sgd', order 2", "'adam'", "'adam', order 2", "batches"]
    return markdown(head, rows)


# ---------------------------------------------------------------------------------------------------------------------


def draw_shares(lines, path):
    """The share of negatives and the AUC of shuffled windows over m; and what filters change."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1, 1, 1.3], layout="constrained")
    for direction, marker in (("sgd", "o"), ("adam", "s")):
        for ax, path_ in ((axes[0], ("negative",)), (axes[1], ("auc", "shuffled"))):
            scale = 100 if ax is axes[0] else 1
            for names, style in ((("m1", "m4", "m16"), "-"), (("m1 fixed",), " ")):
                names = [name for name in names if name in lines.by_name]
                found = [interval(np.multiply(scale, lines.column(name, f"all:{direction}", *path_))) for name in names]
                x = [int(name.split()[0][1:]) for name in names]
                label = direction if style == "-" else f"{direction}, always the same window"
                mfc = None if style == "-" else "white"
                color = "C0" if direction == "sgd" else "C1"
                mean, half = [m for m, _ in found], [h or 0 for _, h in found]
                ax.errorbar(x, mean, half, marker=marker, linestyle=style, color=color, mfc=mfc, capsize=3, label=label)
    for ax in axes[:2]:
        ax.set(xscale="log", xlabel="validation windows an iteration, m", xticks=[1, 4, 16], xticklabels=[1, 4, 16])
        ax.minorticks_off()
    axes[0].set(ylabel="windows below zero (%)", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=7)
    axes[1].set(ylabel="AUC for shuffled windows")
    axes[1].axhline(0.5, color="black", linewidth=0.6, linestyle="--")
    names = [name for name in lines.by_name if name.startswith("then") and "all" not in name and "failed" not in name]
    names = [name for name in names if name != "then control" and "single" not in name][::-1]
    found = [interval(lines.against(name, "then control", "test_loss")["difference"]) for name in names]
    mean, half = [m for m, _ in found], [h or 0 for _, h in found]
    axes[2].errorbar(mean, range(len(names)), xerr=half, fmt="ko", capsize=3)
    axes[2].axvline(0, color="black", linewidth=0.6, linestyle="--")
    axes[2].set_yticks(range(len(names)), [name.removeprefix("then ") for name in names], fontsize=8)
    axes[2].set(xlabel="final test loss beside the control's (nats)")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_domains(lines, column, path):
    """The mean value of a draw (the paper's Fig. 3) and the share below zero, by domain, over the run."""
    runs = lines.column("m16", column, "by_domain")
    domains = sorted(set.intersection(*(set(part) for run in runs for part in run)))
    table = np.array([[[part[d] for d in domains] for part in run] for run in runs])  # (seeds, parts, domains, 2)
    iterations = (np.arange(table.shape[1]) + 0.5) / table.shape[1] * 100
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for i, domain in enumerate(domains):
        value, share = table[..., i, 0].mean(0), table[..., i, 1].mean(0)
        total = np.abs(table[..., 0]).mean(2).mean(0)
        style = dict(color=f"C{i}", linewidth=2.5 if domain in column else 1.2)
        axes[0].plot(iterations, value / total, label=domain, **style)
        axes[1].plot(iterations, 100 * share, **style)
    axes[0].axhline(0, color="black", linewidth=0.6, linestyle="--")
    axes[0].set(xlabel="% of the run", ylabel="mean value of a draw,\nover the domains' mean magnitude")
    axes[1].set(xlabel="% of the run", ylabel="draws below zero (%)")
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=f"{HERE}/results.jsonl")
    parser.add_argument("--fidelity", default=f"{HERE}/fidelity.jsonl")
    parser.add_argument("--single", default="two", help="the single-domain validation set of the runs")
    parser.add_argument("--out", default=HERE, help="the folder for the figures")
    args = parser.parse_args()
    with open(args.results, encoding="utf-8") as file:
        everything = [json.loads(line) for line in file]
    os.makedirs(args.out, exist_ok=True)
    for corpus in dict.fromkeys(line["corpus"] for line in everything):
        lines = Lines(everything, corpus)
        single = next((key for line in everything if line["corpus"] == corpus for key in line if "loss_" in key), "")
        single = single.removeprefix("test_loss_") or args.single
        print(f"## {corpus}\n\n{values_table(lines, single)}")
        print(trained_table(lines, single))
        if lines.seeds("then control all"):
            names = ["then control all", "then failed", "then failed, redrawn", "then failed, weighted"]
            print(trained_table(lines, single, "then control all", names))
        if lines.seeds("m16 again"):
            print(agreement_table(lines))
        if corpus.endswith("damaged"):
            draw_shares(lines, f"{args.out}/{corpus}.png")
        for column in next(iter(lines.by_name["m16"].values()))["columns"]:
            if column == f"{single}:adam":
                draw_domains(lines, column, f"{args.out}/{corpus}_domains.png")
    if os.path.exists(args.fidelity):
        print(f"## Fidelity\n\n{fidelity_table(args.fidelity)}")


if __name__ == "__main__":
    main()

"""
The lines of study.py and fidelity.py -> tables in Markdown, and figures.

    python study/tables.py              # reads study/*.jsonl, writes study/*.png, prints the tables

A number with an interval is the mean over the seeds ± half of its 95% interval (Student's t). The seeds share the
split, the damage and the test windows. The references of a run are the control and the random drops of the same seed
and pool. Where no window is drawn twice, they are other orders of the control's windows. Losses are compared with the
mean of the references. Saved is the share of the references' iterations that a run does not need to reach their final
loss. For a run that does not reach it, saved is negative: the share of its own iterations that the references do not
need to reach its final loss.
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

T_975 = [np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # by degrees of freedom


def interval(values):
    """The mean of at most ten values and half the width of its 95% interval, None for a single one."""
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
    """The share of iterations saved beside the control, negative if the control is ahead. All (e,): losses at iters."""
    iters, losses, control = map(np.asarray, (iters, losses, control))
    if losses[-1] <= control[-1]:
        return 1 - first_crossing(iters, losses, control[-1]) / first_crossing(iters, control, control[-1])
    return first_crossing(iters, control, losses[-1]) / first_crossing(iters, losses, losses[-1]) - 1


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def title(line):
    return line["corpus"] + (", fresh seeds" if line["plan"] == "confirm" else "")


class Lines:
    """The lines of one title: by name, then by seed."""

    def __init__(self, lines, of):
        self.by_name = {}
        for line in lines:
            if title(line) == of:
                self.by_name.setdefault(line["name"], {})[line["seed"]] = line

    def arms(self, failed=False):
        """The runs that train afresh and have references: those about the failed reproduction, or the others."""
        about_it = ("then failed", "then control all")
        names = [name for name in self.by_name if name.startswith("then")]
        return [name for name in names if name.startswith(about_it) == failed and self.references(name)]

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

    def references(self, name):
        """The control that draws from the same pool, and the random drops."""
        pool = next(iter(self.by_name[name].values()))["pool"]
        names = sorted(other for other in self.by_name if other.startswith(("then control", "then random")))
        return [other for other in names if next(iter(self.by_name[other].values()))["pool"] == pool]

    def against(self, name, key):
        """{differences of the final loss, savings, shares dropped} to the references, a number for each seed."""
        found, references = dict(difference=[], saved=[], dropped=[], final=[]), self.references(name)
        for seed in self.seeds(name, references[0]):
            ours = self.by_name[name][seed]
            there = [other for other in references if seed in self.by_name[other]]
            theirs = np.mean([self.by_name[other][seed][key] for other in there], 0)
            found["difference"].append(ours[key][-1] - theirs[-1])
            found["saved"].append(saving(ours["iter"], ours[key], theirs))
            found["dropped"].append(ours["dropped"])
            found["final"].append(ours[key][-1])
        return found


# ---------------------------------------------------------------------------------------------------------------------


def values_table(lines):
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
            row += [cell([c["z_score"]["auc"][kind] for c in one], "{:.2f}") for kind in kinds]
            row += [cell([c["z_score"]["damaged"][1] for c in one], "{:.0f}", 100)]
            knobs = next(iter(runs.values()))["knobs"]
            # val_interval, iterations that one gradient served, is a knob of two rows that commit ffc8313 made
            windows = knobs.get("val_batch_size", 16) / knobs.get("val_interval", 1) / 32
            row += [f"{100 * windows:.0f}"]
            rows.append([*row, str(len(one))])
    head = ["validation windows", "direction", "negative, %", "in thirds of the run"]
    head += [f"{by}: {kind}" for by in ("AUC by value", "AUC by z-score") for kind in one[0]["auc"]]
    return markdown([*head, "damaged among the lowest 15%, %", "validation / training windows, %", "seeds"], rows)


def trained_table(lines, single, names):
    """Parts 2 to 4: what a filter changes."""
    rows = []
    for name in names:
        all_, one = (lines.against(name, key) for key in ("test_loss", f"test_loss_{single}"))
        row = [name.removeprefix("then "), cell(all_["dropped"], "{:.0f}", 100), cell(all_["final"], "{:.3f}")]
        row += [cell(all_["difference"], "{:+.3f}"), cell(all_["saved"], "{:+.0f}", 100)]
        row += [cell(one["difference"], "{:+.3f}"), cell(one["saved"], "{:+.0f}", 100), str(len(all_["saved"]))]
        rows.append(row)
    head = ["kept by", "dropped, %", "final test loss", "beside control and random drops", "iterations saved, %"]
    return markdown([*head, f"on {single}", "saved on it, %", "seeds"], rows)


def agreement_table(lines, name):
    """How far two values of the same windows agree."""
    rows = []
    labels = dict(halves="windows, one run, two halves of the validation windows", windows="windows, two runs")
    labels |= dict(documents="means of documents, two runs", domains="means of domains, two runs")
    for pair, label in labels.items():
        found = [run["agreement"].get(pair) for run in lines.by_name[name].values()]
        if None not in found:
            correlation, both, one, other = np.array(found).T
            row = [label, cell(list(correlation), "{:.2f}"), cell(list(one), scale=100)]
            rows.append([*row, cell(list(both), scale=100), cell(list(one * other), scale=100)])
    return markdown(["values of", "correlation", "negative, %", "in both, %", "in both by chance, %"], rows)


def fidelity_table(path):
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rows = []
    conditions = dict.fromkeys(tuple(line["condition"][:4]) for line in lines)
    for dataset, lr, stage, optimizer in conditions:
        some = [line for line in lines if tuple(line["condition"][:4]) == (dataset, lr, stage, optimizer)]
        for case in "ab":
            row = [dataset, optimizer, f"{lr:g}", stage, case]
            for kind in ("sgd", "sgd, order 2", "adam", "adam, order 2"):
                pairs = np.array([line[f"{case}: {kind}"] for line in some if f"{case}: {kind}" in line])
                means = [f"{x:.3f}" for x in pairs.mean(0)] if len(pairs) else []
                row.append(f"{' / '.join(means)} ({pairs[:, 1].min():.2f})" if means else "–")
            rows.append([*row, str(len(some))])
    rows.sort(key=lambda row: (row[0], row[1], row[4]))
    head = ["corpus", "step", "lr", "stage", "case", "'sgd'", "'sgd', order 2", "'adam'", "'adam', order 2", "batches"]
    return markdown(head, rows)


# ---------------------------------------------------------------------------------------------------------------------


def draw_shares(lines, path):
    """Over m: the share of negatives, and the AUC for shuffled windows; and what each filter changes."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.7), width_ratios=[1, 1, 1.5], layout="constrained")
    fresh = ["m1", "m4", "m16"]
    curves = [("sgd, redrawn", "sgd", fresh, "C0o-"), ("adam, redrawn", "adam", fresh, "C1s-")]
    curves += [("adam, always the same window", "adam", ["m1 fixed"], "C3x")]
    curves += [("adam, running average", "adam", ["m1 average32", "m16 average32"], "C2D-")]
    for place, (label, direction, names, style) in enumerate(curves):
        names = [name for name in names if name in lines.by_name]
        x = [int(name.split()[0][1:]) * 1.06 ** (place - 1.5) for name in names]  # beside each other
        for ax, scale, key in ((axes[0], 100, ("negative",)), (axes[1], 1, ("z_score", "auc", "shuffled"))):
            found = [interval(np.multiply(scale, lines.column(name, f"all:{direction}", *key))) for name in names]
            mean, half = [m for m, _ in found], [h or 0 for _, h in found]
            ax.errorbar(x, mean, half, fmt=style[2:], color=style[:2], markersize=5, capsize=3, label=label)
    for ax in axes[:2]:
        ax.set(xscale="log", xlabel="validation windows an iteration, m", xticks=[1, 4, 16], xticklabels=[1, 4, 16])
        ax.minorticks_off()
    axes[0].set(ylabel="windows below zero (%)", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=7, loc="lower left")
    axes[1].set(ylabel="AUC for shuffled windows, by z-score")
    axes[1].axhline(0.5, color="black", linewidth=0.6, linestyle="--")
    names = [name for name in lines.arms() if "single" not in name][::-1]
    found = [interval(lines.against(name, "test_loss")["difference"]) for name in names]
    mean, half = [m for m, _ in found], [h or 0 for _, h in found]
    axes[2].errorbar(mean, range(len(names)), xerr=half, fmt="ko", markersize=4, capsize=3)
    axes[2].axvline(0, color="black", linewidth=0.6, linestyle="--")
    axes[2].set_yticks(range(len(names)), [name.removeprefix("then ") for name in names], fontsize=8)
    axes[2].set(xlabel="final test loss, nats, beside control and random drops")
    axes[2].locator_params(axis="x", nbins=5)
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
        style = dict(color=f"C{i}", linewidth=2.5 if column.startswith(f"{domain}:") else 1.2)
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
    parser.add_argument("--out", default=HERE, help="the folder for the figures")
    args = parser.parse_args()
    with open(args.results, encoding="utf-8") as file:
        everything = [json.loads(line) for line in file]
    os.makedirs(args.out, exist_ok=True)
    for corpus in dict.fromkeys(map(title, everything)):
        lines = Lines(everything, corpus)
        keys = (key for line in everything if title(line) == corpus for key in line)
        single = next((key.removeprefix("test_loss_") for key in keys if key.startswith("test_loss_")), "")
        print(f"## {corpus}\n\n{values_table(lines)}")
        for failed in (False, True):
            if lines.arms(failed):
                print(trained_table(lines, single, lines.arms(failed)))
        for name in ("m16 again", "m16 average32 again"):
            if lines.seeds(name):
                print(f"{name.removesuffix(' again')}:\n\n{agreement_table(lines, name)}")
        if corpus.endswith("damaged"):
            draw_shares(lines, f"{args.out}/{corpus}.png")
        for run in lines.by_name.get("m16", {}).values():
            if f"{single}:adam" in run["columns"]:
                draw_domains(lines, f"{single}:adam", f"{args.out}/{corpus}_domains.png")
                break
    if os.path.exists(args.fidelity):
        print(f"## Fidelity\n\n{fidelity_table(args.fidelity)}")


if __name__ == "__main__":
    main()

"""
Does what a trial sees grow or vanish with the size of the model?

    python study/scale.py --minipile=minipile.parquet --wildpile=wildpile.parquet     # the runs
    python study/scale.py --tables                                                    # the table and the figure

The scored runs and the trials are those of foretell.py with larger models: the same windows, as many iterations, a peak
of the learning rate that falls with the root of the width. The smallest model's lines are those of foretell.py.

Every run is a run of train.py. When it has ended, one JSON line about it joins study/scale.jsonl. A run that has a line
is not run again, so a study that was interrupted goes on; the scored runs stay in out/ for their arms.
"""

import argparse
from typing import NamedTuple
from unittest.mock import patch

import filters
import foretell
import matplotlib
import numpy as np
from foretell import CONDITIONS, HERE, ITERATIONS, arms_of, make_corpora, run_all, run_of, workers

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from foretell_tables import effects, orders_of, read_lines, said  # noqa: E402
from tables import markdown  # noqa: E402

from study import CENTRE, DAMAGE  # noqa: E402
from trial import t_quantile  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The plan.

CHOSEN = {name: CONDITIONS[name] for name in ("15% damaged", "wild, for prose", "wild")}
SMALLEST = "0.25M"
SHAPES = {  # the weights of a model, and its shape
    SMALLEST: dict(n_layer=2, n_head=2, n_embd=96),
    "1M": dict(n_layer=4, n_head=3, n_embd=144),
    "4M": dict(n_layer=6, n_head=5, n_embd=240),
    "10M": dict(n_layer=8, n_head=6, n_embd=324),
}


class Scored(NamedTuple):
    """A scored run of foretell.py, and a key of SHAPES."""

    corpus: str
    values: str
    seed: int
    size: str


# a foretell.Run that is an arm of a trial, and a key of SHAPES
Trial = NamedTuple("Trial", [*foretell.Run.__annotations__.items(), ("size", str)])


def plan(conditions, size, seed, orders):
    """The scored runs, and the trials' arms of as many `orders`."""
    scored = [Scored(c.corpus, c.values, seed, size) for c in conditions]
    trials = [
        Trial(*run_of(condition, arm, seed, order, trial=True), size)
        for order in range(1, orders + 1)
        for condition in conditions
        for arm in arms_of(condition)
    ]
    return list(dict.fromkeys(scored)), list(dict.fromkeys(trials))


def weights_of(size):
    """The number of weights in the blocks, 12 a layer and squared width; the embeddings have 257 rows and 64."""
    return 12 * SHAPES[size]["n_layer"] * SHAPES[size]["n_embd"] ** 2


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def begin_worker():
    """The runs of foretell.py, of which only the last weights are kept."""
    filters.begin_worker()
    foretell.CHECKPOINTS = (ITERATIONS,)


def with_model(run, function):
    """function(a Run or a scored run of foretell.py) with the model of this Trial or Scored, in folders of its own."""
    *same, size = run
    rate = CENTRE["learning_rate"] * (CENTRE["n_embd"] / SHAPES[size]["n_embd"]) ** 0.5
    model, halved = SHAPES[size] | dict(learning_rate=rate, min_lr=rate / 10), dict(learning_rate=rate / 2)

    def scored_folder(corpus, values, seed):
        return f"out/scale/{size}/{corpus}_s{seed}/{values}"

    with (
        patch.dict(foretell.CENTRE, model),
        patch.dict(foretell.TRIAL, halved),
        patch.object(foretell, "scored_folder", scored_folder),
    ):
        return function(foretell.Run(*same) if isinstance(run, Trial) else tuple(same))


def run_scored(run):
    return with_model(run, foretell.run_scored)


def run_arm(run):
    return with_model(run, foretell.run_arm)


# ---------------------------------------------------------------------------------------------------------------------
# The table and the figure.


def lines_of(size, own, known):
    """The lines of a size, by the runs of foretell.py: those `known` of the smallest, of this study's `own` else."""
    return known if size == SMALLEST else {run[:-1]: line for run, line in own.items() if run[-1] == size}


def by_seed(lines, condition, arm, orders):
    """{seed: the arm's effects in its first `orders` orders}, of trials; see effects()."""
    whole = orders_of(lines, condition, True, arms_of(condition))
    some, found = {key: whole[key] for key in whole if key[1] <= orders}, {}
    for (seed, _), effect in zip(some, effects(some, condition.target, arm), strict=True):
        found.setdefault(seed, []).append(effect)
    return found


def noise_of(found):
    """The standard deviation over the orders of a seed, pooled over seeds; nan where each has one order."""
    variances = [np.var(each, ddof=1) for each in found.values() if len(each) > 1]
    return np.mean(variances) ** 0.5 if variances else np.nan


def line_over_sizes(points):
    """
    From (weights, effect) of scored runs, (slope a tenfold of the weights, half of its 95% interval, effect at 124M,
    half of the interval of that mean); None where they have fewer than three points or one size.
    """
    x, y = np.log10([weights for weights, _ in points]), np.array([effect for _, effect in points])
    if len(x) < 3 or np.ptp(x) == 0:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    squares, at = ((x - x.mean()) ** 2).sum(), np.log10(85e6)  # the weights in the blocks of GPT-2 124M
    left = (((y - slope * x - intercept) ** 2).sum() / (len(x) - 2)) ** 0.5 * t_quantile(0.975, len(x) - 2)
    far = left * (1 / len(x) + (at - x.mean()) ** 2 / squares) ** 0.5
    return slope, left / squares**0.5, intercept + slope * at, far


def cells_of(lines, condition, arm, found):
    """What the table says of an arm of a size: see its head."""
    orders = orders_of(lines, condition, True, arms_of(condition)).values()
    scored = [lines[condition.corpus, condition.values, seed]["columns"][condition.column] for seed in found]
    losses = [order["control"][condition.target][-1] for order in orders]
    dropped = [100 * order[arm]["dropped"] for order in orders]
    aucs = [[each["auc"][kind] for each in scored] for kind in DAMAGE]
    cells = [str(len(found)), str(sum(map(len, found.values()))), f"{np.mean(losses):.3f}", f"{np.mean(dropped):.0f}"]
    cells.append(" / ".join("–" if None in each else f"{np.mean(each):.2f}" for each in aucs))
    return [*cells, said([np.mean(each) for each in found.values()]), f"{noise_of(found):.4f}"]


def show(own, known, orders, path):
    """Print the tables of the effects in the first `orders` orders, and draw them over the number of weights."""
    rows, fits, drawn = [], [], {}
    arms = [(name, "filtered", condition) for name, condition in CHOSEN.items()]
    arms += [(f"{name}, oracle", "oracle", one) for name, one in CHOSEN.items() if "oracle" in arms_of(one)]
    for label, arm, condition in arms:
        for size in SHAPES:
            lines = lines_of(size, own, known)
            found = by_seed(lines, condition, arm, orders)
            if found:
                rows.append([label, size, *cells_of(lines, condition, arm, found)])
                drawn.setdefault(label, {})[size] = [np.mean(each) for each in found.values()]
        line = line_over_sizes([(weights_of(size), mean) for size in drawn[label] for mean in drawn[label][size]])
        if line:
            slope, half, far, far_half = line
            fits.append([label, f"{slope:+.4f} ± {half:.4f}", f"{far:+.3f} ± {far_half:.3f}"])
    head = ["condition", "weights", "scored runs", "orders", "control's loss", "dropped, %"]
    head += ["AUC: shuffled / foreign / duplicated", "effect in the trial, nats", "an order's spread"]
    print(f"## Sizes\n\n{markdown(head, rows)}")
    fits = [[cell.replace("-", "−") for cell in row] for row in fits]
    print(f"## Lines\n\n{markdown(['condition', 'a tenfold of the weights, nats', 'the line at 124M, nats'], fits)}")
    draw(drawn, path)


def draw(drawn, path):
    """{label: {size: effects of scored runs}}: a point for each run, and the means with their intervals."""
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (label, sizes) in enumerate(drawn.items()):
        shift = 1.04 ** (number - (len(drawn) - 1) / 2)
        x = [shift * weights_of(size) for size in sizes]
        for place, effects_there in zip(x, sizes.values(), strict=True):
            ax.plot([place] * len(effects_there), effects_there, ".", color=f"C{number}", markersize=4, alpha=0.5)
        means = [np.mean(each) for each in sizes.values()]
        halves = [half_over_seeds(each) for each in sizes.values()]
        ax.errorbar(x, means, yerr=halves, fmt="o-", color=f"C{number}", markersize=5, capsize=3, label=label)
    ax.axhline(0, color="black", linewidth=0.5, linestyle="--")
    ax.set(xscale="log", xlabel="weights in the blocks", ylabel="effect in the trial, nats (below zero: it helps)")
    ax.legend(frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def half_over_seeds(means):
    """Half of the 95% interval of the mean over scored runs (Student's t); nan of one or two: no bar."""
    if len(means) < 3:
        return np.nan
    return t_quantile(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="the table and the figure of the lines so far; no run")
    parser.add_argument("--minipile", help="a file of texts with their domains, as for foretell.py")
    parser.add_argument("--wildpile", help="a large one, as found")
    parser.add_argument("--conditions", nargs="+", choices=CHOSEN, default=CHOSEN, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES)[1:], default=["1M", "4M"], metavar="SIZE")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--results", default=f"{HERE}/scale.jsonl")
    parser.add_argument("--known", default=f"{HERE}/foretell.jsonl", help="the lines of foretell.py, for the table")
    parser.add_argument("--out", default=HERE, help="the folder for the figure")
    args = parser.parse_args()
    if args.tables:
        show(read_lines(args.results), read_lines(args.known), args.orders, f"{args.out}/scale.png")
        return
    make_corpora(args.minipile, args.wildpile)
    conditions = [CHOSEN[name] for name in args.conditions]
    with workers(args.jobs, begin_worker) as pool:
        for size in args.sizes:
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                scored, trials = plan(conditions, size, seed, args.orders)
                run_all(pool, run_scored, scored, args.results)
                run_all(pool, run_arm, trials, args.results)


if __name__ == "__main__":
    main()

"""
Does what a trial sees grow or vanish with the size of the model?

    python study/scale.py --minipile=minipile.parquet --wildpile=wildpile.parquet     # the runs
    python study/scale.py --tables                                                    # the tables and the figure

The scored runs and the trials are those of foretell.py with larger models. They see the same windows in the same number
of iterations. The peak of the learning rate is 2e-3 * sqrt(96 / n_embd), a rule of thumb. The lines of the smallest
model are those of foretell.py. An effect is the filtered arm's final test loss less the mean of the control's and of
the random drop's, of one order. ± is half of the 95% interval over scored runs, of which each counts with the mean of
its orders.

Every run is a run of train.py. When it has ended, one JSON line about it joins study/scale.jsonl. A run that has a line
is not run again, so a study that was interrupted goes on; the scored runs stay in out/ for their arms.
"""

from typing import NamedTuple
from unittest.mock import patch

import filters
import foretell
import matplotlib
import numpy as np
from foretell import (
    CONDITIONS,
    HERE,
    ITERATIONS,
    arms_of,
    make_corpora,
    parsed,
    parser_of,
    run_all,
    run_of,
    workers,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from foretell_tables import effects, half_interval, orders_of, read_lines, said  # noqa: E402
from tables import markdown  # noqa: E402
from trial_defaults import number, spread  # noqa: E402

from study import CENTRE, DAMAGE  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The plan.

CHOSEN = {name: CONDITIONS[name] for name in ("15% damaged", "wild, for prose", "wild")}
SMALLEST = "0.25M"
SHAPES = {  # the weights of a model, with its embeddings, and its shape
    SMALLEST: dict(n_layer=2, n_head=2, n_embd=96),
    "1M": dict(n_layer=4, n_head=3, n_embd=144),
    "4M": dict(n_layer=6, n_head=5, n_embd=240),
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
    """The weights of the blocks, 12 n_layer n_embd^2, without the embeddings of 257 tokens and 64 positions."""
    return 12 * SHAPES[size]["n_layer"] * SHAPES[size]["n_embd"] ** 2


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def begin_worker():
    """The runs of foretell.py, of which only the last weights are kept."""
    filters.begin_worker()
    foretell.CHECKPOINTS = (ITERATIONS,)


def with_model(run, function):
    """
    Call `function` with a Trial or a Scored as foretell.py knows it, while foretell.py has the model, the learning rate
    and the folders of its size.
    """
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
    """{run of foretell.py: line} of a size: `known`, of foretell.py, for the smallest, for the others some of `own`."""
    return known if size == SMALLEST else {run[:-1]: line for run, line in own.items() if run[-1] == size}


def trials_of(lines, condition, n):
    """{seed: {(seed, order): {arm: line}}} of the first n orders."""
    found = {}
    for key, arms in orders_of(lines, condition, True, arms_of(condition)).items():
        if key[1] <= n:
            found.setdefault(key[0], {})[key] = arms
    return found


def cells_of(lines, condition, arm, trials):
    """What the table says of an arm of a size, see its head; and {seed: its effects}."""
    target, scored = condition.target, [lines[condition.corpus, condition.values, seed] for seed in trials]
    controls = [[arms["control"][target][-1] for arms in orders.values()] for orders in trials.values()]
    gains = [line[target][-1] - np.mean(losses) for line, losses in zip(scored, controls, strict=True)]
    found = {seed: effects(orders, target, arm) for seed, orders in trials.items()}
    dropped = [100 * arms[arm]["dropped"] for orders in trials.values() for arms in orders.values()]
    aucs = [[line["columns"][condition.column]["auc"][kind] for line in scored] for kind in DAMAGE]
    unknown = [arm == "oracle" or None in each for each in aucs]  # the oracle does not go by values
    cells = [str(len(trials)), str(sum(map(len, trials.values()))), f"{np.mean(sum(controls, [])):.3f}"]
    cells += [f"{np.mean(gains):.4f}".replace("-", "−"), f"{np.mean(dropped):.0f}"]
    cells.append(" / ".join("–" if no else f"{np.mean(each):.2f}" for no, each in zip(unknown, aucs, strict=True)))
    return [*cells, said([np.mean(each) for each in found.values()]), number(spread([found]), "{:.4f}")], found


def slopes(by_size):
    """
    From {size: {seed: effects}} the slopes of least squares, in nats for ten times the weights, of every seed that has
    all of the sizes. Seeds are the unit: the runs of a seed have the same windows in the same order, whatever the size.
    """
    x = np.log10([weights_of(size) for size in by_size])
    seeds = set.intersection(*map(set, by_size.values())) if len(x) > 1 else ()
    return [float(np.polyfit(x, [np.mean(by_size[size][seed]) for size in by_size], 1)[0]) for seed in sorted(seeds)]


def show(own, known, n, path):
    """Print the tables of the effects in the first n orders, and draw them over the number of weights."""
    rows, slope_rows, drawn = [], [], {}
    arms = [(name, "filtered", condition) for name, condition in CHOSEN.items()]
    arms += [(f"{name}, oracle", "oracle", one) for name, one in CHOSEN.items() if "oracle" in arms_of(one)]
    for label, arm, condition in arms:
        found = drawn[label] = {}
        for size in SHAPES:
            lines = lines_of(size, own, known)
            trials = trials_of(lines, condition, n)
            if trials:
                cells, found[size] = cells_of(lines, condition, arm, trials)
                rows.append([label, size, *cells])
        for count in range(2, len(found) + 1):
            sizes = list(found)[:count]
            each = slopes({size: found[size] for size in sizes})
            if each:
                slope_rows.append([label, f"{sizes[0]} to {sizes[-1]}", str(len(each)), said(each)])
    head = ["condition", "weights", "scored runs", "orders", "control's loss", "control's gain, nats", "dropped, %"]
    head += ["AUC: shuffled / foreign / duplicated", "effect in the trial, nats", "an order's spread"]
    print(f"## Sizes\n\n{markdown(head, rows)}")
    head = ["condition", "weights", "scored runs", "ten times the weights, nats"]
    print(f"## Slopes\n\n{markdown(head, slope_rows)}")
    draw(drawn, path)


def draw(drawn, path):
    """{label: {size: {seed: effects}}}: a point for each scored run, and the means with their intervals over them."""
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for place, (label, sizes) in enumerate(drawn.items()):
        shift = 1.04 ** (place - (len(drawn) - 1) / 2)
        x = [shift * weights_of(size) for size in sizes]
        means = [[np.mean(each) for each in found.values()] for found in sizes.values()]
        for at, each in zip(x, means, strict=True):
            ax.plot([at] * len(each), each, ".", color=f"C{place}", markersize=4, alpha=0.5)
        look = dict(fmt="o-", color=f"C{place}", markersize=5, capsize=3, label=label)
        ax.errorbar(x, [np.mean(each) for each in means], yerr=[half_interval(each) for each in means], **look)
    ax.axhline(0, color="black", linewidth=0.5, linestyle="--")
    ax.set(xscale="log", xlabel="weights in the blocks", ylabel="effect in the trial, nats (below zero: it helps)")
    ax.set_title("small points: scored runs; bars: 95% over them", fontsize=10)
    ax.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main():
    parser = parser_of(__doc__, "scale", first_seed=1, seeds=3, orders=4)
    parser.add_argument("--conditions", nargs="+", choices=CHOSEN, default=CHOSEN, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES)[1:], default=["1M", "4M"], metavar="SIZE")
    parser.add_argument("--out", default=HERE, help="the folder for the figure, which --tables draws too")
    args = parsed(parser)
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

"""
Which trial agrees best with retraining: the optimiser's state, the peak of the learning rate, the share of iterations?

    python study/trial_defaults.py --minipile=minipile.parquet --wildpile=wildpile.parquet     # the runs
    python study/trial_defaults.py --tables                                                    # the tables

The trials and the retraining are those of foretell.py, with seeds that most of its conditions have not. A variant of
the trial starts from the scored run's weights with a fresh AdamW, or with the run's own AdamW state, and rises to
another peak of the learning rate, or lasts for another share of the iterations. The variants share one retraining.

Every run is a run of train.py. When it has ended, one JSON line about it joins study/trial_defaults.jsonl. A run that
has a line is not run again, so a study that was interrupted goes on; the scored runs stay in out/ for their arms.
"""

from typing import NamedTuple
from unittest.mock import patch

import filters
import foretell
import numpy as np
import torch
from foretell import (
    CLEAN,
    CONDITIONS,
    ITERATIONS,
    make_corpora,
    parsed,
    parser_of,
    run_all,
    run_of,
    run_scored,
    workers,
)
from foretell_tables import effects, orders_of, read_lines, said
from tables import markdown

from model import GPT
from study import CENTRE

# ---------------------------------------------------------------------------------------------------------------------
# The plan.

CHOSEN = {name: CONDITIONS[name] for name in ("undamaged", "15% damaged", "for novels")}
ARMS = ("control", "random", "filtered")


class Variant(NamedTuple):
    """A trial; the first is the default of trial.py."""

    state: str = "fresh"  # the optimiser's, or 'kept': as the scored run has left it
    peak: float = 0.5  # of the learning rate, in peaks of the scored run
    share: float = 0.1  # of the scored run's iterations


VARIANTS = [Variant(state, peak) for peak in (0.5, 0.25, 1.0) for state in ("fresh", "kept")]
VARIANTS += [Variant(share=0.05), Variant(share=0.3)]


# a foretell.Run that is an arm of a trial, and what the variant changes besides `iterations`
Trial = NamedTuple("Trial", [*foretell.Run.__annotations__.items(), ("state", str), ("peak", float)])


def trial_of(variant, condition, arm, seed, order):
    run = run_of(condition._replace(share=variant.share), arm, seed, order, trial=True)
    return Trial(*run, variant.state, variant.peak)


def plan(seeds, orders, retrainings):
    """For each seed: the scored runs, and then the trials and the retraining, each list by worth."""
    for seed in seeds:
        scored = dict.fromkeys((condition.corpus, condition.values, seed) for condition in CHOSEN.values())
        both = [(condition, arm) for condition in CHOSEN.values() for arm in ARMS]
        trials = [
            trial_of(variant, *each, seed, order)
            for order in range(1, orders + 1)
            for variant in VARIANTS
            for each in both
        ]
        retrained = [run_of(*each, seed, order, trial=False) for order in range(1, retrainings + 1) for each in both]
        yield list(scored), list(dict.fromkeys(trials + retrained))


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def scored_folder(corpus, values, seed):
    return f"out/defaults/{corpus}_s{seed}/{values}"


def begin_worker():
    """The runs of foretell.py in folders of their own, with the optimiser's state beside the last weights."""
    filters.begin_worker()
    foretell.scored_folder = scored_folder
    foretell.WEIGHTS = (*foretell.WEIGHTS, "optimizer")
    foretell.CHECKPOINTS = (ITERATIONS,)
    foretell.TEST_SETS[CLEAN] = "all,novels"


def going_on_from(path):
    """A GPT.configure_optimizers whose optimiser has the state in the checkpoint `path`; train.py takes the weights."""
    configure, state = GPT.configure_optimizers, torch.load(path, weights_only=True)["optimizer"]

    def configure_optimizers(model, *args):
        optimizer = configure(model, *args)
        optimizer.load_state_dict(state)
        return optimizer

    return configure_optimizers


def run_arm(run):
    """The results of a Trial or of the Run of a retraining, whose scored run has ended."""
    if not run.start:
        return foretell.run_arm(run)
    rate = dict(learning_rate=run.peak * CENTRE["learning_rate"], warmup_iters=run.iterations // 16)  # as trial.py has
    checkpoint = f"{scored_folder(run.corpus, 'average32', run.seed)}/{run.start}.pt"
    configure = going_on_from(checkpoint) if run.state == "kept" else GPT.configure_optimizers
    with patch.dict(foretell.TRIAL, rate), patch.object(GPT, "configure_optimizers", configure):
        return foretell.run_arm(run)


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


def effects_of(lines, variant, trial):
    """
    {condition: {seed: [the effect in each order]}} in the trial of this variant, or in the retraining. An effect is the
    filtered arm's final test loss less the mean of the control's and of the random drop's.
    """
    mine, found = {run[:9]: line for run, line in lines.items() if run[9:] in ((), variant[:2])}, {}
    for name, condition in CHOSEN.items():
        orders = orders_of(mine, condition._replace(share=variant.share), trial, ARMS)
        found[name] = {seed: [] for seed, _ in orders}
        for (seed, _), effect in zip(orders, effects(orders, condition.target), strict=True):
            found[name][seed].append(effect)
    return found


def flat(by_seed):
    return [effect for orders in by_seed.values() for effect in orders]


def spread(conditions):
    """The standard deviation over the orders of a seed, pooled over dicts {seed: effects}; nan where all have one."""
    variances = [np.var(each, ddof=1) for by_seed in conditions for each in by_seed.values() if len(each) > 1]
    return float(np.mean(variances)) ** 0.5 if variances else np.nan


def agreement(trials, retrained):
    """
    How the effects in trials (n,) tell those of the retraining (n,): how many signs agree, the correlation, the slope
    of the line through zero, and the root mean square of what it leaves, in nats of the retraining.
    """
    slope = (trials * retrained).sum() / (trials**2).sum()
    left = np.mean((retrained - slope * trials) ** 2) ** 0.5
    return int((np.sign(trials) == np.sign(retrained)).sum()), np.corrcoef(trials, retrained)[0, 1], slope, left


def points_by_seed(trials, retrained):
    """[(effects in the trial, effects of the retraining)] of every condition and seed that has both."""
    return [
        (trials[name][seed], retrained[name][seed]) for name in CHOSEN for seed in trials[name].keys() & retrained[name]
    ]


def points_by_condition(trials, retrained):
    return [(flat(trials[name]), flat(retrained[name])) for name in CHOSEN if retrained[name]]


def number(value, form):
    return "–" if np.isnan(value) else form.format(value).replace("-", "−")


def effects_table(rows):
    """{label: effects_of} -> the effects, over the orders of all seeds, their spread, and how many spreads they are."""
    cells = []
    for label, found in rows.items():
        noise = spread(found.values())
        spreads = [*(spread([by_seed]) for by_seed in found.values()), noise]
        resolution = [np.mean(flat(by_seed)) / noise for by_seed in found.values()]
        cells.append([label, str(len(flat(found["undamaged"]))), *(said(flat(by_seed)) for by_seed in found.values())])
        cells[-1] += [number(each, "{:.4f}") for each in spreads] + [number(each, "{:+.1f}") for each in resolution]
    head = ["state, peak, share", "orders", *(f"{name}, nats" for name in CHOSEN)]
    head += [*(f"spread, {name}" for name in CHOSEN), "spread, all", *(f"{name}, spreads" for name in CHOSEN)]
    return markdown(head, cells)


def agreement_table(found, retrained, points_of):
    """{Variant: effects_of} beside the retraining: a line through points_of them, and what an order costs and tells."""
    cells = []
    for variant, trials in found.items():
        points = points_of(trials, retrained)
        if len(points) < len(CHOSEN):
            continue
        means = [np.array([np.mean(orders) for orders in side]) for side in zip(*points, strict=True)]
        same, correlation, slope, left = agreement(*means)
        ratios = [np.mean(flat(retrained[name])) / np.mean(flat(trials[name])) for name in CHOSEN]
        noise = slope * spread(trials.values())
        at_equal_cost = noise * (variant.share / Variant().share) ** 0.5
        cells.append([label_of(variant), str(round(variant.share * ITERATIONS)), f"{same} of {len(points)}"])
        cells[-1] += [number(each, "{:.1f}") for each in ratios] + [f"{correlation:.2f}", f"{slope:.2f}"]
        cells[-1] += [number(each, "{:.4f}") for each in (left, noise, at_equal_cost)]
    head = ["state, peak, share", "iterations", "signs", *(f"ratio, {name}" for name in CHOSEN), "correlation", "slope"]
    return markdown([*head, "left, nats", "an order's noise, nats of a retraining", "at equal cost"], cells)


def label_of(variant):
    return f"{variant.state}, {variant.peak:g}, {variant.share:g}"


def print_tables(lines, known):
    """From the lines of this study, and those `known` of foretell.py, whose retraining has other seeds."""
    found = {variant: effects_of(lines, variant, True) for variant in VARIANTS}
    found = {variant: each for variant, each in found.items() if all(each.values())}
    own, others = (effects_of(some, Variant(), False) for some in (lines, known))
    others = {name: {key: each[key] for key in each if key not in own[name]} for name, each in others.items()}
    both = {name: own[name] | others[name] for name in CHOSEN}
    rows = {label_of(variant): each for variant, each in found.items()}
    rows |= {
        label: each
        for label, each in {"retrained": own, "retrained, other seeds": others}.items()
        if all(each.values())
    }
    print(f"## Effects\n\n{effects_table(rows)}")
    print(f"## Agreement by condition and seed\n\n{agreement_table(found, own, points_by_seed)}")
    print(f"## Agreement by condition\n\n{agreement_table(found, both, points_by_condition)}")


def main():
    parser = parser_of(__doc__, "trial_defaults", first_seed=4, seeds=2, orders=2)
    parser.add_argument("--retrainings", type=int, default=2, help="orders of the retraining")
    args = parsed(parser)
    if args.tables:
        print_tables(read_lines(args.results), read_lines(args.known))
        return
    make_corpora(args.minipile, args.wildpile)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with workers(args.jobs, begin_worker) as pool:
        for scored, runs in plan(seeds, args.orders, args.retrainings):
            run_all(pool, run_scored, scored, args.results)
            run_all(pool, run_arm, runs, args.results)


if __name__ == "__main__":
    main()

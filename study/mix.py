"""
On undamaged text, what brings the gain of a filter: another mix of domains, or the choice within the domains?

    python study/mix.py --minipile=minipile.parquet --wildpile=wildpile.parquet     # the runs that foretell.py has not
    python study/mix.py --tables                                                    # the tables of study/why.md

A filter by sign does both. Two more arms do one of the two, and reject as many windows. 'mix' rejects as many of each
domain as the sign does, chosen at random. 'within' rejects the lowest values of each domain, of all domains the same
share. They join the control, the random drops and the filtered arm of foretell.py, in the same orders. The scored runs
are those of foretell.py as well, and stay in out/foretell for their arms; where they are gone, give another --results.
Every run is a run of train.py. When it has ended, one JSON line about it joins study/mix.jsonl. A run that has a line,
there or in foretell.jsonl, is not run again.
"""

import os
import time
from itertools import combinations, zip_longest

import foretell
import numpy as np
from foretell import (
    CONDITIONS,
    make_corpora,
    parsed,
    parser_of,
    prepare_worker,
    run_all,
    run_of,
    scored_folder,
    workers,
)
from foretell_tables import REFERENCES, by_seed, effects, orders_of, read_lines, said
from tables import markdown, saving

from study import by_sign, data_folder, domains_of, within_domain
from support.corpus import load_meta

# ---------------------------------------------------------------------------------------------------------------------
# The runs.

CONDITION = CONDITIONS["undamaged"]
ARMS = {"filtered": "the sign", "mix": "the mix of domains alone", "within": "the lowest within each domain"}


def shuffled_within(number, group, rng):
    """The numbers (n,), in each group (n,) in a random order."""
    found = np.empty_like(number)
    for g in np.unique(group):
        found[group == g] = rng.permutation(number[group == g])
    return found


def rule_of(run):
    """The rule of an arm that foretell.py has not, as foretell.run_arm takes it, or None."""

    def mix(folder, column):
        (sample_id, value), rng = by_sign(folder, column), np.random.default_rng((run.seed, run.order))
        return sample_id, shuffled_within(value, domains_of(folder, sample_id), rng)

    return dict(mix=mix, within=within_domain).get(run.arm)


def plan(seeds, orders):
    """The Runs by worth: of retraining, then of trials, each with the orders of all seeds."""
    for trial in (False, True):
        for order in range(1, orders + 1):
            for seed in seeds:
                for arm in (*REFERENCES, *ARMS):
                    yield run_of(CONDITION, arm, seed, order, trial)


def run_scored(job):
    """The scored run, unless its folder is there: of each domain, its windows and how many are negative."""
    folder, started = scored_folder(*job), time.perf_counter()
    if not os.path.isfile(f"{folder}/{foretell.ITERATIONS}.pt"):
        foretell.run_scored(job)
    sample_id, value = by_sign(folder)
    domain, names = domains_of(folder, sample_id), load_meta(data_folder(folder))["domains"]
    counts = {name: [int((domain == i).sum()), int((value[domain == i] < 0).sum())] for i, name in enumerate(names)}
    return dict(domains=counts, seconds=time.perf_counter() - started)


def run_arm(run):
    return foretell.run_arm(run, rule_of(run))


# ---------------------------------------------------------------------------------------------------------------------
# The table.


def saved_by(arm, orders):
    """The iterations that a retrained arm saves, in percent: one number an order."""
    target, found = CONDITION.target, []
    for order in orders.values():
        references = np.mean([order[name][target] for name in REFERENCES], 0)
        found.append(100 * saving(order[arm]["iter"], order[arm][target], references))
    return found


def table(orders, trial):
    """The effects of the arms at the end, and of each pair of arms; of a retraining, what they save too."""
    if not orders:
        return "no order has all five arms yet"
    last = {arm: np.array([order[arm][CONDITION.target][-1] for order in orders.values()]) for arm in ARMS}
    found = {label: effects(orders, CONDITION.target, arm) for arm, label in ARMS.items()}
    found |= {f"{ARMS[ours]} − {ARMS[theirs]}": last[ours] - last[theirs] for ours, theirs in combinations(ARMS, 2)}
    counts = [str(len({seed for seed, _ in orders})), str(len(orders))]
    rows = [[label, *counts, said(each), said(by_seed(each, orders))] for label, each in found.items()]
    head = ["dropped by", "scored runs", "orders", "nats, ± over orders", "nats, ± over scored runs"]
    if not trial:
        head.append("iterations saved, %")
        saved = [said(by_seed(saved_by(arm, orders), orders), "{:+.0f}") for arm in ARMS]
        rows = [[*row, cell] for row, cell in zip_longest(rows, saved, fillvalue="")]
    return markdown(head, rows)


def curves_table(orders):
    """The effects along the retraining, means of the scored runs."""
    if not orders:
        return ""
    target, iters = CONDITION.target, next(iter(orders.values()))["control"]["iter"]
    rows = []
    for arm, label in ARMS.items():
        along = np.array([order[arm][target] for order in orders.values()])
        along -= np.mean([[order[name][target] for order in orders.values()] for name in REFERENCES], 0)
        rows.append([label, *(said(by_seed(each, orders)) for each in along.T[1:])])
    return markdown(["dropped by", *(f"iteration {each}" for each in iters[1:])], rows)


def domains_table(scored):
    """Of every domain: its share of the windows, what is dropped of it, its share of what is kept; means over runs."""
    counts = {name: np.array([line["domains"][name] for line in scored]) for name in scored[0]["domains"]}
    all_windows, all_negative = sum(counts.values()).T
    rows = []
    for name, found in sorted(counts.items(), key=lambda pair: -pair[1][:, 0].sum()):
        windows, negative = found.T
        shares = windows / all_windows, negative / windows, (windows - negative) / (all_windows - all_negative)
        rows.append([name, *(said(100 * each, "{:.1f}") for each in shares)])
    return markdown(["domain", "windows, %", "dropped of it, %", "in what is kept, %"], rows)


def main():
    args = parsed(parser_of(__doc__, "mix", first_seed=1, seeds=10, orders=4))
    known = read_lines(args.known)
    if args.tables:
        own, arms = read_lines(args.results), (*REFERENCES, *ARMS)
        retrained, trials = (orders_of(known | own, CONDITION, trial, arms) for trial in (False, True))
        print(f"## Retrained\n\n{table(retrained, False)}\n{curves_table(retrained)}")
        print(f"## In a trial\n\n{table(trials, True)}")
        print(f"## Domains\n\n{domains_table([line for run, line in own.items() if len(run) == 3])}")
        return
    make_corpora(args.minipile, args.wildpile)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [run for run in plan(seeds, args.orders) if tuple(run) not in known]
    with workers(args.jobs, prepare_worker) as pool:
        run_all(pool, run_scored, [(CONDITION.corpus, CONDITION.values, seed) for seed in seeds], args.results)
        run_all(pool, run_arm, runs, args.results)


if __name__ == "__main__":
    main()

"""
On undamaged text, what brings the gain of a filter: another mix of domains, or the choice within the domains?

    python study/mix.py --minipile=minipile.parquet --wildpile=wildpile.parquet     # the runs that foretell.py has not
    python study/mix.py --tables                                                    # the tables of study/why.md

A filter by sign does both. Two more arms do one of the two, and reject as many windows. 'mix' rejects as many of each
domain as the sign does, chosen at random. 'within' rejects the lowest values of each domain, of all domains the same
share. They join the control, the random drops and the filtered arm of foretell.py, in the same orders. The scored runs
are those of foretell.py as well. Every run is a run of train.py. When it has ended, one JSON line about it joins
study/mix.jsonl. A run that has a line, there or in foretell.jsonl, is not run again.
"""

import argparse
import os
import time

import foretell
import numpy as np
from foretell import CONDITIONS, HERE, make_corpora, prepare_worker, run_all, run_of, scored_folder, workers
from foretell_tables import REFERENCES, effects, orders_of, read_lines, said
from tables import markdown, saving

from study import T, by_sign, data_folder, within_domain
from support.corpus import load_meta, window_domains

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


def domains_of(folder, sample_id):
    where = data_folder(folder)
    return window_domains(where, "train", sample_id, T, load_meta(where))


def rule_of(run):
    """The rule of study.py's kind of an arm that foretell.py has not, or None."""

    def mix(folder, column):
        sample_id, value = by_sign(folder, column)
        return sample_id, shuffled_within(value, domains_of(folder, sample_id), np.random.default_rng(run[-2:]))

    return dict(mix=mix, within=within_domain).get(run.arm)


def named(run, arm):
    """The Run of an arm, that has the knobs of the filtered one."""
    return run._replace(arm=arm) if run.arm == "filtered" else run


def plan(seeds, orders):
    """The Runs by worth: of retraining, then of trials, each with the orders of all seeds."""
    for trial in (False, True):
        for order in range(1, orders + 1):
            for seed in seeds:
                for arm in (*REFERENCES, *ARMS):
                    name = arm if arm in REFERENCES else "filtered"
                    yield named(run_of(CONDITION, name, seed, order, trial), arm)


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


def orders_with(lines, trial):
    """{(seed, order): {arm: line}} of the orders that have all five arms."""
    known = orders_of(lines, CONDITION, trial, (*REFERENCES, "filtered"))
    found = {}
    for key, arms in known.items():
        run = run_of(CONDITION, "filtered", *key, trial)
        ours = {arm: lines.get(tuple(named(run, arm))) for arm in ARMS}
        if None not in ours.values():
            found[key] = arms | ours
    return found


def by_seed(values, orders):
    """[the mean of the values, one an order, of every seed]."""
    seeds = sorted({seed for seed, _ in orders})
    return [np.mean([x for x, key in zip(values, orders, strict=True) if key[0] == seed]) for seed in seeds]


def cells_of(arm, orders, target):
    """Scored runs, orders, the effect over orders and over scored runs, and, with a curve, the iterations saved."""
    found = effects(orders, target, arm)
    cells = [str(len({seed for seed, _ in orders})), str(len(orders)), said(found), said(by_seed(found, orders))]
    curves = [(order[arm], np.mean([order[name][target] for name in REFERENCES], 0)) for order in orders.values()]
    if len(curves[0][1]) > 2:
        saved = [saving(ours["iter"], ours[target], theirs) for ours, theirs in curves]
        cells.append(said(by_seed(np.multiply(100, saved), orders), "{:+.0f}"))
    return cells


def table(lines, trial):
    orders, target = orders_with(lines, trial), CONDITION.target
    if not orders:
        return "no order has all five arms yet"
    rows = [[label, *cells_of(arm, orders, target)] for arm, label in ARMS.items()]
    for arm in list(ARMS)[1:]:  # paired
        less = [order["filtered"][target][-1] - order[arm][target][-1] for order in orders.values()]
        counts = rows[0][1:3]
        empty = [] if trial else [""]
        rows.append([f"the sign − {ARMS[arm]}", *counts, said(less), said(by_seed(less, orders)), *empty])
    head = ["dropped by", "scored runs", "orders", "nats, ± over orders", "nats, ± over scored runs"]
    return markdown(head if trial else [*head, "iterations saved, %"], rows)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables of the lines so far, and run nothing")
    parser.add_argument("--minipile", help="a file of texts with their domains, as for foretell.py")
    parser.add_argument("--wildpile", help="a large one, as found")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--results", default=f"{HERE}/mix.jsonl")
    parser.add_argument("--known", default=f"{HERE}/foretell.jsonl", help="the lines of foretell.py")
    args = parser.parse_args()
    known = read_lines(args.known)
    if args.tables:
        own = read_lines(args.results)
        print(f"## Retrained\n\n{table(known | own, False)}\n## In a trial\n\n{table(known | own, True)}")
        print(f"## Domains\n\n{domains_table([line for run, line in own.items() if len(run) == 3])}")
        return
    if not (args.minipile and args.wildpile):
        parser.error("name both --minipile and --wildpile, or give --tables")
    make_corpora(args.minipile, args.wildpile)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [run for run in plan(seeds, args.orders) if tuple(run) not in known]
    with workers(args.jobs, prepare_worker) as pool:
        run_all(pool, run_scored, [(CONDITION.corpus, CONDITION.values, seed) for seed in seeds], args.results)
        run_all(pool, run_arm, runs, args.results)


if __name__ == "__main__":
    main()

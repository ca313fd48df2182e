"""
Does a trial foretell what retraining does?

    python study/foretell.py --minipile=minipile.parquet --wildpile=wildpile.parquet     # columns text, domain

A trial starts from the weights of a scored run and lets the learning rate fall to zero within a tenth of its
iterations. Retraining starts afresh. Both have the same arms, which draw from the windows that the run has scored:
`control` takes all, `filtered` those not below zero, `random` as many at random, `oracle` the undamaged ones. The arms
of one order have one seed, hence the same window wherever both accept it. A condition below is a corpus, the knobs of
the scored run, the weights that the trial starts from, and the test set.

Every run is a run of train.py. When it has ended, one JSON line about it joins study/foretell.jsonl and its folder
goes. A run that has a line is not run again, so a study that was interrupted goes on. Conditions share their runs where
they can. The plan first does the first orders of every seed and then more orders, so that a part of it is a study too.
study/foretell_tables.py makes the tables and the figure from the lines.
"""

import argparse
import io
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import torch  # noqa: E402

import train  # noqa: E402
from prepare_owt import Knobs, documents_of  # noqa: E402
from study import CENTRE, RETRAIN, by_sign, damage, damage_of, derive, judge, prepare  # noqa: E402
from support.processes import keep_freed_memory, processes  # noqa: E402
from support.run_folder import WEIGHTS  # noqa: E402
from support.values import load_values  # noqa: E402
from support.windows import mix  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The corpora.

CLEAN, FOREIGN, SINGLES = "minipile_clean", "minipile_foreign", ("novels", "python_code")
PERCENT = {  # of the training windows, shuffled, foreign, duplicated
    "minipile_damaged_5": (5 / 3, 5 / 3, 5 / 3),
    "minipile_damaged_15": (5, 5, 5),
    "minipile_damaged_30": (10, 10, 10),
    "minipile_shuffled_15": (15, 0, 0),
    "minipile_foreign_15": (0, 15, 0),
    "minipile_duplicated_15": (0, 0, 15),
}
PROSE = ("books", "specs", "manuals_en", "manpages")  # of wildpile: one domain here, 'prose'
JUNK = ("js_minified", "svg", "blobs", "tables", "word_lists", "test_fixtures", "licences")
EIGHTH = 8  # one document of wildpile in so many, 26 MB: a run sees no more than 1.3 MB
TEST_SETS = {CLEAN: f"all,{','.join(SINGLES)}", "wild": "all,prose"}  # 'all' for the others; val_sets of the scored run


def make_corpora(minipile, wildpile):
    """Those in data/ that are not there yet. Their validation and test splits are never damaged."""
    texts = Knobs(minipile, domain_field="domain", tokenizer="bytes")
    prepare(documents_of(texts), CLEAN, lambda domain: domain != "german_manuals")
    prepare(documents_of(texts), FOREIGN, lambda domain: domain == "german_manuals")
    for name, percent in PERCENT.items():
        damage(CLEAN, FOREIGN, name, percent)
    prepare(documents_of(Knobs("python")), "python", lambda domain: True)
    prepare(wild_documents(wildpile), "wild", lambda domain: True)
    prepare(wild_documents(wildpile), "wild_without_junk", lambda domain: domain not in JUNK)


def wild_documents(path):
    """(text, domain) of every eighth document, whose order in the file is random; PROSE is one domain."""
    for number, (text, domain) in enumerate(documents_of(Knobs(path, domain_field="domain"))):
        if number % EIGHTH == 0:
            yield text, "prose" if domain in PROSE else domain


# ---------------------------------------------------------------------------------------------------------------------
# The plan.

ITERATIONS, CHECKPOINTS = CENTRE["max_iters"], (64, 320, 640)  # of a scored run; its weights after so many are kept
SCORED = {  # the knobs of the scored runs, by name
    "average32": dict(val_average=32),
    "m16": {},
    "m1 fixed": dict(val_batch_size=1, val_windows=1),
    "16 windows": dict(val_average=32, val_windows=16),  # the same sixteen at each iteration
}
TRIAL = dict(learning_rate=CENTRE["learning_rate"] / 2, min_lr=0.0, warmup_iters=4)


class Condition(NamedTuple):
    """What a trial and its retraining share, and what sets the trial apart: `start` and `share`."""

    corpus: str
    column: str = "all:adam"
    target: str = "test_loss"  # the test set, as metrics.jsonl calls it
    values: str = "average32"  # the scored run, a key of SCORED
    pool: str = ""  # 'third': only the windows of a third of its iterations
    start: str = "640"  # the weights after so many of its iterations; 'unseen': of a run without these windows
    share: float = 0.1  # of the scored run's iterations


DAMAGED = "minipile_damaged_15"
CONDITIONS = {
    "undamaged": Condition(CLEAN),
    "5% damaged": Condition("minipile_damaged_5"),
    "15% damaged": Condition(DAMAGED),
    "30% damaged": Condition("minipile_damaged_30"),
    "15% shuffled": Condition("minipile_shuffled_15"),
    "15% foreign": Condition("minipile_foreign_15"),
    "15% duplicated": Condition("minipile_duplicated_15"),
    "for novels": Condition(CLEAN, "novels:adam", "test_loss_novels"),
    "for python_code": Condition(CLEAN, "python_code:adam", "test_loss_python_code"),
    "for novels, on all": Condition(CLEAN, "novels:adam"),
    "for python_code, on all": Condition(CLEAN, "python_code:adam"),
    "for novels, 16 windows": Condition(CLEAN, "novels:adam", "test_loss_novels", "16 windows"),
    "for python_code, 16 windows": Condition(CLEAN, "python_code:adam", "test_loss_python_code", "16 windows"),
    "embedded corpus": Condition("python"),
    "wild": Condition("wild"),
    "wild, without junk": Condition("wild_without_junk"),
    "wild, for prose": Condition("wild", "prose:adam", "test_loss_prose"),
    "wild, for prose, on all": Condition("wild", "prose:adam"),
    "damaged, m16 fresh": Condition(DAMAGED, values="m16"),
    "damaged, m1 fixed": Condition(DAMAGED, values="m1 fixed"),
    "damaged, unseen pool": Condition(DAMAGED, start="unseen"),
    "damaged, from 10%": Condition(DAMAGED, start="64"),
    "damaged, from 50%": Condition(DAMAGED, start="320"),
    "damaged, share 0.05": Condition(DAMAGED, share=0.05),
    "damaged, share 0.3": Condition(DAMAGED, share=0.3),
    "damaged, small pool": Condition(DAMAGED, pool="third"),
    "undamaged, from 10%": Condition(CLEAN, start="64"),
}


class Run(NamedTuple):
    """One arm, in a trial or, where `start` is '', in a retraining."""

    corpus: str
    values: str
    column: str
    pool: str
    arm: str
    start: str
    iterations: int
    seed: int
    order: int


def arms_of(condition):
    return ("control", "random", "filtered", *(["oracle"] if condition.corpus in PERCENT else []))


def run_of(condition, arm, seed, order, trial):
    """The Run of an arm. What does not matter to it is left out, so that conditions share runs."""
    values, column = ("", "") if arm in ("control", "oracle") else (condition.values, condition.column)
    start, iterations = "", RETRAIN["max_iters"]
    if trial:
        start, iterations = condition.start, round(condition.share * ITERATIONS)
    return Run(condition.corpus, values, column, condition.pool, arm, start, iterations, seed, order)


def plan(conditions, first_seed, seeds, rounds):
    """
    Lists of [scored runs, Runs] of Conditions, by worth; `rounds` are (orders of the trials, orders of retraining) so
    far.
    """
    before = (0, 0)
    for orders in rounds:
        for seed in range(first_seed, first_seed + seeds):
            scored = [(c.corpus, c.values, seed) for c in conditions]
            scored += [(c.corpus, "unseen", seed) for c in conditions if c.start == "unseen"]
            runs = [
                run_of(condition, arm, seed, order, trial)
                for trial in (True, False)
                for order in range(before[1 - trial] + 1, orders[1 - trial] + 1)
                for condition in conditions
                for arm in arms_of(condition)
            ]
            yield list(dict.fromkeys(scored)), list(dict.fromkeys(runs))
        before = orders


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def prepare_worker():
    torch.set_num_threads(1)
    keep_freed_memory()


def run_here(folder, **knobs):
    """A run of train.py in this process. Returns {key in metrics.jsonl: list} of its test losses and their iter."""
    knobs = train.Knobs(**CENTRE | knobs, out_dir=folder)
    with redirect_stdout(io.StringIO()), processes(knobs) as ranks, ExitStack() as stack:
        if train.train(knobs, ranks, stack):
            raise KeyboardInterrupt
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        tests = [line for line in map(json.loads, file) if "test_loss" in line]
    return {key: [line[key] for line in tests] for key in tests[0] if key == "iter" or key.startswith("test_loss")}


def scored_folder(corpus, values, seed):
    return f"out/foretell/{corpus}_s{seed}/{values}"


def run_scored(job):
    """The scored run (corpus, values, seed), and its weights at CHECKPOINTS."""
    corpus, values, seed = job
    folder, started = scored_folder(*job), time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    knobs = dict(score=True, value_direction="adam", val_sets=TEST_SETS.get(corpus, "all")) | SCORED[values]
    knobs |= dict(dataset=corpus, seed=seed, lr_decay_iters=ITERATIONS, checkpoint_interval=10 * ITERATIONS)
    for iterations in CHECKPOINTS:  # in legs, since a checkpoint replaces the one before
        begun = os.path.exists(f"{folder}/ckpt.pt")
        losses = run_here(folder, **knobs, max_iters=iterations, init_from="resume" if begun else "scratch")
        keep_weights(folder, iterations)
    os.remove(f"{folder}/ckpt.pt")
    columns = {}
    for column in np.load(f"{folder}/values.npz")["columns"].tolist():
        sample_id, value, _ = load_values(folder, column)
        kind = damage_of(sample_id, PERCENT.get(corpus, ()))
        columns[column] = dict(negative=float((value < 0).mean()), auc=judge(value, kind))
    return dict(knobs=knobs, columns=columns, seconds=time.perf_counter() - started, **losses)


def run_unseen(job):
    """The run (corpus, 'unseen', seed), which trains on windows that the scored run of this seed has not seen."""
    corpus, _, seed = job
    folder, started = scored_folder(*job), time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    derive(scored_folder(corpus, "average32", seed), f"{folder} pool", nothing, "")
    knobs = dict(dataset=corpus, seed=seed + 1000, filter_from=f"{folder} pool", filter_negative=True)
    knobs |= dict(filter_pool="all", checkpoint_interval=10 * ITERATIONS)
    losses = run_here(folder, **knobs)
    keep_weights(folder, "unseen")
    os.remove(f"{folder}/ckpt.pt")
    return dict(knobs=knobs, seconds=time.perf_counter() - started, **losses)


def keep_weights(folder, name):
    checkpoint = torch.load(f"{folder}/ckpt.pt", weights_only=True)
    torch.save({key: checkpoint[key] for key in WEIGHTS}, f"{folder}/{name}.pt")


def nothing(folder, column):
    """The rule that rejects all that was scored."""
    sample_id, value, _ = load_values(folder)
    return sample_id, -np.ones_like(value)


def rule_of(run):
    """The rule of study.py's kind, from a scored run to (sample_id, number): the arm's, within the pool."""

    def rule(folder, column):
        sample_id, number = by_sign(folder, column)
        if run.arm == "oracle":
            number = np.where(damage_of(sample_id, PERCENT[run.corpus]) > 0, -1.0, 1.0)
        inside = mix(sample_id.astype(np.uint64)) % np.uint64(3) == 0 if run.pool else slice(None)
        return sample_id[inside], number[inside]

    return rule


def run_arm(run, rule=None):
    """
    The results of a Run, whose scored run has ended; its folder is removed. An arm that is none of ours needs a `rule`:
    (scored run's folder, column) -> (sample_id (n,), number (n,)), of which those below zero are rejected.
    """
    scored = scored_folder(run.corpus, run.values or "average32", run.seed)
    folder, started = f"{scored_folder(run.corpus, 'arms', run.seed)}/{'_'.join(map(str, run))}", time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    dropped = derive(scored, f"{folder}/values", rule or rule_of(run), run.column)
    how = dict(control={}, random=dict(drop_random=dropped)).get(run.arm, dict(filter_negative=True))
    knobs = dict(dataset=run.corpus, seed=run.seed + 1000 * run.order, filter_from=f"{folder}/values")
    knobs |= how | dict(val_sets=TEST_SETS.get(run.corpus, "all"), max_iters=run.iterations)
    knobs |= dict(log_interval=10 * ITERATIONS, checkpoint_interval=10 * ITERATIONS, eval_interval=100)
    if run.start:  # the weights at the end of the trial, and no curve
        weights = scored_folder(run.corpus, run.start if run.start == "unseen" else "average32", run.seed)
        knobs |= TRIAL | dict(init_from=f"{weights}/{run.start}.pt", eval_interval=10 * ITERATIONS)
    losses = run_here(f"{folder}/run", **knobs)
    with open(f"{folder}/run/config.json", encoding="utf-8") as file:
        coverage = json.load(file)["coverage"]
    shutil.rmtree(folder)
    dropped = 0.0 if run.arm == "control" else dropped
    return dict(dropped=dropped, coverage=coverage, seconds=time.perf_counter() - started, **losses)


@contextmanager
def workers(jobs, begin):
    """A pool of so many processes, each of which calls `begin` first. When a run has failed, no other begins."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_all(pool, function, runs, path):
    """The runs that have no line in the file `path` yet; writes their lines as they come."""
    done = set()
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            done = {tuple(json.loads(line)["run"]) for line in file}
    runs = [run for run in runs if tuple(run) not in done]
    for run, found in zip(runs, pool.map(function, runs), strict=True):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(run=list(run), **found)) + "\n")
        print(*run, f"{found['seconds']:.1f} s", flush=True)


def parser_of(doc, name, first_seed, seeds, orders):
    """The arguments of a study that goes on from this one, with its lines in study/`name`.jsonl; see `parsed`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables of the lines so far, and run nothing")
    parser.add_argument("--minipile", help="a file of texts with their domains, as for foretell.py")
    parser.add_argument("--wildpile", help="a large one, as found")
    parser.add_argument("--first_seed", type=int, default=first_seed)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--orders", type=int, default=orders, help="of the trials")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--results", default=f"{HERE}/{name}.jsonl")
    parser.add_argument("--known", default=f"{HERE}/foretell.jsonl", help="the lines of foretell.py, for the tables")
    return parser


def parsed(parser):
    """The arguments of the command line; ends with a message where there are neither texts nor --tables."""
    args = parser.parse_args()
    if not args.tables and not (args.minipile and args.wildpile):
        parser.error("name both --minipile and --wildpile, or give --tables")
    return args


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minipile", required=True, help="a file of texts with their domains")
    parser.add_argument("--wildpile", required=True, help="a large one, as found")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS, metavar="NAME")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", default="4:2,8:4,8:6", help="orders of the trials:of retraining, so far, by round")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--results", default=f"{HERE}/foretell.jsonl")
    args = parser.parse_args()

    make_corpora(args.minipile, args.wildpile)
    rounds = [tuple(map(int, orders.split(":"))) for orders in args.rounds.split(",")]
    conditions = [CONDITIONS[name] for name in args.conditions]
    with workers(args.jobs, prepare_worker) as pool:
        for scored, runs in plan(conditions, args.first_seed, args.seeds, rounds):
            run_all(pool, run_scored, [job for job in scored if job[1] != "unseen"], args.results)
            run_all(pool, run_unseen, [job for job in scored if job[1] == "unseen"], args.results)
            run_all(pool, run_arm, runs, args.results)


if __name__ == "__main__":
    main()

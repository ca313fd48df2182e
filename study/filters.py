"""
Which filter is worth anything on text that nobody damaged, and which where there is a target?

    python study/filters.py --source=minipile.parquet --seeds=5          # columns text, domain
    python study/filters.py --source=wildpile.parquet --seeds=5          # text as found, with its own junk
    python study/filters_tables.py                                       # the tables and the figure

A filter gives every window that a run has scored a number, and rejects those below zero, or a lowest share. Some go by
the run's values, others by the text alone. A trial judges a filter: an arm starts from the weights of the scored run,
with a fresh AdamW, its learning rate falls to zero within a tenth of the iterations, and it draws from the windows that
the filter keeps. The arms of one order have one seed, hence the same window wherever both accept it. The control
rejects nothing; the random drops reject as many as the sign of the value does. All filters share these two.

Every run is a run of train.py. When it has ended, one JSON line about it joins study/filters.jsonl. A run that has a
line is not run again, so a study that was interrupted goes on; the scored runs stay in out/ for their arms. Runs that
foretell.py has made are taken from there. The plan is in rounds, the most telling first, and a round ends with every
seed, so that a part of the plan is a study too.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from functools import partial
from typing import NamedTuple

import foretell
import numpy as np
from foretell import CLEAN, ITERATIONS, TRIAL, prepare_worker, run_all, run_here, scored_folder, wild_documents, workers

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import train  # noqa: E402
from prepare_owt import Knobs, documents_of  # noqa: E402
from study import (  # noqa: E402
    T,
    beyond_error,
    by_sign,
    derive,
    document_of,
    prepare,
    within_domain,
)
from support.configurator import UserError  # noqa: E402
from support.corpus import load_meta, open_split, window_domains  # noqa: E402
from support.files import atomic_write  # noqa: E402
from support.values import read_log  # noqa: E402
from support.windows import VAL, mix, open_sets  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The plan.

SOURCES = {  # the corpus and the targets, by the name of the file
    "minipile": (CLEAN, ("novels", "python_code", "scripture", "perl_docs")),
    "wildpile": ("wild", ("prose",)),  # one document in eight, books and manuals are the domain 'prose'
}
FEW = (16, 64, 256)  # validation windows of a target, where there are no more
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


class Scored(NamedTuple):
    """A scored run. All of a seed train alike, as scoring changes nothing, but 'again', with weights of its own."""

    source: str
    seed: int
    values: str  # 'main', of foretell.py, for all and the first two targets; 'others': the other targets; see knobs_of


class Arm(NamedTuple):
    """An arm of a trial: what it rejects is a score of a scored run, below zero or, with a `share`, the lowest."""

    source: str
    seed: int
    order: int
    values: str
    score: str  # 'control', 'random', or one of scores.npz
    share: float  # of the windows; 0: what is below zero


def rounds_of(source):
    """[(orders, values, [(values, score, share)])]: rounds by worth; each needs the scored runs of `values`."""
    first, others = SOURCES[source][1][:2], SOURCES[source][1][2:]

    def main(*scores, share=0.0):
        return [("main", score, share) for score in scores]

    def for_targets(targets, values, *kinds, share=0.0):
        return [(values, f"{target} {kind}", share) for target in targets for kind in kinds]

    whole = main("control", "random", "sign")
    others_whole = [("others", *arm[1:]) for arm in whole]  # the same, with the losses on the other targets
    target = for_targets(first, "main", "sign", "DSIR", "label", "both", "sum")
    own = main("within domains", "highest quarter", "model") + main("model", share=0.25)
    by_share = [arm for share in SHARES for arm in for_targets(first, "main", "sign", "DSIR", "sum", share=share)]
    wild = [arm for share in SHARES for arm in main("sign", "random", share=share)]
    rounds = [(range(1, 3), ["main"], whole + target), (range(1, 3), [], own), (range(3, 5), [], whole + target + own)]
    shares = [(range(1, 3), [], wild), (range(1, 3), [], by_share)]
    rounds += shares if source == "wildpile" else shares[::-1]
    if others:
        kinds = "sign", "DSIR", "label", "both", "sum"
        rounds.append((range(1, 5), ["others"], others_whole + for_targets(others, "others", *kinds)))
    few = [f"{n} windows" for n in FEW]
    rounds.append((range(1, 5), few, [arm for n in few for arm in for_targets(first, n, "sign", "DSIR")]))
    rounds.append((range(1, 5), [], for_targets(first, "main", "either")))
    rounds.append((range(1, 5), ["errors", "again"], [("errors", "beyond error", 0.0), ("again", "two runs", 0.0)]))
    rounds.append((range(5, 26), [], whole + own))  # what is left of the noise
    return rounds


def knobs_of(job):
    """The knobs of a scored run that foretell.py has not."""
    corpus, targets = SOURCES[job.source]
    knobs = dict(dataset=corpus, seed=job.seed, score=True, value_direction="adam", val_average=32)
    if job.values == "again":  # other weights and another order of the same windows
        knobs |= dict(seed=job.seed + 1000, filter_from=folder_of(job._replace(values="main")))
    elif job.values == "errors":
        knobs |= dict(val_groups=4)
    elif job.values == "others":
        knobs |= dict(val_sets=",".join(targets[2:]))
    else:
        knobs |= dict(val_sets=",".join(targets[:2]), val_windows=int(job.values.split()[0]))
    return knobs


def folder_of(job):
    """A scored run's folder; its scores are in scores_file."""
    if job.values == "main":
        return scored_folder(SOURCES[job.source][0], "average32", job.seed)
    return f"out/filters/{job.source}_s{job.seed}/{job.values}"


def scores_file(job):
    return f"out/filters/{job.source}_s{job.seed}/{job.values}.npz"


# ---------------------------------------------------------------------------------------------------------------------
# Filters: numbers (n,) for the scored windows in the order of their ids.

BUCKETS, SMALLEST = 10_000, 1e-8  # of DSIR; the second joins every probability
WORD = re.compile(r"\w+|[^\w\s]+")


def words_of(windows):
    """The buckets of the words and pairs of words of windows (n, T) of bytes: a list of (k,) arrays."""
    known, found = {}, []
    for row in windows:
        # what a window's edge has cut off a word or a character stays a word or goes
        text = row[row < 256].astype(np.uint8).tobytes().decode(errors="ignore")
        words = WORD.findall(text.lower())
        grams = words + [" ".join(pair) for pair in zip(words, words[1:], strict=False)]
        for gram in grams:
            if gram not in known:
                known[gram] = int(hashlib.sha256(gram.encode()).hexdigest(), 16) % BUCKETS
        found.append(np.array([known[gram] for gram in grams], dtype=np.int64))
    return found


def importance(grams, target):
    """
    The log importance weights (n,) of DSIR (Xie et al. 2023, arXiv 2302.03169, Sec. 3, and its published code): log of
    the probability of a window's hashed n-grams in `target` over that in `grams`, two bags of n-grams of words_of.
    """
    raw, wanted = (np.bincount(np.concatenate(bag), minlength=BUCKETS) for bag in (grams, target))
    ratio = np.log(wanted / wanted.sum() + SMALLEST) - np.log(raw / raw.sum() + SMALLEST)
    return np.array([ratio[gram].sum() for gram in grams])


FOLDS, LENGTHS, MODEL_BUCKETS = 5, (1, 2, 3, 4), 2**15
RIDGE, STEPS = 10_000.0, 20  # penalty; steps of conjugate gradients


def bytes_of(windows):
    """The buckets of the n-grams of 1 to 4 bytes of windows (n, T): (n, k) int64."""
    found = []
    for length in LENGTHS:
        slices = np.lib.stride_tricks.sliding_window_view(windows.astype(np.uint64), length, axis=1)
        code = (slices * np.uint64(257) ** np.arange(length, dtype=np.uint64)).sum(2, dtype=np.uint64)
        found.append(mix(code + np.uint64(length << 40)) % np.uint64(MODEL_BUCKETS))
    return np.concatenate(found, axis=1).astype(np.int64)


def ridge(features, y, penalty=RIDGE, steps=STEPS):
    """
    The weights (MODEL_BUCKETS,) that minimise |y - X w|^2 + penalty |w|^2, where X counts the buckets `features` (n, k)
    of every row: conjugate gradients on the normal equations.
    """

    def transposed(rows):
        return np.bincount(features.ravel(), np.repeat(rows, features.shape[1]), MODEL_BUCKETS)

    w = np.zeros(MODEL_BUCKETS)
    residual = transposed(y)
    step, norm = residual.copy(), residual @ residual
    for _ in range(steps):
        if norm < 1e-12:
            break
        image = transposed(times(features, step)) + penalty * step
        length = norm / (step @ image)
        w += length * step
        residual -= length * image
        before, norm = norm, residual @ residual
        step = residual + norm / before * step
    return w


def times(features, w):
    """X w, (n,)."""
    return w[features].sum(1)


def out_of_fold(features, y, document):
    """What a ridge regression that has not seen a window's `document`, (n,), predicts of y, (n,)."""
    fold, predicted = mix(document.astype(np.uint64)) % np.uint64(FOLDS), np.empty_like(y)
    for held_out in range(FOLDS):
        there = fold != held_out
        mean = y[there].mean()
        w = ridge(features[there], y[there] - mean)
        predicted[~there] = mean + times(features[~there], w)
    return predicted


def in_deviations(folder):
    """(n,) values of the first column, in standard deviations of their iteration: the first iterations' are largest."""
    log = read_log(folder)
    return (log["value"] / log["value"].std(1, keepdims=True)).ravel()[np.argsort(log["sample_id"].ravel())]


def scores_of(job):
    """{name: numbers (n,)} that a scored run makes, and what else there is to tell of it."""
    folder, main = folder_of(job), folder_of(job._replace(values="main"))
    if job.values == "errors":
        return {"beyond error": beyond_error(folder)[1]}, {}
    if job.values == "again":
        own, again = in_deviations(main), in_deviations(folder)
        with np.load(scores_file(job._replace(values="main"))) as scores:
            model = scores["model"]
        found = dict(agreement=np.corrcoef(own, again)[0, 1], model_foretells=np.corrcoef(model, again)[0, 1])
        return {"two runs": own + again}, found
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        knobs = train.Knobs(**json.load(file)["knobs"])
    where, sets = f"data/{knobs.dataset}", knobs.val_sets.split(",")
    meta, (ids, mixture) = load_meta(where), by_sign(main, "all:adam")
    windows = open_split(where, "train", meta).windows(ids, T)[:, :T]
    domain = window_domains(where, "train", ids, T, meta)
    scores, found = {"sign": mixture}, {}
    if "all" in sets:
        model = out_of_fold(bytes_of(windows), in_deviations(folder), document_of(ids, where))
        scores |= {"within domains": within_domain(folder)[1], "model": model}
        scores["highest quarter"] = np.quantile(mixture, 0.75) - mixture
        found["model_correlation"] = np.corrcoef(model, in_deviations(folder))[0, 1]
    targets = [name for name in sets if name != "all"]
    grams, rng = words_of(windows), np.random.default_rng(job.seed)
    for target, (tokens, order, _) in open_sets(knobs, meta, targets, "val", knobs.seed, VAL).items():
        value = by_sign(folder, f"{target}:adam")[1]
        wanted = words_of(tokens.windows(order.ids, T)[:, :T])
        noisy = importance(grams, wanted) + rng.gumbel(size=len(ids))  # the k highest are a sample of k by weight
        scores[f"{target} sign"] = value
        scores[f"{target} DSIR"] = noisy - np.quantile(noisy, (value < 0).mean())  # rejects as many as the sign
        scores[f"{target} label"] = np.where(domain == meta["domains"].index(target), 1.0, -1.0)
        scores[f"{target} both"] = np.maximum(value, mixture)  # rejects what is negative for both
        scores[f"{target} either"] = np.minimum(value, mixture)
        scores[f"{target} sum"] = value + mixture  # the value for the sum of the two losses
        found[f"{target} windows"] = len(order.ids)
    return scores, found


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def run_scored(job):
    """A scored run; its folder, with values and the last weights, and its scores stay."""
    folder, started = folder_of(job), time.perf_counter()
    if job.values != "main":
        shutil.rmtree(folder, ignore_errors=True)
        run_here(folder, **knobs_of(job))
    elif not os.path.isfile(f"{folder}/{ITERATIONS}.pt"):
        foretell.run_scored((SOURCES[job.source][0], "average32", job.seed))
    scores, found = scores_of(job)
    os.makedirs(os.path.dirname(scores_file(job)), exist_ok=True)
    with atomic_write(scores_file(job)) as file:
        np.savez(file, **scores)
    found = {key: float(value) for key, value in found.items()}
    dropped = {name: float((number < 0).mean()) for name, number in scores.items()}
    return dict(dropped=dropped, **found, seconds=time.perf_counter() - started)


def rule_of(arm):
    """The rule of study.py's kind for an arm: numbers below zero are rejected."""

    def rule(folder, column):
        sample_id, number = by_sign(folder)
        if arm.score not in ("control", "random"):
            with np.load(scores_file(Scored(arm.source, arm.seed, arm.values))) as scores:
                number = scores[arm.score]
        return sample_id, number - np.quantile(number, arm.share) if arm.share else number

    return rule


def same_arm(arm):
    """The foretell.Run that does the same as this Arm, or None."""
    corpus, targets = SOURCES[arm.source]
    same = dict(control=("", "", "control"), random=("average32", "all:adam", "random"))
    same |= {f"{name} sign": ("average32", f"{name}:adam", "filtered") for name in targets[:2]}
    same["sign"] = "average32", "all:adam", "filtered"
    if arm.values != "main" or arm.share or arm.score not in same:
        return None
    values, column, name = same[arm.score]
    return foretell.Run(corpus, values, column, "", name, str(ITERATIONS), ITERATIONS // 10, arm.seed, arm.order)


def line_of(known, arm):
    """The line of the file `known` of foretell.py about this arm, or None."""
    same = same_arm(arm)
    if same is None or not os.path.isfile(known):
        return None
    with open(known, encoding="utf-8") as file:
        return next((line for line in map(json.loads, file) if tuple(line["run"]) == same), None)


def run_arm(known, arm):
    """
    The final test losses of an arm, whose scored run has ended; its folder is removed. They are `taken` from the file
    `known` of foretell.py where it has the arm.
    """
    started, found = time.perf_counter(), line_of(known, arm)
    taken = found is not None
    if not taken:
        found = run_afresh(arm)
    final = {key: series[-1] for key, series in found.items() if key.startswith("test_loss")}
    return dict(dropped=found["dropped"], taken=taken, seconds=time.perf_counter() - started, **final)


def run_afresh(arm):
    """The arm's test losses, {name: list}, and the share `dropped`."""
    (corpus, targets), main = SOURCES[arm.source], folder_of(Scored(arm.source, arm.seed, "main"))
    folder = f"out/filters/{arm.source}_s{arm.seed}/arm {' '.join(map(str, arm))}"
    shutil.rmtree(folder, ignore_errors=True)
    dropped = derive(main, f"{folder}/values", rule_of(arm), "")
    how = dict(control={}, random=dict(drop_random=dropped)).get(arm.score, dict(filter_negative=True))
    knobs = TRIAL | how | dict(dataset=corpus, seed=arm.seed + 1000 * arm.order, filter_from=f"{folder}/values")
    knobs |= dict(init_from=f"{main}/{ITERATIONS}.pt", max_iters=ITERATIONS // 10)
    knobs |= dict(val_sets=",".join(["all", *(targets[2:] if arm.values == "others" else targets[:2])]))
    knobs |= dict(log_interval=10 * ITERATIONS, checkpoint_interval=10 * ITERATIONS, eval_interval=10 * ITERATIONS)
    losses = run_here(f"{folder}/run", **knobs)
    shutil.rmtree(folder)
    return dict(dropped=0.0 if arm.score == "control" else dropped, **losses)


def losses_at_the_end(evaluation):
    """train.py's test_losses without the first of an arm, which costs a quarter of it: all arms begin alike."""

    def test_losses(net, windows, iter_num, folder):
        if iter_num == 0 and folder.knobs.init_from.endswith(".pt"):
            return {"iter": 0}, "not evaluated"
        return evaluation(net, windows, iter_num, folder)

    return test_losses


def begin_worker():
    prepare_worker()
    train.test_losses = losses_at_the_end(train.test_losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="a file of texts: minipile or wildpile, of any kind and folder")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_round", type=int, default=1, help="of the plan")
    parser.add_argument("--rounds", type=int, default=100, help="no more than so many rounds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--results", default=f"{HERE}/filters.jsonl")
    parser.add_argument("--known", default=f"{HERE}/foretell.jsonl", help="the lines of foretell.py")
    args = parser.parse_args()
    if args.first_round < 1:
        parser.error(f"--first_round={args.first_round}: the first is 1")

    source = os.path.splitext(os.path.basename(args.source))[0]
    if source not in SOURCES:
        raise UserError(f"--source={args.source}: the study knows the files {', '.join(SOURCES)}")
    texts = Knobs(args.source, domain_field="domain", tokenizer="bytes")
    documents = wild_documents(args.source) if source == "wildpile" else documents_of(texts)
    prepare(documents, SOURCES[source][0], lambda domain: domain != "german_manuals")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with workers(args.jobs, begin_worker) as pool:
        for orders, values, arms in rounds_of(source)[args.first_round - 1 :][: args.rounds]:
            for seed in seeds:
                run_all(pool, run_scored, [Scored(source, seed, each) for each in values], args.results)
                runs = [Arm(source, seed, order, *arm) for order in orders for arm in arms]
                run_all(pool, partial(run_arm, args.known), runs, args.results)


if __name__ == "__main__":
    main()

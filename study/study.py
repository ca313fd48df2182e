"""
Why 34% and not 16%: what makes the share of negative values, what they find, and what dropping them saves.

    python study/study.py --source=texts.parquet --foreign=german_manuals --single=novels  # columns text, domain
    python study/study.py --source=python --foreign=topics --single=modules                # this Python's own library

One run scores a small byte-level GPT, and another trains it afresh on the windows that a filter keeps. The plans below
move one knob at a time. Every run is a run of train.py. When it has ended, one JSON line about it joins
study/results.jsonl. A run that has a line is not run again, so a study that was interrupted goes on. study/tables.py
makes the tables and figures from the lines.

Two corpora are made of the source without the domain `foreign`. One is the text as it is. In the other, 15% of the
training windows are replaced: 5% by their own bytes in random order, 5% by windows of the foreign domain, and 5% by
copies of eight windows. The validation and test splits stay as they are.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from prepare_owt import Knobs, documents_of, write_checksums  # noqa: E402
from report import read_run  # noqa: E402
from support.configurator import UserError  # noqa: E402
from support.corpus import checksum_of, load_meta, open_split, sha256_of, window_domains  # noqa: E402
from support.files import atomic_write  # noqa: E402
from support.values import columns_of, load_values, read_log, z_score  # noqa: E402
from support.windows import mix  # noqa: E402

T = 64
# the centre: AdamW, 32 windows of 64 bytes an iteration, m = 16 validation windows redrawn every iteration
CENTRE = dict(n_layer=2, n_head=2, n_embd=96, bias=False, block_size=T, batch_size=32, device="cpu", dtype="float32")
CENTRE |= dict(compile=False, learning_rate=2e-3, min_lr=2e-4, warmup_iters=40, val_batch_size=16, max_iters=640)
CENTRE |= dict(eval_interval=160, eval_iters=16, checkpoint_interval=10000, log_interval=20)
RETRAIN = dict(max_iters=400, eval_interval=25)
DAMAGE = ("shuffled", "foreign", "duplicated")
PERCENT = (5, 5, 5)  # of the training windows, of each

# ---------------------------------------------------------------------------------------------------------------------
# The corpora.


def damage_of(ids, percent=PERCENT):
    """0 for an untouched window, 1 + its place in DAMAGE for a damaged one: (n,). `percent` says how many of each."""
    hashed = mix(ids.astype(np.uint64) + np.uint64(2**40))
    place = hashed % np.uint64(100) + hashed // np.uint64(100) % np.uint64(1000) / 1000.0  # 0 to 100, of each window
    kind = 1 + np.searchsorted(np.cumsum(percent), place, side="right")
    return np.where(kind <= len(percent), kind, 0)


def prepare(documents, name, wanted):
    """The documents, an iterator of (text, domain), of the domains that are `wanted`, as the corpus `name`."""
    if os.path.isfile(f"data/{name}/meta.json"):
        return
    os.makedirs("data", exist_ok=True)
    with atomic_write(f"data/{name}.jsonl") as file:
        for text, domain in documents:
            if wanted(domain):
                file.write(json.dumps(dict(text=text, domain=domain)).encode() + b"\n")
    flags = [f"--source=data/{name}.jsonl", "--domain_field=domain", "--tokenizer=bytes", f"--name={name}"]
    script("prepare_owt.py", *flags)


def script(name, *flags):
    """Run one of the project's scripts on one thread; raises UserError with what it says where it fails."""
    command = [sys.executable, f"{ROOT}/{name}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def damage(clean, foreign, name, percent=PERCENT):
    """The corpus `clean` with `percent` of its training windows replaced, by kind, as the corpus `name`."""
    source, target = f"data/{clean}", f"data/{name}"
    if os.path.isfile(f"{target}/meta.json"):
        return
    meta, rng = load_meta(source), np.random.default_rng(0)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("meta.json"), dirs_exist_ok=True)
    tokens = np.memmap(f"{target}/train.bin", dtype="<u2", mode="r+")
    windows = tokens[: len(tokens) // T * T].reshape(-1, T)
    theirs = open_split(f"data/{foreign}", "train", load_meta(f"data/{foreign}"))
    kind = damage_of(np.arange(len(windows)), percent)
    shuffled, replaced, copied = (np.flatnonzero(kind == 1 + k) for k in range(3))
    windows[shuffled] = rng.permuted(windows[shuffled], axis=1)
    windows[replaced] = theirs.windows(rng.integers(len(theirs) // T - 1, size=len(replaced)), T)[:, :T]
    originals = windows[rng.choice(np.flatnonzero(kind == 0), 8, replace=False)]
    windows[copied] = originals[rng.integers(8, size=len(copied))]
    tokens.flush()
    train = meta["splits"]["train"] | dict(sha256=sha256_of(f"{target}/train.bin"))
    train["crc_sha256"] = write_checksums(f"{target}/train.bin", f"{target}/train.crc")
    meta |= dict(name=name, fingerprint=train["sha256"], splits=meta["splits"] | dict(train=train))
    with atomic_write(f"{target}/meta.json") as file:
        file.write(json.dumps(meta | {"checksum": checksum_of(meta)}, indent=1).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def train(folder, **knobs):
    """train.py with these knobs, on one thread; gone on with where it was interrupted. Returns the seconds it took."""
    flags = [f"--{key}={value}" for key, value in (CENTRE | knobs).items()]
    if os.path.exists(f"{folder}/ckpt.pt"):
        flags.append("--init_from=resume")
    started = time.perf_counter()
    script("train.py", *flags, f"--out_dir={folder}")
    return time.perf_counter() - started


def auc(value, bad, good):
    """The probability that a window of `bad` has a lower value than one of `good`, (n,) bool each; None without."""
    if not bad.any() or not good.any():
        return None
    both = np.concatenate([value[bad], value[good]])
    _, place, count = np.unique(both, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # ties share theirs
    n = int(bad.sum())
    return float(1 - (rank[:n].sum() - n * (n + 1) / 2) / (n * int(good.sum())))


def judge(value, kind):
    """The AUC of values (n,) for each kind of damage."""
    return {name: auc(value, kind == 1 + k, kind == 0) for k, name in enumerate(DAMAGE)}


def measure_values(folder, dataset):
    """
    What a scored run's log says of each column: the share of negatives (in all, and in thirds of the run), the AUC by
    value and by z-score, the damaged share of the windows (of all, and of the lowest 15%), and the mean value and
    the share of negatives of each domain in eighths of the run. Every window is visited once.
    """
    log, meta = read_log(folder), load_meta(f"data/{dataset}")
    ids = log["sample_id"]
    kind = damage_of(ids) if dataset.endswith("damaged") else np.zeros(ids.shape, int)
    domain = window_domains(f"data/{dataset}", "train", ids.ravel(), T, meta).reshape(ids.shape)
    columns = {}
    for name, places in columns_of(log["directions"]).items():
        dots = log["dot_product"][:, :, places].mean(2, dtype=np.float64)
        value, z = log["scale"] * dots, z_score(dots)
        lowest_ = kind.ravel()[np.argsort(z.ravel())[: int(0.15 * z.size)]]
        by_z = dict(auc=judge(z.ravel(), kind.ravel()), damaged=[float((k > 0).mean()) for k in (kind, lowest_)])
        column = dict(negative=float((value < 0).mean()), auc=judge(value.ravel(), kind.ravel()), z_score=by_z)
        column["thirds"] = [dict(negative=float((third < 0).mean())) for third in np.array_split(value, 3)]
        column["by_domain"] = [
            {meta["domains"][d]: [float(v[m == d].mean()), float((v[m == d] < 0).mean())] for d in np.unique(m)}
            for v, m in zip(np.array_split(value, 8), np.array_split(domain, 8), strict=True)
        ]
        columns[name] = column
    return dict(columns=columns)


# ---------------------------------------------------------------------------------------------------------------------
# The rules of filters: from a scored run to (sample_id, number). train.py keeps the windows not below zero.


def by_sign(folder, column=""):
    sample_id, value, _ = load_values(folder, column)
    return sample_id, value


def lowest(share, key="value"):
    """Drop the lowest `share` of the values, or of the z-scores within their iterations, and not those below zero."""

    def rule(folder, column=""):
        sample_id, number, _ = load_values(folder, column, key)
        return sample_id, number - np.quantile(number, share)

    return rule


def unweighted(folder, column=""):
    """The sum of the dot products, without the learning rate: the values of the published code."""
    log = read_log(folder)
    k = log["directions"].index(column)
    order = np.argsort(log["sample_id"].ravel())
    return log["sample_id"].ravel()[order], log["dot_product"][:, :, k].ravel()[order].astype(np.float64)


def beyond_error(folder, column=""):
    """Drop what is negative by more than its standard error over the groups of validation windows."""
    sample_id, value, _ = load_values(folder, column)
    with np.load(f"{folder}/values.npz") as arrays:
        return sample_id, value + arrays["errors"][:, 0]


def by_document(folder, column=""):
    """The mean over the scored windows of a window's document."""
    sample_id, value, _ = load_values(folder, column)
    _, place = np.unique(document_of(sample_id, data_folder(folder)), return_inverse=True)
    return sample_id, (np.bincount(place, value) / np.bincount(place))[place]


def document_of(ids, folder):
    """The number of the document that holds the middle of each window."""
    return np.searchsorted(np.load(f"{folder}/train_docs.npy")["start"], ids * T + T // 2, side="right")


def domains_of(folder, sample_id):
    """The domains of the windows sample_id (n,) of a scored run: (n,) places in the `domains` of its meta.json."""
    where = data_folder(folder)
    return window_domains(where, "train", sample_id, T, load_meta(where))


def within_domain(folder, column=""):
    """Drop the same share of each domain, as much as the sign drops of all."""
    sample_id, value, _ = load_values(folder, column)
    domain = domains_of(folder, sample_id)
    share, result = (value < 0).mean(), np.empty_like(value)
    for d in np.unique(domain):
        result[domain == d] = value[domain == d] - np.quantile(value[domain == d], share)
    return sample_id, result


def both_visits(folder, column=""):
    """The sum of two runs' values of the same windows, the second with other weights and another order."""
    (sample_id, value), (same_id, again) = by_sign(folder, column), by_sign(f"{folder} again")
    assert np.array_equal(sample_id, same_id)
    return sample_id, value + again


def both_visits_by_iteration(folder, column=""):
    """The same sum, of values in standard deviations of their iteration: the first iterations' are the largest."""
    sums = 0
    for run in (folder, f"{folder} again"):
        log = read_log(run)
        order = np.argsort(log["sample_id"].ravel())
        sums = sums + (log["value"] / log["value"].std(1, keepdims=True)).ravel()[order]
    return log["sample_id"].ravel()[order], sums


def undamaged(folder, column=""):
    """The oracle."""
    sample_id, _, _ = load_values(folder, column)
    return sample_id, np.where(damage_of(sample_id) > 0, -1.0, 1.0)


def data_folder(folder):
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        return f"data/{json.load(file)['knobs']['dataset']}"


def derive(source, target, rule, column):
    """A folder for filter_from with what `rule` makes of the scored run `source` in the place of values.npz."""
    sample_id, number = rule(source, column)
    os.makedirs(target, exist_ok=True)
    shutil.copy(f"{source}/config.json", target)
    with atomic_write(f"{target}/values.npz") as file:
        np.savez(file, sample_id=sample_id, value=number, visits=np.ones_like(sample_id))
    return float((number < 0).mean())


# ---------------------------------------------------------------------------------------------------------------------
# The plan: {name: knobs} of the scored runs and {name: (scored run, rule, column, knobs)} of those that train afresh.

BOTH = dict(value_direction="sgd,adam")
SCORED_DAMAGED = {
    "m16": dict(value_direction="adam,sgd,adam-wte,sgd-wte", val_groups=4),
    "m1 fixed": BOTH | dict(val_batch_size=1, val_windows=1),
    "m1": BOTH | dict(val_batch_size=1),
    "m4": BOTH | dict(val_batch_size=4),
    "m16 single": BOTH | dict(val_sets="{single}"),
    "m16 order2": BOTH | dict(value_order=2),
    "m1 average8": BOTH | dict(val_batch_size=1, val_average=8),
    "m1 average32": BOTH | dict(val_batch_size=1, val_average=32),
    "m16 average32": BOTH | dict(val_average=32),
}
SCORED_CLEAN = {
    "m16": dict(value_direction="adam,sgd", val_sets="all,{single}", val_groups=4),
    "m16 again": dict(value_direction="adam", filter_from="m16"),
    "m16 average32": dict(value_direction="adam", val_average=32),
    "m16 average32 again": dict(value_direction="adam", val_average=32, filter_from="m16 average32"),
}
EVERYTHING = dict(filter_pool="all")
TRAINED_DAMAGED = {
    "control": ("m16", None, "", {}),
    "random": ("m16", by_sign, "all:adam", dict(random=True)),
    "random lowest": ("m16", lowest(0.15), "all:adam", dict(random=True)),
    "oracle": ("m16", undamaged, "", {}),
    "m16 adam": ("m16", by_sign, "all:adam", {}),
    "m16 adam lowest": ("m16", lowest(0.15), "all:adam", {}),
    "m16 sgd": ("m16", by_sign, "all:sgd", {}),
    "m16 adam-wte": ("m16", by_sign, "all:adam-wte", {}),
    "m16 order2 adam": ("m16 order2", by_sign, "all:adam", {}),
    "m16 single adam": ("m16 single", by_sign, "{single}:adam", {}),
    "m1 average32 adam": ("m1 average32", by_sign, "all:adam", {}),
    "m16 average32 adam": ("m16 average32", by_sign, "all:adam", {}),
    "random as m16 average32": ("m16 average32", by_sign, "all:adam", dict(random=True)),
    "m1 average32 adam lowest of iteration": ("m1 average32", lowest(0.15, "z_score"), "all:adam", {}),
    "m16 average32 adam lowest of iteration": ("m16 average32", lowest(0.15, "z_score"), "all:adam", {}),
    "m1 sgd": ("m1", by_sign, "all:sgd", {}),
    # The failed reproduction, then each of its causes removed. The unweighted sums remain in all of them: of a single
    # visit the learning rate changes no sign.
    "control all": ("m1 fixed", None, "", EVERYTHING),
    "failed": ("m1 fixed", unweighted, "all:sgd", EVERYTHING),
    "failed, redrawn": ("m1", unweighted, "all:sgd", EVERYTHING),
    "failed, scored": ("m1 fixed", unweighted, "all:sgd", {}),
}
TRAINED_CLEAN = {
    "control": ("m16", None, "", {}),
    "random": ("m16", by_sign, "all:adam", dict(random=True)),
    "random lowest": ("m16", lowest(0.1), "all:adam", dict(random=True)),
    "sign": ("m16", by_sign, "all:adam", {}),
    "lowest": ("m16", lowest(0.1), "all:adam", {}),
    "document": ("m16", by_document, "all:adam", {}),
    "beyond error": ("m16", beyond_error, "all:adam", {}),
    "within domain": ("m16", within_domain, "all:adam", {}),
    "two visits": ("m16", both_visits, "all:adam", {}),
    "average32 lowest of iteration": ("m16 average32", lowest(0.15, "z_score"), "", {}),
    "average32 sign": ("m16 average32", by_sign, "", {}),
    "random as average32 sign": ("m16 average32", by_sign, "", dict(random=True)),
    "two visits by iteration": ("m16", both_visits_by_iteration, "all:adam", {}),
    "single": ("m16", by_sign, "{single}:adam", {}),
}
# The best of the filters above, on undamaged text and fresh seeds.
SCORED_CONFIRM = {"m16 average32": SCORED_CLEAN["m16 average32"]}
TRAINED_CONFIRM = {
    "control": ("m16 average32", None, "", {}),
    "average32 sign": TRAINED_CLEAN["average32 sign"],
    "random as average32 sign": TRAINED_CLEAN["random as average32 sign"],
}


def run_scored(args, dataset, name, knobs, seed):
    folder = folder_of(dataset, name, seed)
    knobs = {key: value.format(single=args.single) if key == "val_sets" else value for key, value in knobs.items()}
    if "filter_from" in knobs:  # other weights, another order, the same windows
        knobs |= dict(filter_from=folder_of(dataset, knobs["filter_from"], seed), seed=seed + 1000)
    seconds = train(folder, **dict(dataset=dataset, seed=seed, score=True) | knobs)
    line = dict(scored=True, knobs=knobs, seconds=seconds, **measure_values(folder, dataset))
    if name.endswith("again"):
        line["agreement"] = agreement(knobs["filter_from"], folder, dataset)
    return line


def agreement(first, again, dataset):
    """
    How far values of the same windows agree, {pair: [correlation of z-scores, share negative in both, in one, in the
    other]}: of two halves of the validation windows of one run; of two runs, for windows and for means of documents
    and domains.
    """
    log, meta = read_log(first), load_meta(f"data/{dataset}")
    dots, found = log["dot_product"], {}
    if log["directions"].count("all:adam") == 4:
        halves = [dots[:, :, k : k + 2].mean(2) for k in (0, 2)]
        found["halves"] = agree(*(z_score(half).ravel() for half in halves), *(half.ravel() for half in halves))
    ids, signs = by_sign(first)[0], [by_sign(run)[1] for run in (first, again)]
    a, b = (load_values(run, key="z_score")[1] for run in (first, again))
    found["windows"] = agree(a, b, *signs)
    levels = dict(documents=document_of(ids, f"data/{dataset}"))
    levels["domains"] = window_domains(f"data/{dataset}", "train", ids, T, meta)
    for name, place in levels.items():
        _, place, count = np.unique(place, return_inverse=True, return_counts=True)
        means = [(np.bincount(place, value) / count)[count >= 5] for value in (a, b, *signs)]
        found[name] = agree(*means) if len(means[0]) > 2 else None
    return found


def agree(a, b, value_a, value_b):
    shares = ((value_a < 0) & (value_b < 0)).mean(), (value_a < 0).mean(), (value_b < 0).mean()
    return [float(number) for number in (np.corrcoef(a, b)[0, 1], *shares)]


def run_trained(args, dataset, name, source, rule, column, knobs, seed):
    folder, scored = folder_of(dataset, f"then {name}", seed), folder_of(dataset, source, seed)
    knobs, column = dict(knobs), column.format(single=args.single)
    dropped = derive(scored, f"{folder} values", rule or by_sign, column if rule else "")
    if rule is None:
        arm = {}
    elif knobs.pop("random", False):
        arm = dict(drop_random=dropped)
    else:
        arm = dict(filter_negative=True)
    arm |= dict(filter_from=f"{folder} values", val_sets=f"all,{args.single}")
    pool = knobs.get("filter_pool", "scored")
    seconds = train(folder, **dict(dataset=dataset, seed=seed) | RETRAIN | arm | knobs)
    all_, single = read_run(folder), read_run(folder, args.single)
    coverage, curves = all_.config["coverage"], dict(iter=all_.iters.tolist(), test_loss=all_.losses.tolist())
    curves[f"test_loss_{args.single}"] = single.losses.tolist()
    dropped = dropped if rule else 0.0
    return dict(scored=False, source=source, pool=pool, dropped=dropped, seconds=seconds, coverage=coverage) | curves


def folder_of(dataset, name, seed):
    return f"out/study/{dataset}_s{seed}/{name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="python", help="'python', or a file of texts with their domains")
    parser.add_argument("--foreign", default="topics", help="the domain that the corpora do without")
    parser.add_argument("--single", default="modules", help="the domain of the single-domain validation set")
    parser.add_argument("--plans", default="damaged,clean", help="of damaged, clean, confirm")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--results", default=f"{HERE}/results.jsonl")
    args = parser.parse_args()

    base = "study_" + os.path.splitext(os.path.basename(args.source))[0]
    knobs = Knobs(args.source, domain_field="domain", tokenizer="bytes")
    prepare(documents_of(knobs), f"{base}_clean", lambda domain: domain != args.foreign)
    prepare(documents_of(knobs), f"{base}_foreign", lambda domain: domain == args.foreign)
    domains = load_meta(f"data/{base}_clean")["domains"]
    if args.single not in domains or len(domains) < 2:
        raise UserError(f"--single={args.single}: not among the domains of {args.source}: {', '.join(domains)}")
    damage(f"{base}_clean", f"{base}_foreign", f"{base}_damaged")

    done = set()
    if os.path.exists(args.results):
        with open(args.results, encoding="utf-8") as file:
            done = {(line["corpus"], line["name"], line["seed"]) for line in map(json.loads, file)}

    plans = dict(damaged=(SCORED_DAMAGED, TRAINED_DAMAGED), clean=(SCORED_CLEAN, TRAINED_CLEAN))
    plans["confirm"] = SCORED_CONFIRM, TRAINED_CONFIRM
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {}

        def job(plan_name, dataset, name, seed, waits_for, run, *rest):
            """Run it once what it waits for has ended, and write its line."""
            for other in waits_for:
                futures[dataset, other, seed].result()  # started before this one: no deadlock
            if (dataset, name, seed) in done:
                return
            found = run(args, dataset, name.removeprefix("then "), *rest, seed)
            line = dict(plan=plan_name, corpus=dataset, name=name, seed=seed, **found)
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(dataset, name, seed, f"{line['seconds']:.0f} s", flush=True)

        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for plan_name in args.plans.split(","):
                scored, trained = plans[plan_name]
                dataset = f"{base}_damaged" if plan_name == "damaged" else f"{base}_clean"
                for name, knobs in scored.items():
                    waits = [knobs["filter_from"]] if "filter_from" in knobs else []
                    arguments = plan_name, dataset, name, seed, waits, run_scored, knobs
                    futures[dataset, name, seed] = pool.submit(job, *arguments)
                for name, (source, *plan) in trained.items():
                    waits = [source] + ["m16 again"] * name.startswith("two visits")
                    arguments = plan_name, dataset, f"then {name}", seed, waits, run_trained, source, *plan
                    futures[dataset, f"then {name}", seed] = pool.submit(job, *arguments)
        try:
            for future in futures.values():
                future.result()
        except BaseException:  # one run has failed: begin no other
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    main()

"""
Will it pay to train again without the windows of negative value? A trial tells before anyone does.

    python trial.py out/baseline                          # a scored run that has ended, or has a checkpoint
    python trial.py out/baseline --orders=auto            # 4, 8, 16 or 32 orders, as many as the verdict takes
    python trial.py out/baseline --filter_column=novels:adam --test_set=novels           # when novels are the target
    python trial.py out/baseline --batch_size=8 --gradient_accumulation_steps=2          # a knob of train.py
    torchrun --standalone --nproc_per_node=8 trial.py out/baseline

Every arm is a run of train.py that starts from the scored run's weights, with a fresh optimiser. Its learning rate
rises to half the scored run's peak and falls to zero within `share` of the iterations. The arms draw from the scored
windows: the control draws from all of them, 'filtered' from those that are not negative, 'random' from about as many,
chosen at random. An order is a seed. In one order, all arms see the same window in the same slot, unless an arm drops
it; their losses are compared pair by pair. With the defaults, the twelve arms take 1.2 times the scored run's
iterations, and tell differences that a dozen retrainings cannot.

The verdict goes by the 95% intervals of the mean differences from the controls (Student's t over the orders).
'helps': both are below zero. A trial sees less gain than a retraining brings: where a trial sees no change, a
retraining saves 7 ± 4% of its iterations, by the line of study/foretell.md. So 'harms': both are above what a tenth of
the iterations is worth in a trial, `even`. 'no help': both are above `even` less what a twentieth is worth, so that a
retraining would save less than a twentieth. Otherwise it cannot tell. With --orders=auto the 5% are divided among the
four looks.
An interrupted trial goes on with the same command. The exit status is 0 whatever the verdict.
"""

import argparse
import functools
import gc
import json
import os
import signal
import sys
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import asdict, fields, replace
from multiprocessing import connection, get_context

import numpy as np
import torch

from report import first_crossing, read_run
from support.configurator import check, configure, split_names
from support.figures import write_trial
from support.files import atomic_write, load_torch, reading
from support.processes import Ranks, keep_freed_memory, processes, without_traceback
from support.run_folder import FREE_KNOBS, WEIGHTS
from support.values import write_values
from support.windows import Windows
from train import Knobs, train

ARMS = ("control", "random", "filtered")
OWN = {f"--{knob}" for knob in ("out_dir", "init_from", "score", "filter_negative", "filter_pool", "drop_random")}
LOOKS = (4, 8, 16, 32)  # orders after which --orders=auto asks for the verdict
LEVEL = 0.05  # of a false verdict, divided among the looks
CALIBRATION = 2.0  # nats of a retraining for each nat of a trial: the slope of the line of study/foretell.md
WORTH = 0.05  # the share of the iterations that 'no help' must exclude
NEAR_ZERO = (-0.06, 0.14)  # the lowest and highest mean saving where the study's trials saw less than 0.004 nats
AT_ZERO = 0.1  # a share that a retraining may save where a trial sees no change: the line has 7 ± 4%


@functools.cache
def t_quantile(p, df):
    """The quantile of Student's t: sqrt(df) tan(a), where a has a density proportional to cos(a)^(df - 1)."""
    a = (np.arange(0.5, 20_000) / 20_000 - 0.5) * np.pi
    density = np.cos(a) ** (df - 1)
    mass = np.cumsum(density) - density / 2
    return float(np.sqrt(df) * np.tan(np.interp(p, mass / density.sum(), a)))


def interval(differences, level):
    """The mean of (n,) and its (low, high) at 1 - level; None for a single one."""
    n, mean = len(differences), float(np.mean(differences))
    if n == 1:
        return mean, None
    half = t_quantile(1 - level / 2, n - 1) * float(np.std(differences, ddof=1)) / n**0.5
    return mean, (mean - half, mean + half)


def orders_needed(differences, no_help, level):
    """
    About how many orders it takes until all intervals are below zero, or all above `no_help`; None where 1,000 are
    too few.
    """
    means, sds = np.array([(np.mean(each), np.std(each, ddof=1)) for each in differences]).T
    for n in np.geomspace(len(differences[0]) + 1, 1000, 100).astype(int).tolist():
        halves = t_quantile(1 - level / 2, n - 1) * sds / n**0.5
        if (means + halves).max() < 0 or (means - halves).min() > no_help:
            return n
    return None


def judge(losses, no_help, even, level):
    """
    The `verdict` on the filtered arm. `losses` are the final ones, {arm: (n,)}, of the same n orders; the thresholds
    `no_help` <= `even`, in nats, are what 'no help' and 'harms' must exceed (`thresholds`). Also returns the
    mean difference and its interval `beside` every other arm, those of the first as `effect` and `interval`, the
    `spread` of a difference over orders (standard deviations, paired and as if the arms were not), and `orders_needed`
    where the verdict is withheld. The module's docstring has the rule.
    """
    filtered = np.array(losses["filtered"])
    differences = {arm: filtered - losses[arm] for arm in losses if arm != "filtered"}
    beside = {arm: interval(each, level) for arm, each in differences.items()}
    effect, bounds = next(iter(beside.values()))
    found = dict(verdict="cannot tell", effect=effect, interval=bounds, beside=beside, orders=len(filtered))
    found |= dict(level=level, no_help=no_help, even=even, spread={}, orders_needed=None)
    if len(filtered) == 1:
        return found
    for arm, each in differences.items():
        unpaired = np.hypot(np.std(filtered, ddof=1), np.std(losses[arm], ddof=1))
        found["spread"][arm] = dict(paired=float(np.std(each, ddof=1)), unpaired=float(unpaired))
    low, high = np.array([bounds for _, bounds in beside.values()]).T
    if high.max() < 0 or low.min() > no_help:
        found["verdict"] = "helps" if high.max() < 0 else "harms" if low.min() > even else "no help"
    else:
        found["orders_needed"] = orders_needed(list(differences.values()), no_help, level)
    return found


def thresholds(iters, losses, calibration=CALIBRATION):
    """
    (no_help, even): the nats of a trial at which a retraining would save WORTH of its iterations, and nothing, by the
    curve `losses` (n,) at `iters` (n,) of a run.
    """
    at_zero, worth = (
        max(0.0, float(np.interp((1 - share) * iters[-1], iters, losses) - losses[-1])) / calibration
        for share in (AT_ZERO, WORTH)
    )
    return max(0.0, at_zero - worth), at_zero


def saved(run, nats):
    """The share of its iterations that a run does not need if its losses are lower by `nats` >= 0."""
    return 1 - first_crossing(run.iters, run.losses, run.losses[-1] + nats) / run.iters[-1]


def in_words(found, run, scope, share):
    """The verdict in plain words, what it means for a retraining, and the `scope` that it holds for."""
    what = f"dropping the {share:.0%} of the windows that are negative"
    beside = []
    for arm, (mean, bounds) in found["beside"].items():
        half = f" ± {(bounds[1] - bounds[0]) / 2:.4f}" if bounds else ""
        beside.append(f"{mean:+.4f}{half} nats beside {dict(control='the control', random='random drops')[arm]}")
    orders = (
        f"{found['orders']} orders, ± half of a {1 - found['level']:.4g} interval" if found["interval"] else "1 order"
    )
    measured = f"{', '.join(beside)} ({orders})".replace("-", "−")
    if found["interval"] is None:
        more = "One order has no interval: give --orders=4 or more."
    elif found["orders_needed"]:
        more = f"About {found['orders_needed']} orders would tell; --orders=auto goes on to 32."
    else:
        more = "Not even 1,000 orders would tell."
    expected = saved(run, CALIBRATION * max(0.0, -found["effect"]))
    small = "By the study's models of 0.25M parameters, expect a retraining to need about"
    says = dict(helps=f"{what} helps: {measured}. {small} {expected:.0%} fewer iterations.")
    says["harms"] = f"{what} harms: {measured}. Expect a retraining to save nothing, or to need more iterations."
    less = f"Expect a retraining to save less than {WORTH:.0%} of the iterations, if any."
    says["no help"] = f"{what} does not help: {measured}. {less}"
    low, high = NEAR_ZERO
    between = f"Where the study's trials saw next to nothing, retraining saved up to {high:.0%} of the iterations, "
    between += f"or needed up to {-low:.0%} more (study/foretell.md)."
    says["cannot tell"] = f"cannot tell whether {what} helps: {measured}. {between} {more}"
    said = says[found["verdict"]]
    if found["spread"]:
        paired, unpaired = next(iter(found["spread"].values())).values()
        said += (
            f" Over orders, the difference varies by {paired:.4f} nats, and by {unpaired:.4f} if they are not paired."
        )
    return f"{said[0].upper()}{said[1:]} This holds for {scope}."


# ---------------------------------------------------------------------------------------------------------------------
# The arms.


def knobs_of(args, theirs, checkpoint, iterations, rest):
    """The knobs of the first order's control, from those of the scored run and what is left of the command line."""
    ours = {field.name: theirs[field.name] for field in fields(Knobs) if field.name in theirs}
    ours |= {key: checkpoint["model_args"][key] for key in ("n_layer", "n_head", "n_embd", "bias", "vocab_size")}
    ours |= dict(out_dir=f"{args.out}/order_1/control", init_from=f"{args.out}/weights.pt", seed=ours["seed"] + 1)
    ours |= dict(score=False, filter_from=args.run, filter_column=args.filter_column, filter_pool="scored")
    ours |= dict(filter_negative=False, drop_random=0.0, wandb_log=False)
    ours |= dict(max_iters=iterations, eval_interval=iterations, warmup_iters=iterations // 16, lr_decay_iters=0)
    ours |= dict(learning_rate=ours["learning_rate"] / 2, min_lr=0.0, decay_lr=True)
    so_far = f"{args.out}/scored"
    if os.path.isdir(so_far) or not os.path.isfile(f"{args.run}/values.npz"):  # the run had not ended when it began
        ours["filter_from"] = so_far
    return configure(Knobs, [*(f"--{key}={value}" for key, value in ours.items()), *rest])


def begin(args, knobs, checkpoint):
    """Write what all arms start from: the weights, and the values so far of a run that has not ended."""
    so_far = f"{args.out}/scored"
    if knobs.filter_from == so_far:
        write_values(args.run, so_far, checkpoint["iter_num"])
        with open(f"{args.run}/config.json", "rb") as ours, atomic_write(f"{so_far}/config.json") as file:
            file.write(ours.read())
    coverage = Windows(replace(knobs, filter_negative=True)).coverage
    check(coverage["negative"], f"{knobs.filter_from}: none of its {coverage['scored']:,} values is below zero")
    with atomic_write(f"{args.out}/weights.pt") as file:
        torch.save(checkpoint, file)


def run_arm(knobs, ranks=None, jobs=1):
    """
    Train an arm, or go on with it, to its end; what it prints is in its metrics.jsonl. Without `ranks` this process is
    the arm's alone, one of `jobs` that share the CPU's threads. A signal that stops the arm ends the process.
    """
    gc.collect()  # else the models of earlier arms would fill the GPU
    keep_freed_memory()
    if ranks is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    with processes(knobs) if ranks is None else nullcontext(ranks) as ranks, ExitStack() as stack:
        stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stopped = train(knobs, ranks, stack)
    if stopped:
        signal.signal(stopped, signal.SIG_DFL)
        signal.raise_signal(stopped)


def finish(todo, ranks, jobs):
    """Run the arms, {name: knobs}, `jobs` at a time, and yield the name of each when it has ended."""
    if "RANK" in os.environ:  # torchrun's processes share every arm
        for name, knobs in todo.items():
            run_arm(knobs, ranks)
            yield name
        return
    context = get_context("forkserver")  # whose processes begin with what they need imported
    context.set_forkserver_preload(["train", "report", "torch._dynamo"])
    waiting, running = list(todo), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                process = context.Process(target=run_arm, args=(todo[name], None, jobs))
                process.start()
                running[process.sentinel] = process, name
            for sentinel in connection.wait(running):
                process, name = running.pop(sentinel)
                process.join()
                status = process.exitcode
                ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
                check(status == 0, f"{todo[name].out_dir}: this run {ended}; the same command goes on with the trial")
                yield name
    finally:  # after an error: the others end in good order, with a checkpoint
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def parse(argv):
    """(args, the rest): the trial's own flags, checked, and those for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="the folder of a scored run")
    parser.add_argument("--share", type=float, default=0.1, help="of its checkpoint's iterations; default: 0.1")
    parser.add_argument("--orders", default="4", metavar="N", help="seeds of every arm, or 'auto'; default: 4")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"default: {','.join(ARMS)}")
    parser.add_argument("--filter_column", default="", metavar="NAME", help="of the values; default: the first")
    parser.add_argument("--test_set", default="all", metavar="SET", help="go by the test loss of one of the val_sets")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time, on one GPU or one CPU; default: 1")
    parser.add_argument("--out", metavar="FOLDER", help="default: trial, in the run's folder")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of words")
    args, rest = parser.parse_known_args(argv)
    args.run, args.out = os.path.normpath(args.run), args.out or os.path.join(args.run, "trial")
    fits = args.orders == "auto" or (args.orders.isdecimal() and int(args.orders) > 0)
    check(fits, f"--orders={args.orders}: expected a number of orders, or auto")
    named = args.arms.split(",")
    fits = set(named) <= set(ARMS) and "filtered" in named and len(set(named)) > 1
    check(fits, f"--arms={args.arms}: expected filtered and at least one of control and random")
    args.arms = [arm for arm in ARMS if arm in named]
    fits = args.jobs == 1 or (args.jobs > 1 and "RANK" not in os.environ)
    check(fits, f"--jobs={args.jobs}: expected at least 1, and 1 under torchrun")
    for flag in rest:
        check(flag.startswith("--"), f"{flag}: a trial takes no config file; give knobs as --key=value")
        check(flag.partition("=")[0] not in OWN, f"{flag}: trial.py sets this knob for each arm; leave it out")
    return args, rest


def todo_of(args, knobs, share, losses, orders):
    """{(order, arm): knobs} of the arms without a loss, new or to go on with."""
    todo = {}
    for order, arm in ((order, arm) for order in orders for arm in args.arms if order not in losses.get(arm, {})):
        folder = f"{args.out}/order_{order}/{arm}"
        changed = dict(out_dir=folder, seed=knobs.seed + int(order) - 1, filter_negative=arm == "filtered")
        changed |= dict(drop_random=share if arm == "random" else 0.0)
        if os.path.isfile(f"{folder}/ckpt.pt"):
            changed["init_from"] = "resume"
        todo[order, arm] = replace(knobs, **changed)
    return todo


def write_record(path, record):
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1).encode())


def trial(args, run, knobs, checkpoint, ranks):
    """
    Run the arms that are not recorded in trial.json, and return what judge finds, with the losses, what it `says` and
    the path of the figure. Raises UserError where the folder holds another trial.
    """
    path, record = f"{args.out}/trial.json", dict(losses={})
    begun = os.path.isfile(path)
    if ranks.rank == 0 and not begun:
        begin(args, knobs, checkpoint)
    ranks.barrier()
    windows = Windows(replace(knobs, filter_negative=True))
    share = windows.coverage["negative"] / windows.coverage["scored"]
    settings = {key: value for key, value in asdict(knobs).items() if key not in FREE_KNOBS - {"max_iters"}}
    settings |= dict(test_set=args.test_set, windows=windows.order.digest())
    if begun:
        with reading(path, f"remove {args.out}, or give another --out"), open(path, encoding="utf-8") as file:
            record = json.load(file)
            theirs, _ = record["settings"], record["losses"]
        other = ", ".join(f"{key} {theirs.get(key)}" for key in settings if theirs.get(key) != settings[key])
        check(not other, f"{args.out}: holds another trial, with {other}; give this one another --out, or remove it")
    record["settings"], losses = settings, record["losses"]

    ranks.barrier()  # all have seen what was there
    if ranks.rank == 0:
        write_record(path, record)
    looks = LOOKS if args.orders == "auto" else [int(args.orders)]
    for look in looks:
        orders = [str(order) for order in range(1, look + 1)]  # as JSON has them
        todo = todo_of(args, knobs, share, losses, orders)
        ranks.barrier()
        for order, arm in finish(todo, ranks, args.jobs):
            if ranks.rank == 0:
                folder = todo[order, arm].out_dir
                losses.setdefault(arm, {})[order] = float(read_run(folder, args.test_set).losses[-1])
                write_record(path, record)
                os.remove(f"{folder}/ckpt.pt")
                print(f"order {order}, {arm}: {losses[arm][order]:.4f}", file=sys.stderr)
        losses = ranks.broadcast(losses, knobs.device)
        judged = {arm: [losses[arm][order] for order in orders] for arm in args.arms}
        found = judge(judged, *thresholds(run.iters, run.losses), LEVEL / len(looks))
        if found["verdict"] != "cannot tell":
            break
    first = split_names(run.knobs["val_sets"])[0], run.knobs["value_direction"].split(",")[0]
    column = args.filter_column or ":".join(first)
    scope = f"this checkpoint ({args.run}, {checkpoint['iter_num']:,} iterations), these values ({column})"
    loss = "test loss" if args.test_set == "all" else f"test loss on {args.test_set}"
    found |= dict(says=in_words(found, run, f"{scope} and this {loss}", share), figure=f"{args.out}/trial.png")
    if ranks.rank == 0:
        write_trial(found["figure"], judged, found, loss)
        write_record(path, dict(settings=settings, losses=losses) | found)
    return found | dict(losses=losses)


def main(argv=None):
    args, rest = parse(argv)
    run = read_run(args.run, args.test_set)
    few = f"{args.run}: {len(run.iters)} evaluations, and the verdict needs 3"
    check(len(run.iters) >= 3, f"{few}; train it with a smaller --eval_interval, or wait")
    path, mend = f"{args.run}/ckpt.pt", "a trial starts from it; train the run again in another --out_dir"
    if os.path.isfile(f"{args.out}/trial.json"):  # the run may have gone on since the trial began
        path, mend = f"{args.out}/weights.pt", f"remove {args.out}, or give another --out"
    checkpoint = load_torch(path, (*WEIGHTS, "iter_num"), mend)
    checkpoint = {key: checkpoint[key] for key in (*WEIGHTS, "iter_num")}
    iterations = round(args.share * checkpoint["iter_num"])
    few = f"--share={args.share}: {iterations} of the {checkpoint['iter_num']} iterations of {path}"
    check(iterations >= 8, f"{few}, and a trial has at least 8; give a larger --share, or train the run for longer")
    knobs = knobs_of(args, run.knobs, checkpoint, iterations, rest)
    with without_traceback(), processes(knobs) if "RANK" in os.environ else nullcontext(Ranks()) as ranks:
        if "RANK" not in os.environ:  # the arms end as after Ctrl-C
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        found = trial(args, run, knobs, checkpoint, ranks)
        if ranks.rank == 0:
            print(json.dumps(found, indent=1) if args.json else f"{found['says']}\nFigure: {found['figure']}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack a character
    main()

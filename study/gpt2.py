"""
The paper's Figure 2 with GPT-2 124M in the time that there is: does it pay to leave out the windows of negative value?

    python study/gpt2.py --dataset=openwebtext --minutes=60    # on a GPU, into out/gpt2/; once more: it goes on
    python study/gpt2.py --dataset=mine --target=news          # and values for one domain

A baseline values its windows with the directions of config/baseline_best.py for N iterations: a third of the time that
compiling leaves, at most --max_iters. The trial starts every arm from the baseline's checkpoint, for N / 10 iterations
in which the learning rate falls to zero: the control, the filtered one (filter_negative), one that drops the same share
at random and, with a target, one that drops what has a negative value for it (its share has no random arm). Two arms
have the same window in every slot that both accept. The trial is repeated in other orders while there is time; when
four have ended and all arms fit, they are trained afresh as well, for N / 2 iterations. Every run is one of train.py.
What has ended is at once in metrics.json and figure.png, and is not run again.
"""

import gc
import io
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, f"{ROOT}/study"]

from tables import interval  # noqa: E402

import train  # noqa: E402
from report import read_run  # noqa: E402
from support.configurator import UserError, check, configure  # noqa: E402
from support.corpus import load_meta  # noqa: E402
from support.processes import processes  # noqa: E402
from support.values import load_values, log_files  # noqa: E402


@dataclass
class Knobs:
    out_dir: str = "out/gpt2"
    minutes: float = 60.0  # for everything; a run that has begun may end a little later
    max_iters: int = 0  # N is at most this; 0: an epoch of the corpus
    orders: int = 10  # of the trial, at most
    target: str = ""  # a domain
    # the rest is train.py's
    dataset: str = "openwebtext"
    data_dir: str = "data"
    compile: bool = True  # takes a minute or two once: below eight minutes it saves less than it takes
    device: str = "cuda"
    dtype: str = "bfloat16"
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50304
    # The paper's 16 windows. With nanoGPT's 480 the m = 16 validation windows would cost 3% of an iteration instead of
    # as much again. But a GPU takes a second for 480: in minutes too few iterations to learn, and to average over.
    batch_size: int = 16
    val_batch_size: int = 16

    def __post_init__(self):
        if self.minutes <= 0 or not 1 <= self.orders <= 10:
            raise UserError(f"--minutes={self.minutes} --orders={self.orders}: expected some time, and 1 to 10 orders")
        self.arms, self.val_sets = ["control", "filtered", "random"], "all"
        if self.target:
            self.arms.append("target")
            self.val_sets += "," + self.target.replace(",", "\\,")


RATE, TRIAL, AFRESH = 6e-4, 0.1, 0.5  # nanoGPT's learning rate; the iterations of the arms as shares of N
COLORS = ("tab:gray", "tab:blue", "tab:orange", "tab:green")
FIRST = 30  # iterations of the baseline's first leg
OURS = ("minutes", "orders", "target")  # knobs that train.py does not have


def run_here(knobs, folder, **flags):
    """
    A run of train.py in this process, where what one run has compiled serves the next: the seconds it took. One that
    was interrupted, or has ended before, is gone on with.
    """
    gc.collect()  # nothing of the run before stays, on a GPU either
    theirs = {key: value for key, value in asdict(knobs).items() if key not in OURS} | dict(val_sets=knobs.val_sets)
    flags = theirs | dict(eval_iters=16, checkpoint_interval=10**9) | flags | dict(out_dir=folder)
    flags |= dict(init_from="resume") if os.path.exists(f"{folder}/ckpt.pt") else {}
    run, started = train.Knobs(**flags), time.perf_counter()
    with redirect_stdout(io.StringIO()), processes(run) as ranks, ExitStack() as stack:
        if run.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if train.train(run, ranks, stack):
            raise KeyboardInterrupt
    return time.perf_counter() - started


def baseline_run(knobs, folder, iters, total):
    """The scored run, `iters` iterations or a third of what compiling leaves of the `total` seconds: what is known."""
    flags = dict(score=True, value_direction="adam", val_average=32.0, eval_interval=10**9, log_interval=10)
    # Constant behind the warm-up: it need not know where it will end, and the trial finds something to gain.
    flags |= dict(learning_rate=RATE, min_lr=RATE, warmup_iters=min(100, iters // 4), lr_decay_iters=10**6)
    done = max(log_files(folder), default=0)  # of a run that was interrupted
    first = min(iters, done + FIRST)
    seconds = run_here(knobs, folder, max_iters=first, **flags)  # compiles, and tells what a step takes
    scored_s = read_run(folder).lines[-1]["step_ms"] / 1000
    start_s = max(0.0, seconds - (first - done) * scored_s)  # what this process took to compile
    more = int(((total - start_s) / 3 - (seconds - start_s)) / scored_s)
    if first < iters and more > 0:
        seconds += run_here(knobs, folder, max_iters=min(iters, first + more), **flags)
    last = read_run(folder).lines[-1]
    _, value, visits = load_values(folder)
    found = dict(iters=int(visits.sum()) // knobs.batch_size, baseline_s=seconds, negative=float((value < 0).mean()))
    if knobs.target:
        found["negative_for_target"] = float((load_values(folder, f"{knobs.target}:adam")[1] < 0).mean())
    plain_s = (last["step_ms"] - last["val_ms"]) / 1000
    return found | dict(lr=last["lr"], scored_s=last["step_ms"] / 1000, start_s=start_s, plain_s=plain_s)


def arm_run(knobs, plan, arm, order, afresh):
    """The line of an arm: on the baseline's windows, from its checkpoint or afresh."""
    baseline, folder = f"{knobs.out_dir}/baseline", f"{knobs.out_dir}/{'afresh' if afresh else 'trial'}_{arm}_{order}"
    iters = max(5, int((AFRESH if afresh else TRIAL) * plan["iters"]))
    how = dict(filtered=dict(filter_negative=True), random=dict(drop_random=plan["negative"]))
    how |= dict(target=dict(filter_negative=True, filter_column=f"{knobs.target}:adam"))
    flags = how.get(arm, {}) | dict(filter_from=baseline, filter_pool="scored", seed=order)
    # from the checkpoint on with the learning rate that it ended with; AdamW's state begins anew, hence a warm-up
    rates = (RATE, RATE / 10) if afresh else (plan["lr"], 0.0)
    flags |= dict(max_iters=iters, warmup_iters=iters // 10, learning_rate=rates[0], min_lr=rates[1])
    flags |= dict(log_interval=50, eval_interval=max(1, iters // 5))
    if not os.path.exists(f"{folder}/ckpt.pt"):  # a study that was interrupted has not noted this run
        shutil.rmtree(folder, ignore_errors=True)
    seconds = run_here(knobs, folder, init_from="scratch" if afresh else f"{baseline}/ckpt.pt", **flags)
    run = read_run(folder)
    os.remove(f"{folder}/ckpt.pt")  # 1.5 GB
    line = dict(arm=arm, order=order, afresh=afresh, seconds=seconds, iters=run.iters.tolist())
    if knobs.target:
        line["test_loss_target"] = read_run(folder, knobs.target).losses.tolist()
    return line | dict(test_loss=run.losses.tolist())


def differences(lines, arm, afresh=False, key="test_loss", other="control"):
    """The arm's final test loss less another one's, of every order that has both."""
    last = {(line["arm"], line["order"]): line[key][-1] for line in lines if line["afresh"] == afresh}
    return [last[arm, order] - last[other, order] for name, order in last if name == arm and (other, order) in last]


def write(knobs, state):
    """metrics.json, and the figure once there is an order."""
    keys = dict(test_loss="") | (dict(test_loss_target=f" on {knobs.target}") if knobs.target else {})
    state["final"] = {}
    pairs = [(arm, other) for arm in knobs.arms[1:] for other in ("control", "random") if arm != other]
    for afresh, (arm, other), (key, where) in product((False, True), pairs, keys.items()):
        losses = differences(state["arms"], arm, afresh, key, other)
        name = f"{arm} - {other}{where}" + (", trained afresh" if afresh else "")
        state["final"] |= {name: interval(losses)} if losses else {}
    with open(f"{knobs.out_dir}/metrics.json.tmp", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
    os.replace(file.name, f"{knobs.out_dir}/metrics.json")
    if not all(differences(state["arms"], arm) for arm in knobs.arms[1:]):
        return
    figure, (left, *rest) = plt.subplots(1, 1 + len(keys), figsize=(5 * (1 + len(keys)), 4), layout="constrained")
    for ax in rest[1:]:
        ax.sharey(rest[0])
    trials = [line for line in state["arms"] if not line["afresh"]]
    whole = {line["order"] for line in trials if line["arm"] == knobs.arms[-1]}  # orders that have all arms
    for arm, color in zip(knobs.arms, COLORS, strict=False):
        runs = [line for line in trials if line["arm"] == arm and line["order"] in whole]
        curves = np.array([line["test_loss"] for line in runs]).T
        left.plot(runs[0]["iters"], curves, color=color, alpha=0.25)
        left.plot(runs[0]["iters"], curves.mean(1), color=color, lw=2, label=arm)
    left.set(xlabel="iterations after the baseline's {iters:,}".format(**state["plan"]), ylabel="test loss, nats")
    left.set_title("{negative:.0%} of the baseline's windows are negative".format(**state["plan"]))
    left.legend()
    for ax, (key, where) in zip(rest, keys.items(), strict=True):
        for place, (arm, color) in enumerate(zip(knobs.arms, COLORS, strict=False)):
            losses = differences(state["arms"], arm, key=key)
            ax.plot([place] * len(losses), losses, "o", color=color, alpha=0.5)
            ax.errorbar([place], np.mean(losses), interval(losses)[1], color="black", capsize=5, fmt="_", ms=15)
        ax.axhline(0, color="tab:gray", lw=1)
        ax.set(xticks=range(len(knobs.arms)), xticklabels=knobs.arms, xlim=(-0.5, len(knobs.arms) - 0.5))
        ax.set(title=f"final test loss{where} less the control's, nats", ylabel="bars: 95% interval of the mean")
    figure.savefig(f"{knobs.out_dir}/figure.png", dpi=120)
    plt.close(figure)


def main():
    knobs = configure(Knobs, sys.argv[1:])
    end = time.monotonic() + 60 * knobs.minutes
    os.makedirs(knobs.out_dir, exist_ok=True)
    mine = {key: value for key, value in asdict(knobs).items() if key not in ("minutes", "orders")}
    state = dict(knobs=mine, plan={}, arms=[])
    if os.path.exists(f"{knobs.out_dir}/metrics.json"):
        state = json.loads(Path(f"{knobs.out_dir}/metrics.json").read_text("utf-8"))
        check("knobs" in state, f"{knobs.out_dir}: its metrics.json is of older code; give another --out_dir")
        other = [f"--{key}={state['knobs'].get(key)}" for key in mine if state["knobs"].get(key) != mine[key]]
        check(not other, f"{knobs.out_dir}: its study has {' '.join(other)}; use these, or another --out_dir")
    write(knobs, state)
    plan = state["plan"]
    if not plan:
        tokens = load_meta(f"{knobs.data_dir}/{knobs.dataset}")["splits"]["train"]["tokens"]
        epoch = (tokens - 1) // knobs.block_size // knobs.batch_size
        iters = min(epoch, knobs.max_iters or epoch)
        plan |= baseline_run(knobs, f"{knobs.out_dir}/baseline", iters, 60 * knobs.minutes)
        said = "baseline: {iters:,} iterations in {baseline_s:.0f} s, {negative:.1%} negative"
        print(said.format(**plan), flush=True)
        write(knobs, state)

    before = len(state["arms"])
    rounds = [(order, False) for order in range(1, knobs.orders + 1)]
    rounds[4:4] = [(0, True)] * (knobs.orders >= 4)
    for order, afresh in rounds:
        ended = {line["arm"] for line in state["arms"] if (line["order"], line["afresh"]) == (order, afresh)}
        # An arm takes what the middle one has taken; one that is trained afresh takes more. The first arm of a process
        # also compiles, for at most as long as the baseline.
        seconds = [line["seconds"] for line in state["arms"] if not line["afresh"]]
        run_s = statistics.median(seconds or [TRIAL * plan["iters"] * plan["plain_s"]])
        run_s += (AFRESH - TRIAL) * afresh * plan["iters"] * plan["plain_s"]
        start_s = 0.0 if len(state["arms"]) > before else plan["start_s"]
        left = [arm for arm in knobs.arms if arm not in ended]
        fits = time.monotonic() + start_s + len(left) * run_s < end
        for arm in left if fits else ():
            state["arms"].append(arm_run(knobs, plan, arm, order, afresh))
            write(knobs, state)
            print(arm, f"order {order}", "afresh" * afresh, f"{state['arms'][-1]['test_loss'][-1]:.4f}", flush=True)
    print(f"{len(state['arms'])} arms have ended; an order takes {len(knobs.arms)} more, of {run_s:.0f} s each")
    for name, (mean, half) in state["final"].items():
        print(f"{name}: {mean:+.4f} nats", f"+- {half:.4f}, 95% of the mean over orders" if half is not None else "")


if __name__ == "__main__":
    main()

"""
The paper's Figure 2 with GPT-2 124M in the time that there is: does it pay to leave out the windows of negative value?

    python study/gpt2.py --dataset=openwebtext --minutes=60                      # on a GPU, into out/gpt2/
    python study/gpt2.py --dataset=openwebtext --minutes=60 --out_dir=out/gpt2   # again: goes on, with more orders

A few scored iterations tell what a step takes. A baseline of N iterations, as many as leave time for two orders of the
trial, values its windows with the directions of config/baseline_best.py. The trial then starts every arm from the
baseline's checkpoint, for N / 10 iterations in which the learning rate falls to zero: the control, the filtered one
(filter_negative) and the one that drops the same share at random, on the same windows in the same order where both keep
them. It is repeated in other orders until the time is over; when four have ended and there is time for all three arms,
they are trained afresh as well, N / 2 iterations each. Every run is a run of train.py. What has ended is in
metrics.json and in the figure at once; what has a line there is not run again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]

from tables import interval  # noqa: E402

from report import read_run  # noqa: E402
from support.configurator import UserError, configure  # noqa: E402
from support.values import load_values  # noqa: E402


@dataclass
class Knobs:
    dataset: str = "openwebtext"
    data_dir: str = "data"
    out_dir: str = "out/gpt2"
    minutes: float = 60.0  # for everything; a run that has begun may end a little later
    max_iters: int = 0  # N is at most this; 0: an epoch of the corpus
    orders: int = 10  # of the trial, at most
    # Compiling takes half a minute for each run, and an eager step about twice a compiled one's time: what is faster in
    # all, if there are less than five minutes, is not to compile.
    compile: bool = True
    device: str = "cuda"
    dtype: str = "bfloat16"
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50304
    # The paper's batch of 16 windows. nanoGPT's 480 would be better for the values, for m = 16 validation windows then
    # cost 3% of an iteration instead of all of another one. But a GPU takes a second for 480 windows: in minutes they
    # are too few iterations to learn from, and to average directions over.
    batch_size: int = 16
    val_batch_size: int = 16

    def __post_init__(self):
        if self.minutes <= 0 or not 1 <= self.orders <= 10:
            raise UserError(f"--minutes={self.minutes} --orders={self.orders}: expected some time, and 1 to 10 orders")


SHAPE = ("dataset", "data_dir", "compile", "device", "dtype", "n_layer", "n_head", "n_embd", "block_size", "vocab_size")
SHAPE += ("batch_size",)
RATE, TRIAL, AFRESH = 6e-4, 0.1, 0.5  # nanoGPT's learning rate; the iterations of the arms as shares of N
NEW_ARM = dict(score=False, filter_pool="scored", checkpoint_interval=10**9, log_interval=50, eval_iters=16)


def train(knobs, folder, **flags):
    """A run of train.py, gone on with where it was interrupted: its seconds. Raises UserError where it fails."""
    flags = {key: getattr(knobs, key) for key in SHAPE} | flags | dict(out_dir=folder)
    if os.path.exists(f"{folder}/ckpt.pt"):
        flags["init_from"] = "resume"
    command = [sys.executable, f"{ROOT}/train.py", *(f"--{key}={value}" for key, value in flags.items())]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stdout[-2000:]}")
    return time.perf_counter() - started


def scored_run(knobs, folder, iters, lr_decay_iters, log_interval):
    """The directions are those of config/baseline_best.py."""
    flags = dict(score=True, value_direction="adam", val_average=32.0, val_batch_size=knobs.val_batch_size)
    flags |= dict(max_iters=iters, lr_decay_iters=lr_decay_iters, warmup_iters=lr_decay_iters // 20)
    flags |= dict(learning_rate=RATE, min_lr=RATE / 10, log_interval=log_interval, eval_interval=iters, eval_iters=16)
    return train(knobs, folder, checkpoint_interval=10**9, **flags)


def measure_step(knobs):
    """What an iteration takes, scored and plain, and what a run takes beside its iterations, in seconds."""
    folder, every = f"{knobs.out_dir}/step", 8
    shutil.rmtree(folder, ignore_errors=True)
    seconds = scored_run(knobs, folder, 2 * every + 1, 1000, every)
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        last = [line for line in map(json.loads, file) if "step_ms" in line][-1]  # the first ones compile
    shutil.rmtree(folder)
    scored, val = last["step_ms"] / 1000, last["val_ms"] / 1000
    return dict(scored_s=scored, plain_s=scored - val, run_s=seconds - (2 * every + 1) * scored)


def iterations_that_fit(seconds, step, most):
    """
    N, at most `most`, such that the baseline and two orders of the trial, or at least one, take 0.9 of `seconds`.
    Raises UserError where this is less than 10.
    """
    for orders in (2, 1):
        runs = 3 * orders
        iteration = step["scored_s"] + runs * TRIAL * step["plain_s"]
        n = int((0.9 * seconds - (1 + runs) * step["run_s"]) / iteration)
        if n >= 200:
            break
    if min(n, most) < 10:
        raise UserError(f"--minutes: {seconds:.0f} s are too few for runs of which each takes {step['run_s']:.0f} s")
    return min(n, most)


def arm_run(knobs, plan, arm, order, afresh):
    """The line of an arm: on the baseline's windows, from its checkpoint or afresh."""
    baseline, folder = f"{knobs.out_dir}/baseline", f"{knobs.out_dir}/{'afresh' if afresh else 'trial'}_{arm}_{order}"
    iters = max(5, int((AFRESH if afresh else TRIAL) * plan["iters"]))
    flags = dict(filtered=dict(filter_negative=True), random=dict(drop_random=plan["negative"])).get(arm, {})
    # from the checkpoint on with the learning rate that it ended with; AdamW's state begins anew, hence a warm-up
    start = dict(init_from="scratch", learning_rate=RATE, min_lr=RATE / 10)
    if not afresh:
        start = dict(init_from=f"{baseline}/ckpt.pt", learning_rate=plan["last_lr"], min_lr=0.0)
    start |= dict(max_iters=iters, warmup_iters=iters // 10, eval_interval=max(1, iters // 5), seed=order)
    seconds = train(knobs, folder, filter_from=baseline, **flags, **start, **NEW_ARM)
    run = read_run(folder)
    os.remove(f"{folder}/ckpt.pt")  # 1.5 GB
    line = dict(arm=arm, order=order, afresh=afresh, seconds=seconds, iters=run.iters.tolist())
    return line | dict(test_loss=run.losses.tolist())


def differences(lines, arm, afresh=False):
    """The arm's final test loss less the control's, of every order that has both."""
    last = {(line["arm"], line["order"]): line["test_loss"][-1] for line in lines if line["afresh"] == afresh}
    return [last[arm, order] - last["control", order] for name, order in last if name == arm]


def write(knobs, state):
    """metrics.json, and the figure once there is an order."""
    state["final"] = {}
    for arm in ("filtered", "random"):
        found = differences(state["arms"], arm)
        if found:
            state["final"][f"{arm} - control"] = interval(found)
    with open(f"{knobs.out_dir}/metrics.json.tmp", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
    os.replace(file.name, f"{knobs.out_dir}/metrics.json")
    if state["final"]:
        draw(knobs, state)


def draw(knobs, state):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors = dict(control="tab:gray", filtered="tab:blue", random="tab:orange")
    for arm, color in colors.items():
        runs = [line for line in state["arms"] if line["arm"] == arm and not line["afresh"]]
        for line in runs:
            left.plot(line["iters"], line["test_loss"], color=color, alpha=0.25)
        mean = np.mean([line["test_loss"] for line in runs], axis=0) if runs else []
        left.plot(runs[0]["iters"] if runs else [], mean, color=color, lw=2, label=arm)
    left.set(xlabel=f"iterations after the baseline's {state['plan']['iters']:,}", ylabel="test loss, nats")
    left.legend()
    for place, arm in enumerate(("filtered", "random")):
        found = differences(state["arms"], arm)
        right.plot([place] * len(found), found, "o", color=colors[arm], alpha=0.5)
        right.errorbar([place], np.mean(found), interval(found)[1], color="black", capsize=5, fmt="_", ms=15)
    right.axhline(0, color="tab:gray", lw=1)
    right.set(xticks=[0, 1], xticklabels=["filtered", "random drop"], xlim=(-0.5, 1.5))
    right.set(ylabel="final test loss less the control's, nats", title="each order, mean and 95% of it")
    left.set_title(f"{state['plan']['negative']:.0%} of the windows negative")
    figure.savefig(f"{knobs.out_dir}/figure.png", dpi=120)
    plt.close(figure)


def main():
    knobs = configure(Knobs, sys.argv[1:])
    started = time.monotonic()

    def left():
        return 60 * knobs.minutes - (time.monotonic() - started)

    os.makedirs(knobs.out_dir, exist_ok=True)
    state, baseline = dict(plan={}, arms=[]), f"{knobs.out_dir}/baseline"
    if os.path.exists(f"{knobs.out_dir}/metrics.json"):
        with open(f"{knobs.out_dir}/metrics.json", encoding="utf-8") as file:
            state = json.load(file)
    plan = state["plan"]
    if not plan:
        with open(f"{knobs.data_dir}/{knobs.dataset}/meta.json", encoding="utf-8") as file:
            epoch = json.load(file)["splits"]["train"]["tokens"] // knobs.block_size // knobs.batch_size - 1
        plan |= measure_step(knobs)
        plan["iters"] = iterations_that_fit(left(), plan, min(epoch, knobs.max_iters or epoch))
        print("a scored step takes {scored_s:.4f} s, a run {run_s:.1f} s more: {iters:,} iterations".format(**plan))
        write(knobs, state)
    if "negative" not in plan:
        # half of a cosine's way, so that the trial begins with a learning rate that there is something to gain from
        plan["baseline_s"] = scored_run(knobs, baseline, plan["iters"], 2 * plan["iters"], max(1, plan["iters"] // 50))
        with open(f"{baseline}/metrics.jsonl", encoding="utf-8") as file:
            lines = list(map(json.loads, file))
        plan |= dict(last_lr=[line["lr"] for line in lines if "lr" in line][-1], test_loss=lines[-1]["test_loss"])
        plan["negative"] = float((load_values(baseline)[1] < 0).mean())
        print("baseline: {baseline_s:.0f} s, test loss {test_loss:.4f}, {negative:.1%} negative".format(**plan))
        write(knobs, state)

    rounds = [(order, False) for order in range(1, knobs.orders + 1)]
    for order, afresh in rounds[:4] + [(0, True)] + rounds[4:]:
        begun = {line["arm"] for line in state["arms"] if (line["order"], line["afresh"]) == (order, afresh)}
        iters = (AFRESH if afresh else TRIAL) * plan["iters"]
        need = (3 - len(begun)) * (plan["run_s"] + iters * plan["plain_s"])
        if need > left() or (afresh and knobs.orders < 4):
            continue
        for arm in [arm for arm in ("control", "filtered", "random") if arm not in begun]:
            state["arms"].append(arm_run(knobs, plan, arm, order, afresh))
            write(knobs, state)
            print(arm, f"order {order}", "afresh" * afresh, f"{state['arms'][-1]['test_loss'][-1]:.4f}", flush=True)
    for name, (mean, half) in state["final"].items():
        print(f"{name}: {mean:+.4f} nats" + (f" +- {half:.4f}, 95% of the orders' mean" if half else ""))
    print(f"{knobs.out_dir}: metrics.json, figure.png, baseline/values.npz")


if __name__ == "__main__":
    main()

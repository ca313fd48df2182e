"""
The paper's Figure 2 with GPT-2 124M in the time that there is: does it pay to leave out the windows of negative value?

    python study/gpt2.py --dataset=openwebtext --minutes=60    # on a GPU, into out/gpt2/; once more: it goes on

A baseline values its windows with the directions of config/baseline_best.py for a third of the time, N iterations. The
trial starts every arm from the baseline's checkpoint, for N / 10 iterations in which the learning rate falls to zero:
the control, the filtered one (filter_negative) and one that drops the same share at random, with the same window in
every slot that two arms both accept. It is repeated in other orders while there is time; when four have ended and all
three arms fit, they are trained afresh as well, for N / 2 iterations. Every run is one of train.py. What has ended is
at once in metrics.json and figure.png, and is not run again.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, f"{ROOT}/study"]

from tables import interval  # noqa: E402

from report import read_run  # noqa: E402
from support.configurator import UserError, configure  # noqa: E402
from support.corpus import load_meta  # noqa: E402
from support.values import load_values, write_values  # noqa: E402


@dataclass
class Knobs:
    out_dir: str = "out/gpt2"
    minutes: float = 60.0  # for everything; a run that has begun may end a little later
    max_iters: int = 0  # N is at most this; 0: an epoch of the corpus
    orders: int = 10  # of the trial, at most
    # the rest is train.py's
    dataset: str = "openwebtext"
    data_dir: str = "data"
    compile: bool = True  # takes half a minute a run: below five minutes or so it saves less than it takes
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


RATE, TRIAL, AFRESH = 6e-4, 0.1, 0.5  # nanoGPT's learning rate; the iterations of the arms as shares of N
ARMS = ("control", "filtered", "random")


def train(knobs, folder, limit=None, **flags):
    """
    A run of train.py, gone on with where it was interrupted, and stopped after `limit` seconds: the seconds it took.
    Raises UserError where it fails.
    """
    theirs = {key: value for key, value in asdict(knobs).items() if key not in ("minutes", "orders")}
    flags = theirs | dict(eval_iters=16, checkpoint_interval=10**9) | flags | dict(out_dir=folder)
    flags |= dict(init_from="resume") if os.path.exists(f"{folder}/ckpt.pt") else {}
    command = [sys.executable, f"{ROOT}/train.py", *(f"--{key}={value}" for key, value in flags.items())]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        process.terminate()  # train.py ends the step that it is in, and writes a checkpoint
        if process.wait():
            log.seek(0)
            raise UserError(f"{' '.join(command)}: {log.read()[-2000:]}")
    return time.perf_counter() - started


def baseline_run(knobs, folder, iters, limit):
    """The scored run, of `iters` iterations or `limit` seconds: what is known of it."""
    flags = dict(score=True, value_direction="adam", val_average=32.0, max_iters=iters, eval_interval=10**9)
    # Constant behind the warm-up: it need not know where it will end, and the trial finds something to gain.
    flags |= dict(
        learning_rate=RATE, min_lr=RATE, warmup_iters=min(100, iters // 4), lr_decay_iters=10**6, log_interval=10
    )
    seconds = train(knobs, folder, limit, **flags)
    write_values(folder, folder)  # the run itself writes them at its last iteration alone
    _, value, visits = load_values(folder)
    last = [line for line in read_run(folder).lines if "step_ms" in line][-1]
    found = dict(iters=int(visits.sum()) // knobs.batch_size, baseline_s=seconds, negative=float((value < 0).mean()))
    return found | dict(
        lr=last["lr"], scored_s=last["step_ms"] / 1000, plain_s=(last["step_ms"] - last["val_ms"]) / 1000
    )


def arm_run(knobs, plan, arm, order, afresh):
    """The line of an arm: on the baseline's windows, from its checkpoint or afresh."""
    baseline, folder = f"{knobs.out_dir}/baseline", f"{knobs.out_dir}/{'afresh' if afresh else 'trial'}_{arm}_{order}"
    iters = max(5, int((AFRESH if afresh else TRIAL) * plan["iters"]))
    flags = dict(filtered=dict(filter_negative=True), random=dict(drop_random=plan["negative"])).get(arm, {})
    flags |= dict(filter_from=baseline, filter_pool="scored", seed=order, max_iters=iters, log_interval=50)
    # from the checkpoint on with the learning rate that it ended with; AdamW's state begins anew, hence a warm-up
    rates = (RATE, RATE / 10) if afresh else (plan["lr"], 0.0)
    flags |= dict(warmup_iters=iters // 10, eval_interval=max(1, iters // 5), learning_rate=rates[0], min_lr=rates[1])
    seconds = train(knobs, folder, init_from="scratch" if afresh else f"{baseline}/ckpt.pt", **flags)
    run = read_run(folder)
    os.remove(f"{folder}/ckpt.pt")  # 1.5 GB
    line = dict(arm=arm, order=order, afresh=afresh, seconds=seconds)
    return line | dict(iters=run.iters.tolist(), test_loss=run.losses.tolist())


def differences(lines, arm, afresh=False):
    """The arm's final test loss less the control's, of every order that has both."""
    last = {(line["arm"], line["order"]): line["test_loss"][-1] for line in lines if line["afresh"] == afresh}
    return [last[arm, order] - last["control", order] for name, order in last if name == arm]


def write(knobs, state):
    """metrics.json, and the figure once there is an order."""
    found = {arm: differences(state["arms"], arm) for arm in ARMS[1:]}
    state["final"] = {f"{arm} - control": interval(losses) for arm, losses in found.items() if losses}
    with open(f"{knobs.out_dir}/metrics.json.tmp", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
    os.replace(file.name, f"{knobs.out_dir}/metrics.json")
    if not found["random"]:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for place, (arm, color) in enumerate(zip(ARMS, ("tab:gray", "tab:blue", "tab:orange"), strict=True)):
        runs = [line for line in state["arms"] if line["arm"] == arm and not line["afresh"]]
        curves = np.array([line["test_loss"] for line in runs]).T
        left.plot(runs[0]["iters"], curves, color=color, alpha=0.25)
        left.plot(runs[0]["iters"], curves.mean(1), color=color, lw=2, label=arm)
        losses = differences(state["arms"], arm)
        right.plot([place] * len(losses), losses, "o", color=color, alpha=0.5)
        right.errorbar([place], np.mean(losses), interval(losses)[1], color="black", capsize=5, fmt="_", ms=15)
    left.set(xlabel="iterations after the baseline's {iters:,}".format(**state["plan"]), ylabel="test loss, nats")
    left.set_title("{negative:.0%} of the baseline's windows are negative".format(**state["plan"]))
    left.legend()
    right.axhline(0, color="tab:gray", lw=1)
    right.set(xticks=range(3), xticklabels=ARMS, xlim=(-0.5, 2.5), title="every order; their mean and 95% of it")
    right.set_ylabel("final test loss less the control's, nats")
    figure.savefig(f"{knobs.out_dir}/figure.png", dpi=120)
    plt.close(figure)


def main():
    knobs = configure(Knobs, sys.argv[1:])
    end = time.monotonic() + 60 * knobs.minutes
    os.makedirs(knobs.out_dir, exist_ok=True)
    state = dict(plan={}, arms=[])
    if os.path.exists(f"{knobs.out_dir}/metrics.json"):
        with open(f"{knobs.out_dir}/metrics.json", encoding="utf-8") as file:
            state = json.load(file)
    plan = state["plan"]
    if not plan:
        tokens = load_meta(f"{knobs.data_dir}/{knobs.dataset}")["splits"]["train"]["tokens"]
        epoch = (tokens - 1) // knobs.block_size // knobs.batch_size
        plan |= baseline_run(
            knobs, f"{knobs.out_dir}/baseline", min(epoch, knobs.max_iters or epoch), 20 * knobs.minutes
        )
        print(
            "baseline: {iters:,} iterations in {baseline_s:.0f} s, {negative:.1%} negative".format(**plan), flush=True
        )
        write(knobs, state)

    rounds = [(order, False) for order in range(1, knobs.orders + 1)]
    rounds[4:4] = [(0, True)] * (knobs.orders >= 4)
    for order, afresh in rounds:
        ended = {line["arm"] for line in state["arms"] if (line["order"], line["afresh"]) == (order, afresh)}
        # an arm takes what the longest has taken, the first what the baseline took to start; and more if it is longer
        started = plan["baseline_s"] - plan["iters"] * plan["scored_s"]
        run_s = max((line["seconds"] for line in state["arms"] if not line["afresh"]), default=started)
        run_s += (AFRESH - TRIAL) * afresh * plan["iters"] * plan["plain_s"]
        fits = time.monotonic() + (3 - len(ended)) * run_s < end
        for arm in [arm for arm in ARMS if fits and arm not in ended]:
            state["arms"].append(arm_run(knobs, plan, arm, order, afresh))
            write(knobs, state)
            print(arm, f"order {order}", "afresh" * afresh, f"{state['arms'][-1]['test_loss'][-1]:.4f}", flush=True)
    print(f"{len(state['arms'])} arms have ended; an order takes three more, of {run_s:.0f} s each")
    for name, (mean, half) in state["final"].items():
        print(f"{name}: {mean:+.4f} nats", f"+- {half:.4f}, 95% of the mean over orders" if half is not None else "")


if __name__ == "__main__":
    main()

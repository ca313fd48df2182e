"""A trial's arms are paired runs of train.py from the scored run's weights; its verdict follows the rule."""

import functools
import io
import json
import multiprocessing.forkserver
import os
import shutil
import signal
import sys
import threading
import time
import types
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processes import forked, run_ranks, torchrun
from test_run_folder import start_forks
from test_train import TINY, baseline, call, corpus, home, metrics  # noqa: F401 (fixtures)

import prepare_owt
import report
import train
import trial
from support.values import load_values, write_values

# ---------------------------------------------------------------------------------------------------------------------
# The verdict.


def test_students_quantiles_are_those_of_the_tables():
    table = {1: (6.3138, 12.7062), 2: (2.9200, 4.3027), 3: (2.3534, 3.1824), 7: (1.8946, 2.3646), 31: (1.6955, 2.0395)}
    for df, (p95, p975) in table.items():
        assert trial.t_quantile(0.95, df) == pytest.approx(p95, rel=2e-4)
        assert trial.t_quantile(0.975, df) == pytest.approx(p975, rel=2e-4)
        assert trial.t_quantile(0.025, df) == pytest.approx(-p975, rel=2e-4)


CONTROL = np.array([2.50, 2.52, 2.49, 2.51])
NOISE = np.array([0.001, -0.001, 0.0005, -0.0005])


@pytest.mark.parametrize(
    "beside_control, beside_random, verdict",
    [
        (-0.02, -0.02, "helps"),
        (-0.02, 0.01, "cannot tell"),  # as many at random help more
        (0.02, 0.02, "harms"),
        (0.02, 0.01, "no help"),
        (0.01, 0.01, "no help"),
        (0.006, 0.006, "cannot tell"),
        (0.0, 0.0, "cannot tell"),
        (-0.001, -0.001, "cannot tell"),
    ],
)
def test_the_verdict_goes_by_the_intervals_beside_both_controls(beside_control, beside_random, verdict):
    """Half of an interval is 0.0014 beside the control and up to twice that beside the random drops."""
    filtered = CONTROL + beside_control + NOISE
    losses = dict(control=CONTROL, random=filtered - beside_random - NOISE[::-1], filtered=filtered)
    found = trial.judge({arm: each.tolist() for arm, each in losses.items()}, 0.005, 0.012, 0.05)
    assert found["verdict"] == verdict
    # the twin: t of a table, written out
    for arm in ("control", "random"):
        differences = filtered - losses[arm]
        half = 3.1824 * np.sqrt(((differences - differences.mean()) ** 2).sum() / 3) / 2
        mean, (low, high) = found["beside"][arm]
        assert [low, mean, high] == pytest.approx([differences.mean() + x for x in (-half, 0, half)], abs=1e-6)
    assert [found["effect"], found["interval"]] == [*found["beside"]["control"]]
    assert (found["orders_needed"] is None) == (verdict != "cannot tell" or beside_random in (0.0, 0.01))


def test_one_order_has_no_interval():
    found = trial.judge(dict(control=[2.5], filtered=[2.4]), 0.0, 0.0, 0.05)
    assert found["verdict"] == "cannot tell" and found["interval"] is None and found["effect"] == pytest.approx(-0.1)


def test_the_verdict_in_words_says_what_a_retraining_may_expect():
    run = types.SimpleNamespace(iters=np.array([0, 50, 100]), losses=np.array([5.0, 2.6, 2.5]), folder="out/scored")

    def words(effect, noise):
        filtered = (CONTROL + effect + noise * NOISE).tolist()
        found = trial.judge(dict(control=CONTROL.tolist(), filtered=filtered), 0.002, 0.004, 0.05)
        return trial.in_words(found, run, "this checkpoint", 0.4)

    # from iteration 100 back to 50 the loss is 0.1 higher
    assert trial.saved(run, 0.02) == pytest.approx(0.1)
    expected = trial.CALIBRATION * 0.005 / 0.1 / 2
    helps = words(-0.005, 0.1)
    assert "Dropping the 40% of the windows that are negative helps: −0.0050 ± 0.0001 nats beside the control" in helps
    assert f"about {expected:.0%} fewer iterations" in helps and helps.endswith("This holds for this checkpoint.")
    assert "(4 orders, ± half of a 0.95 interval)" in helps and "varies by 0.0001 nats, and by 0.0182 if" in helps
    assert "harms: +0.0050" in words(0.005, 0.1) and "does not help" in words(0.003, 0.1)
    needed = trial.judge(dict(control=CONTROL, filtered=CONTROL - 0.001 + NOISE), 0.002, 0.004, 0.05)["orders_needed"]
    assert "Cannot tell whether dropping" in (said := words(-0.001, 1)) and f"About {needed} orders" in said
    assert "saved up to 14% of the iterations, or needed up to 6% more" in said


def test_the_thresholds_are_what_shares_of_the_iterations_are_worth():
    """From iteration 100 back to 80 the loss rises by 0.04; a nat of a trial is two of a retraining."""
    iters, losses = np.array([0, 80, 100]), np.array([5.0, 2.54, 2.5])
    assert trial.thresholds(iters, losses, 2.0) == pytest.approx((0.005, 0.01))
    assert trial.thresholds(iters, losses[::-1], 2.0) == (0.0, 0.0)  # a loss that rises is worth nothing


def test_the_interval_is_of_the_paired_differences():
    found = trial.judge(dict(control=CONTROL.tolist(), filtered=(CONTROL - 0.01 + NOISE).tolist()), 0.0, 0.0, 0.05)
    assert found["verdict"] == "helps"
    assert found["spread"]["control"]["paired"] == pytest.approx(np.std(NOISE, ddof=1))
    expected = np.hypot(np.std(CONTROL, ddof=1), np.std(CONTROL + NOISE, ddof=1))
    assert found["spread"]["control"]["unpaired"] == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(
    mean=st.floats(-0.01, 0.02), sd=st.floats(1e-4, 0.02), no_help=st.floats(0, 0.01), seed=st.integers(0, 2**32 - 1)
)
def test_with_the_orders_needed_a_verdict_holds_and_with_nine_tenths_of_them_none(mean, sd, no_help, seed):
    noise = np.random.default_rng(seed).normal(size=4)
    noise = sd * (noise - noise.mean()) / noise.std(ddof=1)  # so that mean and sd are exact
    losses = dict(control=CONTROL.tolist(), filtered=(CONTROL + mean + noise).tolist())
    found = trial.judge(losses, no_help, 0.01, 0.05)

    def some_verdict_holds(n):
        half = trial.t_quantile(0.975, n - 1) * sd / n**0.5
        return mean + half < 0 or mean - half > no_help

    n = found["orders_needed"]
    if found["verdict"] != "cannot tell":
        assert n is None and some_verdict_holds(4)
    elif n is None:
        assert not some_verdict_holds(1000)
    else:
        assert n > 4 and some_verdict_holds(n) and not some_verdict_holds(max(4, int(0.9 * n)))


def test_a_filter_that_changes_nothing_is_rarely_called_a_help_however_often_one_looks():
    rng, helps, n = np.random.default_rng(0), 0, 300
    for _ in range(n):
        control, random, filtered = rng.normal(2.5, 0.005, (3, 32))
        for look in trial.LOOKS:
            losses = dict(control=control[:look], random=random[:look], filtered=filtered[:look])
            found = trial.judge(losses, -1e-9, 0.0, trial.LEVEL / len(trial.LOOKS))
            helps += found["verdict"] == "helps"
            if found["verdict"] != "cannot tell":
                break
    assert helps < 0.05 * n


# ---------------------------------------------------------------------------------------------------------------------
# The arms.


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def edit_json(path, edit):
    found = read_json(path)
    edit(found)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(found, file)


def make_some_negative(folder):
    """Lower a tiny run's values, of which perhaps none is below zero."""
    with np.load(f"{folder}/values.npz") as arrays:
        arrays = dict(arrays)
    np.savez(f"{folder}/values.npz", **arrays | dict(value=arrays["value"] - np.quantile(arrays["value"], 0.3)))


def copy_scored(baseline):  # noqa: F811
    """A scored run in out/scored."""
    shutil.copytree(baseline, "out/scored")
    edit_json("out/scored/config.json", lambda config: config["knobs"].update(data_dir="data"))
    make_some_negative("out/scored")


@pytest.fixture
def scored(home, baseline):  # noqa: F811
    """A fresh working folder with the corpus and a scored run in out/scored."""
    copy_scored(baseline)
    return "out/scored"


def run_trial(flags=""):
    """The result of `trial.py out/scored <flags> --json`."""
    start_forks()
    trial.main(f"out/scored --share=1 --json {flags}".split())
    return read_json("out/scored/trial/trial.json")


@pytest.fixture(scope="module")
def ended(corpus, baseline, tmp_path_factory):  # noqa: F811
    """The folder of a trial of two orders and all arms, made once, and what it has printed."""
    folder = tmp_path_factory.mktemp("ended")
    shutil.copytree(corpus / "data", folder / "data")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        copy_scored(baseline)
        run_trial("--orders=2")
    return folder / "out/scored/trial", out.getvalue()


def test_every_arm_is_a_run_of_train_py_from_the_scored_weights(scored, ended):
    shutil.copytree(ended[0], f"{scored}/trial")
    found, printed = read_json(f"{scored}/trial/trial.json"), json.loads(ended[1])
    assert {key: printed[key] for key in ("verdict", "effect", "interval")}.items() <= found.items()
    assert sorted(found["losses"]) == ["control", "filtered", "random"] and os.path.getsize(found["figure"]) > 10_000
    _, value, _ = load_values(scored)
    checkpoint = torch.load(f"{scored}/ckpt.pt", weights_only=True)
    weights = {key: checkpoint[key] for key in ("model", "model_args")}
    torch.save(weights, "weights.pt")
    lr = 1e-2 / 2
    flags = f"{TINY} --init_from=weights.pt --filter_from={scored} --learning_rate={lr} --min_lr=0 --warmup_iters=0"
    arms = dict(control="", filtered="--filter_negative=True", random=f"--drop_random={(value < 0).mean()}")
    for order in (1, 2):
        for arm, flag in arms.items():
            out_dir = f"out/{arm}_{order}"
            call(train.main, f"{flags} {flag} --eval_interval=8 --seed={1337 + order} --out_dir={out_dir}")
            assert metrics(out_dir) == metrics(f"{scored}/trial/order_{order}/{arm}")
            assert found["losses"][arm][str(order)] == metrics(out_dir)[-1]["test_loss"]
    assert len({loss for losses in found["losses"].values() for loss in losses.values()}) == 6


def test_a_trial_that_was_interrupted_ends_as_one_that_was_not(scored, ended, capsys):
    before = read_json(ended[0] / "trial.json")
    # all arms of the first order ended; of the second one arm has a checkpoint, and the others have not begun
    shutil.copytree(ended[0], "out/scored/trial", ignore=shutil.ignore_patterns("order_2"))
    edit_json("out/scored/trial/trial.json", lambda record: [losses.pop("2") for losses in record["losses"].values()])
    knobs = read_json(ended[0] / "order_2/filtered/config.json")["knobs"] | dict(max_iters=5, lr_decay_iters=8)
    call(train.main, " ".join(f"--{key}={value}" for key, value in knobs.items()))
    assert metrics("out/scored/trial/order_2/filtered")[-1]["iter"] == 5
    assert run_trial("--orders=2") == before
    assert metrics("out/scored/trial/order_2/filtered")[-1] == metrics(ended[0] / "order_2/filtered")[-1]
    # more orders, and fewer arms, go on with those that are there
    more = run_trial("--orders=3 --arms=control,filtered --jobs=2")
    assert {arm: {n: more["losses"][arm][n] for n in "12"} for arm in more["losses"]} == before["losses"]
    assert more["orders"] == 3


def test_a_run_that_has_not_ended_is_tried_with_its_values_so_far(home):  # noqa: F811
    flags = f"{TINY} --score=True --val_batch_size=4 --out_dir=out/scored --checkpoint_interval=4 --max_iters=16"
    call(train.main, flags)
    os.remove("out/scored/values.npz")
    found = run_trial("--orders=1 --arms=control,filtered")
    assert found["settings"]["max_iters"] == 16
    write_values("out/scored", "expected")
    for ours, theirs in zip(load_values("out/scored/trial/scored"), load_values("expected"), strict=True):
        assert np.array_equal(ours, theirs)
    assert "One order has no interval" in found["says"]


@pytest.mark.parametrize("by_torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_several_processes_share_every_arm(scored, capsys, by_torchrun):
    flags = "--orders=1 --arms=control,filtered --gradient_accumulation_steps=2 --batch_size=2"
    alone = run_trial(flags)
    os.rename("out/scored/trial", "alone")
    if by_torchrun:
        run = torchrun("--standalone --nproc_per_node=2", f"out/scored --share=1 {flags}", "trial.py")
        _, err = run.communicate()
        assert run.returncode == 0, err
    else:
        run_ranks(2, f"out/scored --share=1 {flags}", functools.partial(forked, script="trial"))
    two = read_json("out/scored/trial/trial.json")
    for arm in ("control", "filtered"):
        assert two["losses"][arm]["1"] == pytest.approx(alone["losses"][arm]["1"], abs=1e-5)


def kill_the_first_arm():
    until = time.time() + 60
    while not os.path.isfile("out/scored/trial/order_1/control/ckpt.pt") and time.time() < until:
        time.sleep(0.01)
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    with open(f"/proc/{server}/task/{server}/children") as file:
        for child in file.read().split():
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the arm's process in /proc")
def test_an_arm_that_was_killed_is_named_and_gone_on_with_to_the_same_verdict(scored, capsys):
    flags = "--orders=1 --arms=control,filtered --max_iters=200 --eval_interval=200 --checkpoint_interval=20"
    killer = threading.Thread(target=kill_the_first_arm)
    killer.start()
    with pytest.raises(SystemExit, match="order_1/control: this run was ended by signal 9; the same command goes on"):
        run_trial(flags)
    killer.join()
    assert os.path.isfile("out/scored/trial/order_1/control/ckpt.pt")
    again = run_trial(flags)
    trial.main(f"out/scored --share=1 --out=elsewhere {flags}".split())
    whole = read_json("elsewhere/trial.json")
    assert again["losses"] == whole["losses"] and again["says"] == whole["says"]


def test_orders_auto_looks_again_until_a_verdict_holds(scored, monkeypatch, capsys):
    rng, begun = np.random.default_rng(1), []
    control = rng.normal(2.5, 0.01, 32)
    losses = dict(control=control, filtered=control - 0.02 + rng.normal(0, 0.02, 32))

    def finish(todo, ranks, jobs):  # instead of training
        for order, arm in todo:
            begun.append((int(order), arm))
            os.makedirs(todo[order, arm].out_dir)
            open(f"{todo[order, arm].out_dir}/ckpt.pt", "w").close()
            yield order, arm

    def read_run(folder, test_set):
        if folder == "out/scored":
            return report.read_run(folder, test_set)
        order, arm = folder.split("order_")[1].split("/")
        return types.SimpleNamespace(losses=[losses[arm][int(order) - 1]])

    monkeypatch.setattr(trial, "finish", finish)
    monkeypatch.setattr(trial, "read_run", read_run)
    found = run_trial("--orders=auto --arms=control,filtered")
    verdicts = {
        n: trial.judge({arm: each[:n] for arm, each in losses.items()}, found["no_help"], found["even"], 0.05 / 4)
        for n in (4, 8, 16, 32)
    }
    looks = [n for n in verdicts if verdicts[n]["verdict"] != "cannot tell"] or [32]
    assert found["orders"] == looks[0] > 4 and found["level"] == 0.05 / 4
    assert found["verdict"] == verdicts[looks[0]]["verdict"]
    assert begun == [(order, arm) for order in range(1, looks[0] + 1) for arm in ("control", "filtered")]


def test_another_folder_of_values_is_used_as_it_is(scored, capsys):
    sample_id, _, visits = load_values(scored)
    os.makedirs("oracle")
    shutil.copy(f"{scored}/config.json", "oracle")
    np.savez("oracle/values.npz", sample_id=sample_id, value=np.where(sample_id % 2, 1.0, -1.0), visits=visits)
    before = Path("oracle/values.npz").read_bytes()
    found = run_trial("--orders=1 --arms=control,filtered --filter_from=oracle")
    coverage = read_json("out/scored/trial/order_1/filtered/config.json")["coverage"]
    assert coverage["negative"] == (sample_id % 2 == 0).sum() and "dropping the" in found["says"].lower()
    assert Path("oracle/values.npz").read_bytes() == before


def test_a_run_that_goes_on_does_not_change_its_trial(home, monkeypatch, capsys):  # noqa: F811
    def write_some_negative(out_dir, folder, end):
        write_values(out_dir, folder, end)
        make_some_negative(folder)

    monkeypatch.setattr(trial, "write_values", write_some_negative)
    flags = f"{TINY} --score=True --val_batch_size=4 --out_dir=out/scored --checkpoint_interval=4 --lr_decay_iters=16"
    call(train.main, f"{flags} --max_iters=12")
    os.remove("out/scored/values.npz")
    first = run_trial("--orders=1 --arms=control,filtered")
    call(train.main, f"{flags} --max_iters=16 --init_from=resume")
    more = run_trial("--orders=2 --arms=control,filtered")
    assert {arm: each["1"] for arm, each in more["losses"].items()} == {
        arm: each["1"] for arm, each in first["losses"].items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: refused in one line, before anything is written.


def test_what_cannot_be_tried_is_refused(scored, corpus):  # noqa: F811
    def refused(message, flags=""):
        before = sorted(os.listdir("out/scored"))
        with pytest.raises(SystemExit, match=message) as error:
            run_trial(flags)
        assert "\n" not in str(error.value) and sorted(os.listdir("out/scored")) == before

    refused("--orders=0: expected a number of orders, or auto", "--orders=0")
    refused("--arms=control,other: expected filtered and at least one", "--arms=control,other")
    refused("--arms=filtered: expected filtered and at least one", "--arms=filtered")
    refused("--jobs=0", "--jobs=0")
    refused("--drop_random=0.2: trial.py sets this knob for each arm; leave it out", "--drop_random=0.2")
    refused("--init_from=gpt2: trial.py sets this knob for each arm", "--init_from=gpt2")
    refused("config/x.py: a trial takes no config file", "config/x.py")
    refused("there is no knob 'batchsize'; did you mean 'batch_size'", "--batchsize=4")
    refused("--share=0.5: 4 of the 8 iterations of out/scored/ckpt.pt, and a trial has at least 8", "--share=0.5")
    refused("has no column 'all:adam', only all:sgd", "--filter_column=all:adam")
    refused("no evaluation with a test_loss_odd", "--test_set=odd")
    call(prepare_owt.main, f"--source={corpus}/tiny.jsonl --tokenizer=bytes --name=other --test_fraction=0.3")
    refused("--filter_from=out/scored: valued another corpus, 'tiny', than --dataset=other", "--dataset=other")
    with np.load("out/scored/values.npz") as arrays:
        arrays = dict(arrays)
    np.savez("out/scored/values.npz", **arrays | dict(value=-np.abs(arrays["value"]) - 1))
    refused("nothing is left to train on")
    np.savez("out/scored/values.npz", **arrays | dict(value=np.abs(arrays["value"])))
    refused("out/scored: none of its .* values is below zero")
    np.savez("out/scored/values.npz", **arrays)
    os.rename("out/scored/ckpt.pt", "ckpt.pt")
    refused("out/scored/ckpt.pt: no such file; a trial starts from it")


def test_a_run_without_values_is_refused(home):  # noqa: F811
    call(train.main, f"{TINY} --out_dir=out/scored")
    with pytest.raises(SystemExit, match="out/scored/dot_prod: no dot-product log there"):
        run_trial()
    assert not os.path.exists("out/scored/trial")


def test_another_trial_in_the_same_folder_is_refused(scored, ended):
    shutil.copytree(ended[0], "out/scored/trial")
    with pytest.raises(SystemExit, match=r"trial: holds another trial, with learning_rate 0\.005; give .* --out"):
        run_trial("--orders=2 --learning_rate=1e-3")


def test_the_report_shows_the_trial_of_its_run(scored, ended, capsys):
    shutil.copytree(ended[0], "out/scored/trial")
    report.main([scored])
    assert read_json("out/scored/trial/trial.json")["says"] in capsys.readouterr().out

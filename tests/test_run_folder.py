"""What a bad day does to a run: kills, full disks, damaged and hostile files, numbers gone bad, any input."""

import importlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from multiprocessing.forkserver import ensure_running

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_train import ROOT, TINY, call, corpus, home, metrics, refused  # noqa: F401 (fixtures)

import train
from model import GPT
from support.configurator import UserError
from support.corpus import checksum_of, get_tokenizer, load_meta, open_split, window_domains
from support.files import load_torch
from support.run_folder import CHECKPOINT
from support.values import load_values, read_log
from support.windows import VAL, WindowOrder, training_order

SCORED = f"{TINY} --score=True --val_batch_size=3 --value_direction=adam"


FORKS = multiprocessing.get_context("forkserver")


def start_forks():
    """Start the process from which others are forked: it imports what takes them seconds, once for all tests."""
    FORKS.set_forkserver_preload(["train", "report", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:  # no working folder of a test has these modules
        patch.setenv("PYTHONPATH", ROOT)
        ensure_running()


class Script:
    """
    train.py, or another script, as a process of its own, after the Python statements `before`; what the tests use of
    subprocess.Popen. It is forked from a process that has imported train.py already. When it ends, it leaves by
    os._exit, and an exception, Ctrl-C's too, gives status 1.
    """

    def __init__(self, flags, before="pass", script="train", **environment):
        start_forks()
        self.folder = tempfile.mkdtemp()
        pipes = [f"{self.folder}/{name}" for name in ("stdout", "stderr")]
        for pipe in pipes:
            os.mkfifo(pipe)
        arguments = os.getcwd(), script, flags.split(), before, environment, pipes
        self.process = FORKS.Process(target=run_script, args=arguments)
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate
        self.stdout, self.stderr = (open(pipe, encoding="utf-8") for pipe in pipes)  # noqa: SIM115

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        return self.process.exitcode

    def communicate(self):
        said = self.stdout.read(), self.stderr.read()
        self.wait()
        return said


def run_script(folder, script, argv, before, environment, pipes):
    os.chdir(folder)
    os.environ.update(environment)
    for number, pipe in enumerate(pipes, 1):
        os.dup2(os.open(pipe, os.O_WRONLY), number)
    # a new one: that of the first process may have been a file, in which one can seek
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = [f"{script}.py", *argv]
    exec(before, {})
    importlib.import_module(script).main()


def wait_for_training(run):
    """Until it has printed what it will train."""
    for line in run.stdout:
        if "parameters on" in line:
            return
    raise AssertionError(run.stderr.read())


def resume(out_dir):
    return "--init_from=resume" if os.path.exists(f"{out_dir}/ckpt.pt") else ""


def same_run(a, b, exact=True):
    """Parameters, optimiser state, metrics without timings, log and values are the same, bit for bit or to rounding."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x == y if exact else x == pytest.approx(y, rel=1e-3, abs=1e-6)
    logs, values = (read_log(a), read_log(b)), (load_values(a), load_values(b))
    assert np.array_equal(logs[0]["sample_id"], logs[1]["sample_id"])
    assert logs[0].pop("directions") == logs[1].pop("directions")
    pairs = [*zip(logs[0].values(), logs[1].values(), strict=True), *zip(*values, strict=True)]
    states = [torch.load(f"{run}/ckpt.pt", weights_only=True, map_location="cpu") for run in (a, b)]
    pairs += [(states[0]["model"][key], states[1]["model"][key]) for key in states[0]["model"]]
    optimizers = [state["optimizer"]["state"] for state in states]
    pairs += [(optimizers[0][i][key], optimizers[1][i][key]) for i in optimizers[0] for key in optimizers[0][i]]
    for x, y in ((np.asarray(x), np.asarray(y)) for x, y in pairs):
        if exact:
            assert np.array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4 * np.abs(y).max())


# ---------------------------------------------------------------------------------------------------------------------
# Kills


@pytest.mark.parametrize("kills", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_ends_as_if_it_had_not_been(home, kills):  # noqa: F811
    flags = f"{SCORED} --dropout=0.1 --checkpoint_interval=2 --max_iters={20 * kills}"
    call(train.main, f"{flags} --out_dir=out/whole")
    moments, rng = [], random.Random(kills)
    while len(moments) < kills:
        run = Script(f"{flags} --out_dir=out/killed {resume('out/killed')}")
        wait_for_training(run)
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
        assert run.wait() == -signal.SIGKILL, run.stderr.read()
        tmp = [name for _, _, names in os.walk("out/killed") for name in names if name.endswith(".tmp")]
        moments.append("dot-product log" if "dot" in "".join(tmp) else "checkpoint" if tmp else "between")
    print({where: moments.count(where) for where in sorted(set(moments))}, end=" ")
    call(train.main, f"{flags} --out_dir=out/killed {resume('out/killed')}")
    same_run("out/killed", "out/whole")


# The moments of a run that write: config.json, the checkpoint at 0, log and checkpoint at 3, 6 and 8, values.npz.
# A file is synced, renamed, its folder synced; metrics.jsonl is synced before each checkpoint.
KILL_AT_SYSTEM_CALL = """
import os, signal
count = [0]
def counted(call):
    def wrapper(*arguments):
        count[0] += 1
        if count[0] == {n}:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return wrapper
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
"""
CALLS = 31


@pytest.mark.parametrize(
    "n", [2, 5, 8, 13, CALLS - 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, CALLS + 1))]
)
def test_killed_at_every_sync_and_rename(home, n):  # noqa: F811
    call(train.main, f"{SCORED} --out_dir=out/whole")
    before = f"exec({KILL_AT_SYSTEM_CALL.format(n=n)!r})"
    run = Script(f"{SCORED} --out_dir=out/killed", before)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    call(train.main, f"{SCORED} --out_dir=out/killed {resume('out/killed')}")
    same_run("out/killed", "out/whole")


def test_there_are_as_many_syncs_and_renames_as_the_test_above_believes(home, monkeypatch):  # noqa: F811
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, original=original: (calls.append(1), original(*a))[1])
    call(train.main, f"{SCORED} --out_dir=out/x")
    assert len(calls) == CALLS


# before a run that is to be stopped: its iterations wait, so that it does not end first
SLOWLY = """
import time, train
get_lr = train.get_lr
train.get_lr = lambda it, knobs: time.sleep(0.05) or get_lr(it, knobs)
"""


def test_sigterm_ends_a_run_after_its_step_with_a_checkpoint(home):  # noqa: F811
    flags = f"{SCORED} --max_iters=100 --checkpoint_interval=10000"
    run = Script(f"{flags} --out_dir=out/stopped", SLOWLY)
    wait_for_training(run)
    while not os.path.getsize("out/stopped/metrics.jsonl"):  # its first evaluation
        time.sleep(0.01)
        assert run.poll() is None
    run.terminate()
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert "SIGTERM: stopped after" in out and "--init_from=resume" in out
    assert 0 < torch.load("out/stopped/ckpt.pt", weights_only=True)["iter_num"] < 100
    call(train.main, f"{flags} --out_dir=out/stopped --init_from=resume")
    call(train.main, f"{flags} --out_dir=out/whole")
    same_run("out/stopped", "out/whole")


def test_ctrl_c_ends_a_run_as_sigterm_does_and_a_second_one_at_once(home, monkeypatch, capsys):  # noqa: F811
    get_lr, handlers = train.get_lr, []

    def interrupted(it, knobs):
        if it == 5:
            signal.raise_signal(signal.SIGINT)
            handlers.append(signal.getsignal(signal.SIGINT))
        return get_lr(it, knobs)

    monkeypatch.setattr(train, "get_lr", interrupted)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which is silenced
    switched_off = signal.signal(signal.SIGINT, signal.default_int_handler)  # as where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            call(train.main, f"{SCORED} --out_dir=out/stopped")
        assert handlers == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, switched_off)
    assert (
        "SIGINT: stopped after 6 iterations; go on from the last checkpoint in out/stopped" in capsys.readouterr().out
    )
    monkeypatch.setattr(train, "get_lr", get_lr)
    call(train.main, f"{SCORED} --out_dir=out/stopped --init_from=resume")
    call(train.main, f"{SCORED} --out_dir=out/whole")
    same_run("out/stopped", "out/whole")


def test_ctrl_c_that_a_shell_has_switched_off_stays_off(home, monkeypatch):  # noqa: F811
    """As it has for a command in the background."""
    get_lr, before = train.get_lr, signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(train, "get_lr", lambda it, knobs: signal.raise_signal(signal.SIGINT) or get_lr(it, knobs))
    try:
        call(train.main, f"{SCORED} --out_dir=out/x")
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.load("out/x/ckpt.pt", weights_only=True)["iter_num"] == 8


def test_a_run_does_not_go_back_behind_its_end(home):  # noqa: F811
    call(train.main, f"{SCORED} --out_dir=out/x --lr_decay_iters=16")
    before = {path: path.read_bytes() for path in (home / "out/x").rglob("*") if path.is_file()}
    flags = f"{SCORED} --out_dir=out/x --init_from=resume --lr_decay_iters=16"
    refused(f"{flags} --max_iters=5", "--max_iters=5: out/x/ckpt.pt has 8 iterations already")
    refused(f"{SCORED} --out_dir=out/x --init_from=resume --max_iters=5", "--max_iters=5: out/x/ckpt.pt has 8")
    refused(f"{SCORED} --out_dir=out/x --init_from=resume --seed=1", "--seed=1 --max_iters=8: .*with --seed=1337 --lr")
    refused(f"{SCORED} --out_dir=out/x --init_from=resume --max_iters=9", "^--max_iters=9: .*with --lr_decay_iters=16$")
    refused(f"{flags} --lr_decay_iters=12", "^--lr_decay_iters=12: .*with --lr_decay_iters=16$")
    assert before == {path: path.read_bytes() for path in (home / "out/x").rglob("*") if path.is_file()}


def test_a_finished_run_that_is_resumed_writes_its_values_again(home):  # noqa: F811
    call(train.main, f"{SCORED} --out_dir=out/x")
    shutil.copytree("out/x", "out/whole")
    os.remove("out/x/values.npz")
    call(train.main, f"{SCORED} --out_dir=out/x --init_from=resume")
    same_run("out/x", "out/whole")


class FakeWandb(types.ModuleType):
    """What train.py uses of W&B; `runs` has {id: all that was told}."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.fails = {}, False

    def init(self, project, name, config, id, resume):
        if self.fails:
            raise self.Error("No API key configured.")
        run = types.SimpleNamespace(id=id or f"new{len(self.runs)}", name=name, resume=resume, summary={}, said=[])
        run.said = self.runs[run.id].said if run.id in self.runs else []
        run.log, run.define_metric = run.said.append, lambda name, step_metric: None
        self.runs[run.id] = run
        return run

    def Histogram(self, value):
        return "histogram", len(value)


def test_a_resumed_run_is_the_same_run_at_wandb(home, monkeypatch):  # noqa: F811
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = f"{SCORED} --wandb_log=True --out_dir=out/mine"
    call(train.main, f"{flags} --max_iters=6 --lr_decay_iters=8")
    call(train.main, f"{flags} --init_from=resume")
    (run,) = wandb.runs.values()
    assert (run.name, run.resume) == ("mine", "allow")
    value = load_values("out/mine")[1]
    assert run.summary == {"values": ("histogram", len(value)), "negative_share": (value < 0).mean()}
    said = [line["iter"] for line in run.said if "loss" in line]
    assert said == [0, 2, 4, 5, 6, 7] and {"test_loss", "test_bpb"} <= run.said[0].keys()
    call(train.main, f"{SCORED} --wandb_log=True --wandb_run_name=other --out_dir=out/x --max_iters=3")
    assert len(wandb.runs) == 2 and run.id != wandb.runs["new1"].id and wandb.runs["new1"].name == "other"
    wandb.fails = True
    refused(f"{SCORED} --wandb_log=True --out_dir=out/y", "--wandb_log=True: No API key configured")
    assert not os.path.exists("out/y/config.json")


# ---------------------------------------------------------------------------------------------------------------------
# Disks and files


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 KB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(path)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield str(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(home, small_disk):  # noqa: F811
    flags = f"{SCORED} --max_iters=60 --out_dir={small_disk}/run"
    with pytest.raises(SystemExit, match="could not be written .No space left on device."):
        call(train.main, f"{flags} --checkpoint_interval=1 --n_embd=32")
    checkpoint = load_torch(f"{small_disk}/run/ckpt.pt", CHECKPOINT, "")
    assert checkpoint["iter_num"] >= 1
    shutil.copytree(f"{small_disk}/run", "out/run")  # onto a larger disk
    flags = f"{SCORED} --max_iters=60 --n_embd=32 --out_dir=out"
    call(train.main, f"{flags}/run --init_from=resume")
    call(train.main, f"{flags}/whole")
    same_run("out/run", "out/whole")


def test_a_limit_on_file_sizes_leaves_the_last_checkpoint(home):  # noqa: F811
    call(train.main, f"{SCORED} --out_dir=out/x --lr_decay_iters=16")
    with open("out/x/ckpt.pt", "rb") as file:
        before = file.read()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        refused(f"{SCORED} --out_dir=out/x --lr_decay_iters=16 --max_iters=16 --init_from=resume", "ckpt.pt: could not")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with open("out/x/ckpt.pt", "rb") as file:
        assert file.read() == before
    assert not os.path.exists("out/x/ckpt.pt.tmp")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):  # noqa: F811
    """A scored run and its corpus, in a folder that no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(corpus / "data", folder / "data")
    call(train.main, f"{SCORED} --data_dir={folder}/data --out_dir={folder}/run")
    return folder


def read_docs(folder):
    meta = load_meta(f"{folder}/data/tiny")
    return window_domains(f"{folder}/data/tiny", "train", np.arange(9), 16, meta)


def read_tokens(folder):
    tokens = open_split(f"{folder}/data/tiny", "train", load_meta(f"{folder}/data/tiny"))
    return tokens.windows(np.array([0]), len(tokens) - 1)


READERS = {
    "run/ckpt.pt": lambda folder: load_torch(f"{folder}/run/ckpt.pt", CHECKPOINT, "mend it"),
    "run/dot_prod/dot_prod_log_iter_6.pt": lambda folder: read_log(f"{folder}/run"),
    "run/values.npz": lambda folder: load_values(f"{folder}/run"),
    "data/tiny/train.bin": read_tokens,
    "data/tiny/train.crc": read_tokens,
    "data/tiny/train_docs.npy": read_docs,
    "data/tiny/meta.json": lambda folder: load_meta(f"{folder}/data/tiny"),
}


def equal(a, b):
    """Of nested dicts, lists, arrays and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool((np.asarray(a) == np.asarray(b)).all())


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_named_or_says_the_same(finished, name, data):
    """Only bits that nothing reads (time stamps and paddings in a zip) may change without being noticed."""
    path, whole = finished / name, READERS[name](finished)
    content = path.read_bytes()
    how = data.draw(st.sampled_from(["flip", "truncate", "foreign"]))
    if how == "flip":
        damaged = bytearray(content)
        damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "truncate":
        damaged = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        damaged = data.draw(st.binary(max_size=300))
    path.write_bytes(damaged)
    try:
        assert equal(READERS[name](finished), whole) and how == "flip" and name.endswith((".pt", ".npz"))
    except UserError as error:
        assert os.path.basename(name).replace(".crc", "") in str(error)
        assert "\n" not in str(error)
    finally:
        path.write_bytes(content)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_malicious_pickle_is_refused(home, finished):  # noqa: F811
    shutil.copytree(finished / "run", "out/x")
    evil = dict.fromkeys([*CHECKPOINT, "iter", "lr", "clip", "sample_id", "dot_product"], Evil())
    torch.save(evil, "out/x/ckpt.pt")
    refused(f"{SCORED} --out_dir=out/x --init_from=resume", "out/x/ckpt.pt: damaged, or not written by this script")
    refused(f"{SCORED} --out_dir=out/y --init_from=out/x/ckpt.pt", "out/x/ckpt.pt: damaged, or not written")
    for content in (pickle.dumps(Evil()), b"\x80\x02cposix\nmkdir\nX\x05\0\0\0owned\x85R."):
        with open("out/x/ckpt.pt", "wb") as file:
            file.write(content)
        refused(f"{SCORED} --out_dir=out/x --init_from=resume", "out/x/ckpt.pt: damaged, or not written")
    torch.save(evil, "out/x/dot_prod/dot_prod_log_iter_8.pt")
    with pytest.raises(UserError, match="dot_prod_log_iter_8.pt: damaged"):
        read_log("out/x")
    np.savez("out/x/values.npz", sample_id=np.array([Evil()], dtype=object))
    with pytest.raises(UserError, match="values.npz: damaged"):
        load_values("out/x")
    documents = np.array([Evil()], dtype=object)
    np.save("data/tiny/train_docs.npy", documents)
    with pytest.raises(UserError, match="train_docs.npy"):
        read_docs(".")
    assert not os.path.exists("owned")


def test_files_that_do_not_belong_together_are_refused(home, finished):  # noqa: F811
    shutil.copytree(finished / "run", "out/x")
    torch.save({"model": {}, "model_args": {}, "iter_num": 3}, "out/x/ckpt.pt")  # as nanoGPT's
    refused(f"{SCORED} --out_dir=out/x --init_from=resume", "ckpt.pt: not written by this script, it has no optimizer")
    torch.save(torch.zeros(3), "out/x/ckpt.pt")
    refused(f"{SCORED} --out_dir=out/x --init_from=resume", "a Tensor, not a dict")
    shutil.copy(finished / "run/ckpt.pt", "out/x/ckpt.pt")
    os.truncate("out/x/metrics.jsonl", 10)
    refused(f"{SCORED} --out_dir=out/x --init_from=resume", "metrics.jsonl: truncated, 10 bytes of")
    with open("out/x/config.json", "w", encoding="utf-8") as file:
        file.write('{"knobs": 3}')
    refused(f"{SCORED} --filter_from=out/x --out_dir=out/y", "out/x/config.json: damaged")
    shutil.copy(finished / "run/config.json", "out/x/config.json")
    np.savez("out/x/values.npz", sample_id=np.array([10**6]), value=np.ones(1), visits=np.ones(1, dtype=np.int64))
    refused(f"{SCORED} --filter_from=out/x --out_dir=out/y", "out/x/values.npz: has windows that the corpus has not")
    log = torch.load("out/x/dot_prod/dot_prod_log_iter_8.pt", weights_only=True)
    log["dot_product"] = log["dot_product"][:, :2]
    torch.save(log, "out/x/dot_prod/dot_prod_log_iter_8.pt")
    with pytest.raises(UserError, match="dot_prod_log_iter_8.pt: damaged"):
        read_log("out/x")


def test_a_filter_that_has_changed_is_noticed(home, finished):  # noqa: F811
    shutil.copytree(finished / "run", "out/scored")
    sample_id, value, visits = load_values("out/scored")
    value[::3] = -1.0
    np.savez("out/scored/values.npz", sample_id=sample_id, value=value, visits=visits)
    flags = f"{TINY} --filter_from=out/scored --filter_negative=True --lr_decay_iters=99 --out_dir=out/x"
    call(train.main, flags)
    value[1] = -1.0
    np.savez("out/scored/values.npz", sample_id=sample_id, value=value, visits=visits)
    refused(f"{flags} --max_iters=12 --init_from=resume", "--filter_from=out/scored: not the windows that out/x")
    value[1] = 1.0
    np.savez("out/scored/values.npz", sample_id=sample_id, value=value, visits=visits)
    call(train.main, f"{flags} --max_iters=12 --init_from=resume")


def test_a_filter_and_corpora_are_known_by_what_they_are_and_not_by_their_paths(home, finished):  # noqa: F811
    shutil.copytree(finished / "run", "out/scored")
    shutil.copytree("data/tiny", "data/other")
    flags = f"{TINY} --val_sets=other --lr_decay_iters=16 --out_dir=out/x"
    call(train.main, f"{flags} --filter_from=out/scored")
    shutil.move("out/scored", "elsewhere")
    shutil.copytree("data", "corpora")
    os.rename("corpora/tiny", "corpora/renamed")
    elsewhere = "--data_dir=corpora --dataset=renamed --val_sets=./other/"
    flags = f"{TINY} --lr_decay_iters=16 --out_dir=out/x --init_from=resume --max_iters=12"
    refused(f"{flags} {elsewhere} --filter_from={finished}/none", "none/values.npz: no such file")
    refused(f"{flags} {elsewhere}", "--filter_from=: not the windows that out/x/ckpt.pt began with")
    refused(f"{flags} --val_sets=all --filter_from=elsewhere", "--val_sets=all: .*resume with --val_sets=other")
    call(train.main, f"{flags} {elsewhere} --filter_from=elsewhere/. --filter_column=all:adam")
    call(train.main, f"{TINY} --lr_decay_iters=16 --val_sets=other --filter_from=elsewhere --out_dir=y --max_iters=12")
    x, y = ([line for line in metrics(run) if "test_loss" in line] for run in ("out/x", "y"))
    assert x == y and len(x) == 4


def test_a_damaged_log_is_noticed_when_a_run_is_resumed(home, finished):  # noqa: F811
    shutil.copytree(finished / "run", "out/x")
    flags = f"{SCORED} --data_dir={finished}/data --out_dir=out/x --lr_decay_iters=8 --max_iters=12 --init_from=resume"
    os.truncate("out/x/dot_prod/dot_prod_log_iter_3.pt", 700)
    refused(flags, "dot_prod_log_iter_3.pt: damaged")
    os.remove("out/x/dot_prod/dot_prod_log_iter_3.pt")
    refused(flags, "iterations are missing or there twice")
    shutil.copytree(finished / "run", "out/x", dirs_exist_ok=True)
    os.remove("out/x/dot_prod/dot_prod_log_iter_8.pt")
    refused(flags, "dot_prod: ends at iteration 6, .* at 8; bring the missing files back, or train anew in another")


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(home):  # noqa: F811
    run = Script(f"{SCORED} --out_dir=out/x --max_iters=100000")
    wait_for_training(run)
    refused(f"{SCORED} --out_dir=out/x --max_iters=100000", "out/x: a run is writing there now")
    refused(f"{SCORED} --out_dir=out/x --max_iters=100000 --init_from=resume", "out/x: a run is writing there now")
    while not os.path.exists("out/x/ckpt.pt"):
        time.sleep(0.01)
        assert run.poll() is None
    run.kill()
    run.wait()
    iterations = torch.load("out/x/ckpt.pt", weights_only=True)["iter_num"]
    call(
        train.main, f"{SCORED} --out_dir=out/x --max_iters={iterations + 4} --lr_decay_iters=100000 --init_from=resume"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Numbers gone bad


@pytest.mark.parametrize("scored", [True, False])
def test_a_loss_that_is_not_finite_names_its_window(home, monkeypatch, scored):  # noqa: F811
    tokens = np.fromfile("data/tiny/train.bin", dtype="<u2")
    forward, poison = GPT.forward, torch.from_numpy(tokens[: 16 * 600].reshape(-1, 16).astype(np.int64))
    flags = f"{TINY} --score={scored} --out_dir=out/x"
    call(train.main, f"{flags} --max_iters=30 --lr_decay_iters=60")
    ids, _ = training_order((len(tokens) - 1) // 16, 1337, False, "scored", 0.0)[0].take(4 * 40, 4)
    bad = int(ids[2])  # of iteration 40

    def poisoned(self, idx, targets=None, alpha=None):
        logits, loss = forward(self, idx, targets, alpha)
        hit = (idx == poison[bad]).all(1).any()
        return logits, loss * torch.where(hit & (targets is not None), torch.nan, 1.0)

    monkeypatch.setattr(GPT, "forward", poisoned)
    resumed = f"{flags} --max_iters=60 --lr_decay_iters=60 --log_interval=7 --init_from=resume"
    with pytest.raises(SystemExit) as error:
        call(train.main, resumed)
    message = str(error.value)
    text = get_tokenizer("bytes").decode(tokens[bad * 16 : bad * 16 + 17].tolist())
    assert "iteration 40: not every number is finite (loss nan, gradient norm nan" in message
    assert f"its train windows are {', '.join(map(str, ids))}; the worst of them, {bad}, with a loss of nan" in message
    assert repr(text) in message and "\n" not in message
    checkpoint = torch.load("out/x/ckpt.pt", weights_only=True)
    assert checkpoint["iter_num"] == 39 and all(p.isfinite().all() for p in checkpoint["model"].values())
    assert max(line["iter"] for line in metrics("out/x") if "loss" in line) <= 39
    if scored:
        assert read_log("out/x")["iter"][-1] == 38
    monkeypatch.setattr(GPT, "forward", forward)
    call(train.main, resumed)  # the checkpoint is good


def test_a_validation_loss_that_is_not_finite_names_its_window(home, monkeypatch):  # noqa: F811
    tokens = np.fromfile("data/tiny/val.bin", dtype="<u2")
    forward, poison = GPT.forward, torch.from_numpy(tokens[: 16 * 300].reshape(-1, 16).astype(np.int64))
    bad = int(WindowOrder((len(tokens) - 1) // 16, 1337, VAL).take(5 * 3, 3)[0][1])  # of iteration 5

    def poisoned(self, idx, targets=None, alpha=None):
        logits, loss = forward(self, idx, targets, alpha)
        return logits, loss * torch.where((idx == poison[bad]).all(1).any(), torch.inf, 1.0)

    monkeypatch.setattr(GPT, "forward", poisoned)
    with pytest.raises(SystemExit) as error:
        call(train.main, f"{SCORED} --max_iters=60 --out_dir=out/x")
    assert "iteration 5: not every number is finite" in str(error.value)
    assert f"; the worst of them, {bad}, with a loss of inf" in str(error.value)
    assert read_log("out/x")["iter"][-1] < 5


def test_parameters_that_overflow_are_not_saved(home):  # noqa: F811
    flags = f"{TINY} --optimizer=sgd --grad_clip=0 --learning_rate=1e29 --min_lr=0 --checkpoint_interval=1"
    refused(f"{flags} --out_dir=out/x", "not finite|not every number is finite")
    checkpoint = torch.load("out/x/ckpt.pt", weights_only=True)
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzed input

KNOBS = sorted(set(vars(train.Knobs())) - {"compile", "max_iters"})  # a minute to compile; a run that never ends
characters = st.characters(exclude_categories=["Cs"], exclude_characters="/.\0")
values = st.one_of(st.text(characters, max_size=8), st.integers(-3, 300).map(str), st.floats().map(str))
WORDS = ["True", "False", "adam", "sgd", "all", "resume", "scratch", "cpu", "cuda:77", "meta", "float16", "tiny"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(knob=st.sampled_from(KNOBS), value=st.one_of(values, st.sampled_from(WORDS)))
@example(knob="dataset", value="")
def test_any_knob_gives_a_run_or_one_line(home, knob, value):  # noqa: F811
    shutil.rmtree("out", ignore_errors=True)
    argv = [*TINY.split(), "--max_iters=2", "--warmup_iters=0", "--score=True", "--val_batch_size=2", "--out_dir=out/x"]
    old, sys.argv = sys.argv, ["train.py", *argv, f"--{knob}={value}"]
    try:
        train.main()
    except SystemExit as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) > 10, message
        named = knob, f"={value}:", f"{value or '.'}/", "warmup_iters", "finite"  # the knob, its file, or what it did
        assert any(name in message for name in named), message
    finally:
        sys.argv = old


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_meta_json_is_taken_or_refused_in_one_line(finished, data):
    """A value anywhere in it is replaced, and the checksum made to fit."""
    folder = f"{finished}/data/tiny"
    with open(f"{folder}/meta.json", encoding="utf-8") as file:
        content = file.read()
    meta = json.loads(content)
    key = data.draw(st.sampled_from([*meta, *("tokens", "documents", "docs_sha256")]))
    target = meta if key in meta else meta["splits"]["train"]
    target[key] = data.draw(json_values)
    if key != "checksum":
        meta["checksum"] = checksum_of(meta)
    try:
        with open(f"{folder}/meta.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(meta))
        tokens = open_split(folder, "train", load_meta(folder))
        assert tokens.windows(np.array([1]), 16).shape == (1, 17)
        window_domains(folder, "train", np.array([1]), 16, meta)
    except UserError as error:
        assert "tiny" in str(error) and "\n" not in str(error)
    finally:
        with open(f"{folder}/meta.json", "w", encoding="utf-8") as file:
            file.write(content)


# ---------------------------------------------------------------------------------------------------------------------
# Long runs


@pytest.mark.slow
def test_a_long_run_is_flat(home, capsys):  # noqa: F811
    """20,000 steps with scores, evaluations and checkpoints: memory does not grow and the log is as predicted."""
    flags = SCORED.replace("--warmup_iters=2", "--warmup_iters=100").replace("--learning_rate=1e-2", "")
    run = Script(
        f"{flags} --max_iters=20000 --eval_interval=200 --checkpoint_interval=500 --log_interval=100 --out_dir=out/x"
    )
    page, resident = resource.getpagesize(), []
    wait_for_training(run)
    while run.poll() is None:
        try:
            with open(f"/proc/{run.pid}/statm", encoding="ascii") as file:
                resident.append((time.monotonic(), int(file.read().split()[1]) * page / 2**20))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            break
        time.sleep(0.5)
    out, err = run.communicate()
    assert run.returncode == 0, err
    when, megabytes = np.array(resident[len(resident) // 4 : -1]).T  # the first quarter fills caches
    slope = np.polyfit((when - when[0]) / (when[-1] - when[0]), megabytes, 1)[0]
    with open("out/x/metrics.jsonl", encoding="utf-8") as file:
        ms = np.array([line["step_ms"] for line in map(json.loads, file) if "step_ms" in line][1:])
    halves = np.median(ms[len(ms) // 2 :]) / np.median(ms[: len(ms) // 2])
    size = sum(os.path.getsize(f"out/x/dot_prod/{name}") for name in os.listdir("out/x/dot_prod"))
    predicted = 20000 * (8 + 8 + 8 + 4 * (8 + 4)) + 40 * 3000  # bytes of the tensors, and of 40 files' headers
    with capsys.disabled():
        print(f"\n20,000 steps: {slope:+.1f} MB over the last three quarters of the run at {megabytes.mean():.0f} MB;")
        print(f"log {size:,} bytes, predicted {predicted:,}; median step of the second half / the first {halves:.3f}")
    assert abs(slope) < 10 and predicted * 0.9 < size < predicted * 1.1
    assert len(read_log("out/x")["iter"]) == 20000


def test_a_checkpoint_and_a_log_of_a_newer_format_are_refused_and_older_ones_read(home):  # noqa: F811
    call(train.main, f"{SCORED} --max_iters=3 --lr_decay_iters=8 --out_dir=out/x")
    log_path = "out/x/dot_prod/dot_prod_log_iter_3.pt"
    for path, again in (("out/x/ckpt.pt", "--max_iters=4"), (log_path, "--max_iters=5")):
        written = torch.load(path, weights_only=True)
        assert written["format"] == 1
        torch.save(written | dict(format=2), path)
        flags = f"{SCORED} {again} --lr_decay_iters=8 --out_dir=out/x --init_from=resume"
        refused(flags, f"{path}: its format is 2, this code knows 1")
        torch.save({key: value for key, value in written.items() if key != "format"}, path)
        call(train.main, flags)


def test_a_checkpoint_with_a_knob_that_is_gone_is_refused(home):  # noqa: F811
    call(train.main, f"{TINY} --max_iters=3 --lr_decay_iters=8 --out_dir=out/x")
    written = torch.load("out/x/ckpt.pt", weights_only=True)
    written["knobs"] |= dict(val_interval=1, filter_lowest=0.0)  # as they were by default: nothing is lost
    torch.save(written, "out/x/ckpt.pt")
    call(train.main, f"{TINY} --max_iters=4 --lr_decay_iters=8 --out_dir=out/x --init_from=resume")
    written["knobs"]["val_interval"] = 4
    torch.save(written, "out/x/ckpt.pt")
    flags = f"{TINY} --max_iters=5 --lr_decay_iters=8 --out_dir=out/x --init_from=resume"
    refused(flags, "its run has val_interval = 4, a knob that is gone")

"""One, two and four processes: the same batches, losses and values, to rounding, whatever ends one of them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_run_folder import Script, same_run
from test_train import ROOT, TINY, call, corpus, home  # noqa: F401 (fixtures)

import train
from support.values import load_values, read_log

FLAGS = f"{TINY} --score=True --batch_size=1 --gradient_accumulation_steps=4 --eval_iters=10 --dropout=0.1"
# three validation windows: with four processes, one has none. SGD: AdamW would blow up the rounding of zero gradients
FLAGS += " --val_batch_size=3 --optimizer=sgd --weight_decay=0"


PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def python(arguments, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    # a shell switches Ctrl-C off for what it runs in the background, and a process inherits that
    switched_off = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([sys.executable, *arguments.split()], **PIPES, env=environment)
    finally:
        signal.signal(signal.SIGINT, switched_off)


def torchrun(launch, flags, script="train.py"):
    """The command itself. Each of its processes takes seconds to import what it needs."""
    return python(f"-m torch.distributed.run {launch} {ROOT}/{script} {flags}")


def afresh(flags, **environment):
    """A rank whose interpreter ends as a user's does."""
    return python(f"{ROOT}/train.py {flags}", **environment)


def forked(flags, script="train", **environment):
    """A rank that starts at once."""
    return Script(flags, "import torch; torch.set_num_threads(1)", script, **environment)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_ranks(n, flags, start=forked):
    """The processes that torchrun would start, without the agent that ends all when one has died."""
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(n))
    return [start(flags, **address, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(n)]


def run_ranks(n, flags, start=forked):
    """Start them and wait for their ends."""
    ranks = start_ranks(n, flags, start)
    said = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * n, said


def wait_for(path):
    for _ in range(3000):
        if os.path.exists(path):
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize("n", [2, 4])
def test_the_number_of_processes_changes_nothing(home, n):  # noqa: F811
    call(train.main, f"{FLAGS} --out_dir=out/one")
    run_ranks(n, f"{FLAGS} --out_dir=out/many")
    same_run("out/many", "out/one", exact=False)

    # a checkpoint of many processes goes on as one
    flags = f"{FLAGS} --lr_decay_iters=8 --max_iters=12"
    call(train.main, f"{flags} --out_dir=out/many --init_from=resume")
    call(train.main, f"{flags} --out_dir=out/longer")
    for a, b in zip(load_values("out/many"), load_values("out/longer"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    "directions",
    [
        "--val_batch_size=3 --value_direction=adam",
        "--val_batch_size=6 --value_direction=sgd,adam --value_order=2 --val_sets=even,all --val_groups=2",
        "--val_batch_size=3 --value_direction=adam,sgd-wte --val_average=4",
    ],
)
def test_adamw_and_its_direction_on_two_processes(home, directions):  # noqa: F811
    """Without biases: those of the keys have no gradient but rounding, which AdamW makes steps of."""
    flags = f"{TINY} --score=True --batch_size=1 --gradient_accumulation_steps=4 --bias=False --dropout=0.1"
    flags += f" {directions}"
    call(train.main, f"{flags} --out_dir=out/one")
    run_ranks(2, f"{flags} --out_dir=out/two")
    same_run("out/two", "out/one", exact=False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.xdist_group("torch.compile")  # after the test that makes its kernels
@pytest.mark.parametrize(
    "flags",
    [
        # the shapes of test_compile.py's runs, whose kernels torch.compile then has in its cache
        f"{TINY} --score=True --bias=False --value_direction=sgd,adam --val_batch_size=8 --val_groups=2 "
        "--gradient_accumulation_steps=2",
        pytest.param(FLAGS.replace("--n_embd=16 ", "--n_embd=768 "), marks=pytest.mark.slow),  # two DDP buckets
    ],
    ids=["16", "768"],
)
def test_compiled_on_two_processes(home, flags):  # noqa: F811
    flags = flags.replace("--dropout=0.1", "")
    call(train.main, f"{flags} --out_dir=out/one")
    run_ranks(2, f"{flags} --compile=True --process_timeout=300 --out_dir=out/two")
    same_run("out/two", "out/one", exact=False)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_model_of_two_ddp_buckets_scored_then_filtered(home, n):  # noqa: F811
    flags = FLAGS.replace("--n_embd=16 ", "--n_embd=768 ").replace("--dropout=0.1", "--max_iters=4")
    flags += " --checkpoint_interval=4"
    call(train.main, f"{flags} --out_dir=out/base")
    model = torch.load("out/base/ckpt.pt", weights_only=True)["model"]
    assert sum(p.numel() for p in model.values()) * 4 > 2**20 + 25 * 2**20  # DDP's first bucket, and its others
    sample_id, value, visits = load_values("out/base")
    np.savez("out/base/values.npz", sample_id=sample_id, value=np.where(sample_id % 4, value, -1.0), visits=visits)
    flags += " --filter_from=out/base --filter_negative=True"
    call(train.main, f"{flags} --out_dir=out/1")
    assert not (read_log("out/1")["sample_id"] % 4 == 0).any()
    run_ranks(n, f"{flags} --out_dir=out/{n}")
    same_run(f"out/{n}", "out/1", exact=False)


def test_killed_on_two_processes_and_resumed_on_four_and_on_one(home):  # noqa: F811
    flags = f"{FLAGS} --eval_iters=3 --lr_decay_iters=60"
    ranks = start_ranks(2, f"{flags} --max_iters=100000 --out_dir=out/x")
    wait_for("out/x/dot_prod/dot_prod_log_iter_6.pt")
    for rank in ranks:
        rank.kill()
        rank.wait()
    begun = torch.load("out/x/ckpt.pt", weights_only=True)["iter_num"]
    logs = [name for name in os.listdir("out/x/dot_prod") if name.endswith(".pt")]  # some may be behind the checkpoint
    more = f"{flags} --max_iters=100000 --out_dir=out/x --init_from=resume"
    run = torchrun("--standalone --nproc_per_node=4", more)
    last = max(int(name.removeprefix("dot_prod_log_iter_").removesuffix(".pt")) for name in logs)
    wait_for(f"out/x/dot_prod/dot_prod_log_iter_{last + 3}.pt")
    run.terminate()  # torchrun passes SIGTERM on
    out, err = run.communicate()
    assert "SIGTERM: stopped after" in out and not os.path.exists("out/x/values.npz"), err
    stopped = torch.load("out/x/ckpt.pt", weights_only=True)["iter_num"]
    assert stopped > begun
    flags += f" --max_iters={stopped + 3}"
    call(train.main, f"{flags} --out_dir=out/x --init_from=resume")
    call(train.main, f"{flags} --out_dir=out/whole")
    same_run("out/x", "out/whole", exact=False)


@pytest.mark.parametrize(
    "number, status, start", [(signal.SIGTERM, 0, forked), (signal.SIGINT, -signal.SIGINT, afresh)]
)
def test_a_signal_to_one_rank_ends_all_after_the_same_step(home, number, status, start):  # noqa: F811
    ranks = start_ranks(2, f"{FLAGS} --max_iters=100000 --out_dir=out/x", start)
    wait_for("out/x/dot_prod/dot_prod_log_iter_6.pt")
    ranks[1].send_signal(number)
    outs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status, status], outs
    assert f"{number.name}: stopped after" in outs[0][0]
    assert "Traceback" not in outs[0][1] + outs[1][1]


@pytest.mark.parametrize(
    "lost, how, start", [(1, signal.SIGKILL, forked), (0, signal.SIGKILL, afresh), (1, signal.SIGSTOP, afresh)]
)
def test_the_others_end_with_a_message_when_one_dies_or_hangs(home, lost, how, start):  # noqa: F811
    ranks = start_ranks(2, f"{FLAGS} --max_iters=100000 --out_dir=out/x --process_timeout=10", start)
    wait_for("out/x/dot_prod/dot_prod_log_iter_6.pt")
    ranks[lost].send_signal(how)
    survivor = ranks[1 - lost]
    try:
        survivor.wait(timeout=60)
    finally:
        ranks[lost].kill()
    _, err = survivor.communicate()
    ranks[lost].communicate()
    assert survivor.returncode == 1, err
    assert f"process {1 - lost} of 2: another one died or hung" in err and "--init_from=resume" in err
    assert "Traceback" not in err
    assert torch.load("out/x/ckpt.pt", weights_only=True)["iter_num"] >= 3


def test_two_agents_meet_at_a_rendezvous(home):  # noqa: F811
    launch = f"--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()} --rdzv_id=x"
    agents = [torchrun(f"{launch} --local_addr=127.0.0.1", f"{FLAGS} --out_dir=out/two") for _ in range(2)]
    for agent in agents:
        _, err = agent.communicate()
        assert agent.returncode == 0, err
    call(train.main, f"{FLAGS} --out_dir=out/one")
    same_run("out/two", "out/one", exact=False)


def test_a_batch_that_does_not_divide_is_refused(home, monkeypatch):  # noqa: F811
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="gradient_accumulation_steps=4 does not divide by 3 processes; start as many"):
        call(train.main, FLAGS)


def test_a_rank_without_the_rest_of_torchrun_s_environment_is_refused(home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="RANK=0 is in the environment, but no LOCAL_RANK, WORLD_SIZE.*unset RANK"):
        call(train.main, FLAGS)
    assert not os.path.exists("out")

"""One, two and four processes: the same batches, losses and values, to rounding."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_cli import ROOT, TINY, call, corpus, home, metrics  # noqa: F401 (fixtures)

import train
from data_value import load_values, read_log

FLAGS = f"{TINY} --score=True --batch_size=1 --gradient_accumulation_steps=4 --eval_iters=10 --dropout=0.1"
# three validation windows: with four processes, one has none. SGD: AdamW would blow up the rounding of zero gradients
FLAGS += " --val_batch_size=3 --optimizer=sgd --weight_decay=0"


def torchrun(n, flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, f"{ROOT}/train.py", *flags.split()], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("n", [2, 4])
def test_the_number_of_processes_changes_nothing(home, n):  # noqa: F811
    call(train.main, f"{FLAGS} --out_dir=out/one")
    torchrun(n, f"{FLAGS} --out_dir=out/many")
    one, many = read_log("out/one"), read_log("out/many")
    assert np.array_equal(one["sample_id"], many["sample_id"])
    np.testing.assert_allclose(many["value"], one["value"], rtol=1e-3, atol=1e-8)
    for a, b in zip(metrics("out/one"), metrics("out/many"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    states = [torch.load(f"out/{run}/ckpt.pt", weights_only=True)["model"] for run in ("one", "many")]
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-6)

    # a checkpoint of many processes goes on as one
    flags = f"{FLAGS} --lr_decay_iters=8 --max_iters=12"
    call(train.main, f"{flags} --out_dir=out/many --init_from=resume")
    call(train.main, f"{flags} --out_dir=out/longer")
    for a, b in zip(load_values("out/many"), load_values("out/longer"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8)


def test_a_batch_that_does_not_divide_is_refused(home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="gradient_accumulation_steps=4 does not divide by 3 processes; use 3 or 6"):
        call(train.main, FLAGS)

"""The benchmark runs, and what it prints can be read. Nothing here is timed."""

import json
import math
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --val_batch_size=2 --rounds=2"


def bench(*flags):
    return subprocess.run([sys.executable, f"{ROOT}/bench.py", *flags], capture_output=True, text=True)


@pytest.mark.parametrize("flags", [["--value_direction=sgd"], ["--dtype=bfloat16", "--n_directions=3"]])
def test_json(flags):
    run = bench(*TINY.split(), *flags, "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    for key in ("stock_ms", "plain_ms", "val_ms", "scored_ms", "order2_ms", "brute_ms", "plain_over_stock"):
        assert result[key] > 0
    for key in ("stock_peak_mb", "plain_peak_mb", "scored_peak_mb"):
        assert 1 < result[key] < 1000
    assert math.isfinite(result["overhead"]) and result["total"] > result["overhead"]
    assert result["dots_rel_err"] < (1e-5 if "sgd" in flags[0] else 0.05)


def test_a_line_for_each_result():
    run = bench(*TINY.split())
    assert run.returncode == 0, run.stderr
    found = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    for arm in ("stock", "plain", "val", "scored", "order2", "brute"):
        assert float(found[f"{arm}_ms"]) > 0
    assert float(found["dots_rel_err"]) < 1e-5 and math.isfinite(float(found["overhead"]))


@pytest.mark.parametrize("flag", ["--dtype=float16", "--n_head=3", "--rounds=0", "--device=cuda", "--size=3"])
def test_mistakes_are_one_line(flag):
    if flag == "--device=cuda":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    run = bench(*TINY.split(), flag)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and flag.split("=")[0].strip("-") in run.stderr

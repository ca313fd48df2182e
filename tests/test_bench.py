"""The benchmark runs, and what it prints can be read. Nothing here is timed."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
from support.configurator import UserError

TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --val_batch_size=2 --rounds=2"


def printed(capsys, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bench.py", *TINY.split(), *flags])
    bench.main()
    return capsys.readouterr().out


def test_json(capsys, monkeypatch):
    """With the processes that measure memory."""
    result = json.loads(printed(capsys, monkeypatch, "--dtype=bfloat16", "--n_directions=3", "--json"))
    for key in ("stock_ms", "plain_ms", "val_ms", "scored_ms", "order2_ms", "brute_ms", "plain_over_stock"):
        assert result[key] > 0
    for key in ("stock_peak_mb", "plain_peak_mb", "scored_peak_mb"):
        assert 1 < result[key] < 1000
    assert math.isfinite(result["overhead"]) and result["total"] > result["overhead"]
    assert result["dots_rel_err"] < 0.05


def test_a_line_for_each_result(capsys, monkeypatch):
    """Without those processes, which take seconds to start."""
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=lambda *_, **__: SimpleNamespace(stdout="123")))
    lines = printed(capsys, monkeypatch, "--value_direction=sgd").splitlines()
    found = dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)
    for arm in ("stock", "plain", "val", "scored", "order2", "brute"):
        assert float(found[f"{arm}_ms"]) > 0
    assert float(found["dots_rel_err"]) < 1e-5 and math.isfinite(float(found["overhead"]))
    assert float(found["plain_peak_mb"]) == 123


@pytest.mark.parametrize("flag", ["--dtype=float16", "--n_head=3", "--rounds=0", "--device=cuda", "--size=3"])
def test_mistakes_are_one_line(flag, monkeypatch):
    if flag == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["bench.py", *TINY.split(), flag])
    with pytest.raises(UserError, match=flag.split("=")[0].strip("-")) as error:
        bench.main()
    assert "\n" not in str(error.value)

"""
make gpu: rehearsed whole, once; what a failing, a hanging and a talking stage leave; what travels. And on a GPU, with
twins on the CPU: a scored step, and a run that is killed and resumed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_run_folder import SCORED, Script, same_run, wait_for_training
from test_train import ROOT, TINY, call, corpus, home  # noqa: F401 (fixtures)

import bench
import gpu
import train
from support import carry, kernels, profiled, stages, unexecuted
from support.configurator import UserError

sys.path.insert(0, f"{ROOT}/study")

import gpt2  # noqa: E402

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)

# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


def scored_step(device, dtype):
    """The dots, the loss and the weights' gradients of a small scored step, in float64 on the CPU."""
    shape = dict(n_layer=2, n_head=2, n_embd=96, block_size=72, batch_size=6, vocab_size=515, bias=True)
    knobs = bench.Knobs(device=device, dtype=dtype, value_direction="sgd", **shape)
    run = bench.Bench(knobs, stock=False)  # its weights and windows are drawn on the CPU
    dots, gradients = run.scored_backward(), [p.grad for p in run.model.parameters()]
    with torch.no_grad(), run.autocast:
        loss = run.net(run.x, run.y)[1]
    return [torch.cat([part.flatten() for part in parts]).double().cpu() for parts in ([dots], [loss], gradients)]


@pytest.mark.parametrize(
    "device, dtype, tolerance",
    [
        pytest.param("cpu", "bfloat16", 0.02, id="cpu-bfloat16"),  # what rounding the operands to 8 bits does
        pytest.param("cuda", "float32", 1e-4, id="cuda-float32", marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", 0.02, id="cuda-bfloat16", marks=pytest.mark.gpu),
    ],
)
def test_a_scored_step_is_that_of_the_cpu_in_float32(device, dtype, tolerance):
    assert kernels.runs_on(torch.ones(1, device=device)) == (device == "cuda")
    expected = scored_step("cpu", "float32")
    for ours, theirs in zip(scored_step(device, dtype), expected, strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_run_that_is_killed_and_resumed_ends_as_if_it_had_not_been(home, device):  # noqa: F811
    flags = f"{SCORED} --checkpoint_interval=2 --max_iters=30 --learning_rate=1e-3 --device={device}"
    run = Script(f"{flags} --out_dir=out/killed")
    wait_for_training(run)
    while not os.path.exists("out/killed/dot_prod"):  # the first checkpoint behind a step
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    run.communicate()
    for folder, more in (("killed", "--init_from=resume"), ("whole", "")):
        call(train.main, f"{flags} --out_dir=out/{folder} {more}")
    same_run("out/killed", "out/whole", exact=device == "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The script


def gpu_script(*flags):
    return subprocess.run([sys.executable, f"{ROOT}/gpu.py", "--device=cpu", *flags], capture_output=True, text=True)


def results_of(folder):
    with open(f"{folder}/gpu.json", encoding="utf-8") as file:
        results = {stage["stage"]: stage for stage in json.load(file)}
    with open(f"{folder}/gpu.md", encoding="utf-8") as file:
        return results, file.read()


def test_the_rehearsal_runs_every_stage_and_executes_almost_every_line(tmp_path):
    run = gpu_script(f"--out={tmp_path}/out", f"--data={tmp_path}/none", "--minutes=20")
    assert run.returncode == 0, run.stdout + run.stderr
    results, text = results_of(f"{tmp_path}/out")
    assert [stage["status"] for stage in results.values()] == ["passed"] * 6
    keys = {number: set().union(*stage["figures"]) for number, stage in results.items()}
    assert {"gpu", "torch", "triton", "cores"} <= keys[0] and {"copy_gb_per_s", "product_tflops"} <= keys[1]
    assert {"tests", "SKIPPED"} <= keys[2] and {"head", "with_dots_ms", "tflops"} <= keys[3]
    assert {"tokenizer", "scored_s", "test_loss", "nats"} <= keys[5]
    arms = {row["arm"] for row in results[4]["figures"] if "first_s" in row}
    of_one = {"plain", "scored", "stock", "val", "micro", "scored_micro", "scored4", "val4", "order2"}
    assert arms == of_one | {"plain480", "scored480"}
    assert {row["arm"] for row in results[4]["figures"] if "beside" in row} == {"scored_micro", "scored480"}
    beside = {(row["arm"], row.get("part")): row for row in results[4]["figures"] if "budget_ms" in row}
    assert {arm for arm, _ in beside} == {"plain", "scored", "stock", "val", "order2"}
    for part in (None, "attention", "dW", "forward, dX", "head products", "layer norms", "AdamW"):
        row = beside["scored", part]
        assert row["ms"] > 0 and row["budget_ms"] > 0 and row["budget_for"] == "H100, on paper"
    *_, last = (row for row in results[4]["figures"] if "overhead" in row and "val_batch_size" in row)
    assert set(last) == {"val_batch_size", "overhead", "total", "plain_over_stock", "val_over_plain"}
    for stage in results.values():
        assert f"## {stage['stage']}. {stage['what']}" in text and stage["figures"]
    assert re.search(r"\| torch \|", text) and torch.__version__.partition("+")[0] in text

    files = os.listdir(f"{tmp_path}/out")
    assert set(files) == {"gpu.json", "gpu.md", "log.txt", "gpt2.json", "gpt2.png", "gpt2_values.npz"}
    assert max(os.path.getsize(f"{tmp_path}/out/{name}") for name in files) < 2**24
    with open(f"{tmp_path}/out/gpt2.json", encoding="utf-8") as file:
        study = json.load(file)
    assert [line["arm"] for line in study["arms"]] == ["control", "filtered", "random", "target"]
    assert {"filtered - control", "random - control", "target - control on modules"} <= set(study["final"])
    said = int(re.search(r"lines that were not executed, (\d+):", run.stdout)[1])
    assert 0 < said <= 23, run.stdout[-3000:]


def test_a_stage_that_fails_leaves_the_others_figures_and_its_last_lines(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.parquet").write_bytes(b"PAR1 no parquet")
    run = gpu_script(f"--out={tmp_path}/out", f"--data={tmp_path}/data", "--stages=5,1")
    assert run.returncode == 1, run.stdout + run.stderr
    results, text = results_of(f"{tmp_path}/out")
    assert results[5]["status"] == "failed with status 1" and results[1]["status"] == "passed"
    assert any("product_tflops" in row for row in results[1]["figures"])
    assert "corpus.parquet: could not be read" in text and "corpus.parquet: could not be read" in run.stdout


def test_a_stage_that_hangs_is_killed_with_its_children_and_what_it_said_stays(tmp_path, capfdbinary):
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', '{child}']); print(c.pid, flush=True)"
    started = time.monotonic()
    assert stages.supervise([sys.executable, "-c", f"{code}; c.wait()"], 2.0, f"{tmp_path}/log") is None
    assert time.monotonic() - started < 30
    pid = int((tmp_path / "log").read_text())
    assert capfdbinary.readouterr().out == b"%d\n" % pid
    for _ in range(100):  # the system takes its time to clean up
        if not os.path.exists(f"/proc/{pid}") or "\nState:\tZ" in open(f"/proc/{pid}/status").read():  # noqa: SIM115
            return
        time.sleep(0.1)
    raise AssertionError("the child lives")


@given(st.sets(st.sampled_from(list(gpu.STAGES)), min_size=1), st.floats(1, 10_000))
def test_the_limits_of_the_stages_are_the_time_that_is_left(stages, left):
    waiting, limits = sorted(stages), []
    while waiting:
        limits.append(gpu.limit_of(waiting[0], waiting, left - sum(limits)))
        waiting = waiting[1:]
    assert sum(limits) == pytest.approx(left) and min(limits) > 0


def test_of_six_minutes_the_last_stage_has_90_seconds():
    assert gpu.limit_of(5, [5], 360 - sum(gpu.limit_of(n, list(gpu.STAGES), 360) for n in range(1, 5))) >= 90


@pytest.mark.parametrize("flag", ["--stages=6", "--stages=", "--minutes=0", "--stage=x", "--minute=3"])
def test_mistakes(flag):
    run = gpu_script(flag)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and flag.split("=")[0].strip("-")[:6] in run.stderr


def test_lines_that_no_process_has_executed_are_found(tmp_path):
    (tmp_path / "script.py").write_text("def f(x):\n    if x:\n        return 1\n    return 2\n\n\nf(1)\nlast = 3\n")
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from support import unexecuted as u; e = u.watch(['script.py'])"
    code += "; import os, runpy; runpy.run_path(os.path.abspath('script.py')); u.print_unexecuted(['script.py'], e)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "lines that were not executed, 1:\nscript.py:4: return 2\n", run.stderr
    assert unexecuted.unexecuted(f"{tmp_path}/script.py", set()) == [2, 3, 4]


def test_a_kernel_is_for_a_part_of_the_budget():
    """Kernels' names as torch, cuBLAS and torch.compile have them."""
    parts = {
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>": "attention",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "products",
        "add_and_dot_kernel": "dots",
        "cross_entropy_kernel": "head softmax",
        "triton_red_fused__log_softmax_nll_loss_forward_3": "head softmax",
        "triton_per_fused_add_native_layer_norm_backward_sum_5": "layer norms",
        "triton_red_fused_add_arange_embedding_native_layer_norm_0": "embeddings",
        "void multi_tensor_apply_kernel<TensorListMetadata, FusedAdamMathFunctor<float, 4>>": "AdamW",
        "triton_poi_fused_add_addcmul_div_mul_sqrt_2": "direction",
        "triton_poi_fused_gelu_backward_7": "casts, pointwise",
        "Memcpy DtoD (Device -> Device)": "midpoint, copies",
        "Memset (Device)": "else",
    }
    assert {name: profiled.part_of(name) for name in parts} == parts


@pytest.mark.parametrize(
    "name, shapes, part",
    [
        ("aten::mm", [[160, 32], [32, 96], [160, 96]], "forward, dX"),
        ("aten::addmm", [[96], [160, 32], [32, 96], [], []], "forward, dX"),
        ("aten::addmm_", [[96, 32], [96, 40], [40, 32], [], []], "dW"),
        ("aten::bmm", [[4, 96, 40], [4, 40, 32]], "dW"),
        ("aten::mm", [[160, 32], [32, 257]], "head products"),
        ("aten::mm", [[160, 257], [257, 32]], "head products"),
        ("aten::addmm", [[257, 32], [257, 160], [160, 32], [], []], "dW"),
        ("aten::add", [[160, 32], [160, 32]], None),
    ],
)
def test_a_product_is_for_a_part_of_the_budget(name, shapes, part):
    assert profiled.part_of_product(name, shapes, SimpleNamespace(**gpu.TINY)) == part


def test_what_is_measured_stands_beside_what_is_on_paper():
    """A scored arm has its validation pass, which the budget has apart."""
    scored, val = {"dW": dict(ms=1.0), "head dW": dict(ms=0.5), "AdamW": dict(ms=0.25)}, {"dW": dict(ms=0.125)}
    budget = dict(arms=dict(scored=scored, val=val), knobs=dict(gpu="H100"))
    kernel = dict(arm="scored", kernel="k", part="dW", ms=2.0, calls=3)
    figures = [dict(arm="scored", ms=9.0), kernel, dict(val_batch_size=1), dict(arm="scored4", ms=8.0)]
    figures += [dict(arm="scored", part=part, ms=ms) for part, ms in (("dW", 3.0), ("attention", 0.0), ("else", 0.5))]
    rows = profiled.beside(figures, budget)
    assert [row.get("budget_ms") for row in rows] == [1.875, None, None, None, 1.625, 0]
    assert [row.get("part") for row in rows] == [None, "dW", None, None, "dW", "else"]
    assert profiled.beside(figures, dict(failure="no budget")) == [*figures, dict(failure="no budget")]


def test_every_part_of_the_budget_has_its_place_beside_what_is_measured():
    from support import budget

    on_paper = [name for names, _ in profiled.PARTS.values() for name in names]
    assert sorted([*on_paper, "loader"]) == sorted(budget.PARTS)


GPU_TESTS = """
import os, time, pytest, torch
pytestmark, torch.cuda.is_available = pytest.mark.gpu, lambda: True

def test_passes(): pass
def test_fails(): assert os.name == "a GPU"
def test_dies(): {dies}
def test_late(): time.time = lambda: float("inf")
@pytest.mark.parametrize("tile", ["128x256, 8 warps"])
def test_cut(tile): pass
"""


@pytest.mark.parametrize("dies", ["pass", "os.abort()"])
def test_every_test_that_failed_was_cut_or_killed_is_named(tmp_path, monkeypatch, dies):
    (tmp_path / "tests").mkdir()
    shutil.copy(f"{ROOT}/tests/conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_a.py").write_text(GPU_TESTS.format(dies=dies))
    monkeypatch.setattr(gpu, "ROOT", str(tmp_path))
    rows = []
    with pytest.raises(AssertionError, match="test_a.py"):
        gpu.gpu_tests(SimpleNamespace(seconds=1000.0, cuda=False), lambda **figures: rows.append(figures))
    *named, counts = rows
    if dies == "pass":
        assert counts == dict(tests="test_a.py", limit_s=1000.0, PASSED=3, FAILED=1, CUT=1)
        failed, cut = (row["test"] for row in named)
        assert failed.startswith("FAILED tests/test_a.py::test_fails - ") and "a GPU" in failed
        assert cut.startswith("tests/test_a.py::test_cut[128x256, 8 warps] SKIPPED (out of time)")
    else:
        assert counts == dict(tests="test_a.py", limit_s=1000.0, PASSED=1, FAILED=1)
        failed, killed = (row["test"] for row in named)
        assert failed.startswith("tests/test_a.py::test_fails FAILED")
        assert killed == "KILLED tests/test_a.py::test_dies Fatal Python error: Aborted"


# ---------------------------------------------------------------------------------------------------------------------
# What travels, and the study


def test_what_is_packed_is_what_prepare_reads(home, monkeypatch, capsys):  # noqa: F811
    import prepare_owt

    cache = f"{ROOT}/../shared/tiktoken_cache"
    if not os.path.isdir(cache):
        pytest.skip("GPT-2's BPE files are not beside the repository (../shared/tiktoken_cache)")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
    texts = [(f"text {i} \ud800" if i == 3 else f"text {i}", ("a", None)[i % 2]) for i in range(50)]
    with open("texts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(text=text, of=domain)) + "\n" for text, domain in texts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--pack=texts.jsonl", "--domain_field=of", "--data=there"])
    with pytest.raises(SystemExit) as ended:
        gpu.main(set())
    assert not ended.value.code and "there: " in capsys.readouterr().out
    assert len(os.listdir("there/tiktoken")) == 2
    knobs = prepare_owt.Knobs("there/corpus.parquet", domain_field="domain")
    expected = [(text.replace("\ud800", "?"), domain or "none") for text, domain in texts]
    assert list(prepare_owt.documents_of(knobs)) == expected
    monkeypatch.setattr(carry, "MOST", 1000)
    with pytest.raises(SystemExit, match="there: .* are more than .* take a smaller SOURCE"):
        gpu.main(set())


def test_differences_are_of_the_same_order():
    losses = dict(control=[1.0, 2.0], filtered=[0.5], random=[1.5, 2.25])
    lines = [
        dict(arm=arm, order=i, afresh=False, test_loss=[9.0, x]) for arm in losses for i, x in enumerate(losses[arm])
    ]
    assert gpt2.differences(lines, "filtered") == [-0.5] and gpt2.differences(lines, "random") == [0.5, 0.25]
    assert gpt2.differences(lines, "filtered", afresh=True) == []
    assert gpt2.differences(lines, "filtered", other="random") == [-1.0]
    assert gpt2.differences(lines, "random", other="filtered") == [1.0]  # the second order has none of it


def test_a_baseline_lasts_as_long_as_it_may(home, monkeypatch):  # noqa: F811
    """A third of the time, in two legs: the first says what a step takes; here a second, so that 12 more fit."""
    shape = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, vocab_size=257, val_batch_size=2)
    knobs = gpt2.Knobs(**shape, data_dir="data", dataset="tiny", device="cpu", dtype="float32", compile=False)
    read_run, run_here = gpt2.read_run, gpt2.run_here

    def a_second_a_step(folder):
        run = read_run(folder)
        run.lines[-1] |= dict(step_ms=1000.0, val_ms=300.0)
        return run

    monkeypatch.setattr(gpt2, "read_run", a_second_a_step)
    monkeypatch.setattr(gpt2, "run_here", lambda *of, **flags: run_here(*of, **flags) and 0.5)
    for folder, iters, third, expected in (("a", 10**6, 12.6, 42), ("b", 35, 100.0, 35), ("c", 9, 100.0, 9)):
        found = gpt2.baseline_run(knobs, folder, iters, 3 * third + 0.5)
        assert found["iters"] == expected and 0 <= found["negative"] <= 1
        assert (found["scored_s"], found["plain_s"]) == (1.0, 0.7) and found["baseline_s"] == (0.5 if iters == 9 else 1)
    # one that was interrupted goes on from its checkpoint, measures this process's own steps, and has all its values
    for third, expected in ((12.6, 84), (0.0, 114)):
        assert gpt2.baseline_run(knobs, "a", 10**6, 3 * third)["iters"] == expected
    os.remove("b/values.npz")
    assert gpt2.baseline_run(knobs, "b", 35, 100.0)["iters"] == 35

    # what it took to compile is known apart from the steps, of a resumed one too: here 13 s in every first leg
    starts = iter([13.0, 0.0, 13.0, 0.0])

    def a_second_a_step_and_a_start(knobs, folder, **flags):
        steps = flags["max_iters"] - max(gpt2.log_files(folder), default=0)
        run_here(knobs, folder, **flags)
        return steps + next(starts)

    monkeypatch.setattr(gpt2, "run_here", a_second_a_step_and_a_start)
    for expected in (42, 84):
        found = gpt2.baseline_run(knobs, "d", 10**6, 13.0 + 3 * (30.0 + 12.6))
        assert found["iters"] == expected and found["start_s"] == pytest.approx(13.0)


def test_an_order_without_the_time_for_it_is_left_for_later(home, monkeypatch, capsys):  # noqa: F811
    plan = dict(iters=100, baseline_s=60.0, start_s=60.0, negative=0.3, lr=1e-3, scored_s=5.9, plain_s=5.9)
    monkeypatch.setattr(gpt2, "baseline_run", lambda *_: plan)
    line = dict(seconds=59.0, iters=[1], test_loss=[1.0])
    monkeypatch.setattr(gpt2, "arm_run", lambda knobs, plan, *of: line | dict(arm=of[0], order=of[1], afresh=of[2]))
    for minutes, most, orders in ((3.9, 1, 0), (4.0, 1, 1), (3.9, 2, 1), (4.0, 2, 2)):  # each start compiles, a minute
        flags = ["gpt2.py", "--dataset=tiny", f"--minutes={minutes}", "--block_size=16", "--batch_size=4"]
        flags += [f"--orders={most}"]
        monkeypatch.setattr(sys, "argv", flags)
        gpt2.main()
        with open("out/gpt2/metrics.json", encoding="utf-8") as file:
            assert len(json.load(file)["arms"]) == 3 * orders
        assert f"{3 * orders} arms have ended; an order takes 3 more, of 59 s each" in capsys.readouterr().out


def test_the_study_goes_on_where_it_was_stopped(home, monkeypatch, capsys):  # noqa: F811
    shape = [flag for flag in TINY.split() if flag.split("=")[0][2:] in gpt2.Knobs.__dataclass_fields__]
    flags = ["gpt2.py", *shape, "--vocab_size=257", "--max_iters=10", "--val_batch_size=2", "--orders=1"]
    flags += ["--target=odd"]
    monkeypatch.setattr(sys, "argv", flags)
    arm_run = gpt2.arm_run

    def interrupted(knobs, plan, arm, order, afresh):
        if arm == "random":
            raise KeyboardInterrupt
        return arm_run(knobs, plan, arm, order, afresh)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gpt2, "arm_run", interrupted)
        gpt2.main()
    with open("out/gpt2/metrics.json", encoding="utf-8") as file:
        before = json.load(file)
    gpt2.main()
    with open("out/gpt2/metrics.json", encoding="utf-8") as file:
        after = json.load(file)
    assert after["arms"][:2] == before["arms"] and [line["arm"] for line in after["arms"]][2:] == ["random", "target"]
    assert after["plan"] == before["plan"] and 0 <= after["plan"]["negative_for_target"] < 1
    assert set(after["final"]) == {
        f"{pair}{where}"
        for pair in (
            "filtered - control",
            "filtered - random",
            "random - control",
            "target - control",
            "target - random",
        )
        for where in ("", " on odd")
    }
    assert np.load("out/gpt2/baseline/values.npz")["visits"].sum() == 40
    assert "random - control" in capsys.readouterr().out


def test_the_study_compares_its_knobs_before_it_trains(home, monkeypatch):  # noqa: F811
    """A baseline that was interrupted must not go on with others; a study of older code has not noted its own."""
    flags = ["gpt2.py", "--dataset=tiny", "--max_iters=10"]
    monkeypatch.setattr(sys, "argv", flags)
    trained = []
    monkeypatch.setattr(gpt2, "baseline_run", lambda *of: trained.append(of) or sys.exit())
    with pytest.raises(SystemExit):
        gpt2.main()
    assert len(trained) == 1
    monkeypatch.setattr(sys, "argv", [*flags, "--max_iters=20"])
    with pytest.raises(UserError, match="max_iters=10"):
        gpt2.main()
    with open("out/gpt2/metrics.json", "w", encoding="utf-8") as file:
        json.dump(dict(plan={}, arms=[]), file)
    with pytest.raises(UserError, match="older code"):
        gpt2.main()


def test_the_figures_of_a_study_without_a_baseline_are_none(tmp_path):
    arm = dict(arm="control", order=1, afresh=False, seconds=2.0, iters=[1, 5], test_loss=[3.0, 2.0])
    for plan, arms, expected in ({}, [], 0), (dict(iters=9), [], 1), (dict(iters=9), [arm], 2):
        with open(tmp_path / "metrics.json", "w", encoding="utf-8") as file:
            json.dump(dict(plan=plan, arms=arms, final={}), file)
        found = gpu.study_figures(tmp_path / "metrics.json")
        assert len(found) == expected and {} not in found

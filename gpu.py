"""
One command on a machine with an NVIDIA GPU, and minutes later every figure of this project that needs one.

    make gpu                                       # into out/gpu/: read gpu.md there
    make gpu OUT=out/gpu MINUTES=3 STAGES=2,3,4    # some of the stages
    python gpu.py --out=out/gpu --minutes=6        # where there is no make
    make gpu DEVICE=cpu                            # the rehearsal without a GPU: every stage, tiny
    make gpu-data SOURCE=<file>                    # text and GPT-2's BPE for stage 5, into gpu_data/, for a machine
                                                   # that has no network; SOURCE as prepare_owt.py's --source

Stages: 1 what the machine is and can; 2 the tests that need a GPU; 3 the head and the weight gradients; 4 the steps of
bench.py at 124M; 5 study/gpt2.py in the time that is left. Each is a process with a time limit, its share of the
minutes that are left. None stops the others: what one has measured when it fails or is killed stays, and gpu.json,
gpu.md and log.txt are written anew after each. The status is 1 if one failed.
"""

import atexit
import glob
import json
import math
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from support.carry import pack
from support.configurator import UserError, configure
from support.profiled import PARTS, beside, part_of, profiled
from support.stages import about_the_machine, end_of, shown, supervise, write_results
from support.unexecuted import print_unexecuted, watch

ROOT = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = [f"{ROOT}/{path}" for path in ("gpu.py", "support/stages.py", "support/profiled.py", "study/gpt2.py")]


@dataclass
class Knobs:
    out: str = "out/gpu"  # the folder for gpu.md, gpu.json, log.txt and what stage 5 leaves
    minutes: float = 6.0  # for everything
    stages: str = "1,2,3,4,5"
    device: str = "cuda"  # 'cpu': the rehearsal
    data: str = "gpu_data"  # the folder that make gpu-data writes
    pack: str = ""  # write the text of this source to `data`, and stop
    domain_field: str = "domain"  # of that source
    stage: int = 0  # used by the script itself: run this stage in this process,
    work: str = ""  # with its files here,
    seconds: float = 0.0  # within this time

    def __post_init__(self):
        if self.device not in ("cuda", "cpu"):
            raise UserError(f"--device={self.device}: expected cuda, or cpu for the rehearsal")
        self.order = [int(stage) for stage in re.findall(r"\d+", self.stages)]
        if self.minutes <= 0 or not self.order or not set(self.order) <= set(STAGES):
            raise UserError(f"--minutes={self.minutes} --stages={self.stages}: expected some time, and some of 1 to 5")
        self.cuda = self.device != "cpu"


PROPERTIES = ("name", "major", "minor", "multi_processor_count", "L2_cache_size", "total_memory")
# 124M at the paper's batch; or what takes no time
FULL = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, vocab_size=50304)
TINY = dict(n_layer=1, n_head=2, n_embd=32, block_size=40, batch_size=4, vocab_size=257)

# ---------------------------------------------------------------------------------------------------------------------
# The stages: functions of the knobs and of report(**figures), which keeps what is measured. They import torch
# themselves, since the process that starts them needs none.


def timed(run, device, repeats=10):
    """Seconds of run(), the mean of `repeats` in a row after two that warm up; on a GPU its own, all being launched."""
    import torch

    from bench import seconds

    for _ in range(2):
        run()
    if device == "cpu":
        return seconds(lambda: [run() for _ in range(repeats)], device) / repeats
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    # 20 million cycles, 10 ms: else a short run() would take what Python takes to launch it
    torch.cuda._sleep(20_000_000), events[0].record(), [run() for _ in range(repeats)], events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1000 / repeats


def machine(knobs, report):
    """How fast it copies and multiplies."""
    import torch

    report(torch_cuda=str(torch.version.cuda), threads=torch.get_num_threads())
    if knobs.cuda:
        report(**{name: getattr(torch.cuda.get_device_properties(0), name) for name in PROPERTIES})
    a = torch.randn(2**28 if knobs.cuda else 2**16, device=knobs.device)  # 1 GB
    b = torch.empty_like(a)
    report(copy_gb_per_s=2 * a.nbytes / timed(lambda: b.copy_(a), knobs.device) / 1e9, copied_mb=a.nbytes / 2**20)
    n = 8192 if knobs.cuda else 64
    a, b = torch.randn(2, n, n, device=knobs.device).bfloat16()
    report(product_tflops=2 * n**3 / timed(lambda: a @ b, knobs.device) / 1e12, n=n)


def gpu_tests(knobs, report):
    """The tests with the mark `gpu`, which are skipped where there is none; CUT are those that the limit left out."""

    def run(paths):
        # Ten seconds before the stage's end no test is begun, and what hangs is killed so that the rest is counted.
        until = f"--until={time.time() + knobs.seconds - 10}"
        command = [sys.executable, "-m", "pytest", "-vv", "-m", "gpu", "-p", "no:cacheprovider", "--disable-warnings"]
        command += [until, *paths]
        outcomes, begun, failed = Counter(), "", {}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # without plugins that this machine may have; on a terminal so wide that a line is one line
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "250"}
        with subprocess.Popen(command, **pipes, cwd=ROOT, env=environment) as tests:
            timer = threading.Timer(knobs.seconds - 3, tests.kill)
            timer.start()
            for line in tests.stdout:
                print(line, end="", flush=True)
                ended = re.match(r"(\S+::.+?) (PASSED|SKIPPED|FAILED|ERROR)(.*out of time)?", line)
                if ended:
                    test, outcome, cut = ended.groups()
                    outcomes[outcome if not cut else "CUT"] += 1
                    failed |= {test: line.strip()} if cut or outcome in ("FAILED", "ERROR") else {}
                summary = re.match(r"(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", line)
                failed |= {summary.group(1): line.strip()} if summary else {}  # with the reason
                begun = "" if ended else line.strip() if re.match(r"\S+::", line) else begun
        timer.cancel()
        if begun:
            failed[begun] = f"KILLED {begun}"
        for said in failed.values():
            report(test=said)
        report(tests=" ".join(map(os.path.basename, paths)), limit_s=knobs.seconds, **outcomes)
        passed.update(outcomes)
        return tests.returncode

    paths, passed = [], Counter()
    for path in sorted(glob.glob(f"{ROOT}/tests/test_*.py")):
        with open(path, encoding="utf-8") as file:
            paths += [os.path.relpath(path, ROOT)] if "pytest.mark.gpu" in file.read() else []
    # A process for each file, since after an illegal access, say, nothing works any more on the GPU in its process, and
    # two for kernels, which take a second or two each to compile.
    words = "float32", "not float32"
    groups = [[path, "-k", word] for path in paths if "kernel" in path for word in words]
    groups += [[path] for path in paths if "kernel" not in path]
    groups = groups if knobs.cuda else [paths]
    with ThreadPoolExecutor(len(groups)) as pool:
        codes = list(pool.map(run, groups))
    failed = [group for group, code in zip(groups, codes, strict=True) if code not in (0, 5)]  # 5: it has none for now
    assert not failed, f"failed, or not at the end after {knobs.seconds:.0f} s: {failed}"
    assert passed["PASSED"] or not knobs.cuda, "no test has found a GPU"


def products(knobs, report):
    """The head beside the compiler's, its kernel, the weight gradients with dots beside cuBLAS's without."""
    import torch
    from torch.nn import functional as F

    import bench
    import data_value
    from model import GPT
    from support import kernels, operators
    from support.cost import peak_tflops

    size, device, dtype = FULL if knobs.cuda else TINY, knobs.device, torch.bfloat16
    B, T, C, V = (size[key] for key in ("batch_size", "block_size", "n_embd", "vocab_size"))
    x = torch.randn(B, T, C, device=device, dtype=dtype, requires_grad=True)
    targets, alpha = torch.randint(V, (B, T), device=device), torch.zeros(B, 1, device=device, requires_grad=True)
    head = data_value.LossHead(C, V, bias=False, device=device)
    data_value.attach_directions(head)

    @torch.compile(fullgraph=True, dynamic=False, disable=not knobs.cuda)
    def stock(x, targets):
        return F.cross_entropy(F.linear(x, head.weight).flatten(0, 1), targets.flatten())

    def step(loss_of, *arguments):
        head.weight.grad = x.grad = None
        with torch.autocast(knobs.device, dtype):
            loss = loss_of(x, targets, *arguments)
        loss.backward()

    for name, run in dict(plain=[head], stock=[stock], scored=[head, alpha]).items():
        ms = 1000 * timed(lambda run=run: step(*run), device)
        report(head=name, ms=ms, tflops=6 * B * T * C * V / ms / 1e9)

    rows = torch.randn(B * T, V, device=device, dtype=dtype), targets.view(-1), 1.0, True
    moved = kernels.cross_entropy_rows_traffic(*rows)
    if knobs.cuda:
        report(kernel="rows", gb_per_s=moved / timed(lambda: kernels.cross_entropy_rows(*rows), device) / 1e9)

    peak = peak_tflops(torch.cuda.get_device_name(), "bfloat16") if knobs.cuda else None
    with torch.device("meta"):
        model = GPT(bench.gpt_config(bench.Knobs(**size)))
    shapes = Counter(module.weight.shape for module in model.modules() if isinstance(module, data_value.Linear))
    for (n_out, n_in), count in shapes.items():
        x, dy = (torch.randn(B, T, n, device=device, dtype=dtype) for n in (n_in, n_out))
        dw, *direction = torch.randn(2, n_out, n_in, device=device)
        flat, direction = (dy.flatten(0, 1).T, x.flatten(0, 1)), torch.stack(direction)
        stock_ms = 1000 * timed(lambda flat=flat: torch.mm(*flat), device)
        ms = 1000 * timed(lambda of=(dw, x, dy, direction): operators.add_samples(*of, None), device)
        tflops = 2 * B * T * n_in * n_out / ms / 1e9
        share = tflops / peak if peak else None
        report(layers=count, n_in=n_in, n_out=n_out, cublas_ms=stock_ms, with_dots_ms=ms, tflops=tflops, of_peak=share)


def steps(knobs, report):
    """bench.py's arms at 124M, compiled, those that matter most first; beside them their budget on paper."""
    import torch

    import bench
    import data_value
    from support.cost import estimate_mfu, peak_tflops
    from support.graphs import EAGER

    cuda, gpu = knobs.cuda, torch.cuda.get_device_name() if knobs.cuda else ""
    options = dict(val_batch_size=16, dtype="bfloat16", compile=cuda, device=knobs.device, rounds=7 if cuda else 1)
    shape = bench.Knobs(**FULL if cuda else TINY, **options)
    memory, peak = (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated) if cuda else (lambda: 0, lambda: 0)
    ours = bench.Bench(shape, False)
    parameters, windows = sum(p.numel() for p in ours.model.parameters()), (ours.x_val, ours.y_val)
    held = Counter(ours=memory())  # bytes that stay, of which not every arm needs all
    ours.buffers = data_value.attach_directions(ours.model)  # now: what is compiled would be compiled again
    held["directions"] = memory() - held["ours"]
    owners = dict(plain=["ours"], stock=["theirs"])

    def arm(run, m=1):
        def with_windows():
            ours.x_val, ours.y_val = (part[:m] for part in windows)
            run()

        return with_windows

    def plain480():  # nanoGPT's windows in a step: 30 micro-batches of 16
        for _ in range(30 if cuda else 2):
            ours.backward()
        ours.step()

    def scored480():
        ours.set_directions()
        for _ in range(30 if cuda else 2):
            ours.dots()
        ours.step()

    plan = dict(plain=arm(ours.plain), scored=arm(ours.scored), plain480=plain480, scored480=arm(scored480, 16))
    plan |= dict(order2=arm(ours.order2), stock=None, val=arm(ours.val))
    plan |= dict(micro=ours.backward, scored_micro=ours.dots)  # a further micro-batch: its gradients join those there
    plan |= dict(scored4=arm(ours.scored, 4), val4=arm(ours.val, 4))  # of m = 4 windows
    arms = {}
    for name, run in plan.items():
        uses, before = owners.get(name, ["ours", "directions"]), memory()
        arms[name] = run or bench.Bench(shape, True).plain
        first_s = bench.seconds(arms[name], knobs.device)  # compiles
        for _ in range(EAGER):
            arms[name]()  # at last its graphs are recorded
        held[uses[0]] += memory() - before
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        ours.replays = False  # the profiler does not see which operator has launched what a graph holds
        kernels, parts = profiled(arms[name], cuda, shape) if "480" not in name else ({}, Counter())  # 10^5 events
        ours.replays = True
        peers = {other: run for other, run in arms.items() if ("480" in other) == ("480" in name)}
        peak_mb = (peak() - sum(held.values()) + sum(held[owner] for owner in uses)) / 2**20 if kernels else None
        times = bench.take_turns(peers, shape)
        ms = 1000 * statistics.median(times[name])
        tokens_per_s = shape.batch_size * shape.block_size / ms * 1000
        share = estimate_mfu(shape, parameters, tokens_per_s, peak_tflops(gpu, "bfloat16"))
        mfu = share if name in ("stock", "plain", "scored") else None
        report(arm=name, ms=ms, mfu=mfu, peak_mb=peak_mb, first_s=first_s)
        for kernel, (kernel_ms, calls) in list(kernels.items())[:10]:
            report(arm=name, kernel=kernel, part=part_of(kernel), ms=kernel_ms, calls=calls)
        for part in PARTS:
            report(arm=name, part=part, ms=parts[part])
        missing = dict.fromkeys([*plan, "order24"], [math.nan] * shape.rounds)
        for m, end in ((1, ""), (4, "4")):
            of = missing | times
            arms_of_m = [of["stock"], of["plain"], *(of[name + end] for name in ("val", "scored", "order2"))]
            rounds = [bench.ratios(*round_) for round_ in zip(*arms_of_m, strict=True)]
            medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            known = {key: ratio for key, ratio in medians.items() if not math.isnan(ratio)}
            if known:
                report(val_batch_size=m, **known)
        for scored, plain in (("scored_micro", "micro"), ("scored480", "plain480")):
            if scored in times:
                overhead = [mine / other - 1 for mine, other in zip(times[scored], times[plain], strict=True)]
                report(arm=scored, beside=plain, overhead=statistics.median(overhead))


def figure2(knobs, report):
    """GPT-2 124M: does it pay to leave out what has a negative value?"""
    carried, bpe = f"{knobs.data}/corpus.parquet", f"{knobs.data}/tiktoken"
    source = [f"--source={carried}", "--domain_field=domain"] if os.path.exists(carried) else ["--source=python"]
    tokenizer = "gpt2" if os.path.isdir(bpe) else "bytes"
    if tokenizer == "bytes":
        print(f"{bpe}: not there, so tokens are bytes; `make gpu-data` puts GPT-2's BPE there")
    os.environ["TIKTOKEN_CACHE_DIR"] = bpe
    flags = [f"--tokenizer={tokenizer}", "--name=corpus", f"--data_dir={knobs.work}", f"--num_proc={os.cpu_count()}"]
    started, sys.argv = time.monotonic(), ["prepare_owt.py", *source, *flags]
    runpy.run_path(f"{ROOT}/prepare_owt.py", run_name="__main__")
    spent = time.monotonic() - started
    report(source=source[0], tokenizer=tokenizer, prepare_s=spent)

    minutes = (knobs.seconds - spent - 10) / 60  # ten seconds for the figure and for what takes longer than expected
    flags = ["--dataset=corpus", f"--data_dir={knobs.work}", f"--out_dir={knobs.work}/gpt2", f"--minutes={minutes}"]
    flags += [f"--device={knobs.device}", f"--compile={knobs.cuda and minutes > 8}"]
    flags += ["--target=modules"] if source == ["--source=python"] else []
    tiny = TINY | dict(vocab_size=0, max_iters=40, orders=1, val_batch_size=4)
    flags += [] if knobs.cuda else [f"--{key}={value}" for key, value in tiny.items()]
    sys.argv = ["study/gpt2.py", *flags]
    runpy.run_path(f"{ROOT}/study/gpt2.py", run_name="__main__")


# Each stage and its weight: the share of the time that is left is its weight's among those of the stages that have not
# begun. Of six minutes the last one has at least 90 s.
STAGES = {1: (machine, 2), 2: (gpu_tests, 4), 3: (products, 2), 4: (steps, 7), 5: (figure2, 5)}

# ---------------------------------------------------------------------------------------------------------------------
# The process that runs them


def limit_of(stage, waiting, left):
    """The seconds of a stage, the first of those `waiting`, of the seconds that are left."""
    return left * STAGES[stage][1] / sum(STAGES[other][1] for other in waiting)


def run_stage(knobs, executed):
    """The stage knobs.stage in this process."""
    with open(f"{knobs.work}/stage_{knobs.stage}.jsonl", "a", encoding="utf-8") as file:

        def report(**figures):
            file.write(json.dumps(figures) + "\n")
            file.flush()
            print(", ".join(f"{key} {shown(value)}" for key, value in figures.items()), flush=True)

        try:
            STAGES[knobs.stage][0](knobs, report)
        finally:
            with open(f"{knobs.work}/lines_{knobs.stage}.json", "w", encoding="utf-8") as lines:
                json.dump(sorted(executed), lines)


def count_budget(knobs, gpu, work):
    """The process of bench.py --budget for the shape of stage 4, which takes a core for a minute, without the GPU."""
    card = next((name for name in ("A100", "H100", "H200") if name in gpu), "H100")
    flags = [f"--{key}={value}" for key, value in (FULL if knobs.cuda else TINY).items()]
    command = [sys.executable, f"{ROOT}/bench.py", "--budget", "--json", f"--gpu={card}", *flags]
    with open(f"{work}/budget.json", "wb") as found, open(f"{work}/budget.log", "wb") as log:
        counting = subprocess.Popen(command, stdout=found, stderr=log, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    atexit.register(counting.kill)
    return counting


def budget_of(counting, work):
    """What the process has found; a figure that says why, if it has failed."""
    if counting.wait():
        return dict(failure=f"bench.py --budget: {end_of(f'{work}/budget.log', 300).strip()}")
    with open(f"{work}/budget.json", encoding="utf-8") as file:
        return json.load(file)


def study_figures(path):
    """What study/gpt2.py has kept so far, as figures."""
    with open(path, encoding="utf-8") as file:
        state = json.load(file)
    arms = [{key: line[key] for key in ("arm", "order", "afresh", "seconds")} for line in state["arms"]]
    for arm, line in zip(arms, state["arms"], strict=True):
        arm |= dict(iters=line["iters"][-1], test_loss=line["test_loss"][-1])
    plan = [state["plan"]] if state["plan"] else []  # it is empty until the baseline has ended
    return [*plan, *arms, *(dict(final=name, nats=found) for name, found in state["final"].items())]


def measure(knobs, work, executed):
    """Run the stages: a list of what they measured, one dict for each."""
    deadline, stages = time.monotonic() + 60 * knobs.minutes, [about_the_machine()]
    if not knobs.cuda:
        os.environ["OMP_NUM_THREADS"] = "1"  # tiny shapes lose time by more
    counting = count_budget(knobs, stages[0]["figures"][0]["gpu"], work) if 4 in knobs.order else None
    for place, stage in enumerate(knobs.order):
        function, _ = STAGES[stage]
        limit = limit_of(stage, knobs.order[place:], max(1.0, deadline - time.monotonic()))
        print(f"== {stage}. {function.__doc__} (at most {limit:.0f} s)", flush=True)
        flags = [f"--stage={stage}", f"--work={work}", f"--seconds={limit}"]
        flags += [f"--device={knobs.device}", f"--data={os.path.abspath(knobs.data)}"]
        started, log, figures = time.monotonic(), f"{work}/stage_{stage}.log", f"{work}/stage_{stage}.jsonl"
        status = supervise([sys.executable, "-u", f"{ROOT}/gpu.py", *flags], limit, log)
        said = {0: "passed", None: f"killed at its limit of {limit:.0f} s"}.get(status, f"failed with status {status}")
        result = dict(stage=stage, what=function.__doc__, status=said, seconds=time.monotonic() - started, figures=[])
        if os.path.exists(figures):
            with open(figures, encoding="utf-8") as file:
                result["figures"] = [json.loads(line) for line in file if line.endswith("\n")]
        if stage == 4:
            result["figures"] = beside(result["figures"], budget_of(counting, work))
        if stage == 5 and os.path.exists(f"{work}/gpt2/metrics.json"):
            result["figures"] += study_figures(f"{work}/gpt2/metrics.json")
        result["last_lines"] = end_of(log, 4000).splitlines()[-30:] if status != 0 else []
        if os.path.exists(f"{work}/lines_{stage}.json"):
            with open(f"{work}/lines_{stage}.json", encoding="utf-8") as file:
                executed |= set(map(tuple, json.load(file)))
        stages.append(result)
        study = {"metrics.json": "gpt2.json", "figure.png": "gpt2.png", "baseline/values.npz": "gpt2_values.npz"}
        files = {f"{work}/gpt2/{path}": name for path, name in study.items()}
        write_results(knobs.out, stages, files, [f"{work}/stage_{one['stage']}.log" for one in stages[1:]])
    return stages


def main(executed):
    """The status; `executed` is what watch gives in a rehearsal, empty otherwise."""
    knobs = configure(Knobs, sys.argv[1:])
    if knobs.stage:
        sys.exit(run_stage(knobs, executed))
    if knobs.pack:
        tree, carried = pack(knobs.pack, knobs.domain_field, knobs.data)
        sys.exit(print(f"{knobs.data}: {carried / 2**20:.1f} MiB, with the tree {(tree + carried) / 2**20:.1f} of 64"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the stage's processes
    os.makedirs(knobs.out, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_", ignore_cleanup_errors=True) as work:
        stages = measure(knobs, work, executed)
    for stage in stages:
        print(f"{stage['stage']}. {stage['what']} {stage['status']}, {len(stage['figures'])} lines of figures")
    print(f"{knobs.out}/gpu.md has them all")
    return 1 if any(stage["status"] != "passed" for stage in stages) else 0


if __name__ == "__main__":
    rehearsal = "--device=cpu" in sys.argv
    executed = watch(SCRIPTS) if rehearsal else set()
    status = main(executed)
    if rehearsal:
        print_unexecuted(SCRIPTS, executed)
    sys.exit(status)

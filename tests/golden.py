"""
Do two checkouts give the same numbers? Nine command lines run in both; then metrics.jsonl without its timings, every
tensor of the log and every array of values.npz are compared, bit for bit (of two processes: to rounding).

    git worktree add ../before <commit> && python tests/golden.py ../before .
"""

import glob
import json
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch

TIMES = ("step_ms", "val_ms", "tokens_per_s", "mfu", "peak_mb")
SHAPE = (
    "--dataset=python --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --eval_iters=3 "
    "--eval_interval=6 --max_iters=12 --warmup_iters=2 --checkpoint_interval=5 --log_interval=3 --learning_rate=1e-2 "
    "--val_batch_size=4 --device=cpu --dtype=float32 --compile=False"
)
SCORED = f"{SHAPE} --score=True"
RUNS = {  # name: its command lines, in order
    "sgd": [SCORED],
    "adam": [f"{SCORED} --value_direction=adam --weight_decay=0.1"],
    "sets": [f"{SCORED} --val_sets=all,topics,modules --value_direction=sgd,adam-wte --val_groups=2"],
    "average": [f"{SCORED} --value_direction=adam --val_average=8"],
    "order2": [f"{SCORED} --value_direction=adam --value_order=2"],
    "filtered": [f"{SHAPE} --filter_from=out/sgd --filter_negative=True --max_iters=8 --lr_decay_iters=8"],
    "dropout": [f"{SCORED} --dropout=0.1 --dtype=bfloat16"],
    "processes": [f"{SCORED} --gradient_accumulation_steps=2"],
    "resumed": [
        f"{SCORED} --value_direction=adam --val_average=8 --max_iters=7 --lr_decay_iters=12",
        f"{SCORED} --value_direction=adam --val_average=8 --lr_decay_iters=12 --init_from=resume",
    ],
}


def record(checkout, folder):
    """Make the corpus and every run with the code of `checkout` in `folder`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def call(script, *flags, launcher=()):
        command = [sys.executable, *launcher, os.path.join(os.path.abspath(checkout), script), *flags]
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

    call("prepare_owt.py", "--source=python")
    for name, lines in RUNS.items():
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2") if name == "processes" else ()
        for line in lines:
            call("train.py", *line.split(), f"--out_dir=out/{name}", launcher=launcher)


def ignored(key):
    """Times, and what follows from the test losses."""
    return key in TIMES or key.startswith("test_bpb")


def numbers(folder, name):
    """{what: array or JSON value} of one run."""
    found = {}
    with open(f"{folder}/out/{name}/metrics.jsonl", encoding="utf-8") as file:
        for n, line in enumerate(file):
            found |= {f"metrics.{n}.{key}": v for key, v in json.loads(line).items() if not ignored(key)}
    for path in sorted(glob.glob(f"{folder}/out/{name}/dot_prod/*.pt")):
        log = torch.load(path, weights_only=True)
        found |= {
            f"{os.path.basename(path)}.{key}": v.numpy() if torch.is_tensor(v) else v
            for key, v in log.items()
            if key != "format"
        }
    if os.path.exists(f"{folder}/out/{name}/values.npz"):
        with np.load(f"{folder}/out/{name}/values.npz") as arrays:
            found |= {f"values.{key}": arrays[key] for key in arrays}
    return found


def differences(a, b, exact):
    """The names of what differs between two runs' numbers."""

    def same(x, y):
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            return np.array_equal(x, y) if exact else np.linalg.norm(x - y) <= 2e-3 * np.linalg.norm(x)
        if isinstance(x, float):
            return x == y if exact else math.isclose(x, y, rel_tol=2e-2, abs_tol=1e-4)
        return np.array_equal(x, y)

    return [key for key in sorted(a.keys() | b.keys()) if key not in a or key not in b or not same(a[key], b[key])]


def main():
    before, after = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for name, checkout in (("before", before), ("after", after)):
            os.mkdir(f"{folder}/{name}")
            record(checkout, f"{folder}/{name}")
        failed = False
        for name in RUNS:
            a, b = numbers(f"{folder}/before", name), numbers(f"{folder}/after", name)
            found = differences(a, b, exact=name != "processes")
            failed |= bool(found) or not a
            print(f"{name}: {len(a)} numbers and arrays, {f'{found[:5]} differ' if found else 'the same'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()

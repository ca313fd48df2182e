"""Stages of a long measurement: processes with a time limit, and what they have found so far in files to read."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import metadata


def supervise(command, limit, log):
    """Run a command for at most `limit` seconds, its output to `log` and to ours: its status, None if it was killed."""
    end = time.monotonic() + limit
    with open(log, "wb") as file, open(log, "rb") as written:
        # a group of its own, so that its children end with it
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
                sys.stdout.buffer.write(written.read())
                sys.stdout.flush()
            return process.poll()
        finally:
            with suppress(ProcessLookupError):  # there may be none of the group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            sys.stdout.buffer.write(written.read())
            sys.stdout.flush()


def about_the_machine():
    """The card, its driver and the versions, in the shape of a stage's result."""
    query = (
        "nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.memory,power.limit --format=csv,noheader"
    )
    gpu = subprocess.run(query, shell=True, capture_output=True, text=True).stdout.strip() or "no nvidia-smi"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    versions = {name: found.get(name) for name in ("torch", "triton", "numpy", "tiktoken", "pyarrow")}
    figures = [dict(gpu=gpu), dict(system=platform.platform(), cores=os.cpu_count(), memory_gb=memory)]
    figures.append(dict(python=platform.python_version()) | versions)
    return dict(stage=0, what="Where this ran.", status="passed", seconds=0.0, figures=figures, last_lines=[])


def shown(value):
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


LEGEND = """`ms` are milliseconds: of an arm's step the median of the rounds, of a kernel or a part its sum in one more
step under torch.profiler. `first_s` are the seconds of the first step, with its compilation; `peak_mb` is what the arm
alone needs; `budget_ms` is what `python bench.py --budget` expects of the GPU that is named beside it. `None`: not
known."""


def markdown(stages):
    """gpu.md: of each stage how it ended, a table for each kind of figures, and the last lines of a failure."""
    lines = ["# What `make gpu` measured", "", LEGEND]
    for stage in stages:
        lines += ["", f"## {stage['stage']}. {stage['what']}", "", f"{stage['status']}, {stage['seconds']:.0f} s"]
        columns = None
        for row in stage["figures"]:
            if list(row) != columns:
                columns = list(row)
                lines += ["", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
            lines.append(f"| {' | '.join(shown(value).replace('|', '/') for value in row.values())} |")
        lines += ["", "```", *stage["last_lines"], "```"] if stage["last_lines"] else []
    return "\n".join(lines) + "\n"


def write_results(out, results, files, logs):
    """
    Write into the folder `out` gpu.json and gpu.md of the results, dicts of stage, what, status, seconds, figures and
    last_lines; log.txt, the ends of the logs; and copies of `files`, {path: name}, that are there and below 16 MB.
    """
    texts = {"gpu.json": json.dumps(results, indent=1), "gpu.md": markdown(results)}
    texts["log.txt"] = "".join(f"== {os.path.basename(log)}\n{end_of(log, 2**21)}" for log in logs)
    with tempfile.TemporaryDirectory(dir=out) as folder:  # a file is whole or absent
        for name, text in texts.items():
            with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
                file.write(text)
        for path, name in files.items():
            if os.path.exists(path) and os.path.getsize(path) < 2**24:
                shutil.copy(path, f"{folder}/{name}")
        for name in os.listdir(folder):
            os.replace(f"{folder}/{name}", f"{out}/{name}")


def end_of(path, most):
    """The last `most` bytes of a log as text."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()[-most:]

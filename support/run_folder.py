"""
A run's folder: its lock, config.json, metrics.jsonl, the log of dot products and the checkpoint; how a run that was
interrupted goes on from there, as if it had not been.
"""

import errno
import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.configurator import REMOVED, UserError, check
from support.files import atomic_write, load_torch, lock, writing
from support.values import log_files, read_log, write_log

FORMAT = 1  # of ckpt.pt; those without a number are of the code before it was written, and read the same
WEIGHTS = ("model", "model_args")  # what there is in nanoGPT's too
# what a run and its resumption share: the knob that it hangs on, and what it is
IDENTITY = dict(fingerprint=("dataset", "corpus"), val_sets=("val_sets", "corpora"), order=("filter_from", "windows"))
CHECKPOINT = (*WEIGHTS, "optimizer", "iter_num", "position", "negative", "knobs", "metrics_bytes", "val_gradients")
CHECKPOINT += tuple(IDENTITY)

# what may change between the start of a run and its resumption, because the numbers do not depend on it
FREE_KNOBS = {"out_dir", "init_from", "max_iters", "log_interval", "checkpoint_interval", "data_dir", "device"}
FREE_KNOBS |= {"compile", "wandb_log", "wandb_project", "wandb_run_name", "process_timeout"}
FREE_KNOBS |= {"dataset", "filter_from", "filter_column"}  # the corpus and the order are compared, not their names


class RunFolder:
    """
    The folder knobs.out_dir of a run of these `ranks`; `identity` is what a checkpoint of the same run must share: the
    fingerprint of the corpus, {name: fingerprint} of val_sets and the digest of the order. Rank 0 writes, and holds a
    lock until `stack` is closed. Nothing is made before `begin`, so that a run that is refused leaves no trace.

    Raises UserError where another process writes there, or a run has begun there and is not to be resumed.
    """

    def __init__(self, knobs, ranks, identity, stack):
        self.knobs, self.ranks, self.identity, self.stack = knobs, ranks, identity, stack
        self.path = knobs.out_dir
        self.ckpt_path, self.metrics_path = (os.path.join(self.path, name) for name in ("ckpt.pt", "metrics.jsonl"))
        self.resumed = knobs.init_from == "resume"
        self.entries = []  # the dot products since the last checkpoint, left on the device
        self.metrics, self.wandb, self.wandb_id = None, None, None
        if ranks.rank == 0 and (os.path.exists(self.metrics_path) or os.path.exists(self.ckpt_path)):
            self._open()

    def _open(self):
        try:
            os.makedirs(self.path, exist_ok=True)
            self.metrics = self.stack.enter_context(open(self.metrics_path, "ab", buffering=0))  # noqa: SIM115
        except (OSError, UnicodeError) as error:  # the latter where the system's file names are ASCII
            what = getattr(error, "strerror", error)
            raise UserError(f"--out_dir={self.path}: {self.metrics_path}: {what}; choose another folder") from error
        lock(self.metrics, self.path)
        # Nothing is in the metrics before the first checkpoint: without either, a run was killed before it began.
        begun = os.path.exists(self.ckpt_path) or os.path.getsize(self.metrics_path) or log_files(self.path)
        mend = "go on with --init_from=resume or choose another --out_dir"
        check(self.resumed or not begun, f"{self.path}: holds a run already; {mend}")

    def checkpoint(self):
        """
        The checkpoint that the run starts from, its own or the weights of another, or None. Raises UserError where it
        is to be resumed and is not this very run's.
        """
        knobs = self.knobs
        if not self.resumed:
            is_file = knobs.init_from.endswith(".pt")
            return load_torch(knobs.init_from, WEIGHTS, "give another --init_from") if is_file else None
        mend = "start the run with --init_from=scratch, in another --out_dir if this one holds one"
        found = load_torch(self.ckpt_path, CHECKPOINT, mend)
        newer = f"{self.ckpt_path}: its format is {found.get('format', 0)}, this code knows {FORMAT}"
        check(found.get("format", 0) <= FORMAT, f"{newer}; resume it with the code that wrote it")
        what = f"{self.ckpt_path} has {found['iter_num']} iterations already; give a larger --max_iters"
        check(found["iter_num"] <= knobs.max_iters, f"--max_iters={knobs.max_iters}: {what}")
        then, now = found["knobs"], asdict(knobs)
        for key, (default, why) in REMOVED.items():
            value = then.get(key, default)
            check(value == default, f"{self.ckpt_path}: its run has {key} = {value}, a knob that is gone: {why}")
        if list(found["val_sets"]) == list(self.identity["val_sets"]):  # the same names, as 'other/' and 'other' are
            now["val_sets"] = then["val_sets"]
        other = [key for key in now if key not in FREE_KNOBS and then.get(key) != now[key]]
        theirs = " ".join(f"--{key}={then.get(key)}" for key in other)
        # lr_decay_iters is max_iters where it is not given
        given = ["max_iters" if key == "lr_decay_iters" and now[key] == knobs.max_iters else key for key in other]
        ours = " ".join(f"--{key}={now[key]}" for key in given)
        check(not other, f"{ours}: the run of {self.ckpt_path} began otherwise; resume with {theirs}")
        mend = "bring the old ones back, or train anew in another --out_dir"
        for key, (flag, what) in IDENTITY.items():
            what = f"--{flag}={now[flag]}: not the {what} that {self.ckpt_path} began with; {mend}"
            check(found[key] == self.identity[key], what)
        knobs.init_from = then["init_from"]  # what config.json shall go on saying
        self.wandb_id = found.get("wandb_id")
        return found

    def cut_back(self, checkpoint):
        """
        Remove what the interrupted run did after its checkpoint: it is about to happen again. Raises UserError where
        metrics.jsonl or the log end before it.
        """
        self.ranks.barrier()  # all have seen the folder as it was
        if self.ranks.rank > 0:
            return
        found, said = os.path.getsize(self.metrics_path), checkpoint["metrics_bytes"]
        what = f"{self.metrics_path}: truncated, {found:,} bytes of {said:,}"
        check(found >= said, f"{what}; train anew in another --out_dir")
        os.truncate(self.metrics_path, said)
        iter_num, folder = checkpoint["iter_num"], Path(self.path)
        later = [Path(path) for n, path in log_files(self.path).items() if n > iter_num]
        later += folder.glob("values.npz") if iter_num < self.knobs.max_iters else ()
        for path in (*later, *folder.rglob("*.tmp")):
            path.unlink()
        if self.knobs.score and iter_num:  # damage is better known now than at the end
            reached = int(read_log(self.path)["iter"][-1]) + 1
            what = f"{self.path}/dot_prod: ends at iteration {reached}, {self.ckpt_path} at {iter_num}"
            check(reached == iter_num, f"{what}; bring the missing files back, or train anew in another --out_dir")

    def begin(self, model, coverage):
        """Make the folder, begin its run at W&B or go on with it, and write config.json: all it takes to repeat it."""
        if self.ranks.rank > 0:
            return
        knobs = self.knobs
        if not self.metrics:
            self._open()
        if knobs.wandb_log:
            self._begin_wandb()
        git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = "not a git checkout"
        on_gpu = torch.device(knobs.device).type == "cuda"
        processor = torch.cuda.get_device_name(knobs.device) if on_gpu else platform.processor() or platform.machine()
        description = {
            "knobs": asdict(knobs),
            "fingerprint": self.identity["fingerprint"],
            "model": asdict(model.config),
            "parameters": sum(p.numel() for p in model.parameters()),
            "coverage": coverage,
            "commit": commit,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "hardware": {"device": processor, "threads": torch.get_num_threads()},
            "val_sets": self.identity["val_sets"],
        }
        with atomic_write(os.path.join(self.path, "config.json")) as file:
            file.write(json.dumps(description, indent=1).encode())
        print(f"{description['parameters']:,} parameters on {self.ranks.world} x {knobs.device}, {knobs.dtype}")

    def _begin_wandb(self):
        knobs = self.knobs
        name = knobs.wandb_run_name or os.path.basename(os.path.abspath(self.path))
        try:
            import wandb

            run = wandb.init(
                project=knobs.wandb_project, name=name, config=asdict(knobs), id=self.wandb_id, resume="allow"
            )
        except ImportError:
            raise UserError("--wandb_log=True: pip install wandb") from None
        except wandb.Error as error:
            raise UserError(f"--wandb_log=True: {error}") from error
        run.define_metric("*", step_metric="iter")
        self.wandb, self.wandb_id = run, run.id

    def summarise(self, value):
        """Tell W&B the values of a finished run, (n,): their histogram and the share of negatives."""
        if self.wandb:
            from wandb import Histogram

            self.wandb.summary.update({"values": Histogram(value), "negative_share": (value < 0).mean()})

    def record(self, metrics, line):
        """Append the dict `metrics` to metrics.jsonl, and print `line`."""
        if self.ranks.rank > 0:
            return
        text = json.dumps(metrics).encode() + b"\n"
        with writing(self.metrics_path):
            if self.metrics.write(text) < len(text):  # the rest of the line would fail
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tqdm.write(line)
        if self.wandb:
            self.wandb.log(metrics)

    def save(self, state, directions):
        """
        Write the dot products since the last checkpoint, of `directions`, their names, and then the checkpoint, so
        that the log is never behind it. `state` is what the run itself needs to go on.
        """
        if self.entries:
            dots = self.ranks.gather(torch.stack([entry["dot_product"] for entry in self.entries]))  # (iters, B, K)
            if self.ranks.rank == 0:
                logged = [entry | {"dot_product": row} for entry, row in zip(self.entries, dots, strict=True)]
                write_log(self.path, state["iter_num"], logged, directions)
            self.entries.clear()
        if self.ranks.rank > 0:
            return
        with writing(self.metrics_path):
            os.fsync(self.metrics.fileno())
        said = dict(format=FORMAT, knobs=asdict(self.knobs), metrics_bytes=os.path.getsize(self.metrics_path))
        said["wandb_id"] = self.wandb_id
        with atomic_write(self.ckpt_path) as file:
            torch.save(state | self.identity | said, file)

    def stop(self, message):
        """Raise UserError: something is wrong with the numbers of the run."""
        kept = f"; the last checkpoint in {self.path} is whole" if os.path.exists(self.ckpt_path) else ""
        raise UserError(f"{message}; nothing of this iteration is logged{kept}")

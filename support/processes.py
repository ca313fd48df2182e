"""The processes of a run: torchrun's, one for every GPU, or a single one; what they share, and how they end."""

import atexit
import ctypes
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from support.configurator import UserError, check

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets for each process


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are; without torchrun it is alone, and the methods return what they are given."""

    rank: int = 0
    world: int = 1

    def total(self, tensor):
        """The sum of the ranks' tensors, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """The ranks' (iters, b, ...) side by side, (iters, b * world, ...), on rank 0; None on the others."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(tensor, parts)
        return torch.cat(parts, dim=1) if self.rank == 0 else None

    def average(self, gradient, loss, share):
        """Turn each rank's {parameter: gradient} and loss, of its `share` of the windows, into those of all."""
        if self.world == 1:
            return
        flat = torch.cat([g.flatten() for g in gradient.values()] + [loss[None]]).mul_(share)
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in gradient.values()] + [1])
        for g, part in zip([*gradient.values(), loss], parts, strict=True):
            g.copy_(part.view_as(g))

    def broadcast(self, thing, device):
        """Rank 0's `thing`, an object that can be pickled, on every rank."""
        things = [thing]
        if self.world > 1:
            dist.broadcast_object_list(things, device=torch.device(device))
        return things[0]

    def barrier(self):
        """Wait until all ranks are here."""
        if self.world > 1:
            dist.barrier()


def check_device(device):
    """Make a GPU the current device. Raises UserError for a device that is not here."""
    try:
        known = torch.device(device).type in ("cpu", "cuda", "mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        known = False
    check(known, f"--device={device}: no such device here; use --device=cpu")
    if device.startswith("cuda"):  # what is timed and synchronised is the current device
        torch.cuda.set_device(torch.device(device).index or 0)


def autocast(knobs):
    return torch.autocast(knobs.device.split(":")[0], torch.bfloat16, enabled=knobs.dtype == "bfloat16")


@contextmanager
def processes(knobs):
    """
    Yields the Ranks of this process, and sets knobs.device to its GPU. Raises UserError for a device that is not here,
    a batch that does not divide, and where another process is lost: at once if its connections close, after
    process_timeout if it hangs.
    """
    on_gpu = knobs.device.startswith("cuda")
    if on_gpu and "LOCAL_RANK" in os.environ:
        knobs.device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(knobs.device)
    if "RANK" not in os.environ:
        yield Ranks()
        return
    missing = [name for name in TORCHRUN if not os.environ.get(name)]
    what = f"RANK={os.environ['RANK']} is in the environment, but no {', '.join(missing)}"
    check(not missing, f"{what}; start several processes with torchrun, and a single one after unset RANK")
    world, steps = int(os.environ["WORLD_SIZE"]), knobs.gradient_accumulation_steps
    mend = f"start as many processes as divide it, or a run with a multiple of {world} and another --batch_size"
    check(steps % world == 0, f"--gradient_accumulation_steps={steps} does not divide by {world} processes; {mend}")
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=knobs.process_timeout))
        yield Ranks(dist.get_rank(), world)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's own are plain RuntimeErrors
            raise
        lines = str(error).strip().splitlines()
        said = f"{lines[0]:.150}" + (f" ... {lines[-1]:.150}" if len(lines) > 1 else "")
        lost = f"process {os.environ['RANK']} of {world}: another one died or hung, or cannot be reached ({said})"
        # A thread of gloo's that still holds a tensor would ask the dying interpreter to let go of it, and abort.
        atexit.register(os._exit, 1)
        sys.stdout.flush()
        raise UserError(f"{lost}; {how_to_resume(knobs)}") from error
    dist.destroy_process_group()


def keep_freed_memory():
    """
    Have glibc keep what is freed. By itself it gives most of it back to the system after a backward pass and takes it
    again, page by page, in the next step. Nothing is done where there is another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never; the largest number is 2 GB, which a step of 124M frees
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: older versions take no more


def how_to_resume(knobs):
    if not os.path.exists(os.path.join(knobs.out_dir, "ckpt.pt")):
        return "there is no checkpoint yet: start it again"
    return f"go on from the last checkpoint in {knobs.out_dir} with the same command and --init_from=resume"


def watch_signals(stack, ranks, knobs):
    """
    From now on SIGTERM, a scheduler's warning, and a first SIGINT, Ctrl-C, are only noted, until `stack` is closed.
    Returns a function that says which of them any process has had, or 0; all call it at the same step and get the same
    answer.
    """
    noted = [0]

    def note(number, _):
        noted.append(number)
        if number == signal.SIGINT:  # a second one ends the process at once
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell has it for a command in the background
            stack.callback(signal.signal, number, signal.signal(number, note))
    # on the CPU, so that no step waits for the GPU
    alone, timeout = ranks.world == 1, timedelta(seconds=knobs.process_timeout)
    group = None if alone else dist.new_group(backend="gloo", timeout=timeout)
    if group:
        stack.callback(dist.destroy_process_group, group)

    def signalled():
        answer = torch.tensor(max(noted))  # what comes while the others are asked counts the next time
        if not alone:
            dist.all_reduce(answer, dist.ReduceOp.MAX, group)
        return answer.item()

    return signalled


@contextmanager
def without_traceback():
    """
    Ctrl-C in the block leaves no traceback. The process still ends by SIGINT, which a shell calls status 130: so a loop
    or a make around it ends too.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.excepthook = lambda *_: None
        raise

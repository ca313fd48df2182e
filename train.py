"""
Trains GPT-2 and, in the same backward pass, values every training sample (data_value.py says how).

    python prepare_owt.py --source=python && python train.py config/demo_baseline.py     # minutes on a laptop
    python train.py config/baseline.py                           # GPT-2 124M, every window of every batch valued
    python train.py config/filtered.py                           # the control: the windows the baseline has valued
    python train.py config/filtered.py --filter_negative=True    # the treatment: those of them not below zero
    python train.py config/baseline.py --init_from=resume        # go on after an interruption, as if there was none
    torchrun --standalone --nproc_per_node=8 train.py config/baseline.py --batch_size=2 --gradient_accumulation_steps=8
    python train.py --help                                       # the knobs

A run's folder, out_dir, gets config.json, metrics.jsonl, ckpt.pt, dot_prod/ and, when the run has ended, values.npz.
SIGTERM ends a run after the step it is in, with a checkpoint.
"""

import errno
import glob
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data_value
from data_value import (
    attach_directions,
    load_values,
    log_files,
    mean_gradient,
    precondition,
    read_log,
    retreat_to_midpoint,
    set_direction,
    validation_gradient,
    weight_gradient_shapes,
    write_log,
    write_values,
)
from loader import (
    TEST,
    VAL,
    WindowOrder,
    get_batch,
    hash_of,
    load_corpus,
    load_filter,
    micro_batches,
    open_sets,
    training_order,
)
from model import GPT, GPTConfig
from prepare_owt import get_tokenizer
from support import kernels
from support.configurator import UserError, configure
from support.files import atomic_write, load_torch, lock, writing
from support.processes import average_over_ranks, how_to_resume, keep_freed_memory, processes, watch_sigterm


@dataclass
class Knobs:
    # the run
    out_dir: str = "out"  # its folder; {arm} in it becomes 'filtered', 'lowest', 'random' or 'control', {seed} the seed
    init_from: str = "scratch"  # 'scratch', 'resume', 'gpt2' (-medium, -large, -xl), a transformers folder, a ckpt.pt
    seed: int = 1337  # of the weights, the dropout masks and the order of the windows
    eval_interval: int = 250  # iterations between evaluations of the test loss
    eval_iters: int = 50  # batches (of an iteration's size) of test windows in it, always the same windows
    checkpoint_interval: int = 1000  # iterations between checkpoints, each preceded by a file of dot products
    log_interval: int = 10  # iterations between printed lines
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "data-value"
    wandb_run_name: str = "gpt2"
    # the data
    data_dir: str = "data"
    dataset: str = "openwebtext"  # the folder of data_dir that prepare_owt.py has written
    batch_size: int = 16  # windows in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in an iteration
    block_size: int = 1024  # tokens in a window
    # the values
    score: bool = False  # value every window of every batch
    val_batch_size: int = 1  # m, the validation windows that a direction is made of, by default drawn every iteration
    val_sets: str = "all"  # of the val split: 'all', domains, or other corpora of data_dir; 'a,b': values for each
    val_windows: int = 0  # draw only from so many windows of each set; 0: from all
    val_groups: int = 1  # make a direction of each of so many parts of the m windows, for standard errors
    val_interval: int = 1  # iterations for which a validation gradient serves
    val_average: float = 0.0  # half-life, in iterations, of a running average of validation gradients; 0: none
    # 'sgd': the validation gradient; 'adam': the same as AdamW would scale it; 'sgd-wte', 'adam-wte': without the tied
    # embedding; several, as in 'sgd,adam': values for each
    value_direction: str = "sgd"
    value_order: int = 1  # 2: the validation gradient at the step's midpoint, in a second pass over the batch
    # the filter
    filter_from: str = ""  # the folder of the scored run whose values decide
    filter_column: str = ""  # which of its values, as '<set>:<direction>'; the first by default
    filter_pool: str = "scored"  # draw from the windows it has 'scored', or from 'all' of the corpus
    filter_negative: bool = False  # reject windows of negative value
    filter_lowest: float = 0.0  # reject this share instead, those that stand lowest among their iteration's windows
    drop_random: float = 0.0  # reject this share of the windows at random instead (a control)
    # the model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 0  # 0: the corpus's own
    dropout: float = 0.0
    bias: bool = True  # biases in linears and layer norms
    # the optimiser
    optimizer: str = "adamw"  # or 'sgd', without momentum
    learning_rate: float = 6e-4
    max_iters: int = 20000
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0: none
    decay_lr: bool = True  # cosine from learning_rate to min_lr
    warmup_iters: int = 2000
    lr_decay_iters: int = 0  # 0: max_iters
    min_lr: float = 6e-5
    # the machine
    device: str = "cuda"  # 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: str = "bfloat16"  # autocast to bfloat16, or 'float32'
    compile: bool = True  # torch.compile the model and AdamW's direction
    process_timeout: int = 600  # seconds after which processes that wait for a dead or hung one give up

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(message)

        for key, value in asdict(self).items():
            if type(value) in (int, float):
                check(value >= 0, f"--{key}={value}: must not be negative")
                may_be_zero = ("seed", "vocab_size", "warmup_iters", "lr_decay_iters", "val_windows")
                may_be_zero = type(value) is float or key in may_be_zero
                check(value > 0 or may_be_zero, f"--{key}={value}: must be positive")
            elif type(value) is str:
                check(value.isprintable(), f"--{key}={value!r}: has characters that cannot be printed")
            limits = {"seed": 2**63, "vocab_size": 2**16 + 1, "n_layer": 10_000}
            limit = limits.get(key, 1e30 if type(value) is float else 2**31)
            check(type(value) in (bool, str) or value < limit, f"--{key}={value}: must be below {limit:,}")
        tokens = self.batch_size * self.block_size
        check(tokens < 2**31, f"--batch_size={self.batch_size} windows of --block_size={self.block_size}: too many")
        check(bool(self.out_dir), "--out_dir=: give the run a folder")
        check(bool(self.data_dir), "--data_dir=: name the folder of the corpora; this one is --data_dir=.")
        check(bool(self.dataset), f"--dataset=: name a folder of --data_dir={self.data_dir}")
        for key in ("dropout", "drop_random", "filter_lowest", "beta1", "beta2"):
            check(getattr(self, key) < 1, f"--{key}={getattr(self, key)}: must be below 1")
        choices = dict(value_order=(1, 2), filter_pool=("scored", "all"), optimizer=("adamw", "sgd"))
        for key, allowed in choices.items():
            expected = f"expected {' or '.join(map(str, allowed))}"
            check(getattr(self, key) in allowed, f"--{key}={getattr(self, key)}: {expected}")
        kinds = self.value_direction.split(",")
        known = set(kinds) <= {"sgd", "adam", "sgd-wte", "adam-wte"} and len(set(kinds)) == len(kinds)
        expected = "expected sgd, adam, sgd-wte, adam-wte, or several, each once: sgd,adam"
        check(known, f"--value_direction={self.value_direction}: {expected}")
        sets = self.val_sets.split(",")
        check(all(sets) and len(set(sets)) == len(sets), f"--val_sets={self.val_sets}: expected names, each once: a,b")
        m, groups, windows = self.val_batch_size, self.val_groups, self.val_windows
        check(m % groups == 0, f"--val_groups={groups}: does not divide --val_batch_size={m}")
        check(not windows or windows >= m, f"--val_windows={windows}: fewer than --val_batch_size={m}")
        fresh = self.val_interval == 1 and not self.val_average
        midpoint = "--value_order=2 takes its gradient at the midpoint of the step: no --val_interval or --val_average"
        check(self.value_order == 1 or fresh, midpoint)
        masks = "--value_order=2 with --dropout needs --compile=False: two graphs may draw different masks"
        check(self.value_order == 1 or not (self.dropout and self.compile), masks)
        float16 = "float16 needs a loss scaler, which would scale the values too; " if self.dtype == "float16" else ""
        check(self.dtype in ("bfloat16", "float32"), f"--dtype={self.dtype}: {float16}expected bfloat16 or float32")
        heads = f"--n_embd={self.n_embd} is not divisible by --n_head={self.n_head}"
        check(self.n_embd % self.n_head == 0, heads)
        adam = "--value_direction=adam needs --optimizer=adamw, whose scaling it takes"
        check("adam" not in self.value_direction or self.optimizer == "adamw" or not self.score, adam)
        arms = [self.filter_negative, self.filter_lowest > 0, self.drop_random > 0]
        check(sum(arms) < 2, "--filter_negative, --filter_lowest and --drop_random are arms of their own: take one")
        flag = "filter_negative=True" if self.filter_negative else f"filter_lowest={self.filter_lowest}"
        check(not any(arms[:2]) or self.filter_from, f"--{flag} needs --filter_from=<out_dir of a scored run>")
        self.lr_decay_iters = self.lr_decay_iters or self.max_iters
        if self.decay_lr:
            check(
                self.min_lr <= self.learning_rate,
                f"--min_lr={self.min_lr} is above --learning_rate={self.learning_rate}",
            )
            late = f"--warmup_iters={self.warmup_iters} is not below --lr_decay_iters={self.lr_decay_iters}"
            check(self.warmup_iters < self.lr_decay_iters, late)
        names = "filtered", "lowest", "random", "control"
        arm = next(name for name, taken in zip(names, [*arms, True], strict=True) if taken)
        self.out_dir = self.out_dir.replace("{arm}", arm).replace("{seed}", str(self.seed))
        same = self.filter_from and os.path.abspath(self.filter_from) == os.path.abspath(self.out_dir)
        check(not same, f"--out_dir={self.out_dir} is also --filter_from; give this run a folder of its own")


# what may change between the start of a run and its resumption, because the numbers do not depend on it
FREE_KNOBS = {"out_dir", "init_from", "max_iters", "log_interval", "checkpoint_interval", "data_dir", "device"}
FREE_KNOBS |= {"compile", "wandb_log", "wandb_project", "wandb_run_name", "process_timeout"}


# what a checkpoint holds
CHECKPOINT = ("model", "optimizer", "model_args", "iter_num", "position", "negative", "knobs", "fingerprint")
CHECKPOINT += ("metrics_bytes", "order", "val_gradients", "val_sets")


def get_lr(it, knobs):
    """The learning rate of iteration `it`: linear warm-up, cosine decay, then min_lr."""
    if not knobs.decay_lr:
        return knobs.learning_rate
    if it < knobs.warmup_iters:
        return knobs.learning_rate * (it + 1) / (knobs.warmup_iters + 1)
    ratio = min(1.0, (it - knobs.warmup_iters) / (knobs.lr_decay_iters - knobs.warmup_iters))
    return knobs.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (knobs.learning_rate - knobs.min_lr)


def make_model(knobs, vocab_size, checkpoint):
    """The model that init_from asks for; `vocab_size` is the corpus's, `checkpoint` that of a resumption or ckpt.pt."""
    if knobs.init_from == "resume":
        model = GPT(GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    elif knobs.init_from == "scratch" or checkpoint is not None:
        shape = {key: getattr(knobs, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
        shape["vocab_size"] = knobs.vocab_size or vocab_size
        model = GPT(GPTConfig(**shape, dropout=knobs.dropout))
        if checkpoint is not None:
            for key, value in shape.items():
                found = checkpoint["model_args"].get(key)
                if found != value:
                    what = f"its {key} is {found}, this run's is {value}"
                    raise UserError(f"--init_from={knobs.init_from}: {what}; use --{key}={found}")
            # nanoGPT's torch.compile leaves a prefix in its checkpoints
            model.load_state_dict({key.removeprefix("_orig_mod."): t for key, t in checkpoint["model"].items()})
    else:
        model = GPT.from_pretrained(knobs.init_from, knobs.dropout)
        if knobs.block_size > model.config.block_size:
            n = model.config.block_size
            raise UserError(
                f"--block_size={knobs.block_size}: {knobs.init_from} has {n} positions; use --block_size={n}"
            )
        model.crop_block_size(knobs.block_size)
    if model.config.vocab_size < vocab_size:
        found = f"the corpus {knobs.dataset} has {vocab_size} tokens and the model {model.config.vocab_size}"
        raise UserError(
            f"--vocab_size={knobs.vocab_size} --init_from={knobs.init_from}: {found}; use a vocab_size of 0"
        )
    return model


def describe(knobs, fingerprint, model, coverage):
    """What config.json says of a run: everything that it takes to repeat it."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    on_gpu = torch.device(knobs.device).type == "cuda"
    return {
        "knobs": asdict(knobs),
        "fingerprint": fingerprint,
        "model": asdict(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "coverage": coverage,
        "commit": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "hardware": {
            "device": torch.cuda.get_device_name(knobs.device)
            if on_gpu
            else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }


def open_checkpoint(knobs, ckpt_path, fingerprint, val_sets):
    """The checkpoint that the run starts from, or None; raises UserError where it is not one of this very run's."""
    if knobs.init_from != "resume":
        weights = ("model", "model_args")
        is_file = knobs.init_from.endswith(".pt")
        return load_torch(knobs.init_from, weights, "give another --init_from") if is_file else None
    mend = "start the run with --init_from=scratch, in another --out_dir if this one holds one"
    checkpoint = load_torch(ckpt_path, CHECKPOINT, mend)
    if checkpoint.get("fingerprint") != fingerprint:
        mend = "choose another --out_dir or --dataset"
        raise UserError(f"{ckpt_path}: trained on another corpus than --dataset={knobs.dataset}; {mend}")
    changed = [name for name in val_sets if checkpoint["val_sets"].get(name, val_sets[name]) != val_sets[name]]
    if changed:
        found = f"--val_sets={knobs.val_sets}: {', '.join(changed)} is another corpus than {ckpt_path} began with"
        raise UserError(f"{found}; bring it back, or train anew in another --out_dir")
    then, now = checkpoint["knobs"], asdict(knobs)
    for key in now:
        if key not in FREE_KNOBS and then.get(key) != now[key]:
            mend = f"resume with --{key}={then.get(key)}"
            raise UserError(f"{ckpt_path}: its run has {key} = {then.get(key)}, not {now[key]}; {mend}")
    return checkpoint


def main():
    knobs = configure(Knobs, sys.argv[1:])
    keep_freed_memory()
    with processes(knobs) as (rank, world), ExitStack() as stack:
        train(knobs, rank, world, stack)


def train(knobs, rank, world, stack):
    """The run of this process; `stack` closes its files and gives back the signal handler."""
    device_type = knobs.device.split(":")[0]
    resume = knobs.init_from == "resume"
    B = knobs.batch_size * knobs.gradient_accumulation_steps  # windows in an iteration

    # the corpus and the orders in which its windows come
    meta, data, n_windows = load_corpus(knobs)
    scored = load_filter(knobs, meta["fingerprint"], n_windows["train"])
    filter_knobs = knobs.filter_negative or knobs.filter_lowest > 0, knobs.filter_pool, knobs.drop_random
    order, coverage = training_order(n_windows["train"], knobs.seed, *filter_knobs, scored)
    val_sets = open_sets(knobs, meta, data, "val", knobs.seed, VAL) if knobs.score else {}
    kinds = knobs.value_direction.split(",")
    directions = [f"{name}:{kind}" for name in val_sets for kind in kinds for _ in range(knobs.val_groups)]
    named = open_sets(knobs, meta, data, "test", 0, TEST)  # seed 0: the same windows for all seeds
    fingerprints = {name: fingerprint for name, (*_, fingerprint) in named.items()}  # of val_sets' corpora
    test_sets = {"test_loss": (data["test"], WindowOrder(n_windows["test"], 0, TEST))}
    test_sets |= {f"test_loss_{name}": test_set for name, (*test_set, _) in named.items() if name != "all"}
    for name, (tokens, windows) in test_sets.items():
        n = min(windows.n, knobs.eval_iters * B)  # however the batch is cut into micro-batches
        n -= n % B if n > B else 0  # full batches: torch.compile makes a graph for every shape
        test_sets[name] = tokens, windows.take(0, n)[0]

    # the model and the optimiser
    ckpt_path = os.path.join(knobs.out_dir, "ckpt.pt")
    metrics_path = os.path.join(knobs.out_dir, "metrics.jsonl")
    if rank == 0:
        try:
            os.makedirs(knobs.out_dir, exist_ok=True)
            metrics_file = stack.enter_context(open(metrics_path, "ab", buffering=0))  # noqa: SIM115 (the stack's)
        except OSError as error:
            raise UserError(f"--out_dir={knobs.out_dir}: {metrics_path}: {error.strerror}") from error
        lock(metrics_file, knobs.out_dir)
        # Nothing is in the metrics before the first checkpoint: without either, a run was killed before it began.
        begun = os.path.exists(ckpt_path) or os.path.getsize(metrics_path) or log_files(knobs.out_dir)
        if begun and not resume:
            mend = "go on with --init_from=resume or choose another --out_dir"
            raise UserError(f"{knobs.out_dir}: holds a run already; {mend}")
    checkpoint = open_checkpoint(knobs, ckpt_path, meta["fingerprint"], fingerprints)
    torch.manual_seed(knobs.seed)
    try:
        model = make_model(knobs, meta["vocab_size"], checkpoint).to(knobs.device)
    except RuntimeError as error:
        what = f"--n_layer={knobs.n_layer} --n_embd={knobs.n_embd} --init_from={knobs.init_from}"
        raise UserError(f"{what}: there is no making this model here ({str(error).strip():.200})") from error
    betas = (knobs.beta1, knobs.beta2)
    optimizer = model.configure_optimizers(knobs.optimizer, knobs.weight_decay, knobs.learning_rate, betas)
    params = list(model.parameters())
    iter_num, position = 0, 0
    negative = []  # the share of values below zero, for each iteration since the last printed line
    val_gradients = []  # {parameter: gradient} of each group of windows of each validation set
    if resume:
        if checkpoint["order"] != order.digest():
            mend = "bring its values.npz back, or train anew in another --out_dir"
            raise UserError(f"--filter_from={knobs.filter_from}: other windows than {ckpt_path} began with; {mend}")
        optimizer.load_state_dict(checkpoint["optimizer"])
        iter_num, position = checkpoint["iter_num"], checkpoint["position"]
        negative = list(torch.tensor(checkpoint["negative"], device=knobs.device))
        for gradient in checkpoint["val_gradients"]:
            val_gradients.append({p: g.to(knobs.device) for p, g in zip(params, gradient, strict=True)})
        knobs.init_from = checkpoint["knobs"]["init_from"]  # what config.json shall go on saying
    if world > 1:
        dist.barrier()  # all have seen the folder as it was
    if resume and rank == 0:  # what the interrupted run did after this checkpoint is about to happen again
        for path in glob.glob(os.path.join(glob.escape(knobs.out_dir), "**", "*.tmp"), recursive=True):
            os.remove(path)
        found, said = os.path.getsize(metrics_path), checkpoint["metrics_bytes"]
        if found < said:
            raise UserError(f"{metrics_path}: truncated, {found:,} bytes of {said:,}; train anew in another --out_dir")
        os.truncate(metrics_path, said)
        later = [path for n, path in log_files(knobs.out_dir).items() if n > iter_num]
        values_path = os.path.join(knobs.out_dir, "values.npz")
        for path in later + [values_path] * (iter_num < knobs.max_iters and os.path.exists(values_path)):
            os.remove(path)
        if knobs.score and iter_num:  # damage is better known now than at the end
            reached = int(read_log(knobs.out_dir)["iter"][-1]) + 1
            if reached != iter_num:
                raise UserError(f"{knobs.out_dir}/dot_prod: ends at iteration {reached}, {ckpt_path} at {iter_num}")
    del checkpoint
    buffers = attach_directions(model, len(directions)) if knobs.score else None
    # a graph for every shape: training, scoring, validation, and the last batch of each test set
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 + 2 * len(test_sets))
    options = dict(fullgraph=True, dynamic=False, disable=not knobs.compile)
    compiled, compiled_precondition = torch.compile(model, **options), torch.compile(precondition, **options)
    net = compiled  # what trains; validation and evaluation need no averaging of gradients
    if world > 1:  # the buffers are the directions, which every rank computes
        net = DistributedDataParallel(compiled, forward_sync_buffers=False)
    autocast = torch.autocast(device_type, torch.bfloat16) if knobs.dtype == "bfloat16" else nullcontext()

    # the run's folder
    micro_steps = knobs.gradient_accumulation_steps // world  # of this rank
    if rank == 0:
        description = describe(knobs, meta["fingerprint"], model, coverage) | dict(val_sets=fingerprints)
        with atomic_write(os.path.join(knobs.out_dir, "config.json")) as file:
            file.write(json.dumps(description, indent=1).encode())
        if knobs.wandb_log:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb_log=True: pip install wandb") from None
            wandb.init(project=knobs.wandb_project, name=knobs.wandb_run_name, config=asdict(knobs))
        print(f"{description['parameters']:,} parameters on {world} x {knobs.device}, {knobs.dtype}")
        print(f"{B * knobs.block_size:,} tokens an iteration; windows of {knobs.block_size} tokens: {n_windows}")
        print_coverage(coverage, knobs)

    def total(tensor):
        """The sum over the ranks, in place."""
        if world > 1:
            dist.all_reduce(tensor)
        return tensor

    lasting = knobs.val_interval > 1 or knobs.val_average > 0  # validation gradients serve more than one iteration
    if knobs.score:
        data_value.weight_gradients = {}
        shapes = weight_gradient_shapes(model, knobs.batch_size, knobs.block_size, device_type)
        choice, dtype = [None], getattr(torch, knobs.dtype)
        if rank == 0:
            choice[0] = kernels.choose(knobs.device, shapes, dtype, data_value.add_samples, len(directions))
            print(choice[0][1])
        if world > 1:
            dist.broadcast_object_list(choice, device=torch.device(knobs.device))
        data_value.weight_gradients = choice[0][0]

    def batch(tokens, ids):
        return get_batch(tokens, ids, knobs.block_size, model.config.vocab_size, knobs.device)

    @torch.no_grad()
    def evaluate(tokens, ids):
        """Mean loss in nats of the windows `ids`, in eval mode; the ranks take turns at the batches."""
        model.eval()
        loss = torch.zeros((), device=knobs.device)
        for start in range(rank * knobs.batch_size, len(ids), world * knobs.batch_size):
            chunk = ids[start : start + knobs.batch_size]
            with autocast:
                loss += compiled(*batch(tokens, chunk))[1] * (len(chunk) / len(ids))
        model.train()
        return total(loss).item()

    def val_ids(name, iter_num):
        """The windows of a validation set in an iteration's direction."""
        return val_sets[name][1].take(iter_num // knobs.val_interval * knobs.val_batch_size, knobs.val_batch_size)[0]

    def set_directions(stepped=False):
        """Fill the directions' buffers, from fresh validation gradients if it is time."""
        nonlocal val_loss, val_ms, untimed
        if iter_num % knobs.val_interval == 0:
            started = synchronized_time(device_type) if untimed else 0.0
            fresh, losses = [], []
            if not knobs.val_average:
                val_gradients.clear()  # before there are as many again
            for name, (tokens, *_) in val_sets.items():
                for ids in np.split(val_ids(name, iter_num), knobs.val_groups):
                    mine = np.array_split(ids, world)[rank]
                    with autocast:
                        gradient, loss = validation_gradient(compiled, *batch(tokens, mine), knobs.batch_size)
                    if world > 1:
                        average_over_ranks(gradient, loss, len(mine) / len(ids))
                    fresh.append(gradient)
                    losses.append(loss)
            val_loss = torch.stack(losses).mean()
            if knobs.val_average and val_gradients:
                passes, x = iter_num // knobs.val_interval + 1, math.log(2) * knobs.val_interval / knobs.val_average
                weight = math.expm1(-x) / math.expm1(-x * passes)  # (1 - d) / (1 - d^passes), as Adam's bias correction
                for old, new in zip(val_gradients, fresh, strict=True):
                    torch._foreach_lerp_([old[p] for p in params], [new[p] for p in params], weight)
            else:
                val_gradients[:] = fresh
            if untimed:
                val_ms, untimed = (synchronized_time(device_type) - started) * 1000 / knobs.val_interval, False
        k = 0
        for i in range(0, len(val_gradients), knobs.val_groups):
            groups = val_gradients[i : i + knobs.val_groups]
            mean = mean_gradient(groups)
            for kind in kinds:
                for gradient in groups:
                    adamw = optimizer if kind.startswith("adam") else None
                    without = model.lm_head.weight if kind.endswith("-wte") else None
                    set_direction(buffers, gradient, adamw, k, stepped, without, mean, compiled_precondition)
                    k += 1

    def forward(net, step, ids, scored):
        """The loss of a micro-batch as its part of the rank's, and its alpha if it is scored."""
        size = knobs.batch_size, len(directions)
        alpha = torch.zeros(size, device=knobs.device, requires_grad=True) if scored else None
        if knobs.dropout:  # masks that depend on neither the number of processes nor on interruptions
            torch.manual_seed(hash_of(knobs.seed, iter_num, step))
        with autocast:
            return net(*batch(data["train"], ids), alpha)[1] / micro_steps, alpha

    def note(*numbers):
        """The first numbers of which one is not finite, on any process, stay in `bad`."""
        nonlocal bad
        numbers = torch.stack([torch.full_like(numbers[0], iter_num), *numbers])
        not_finite = total((~numbers.isfinite().all()).float()) > 0
        bad = torch.where(not_finite & (bad[0] < 0), numbers, bad)

    def record(metrics, line):
        if rank == 0:
            text = json.dumps(metrics).encode() + b"\n"
            with writing(metrics_path):
                if metrics_file.write(text) < len(text):  # the rest of the line would fail
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            tqdm.write(line)
            if knobs.wandb_log:
                wandb.log(metrics)

    def check_numbers():
        """
        Stop at the first step since the last check that had a number that is not finite. The optimiser has stood still
        since (with value_order 2, since the step behind it), so that its windows can still be asked for their losses.
        """
        bad_iter, *numbers = bad.tolist()
        bad_iter = int(bad_iter)
        if bad_iter < 0:
            recent.clear()
            return
        names = "loss {:.4g}, gradient norm {:.4g}, validation loss {:.4g}, sum of dot products {:.4g}"
        message = f"iteration {bad_iter}: not every number is finite ({names.format(*numbers)})"
        if rank == 0:
            model.eval()
            sets = [("train", data["train"], recent[bad_iter])]
            if not math.isfinite(numbers[2]):
                sets += [(f"val ({name})", val_sets[name][0], val_ids(name, bad_iter)) for name in val_sets]
            for name, tokens, ids in sets:
                with torch.no_grad(), autocast:
                    losses = [model(*batch(tokens, ids[i : i + 1]))[1].item() for i in range(len(ids))]
                worst = int(np.nan_to_num(losses, nan=np.inf).argmax())
                window = tokens.windows(ids[worst : worst + 1], knobs.block_size)[0].tolist()
                text = get_tokenizer(meta["tokenizer"]).decode(window)
                message += f"; its {name} windows are {', '.join(map(str, ids))}; the worst of them, {ids[worst]}, "
                message += f"with a loss of {losses[worst]:.4g}, reads {text!r}"
        if world > 1:
            dist.barrier()  # torchrun ends all of them soon after the first
        stop_run(message)

    def stop_run(message):
        kept = f"; the last checkpoint in {knobs.out_dir} is whole" if os.path.exists(ckpt_path) else ""
        raise UserError(f"{message}; nothing of this iteration is logged{kept}")

    def save():
        """A file of dot products, then the checkpoint, so that the log is never behind it."""
        check_numbers()
        if not torch.isfinite(torch.nn.utils.get_total_norm(params)):
            stop_run(f"iteration {iter_num}: the parameters are not finite; lower --learning_rate={lr:g}")
        if entries:
            dots = torch.stack([entry["dot_product"] for entry in entries])  # (k, B / world, K)
            parts = [torch.empty_like(dots) for _ in range(world)] if rank == 0 else None
            if world > 1:
                dist.gather(dots, parts)
            if rank == 0:
                dots = torch.cat(parts, dim=1) if world > 1 else dots
                logged = [entry | {"dot_product": row} for entry, row in zip(entries, dots, strict=True)]
                write_log(knobs.out_dir, iter_num, logged, directions)
            entries.clear()
        shares = (total(torch.stack(negative)) / world).tolist() if negative else []
        if rank == 0:
            with writing(metrics_path):
                os.fsync(metrics_file.fileno())
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "model_args": asdict(model.config),
                "iter_num": iter_num,
                "position": position,
                "order": order.digest(),
                "negative": shares,
                "knobs": asdict(knobs),
                "fingerprint": meta["fingerprint"],
                "val_sets": fingerprints,
                "metrics_bytes": os.path.getsize(metrics_path),
                "val_gradients": [[g[p] for p in params] for g in val_gradients] if lasting else [],
            }
            with atomic_write(ckpt_path) as file:
                torch.save(state, file)

    terminated = watch_sigterm(stack, world, knobs)

    # training
    model.train()
    lr = 0.0
    val_loss = torch.zeros((), device=knobs.device)
    val_ms, untimed = 0.0, True  # of validation gradients, an iteration's share; timed once for each printed line
    entries = []  # the dot products since the last checkpoint, left on the device
    recent = {}  # iteration: its windows, since the last check of the numbers
    # iteration, loss, gradient norm, validation loss and sum of dot products of the first step where one of them is not
    # finite; from then on the optimiser's kernels do nothing. All this stays on the device: no step waits for it.
    bad = torch.full((5,), -1.0, device=knobs.device)
    clock, timed = time.perf_counter(), 0
    progress = tqdm(total=knobs.max_iters, initial=iter_num, unit="it", disable=None if rank == 0 else True)
    while True:
        last = iter_num == knobs.max_iters
        paused = time.perf_counter()
        stopped = terminated() and not last
        if last or stopped or iter_num % knobs.checkpoint_interval == 0:
            save()
        if stopped:
            progress.close()
            if rank == 0:
                print(f"SIGTERM: stopped after {iter_num} iterations; {how_to_resume(knobs)}")
            return
        if last or iter_num % knobs.eval_interval == 0:
            check_numbers()
            losses = {name: evaluate(*test_set) for name, test_set in test_sets.items()}
            if not all(map(math.isfinite, losses.values())):
                stop_run(f"iteration {iter_num}: a test loss is not finite: {losses}")
            said = ", ".join(f"{name.replace('_', ' ', 2)} {loss:.4f}" for name, loss in losses.items())
            record({"iter": iter_num} | losses, f"iter {iter_num}: {said}")
        if last:
            break
        report = iter_num % knobs.log_interval == 0 or iter_num == knobs.max_iters - 1
        if knobs.score and report:
            first_set, untimed = next(iter(val_sets)), True
            val_before = evaluate(val_sets[first_set][0], val_ids(first_set, iter_num))
        clock += time.perf_counter() - paused

        lr = get_lr(iter_num, knobs)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the directions: validation windows of this iteration's own, before the batch is seen
        if knobs.score and knobs.value_order == 1:
            set_directions()

        # forward and backward; the gradient of alpha is the dot products
        ids, position = order.take(position, B)
        mean_loss, dots = 0.0, []
        micro = micro_batches(ids, knobs.batch_size, rank, world)
        for step, micro_ids in micro:
            if world > 1:
                net.require_backward_grad_sync = step == micro[-1][0]
            loss, alpha = forward(net, step, micro_ids, knobs.score and knobs.value_order == 1)
            loss.backward()
            mean_loss = mean_loss + loss.detach()
            if alpha is not None:
                dots.append(alpha.grad * (knobs.batch_size * micro_steps))

        # the step
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        clip = (knobs.grad_clip / (norm + 1e-6)).clamp(max=1.0) if knobs.grad_clip else torch.ones_like(norm)
        if knobs.grad_clip:
            torch._foreach_mul_([p.grad for p in params], clip)
        note(mean_loss, norm, val_loss, sum((part.sum() for part in dots), torch.zeros_like(norm)))
        recent[iter_num] = ids
        optimizer.found_inf = (bad[0] >= 0).float()
        theta = [p.detach().clone() for p in params] if knobs.score and (report or knobs.value_order == 2) else None
        optimizer.step()

        # to second order: the directions at the step's midpoint, and the batch once more where the step began
        if knobs.score and knobs.value_order == 2:
            stepped = [p.detach().clone() for p in params]
            retreat_to_midpoint(optimizer)
            set_directions(stepped=True)
            with torch.no_grad():
                torch._foreach_copy_(params, theta)
            for step, micro_ids in micro:
                loss, alpha = forward(compiled, step, micro_ids, True)
                dots.append(torch.autograd.grad(loss, alpha)[0] * (knobs.batch_size * micro_steps))
            with torch.no_grad():
                torch._foreach_copy_(params, stepped)
            note(mean_loss, norm, val_loss, torch.cat(dots).sum())
        optimizer.zero_grad(set_to_none=True)
        if knobs.score:
            dots = torch.cat(dots)
            entries.append(dict(iter=iter_num, lr=lr, clip=clip, sample_id=ids, dot_product=dots))
            first = dots[:, : knobs.val_groups].mean(1)  # of the first column
            negative.append((first < 0).float().mean())
        timed += 1

        if report:
            check_numbers()
            metrics = {"iter": iter_num, "loss": total(mean_loss).item() / world, "lr": lr, "grad_norm": norm.item()}
            metrics["step_ms"] = (time.perf_counter() - clock) * 1000 / timed
            metrics["tokens_per_s"] = B * knobs.block_size / metrics["step_ms"] * 1000
            line = "iter {iter}: loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, {step_ms:.0f} ms"
            if knobs.score:
                gradient = mean_gradient(val_gradients[: knobs.val_groups])
                change = [p.detach() - b for p, b in zip(params, theta, strict=True)]
                metrics["negative"] = total(torch.stack(negative).mean()).item() / world
                metrics["predicted"] = -sum((gradient[p] * d).sum() for p, d in zip(params, change, strict=True)).item()
                metrics["realised"] = val_before - evaluate(val_sets[first_set][0], val_ids(first_set, iter_num))
                metrics["value_sum"] = total(lr * clip / B * first.sum()).item()
                metrics["val_ms"] = val_ms
                line += " ({val_ms:.0f} validation), {negative:.1%} negative; validation loss: predicted drop "
                line += "{predicted:.2e}, realised {realised:.2e}, sum of values {value_sum:.2e}"
                negative.clear()
                del change
            record(metrics, line.format(**metrics))
            clock, timed = time.perf_counter(), 0
        iter_num += 1
        progress.update()

    progress.close()
    if knobs.score and rank == 0:
        write_values(knobs.out_dir)
        sample_id, value, visits = load_values(knobs.out_dir)
        share = f"{(value < 0).mean():.1%} of them negative"
        print(f"{knobs.out_dir}/values.npz: {len(sample_id):,} windows valued in {visits.sum():,} visits, {share}")
        if not knobs.val_average:  # with it some 40% are negative, although its values agree better
            advice = "; values agree better from run to run with --val_average=32" if knobs.value_order == 1 else ""
            print(f"that share tells how noisy the direction was (README.md, 'Why 34% and not 16%'){advice}")


def print_coverage(coverage, knobs):
    if coverage:
        counts = "{corpus:,} windows in the corpus, {scored:,} scored, {negative:,} {low}, {eligible:,} eligible"
        counts = counts.format(low="lowest" if knobs.filter_lowest else "negative", **coverage)
        print(f"values of {knobs.filter_from}, pool '{knobs.filter_pool}': {counts};")
        print(f"the filter can touch {coverage['touchable']:.1%} of the draws")
        if coverage["touchable"] < 0.5:
            print("most draws are unscored windows that no filter can reject: expect little of it")


def synchronized_time(device_type):
    if device_type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()

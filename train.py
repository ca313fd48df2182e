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
SIGTERM and Ctrl-C end a run after the step it is in, with a checkpoint; a second Ctrl-C ends it at once.
"""

import inspect
import math
import signal
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data_value import Directions, eval_mode, retreat_to_midpoint, validation_gradient
from model import GPT, GPTConfig
from support.configurator import UserError, check, check_training, configure
from support.cost import line_of, step_cost, timed
from support.graphs import recorded, recorder_for
from support.processes import autocast, how_to_resume, keep_freed_memory, processes, watch_signals, without_traceback
from support.run_folder import RunFolder
from support.values import load_values, write_values
from support.watch import Watch
from support.windows import Windows, hash_of


@dataclass
class Knobs:
    # the run
    out_dir: str = "out"  # its folder; {arm} in it becomes 'filtered', 'random' or 'control', {seed} the seed
    init_from: str = "scratch"  # 'scratch', 'resume', 'gpt2' (-medium, -large, -xl), a transformers folder, a ckpt.pt
    seed: int = 1337  # of the weights, the dropout masks and the order of the windows
    eval_interval: int = 250  # iterations between evaluations of the test loss
    eval_iters: int = 50  # batches (of an iteration's size) of test windows in it, always the same windows
    checkpoint_interval: int = 1000  # iterations between checkpoints, each preceded by a file of dot products
    log_interval: int = 10  # iterations between printed lines
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "data-value"
    wandb_run_name: str = ""  # '': the name of out_dir
    # the data
    data_dir: str = "data"
    dataset: str = "openwebtext"  # the folder of data_dir that prepare_owt.py has written
    batch_size: int = 16  # windows in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in an iteration
    block_size: int = 1024  # tokens in a window
    # the values
    score: bool = False  # value every window of every batch
    val_batch_size: int = 1  # m, the validation windows that a direction is made of, by default drawn every iteration
    val_sets: str = "all"  # of the val split: 'all', domains, corpora of data_dir; 'a,b': values for each; \, in a name
    val_windows: int = 0  # draw only from so many windows of each set; 0: from all
    val_groups: int = 1  # make a direction of each of so many parts of the m windows, for standard errors
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
    compile: bool = True  # torch.compile the model and AdamW's direction; on one GPU CUDA graphs replay them
    process_timeout: int = 600  # seconds after which processes that wait for a dead or hung one give up

    def __post_init__(self):
        check_training(self)


def get_lr(it, knobs):
    """The learning rate of iteration `it`: linear warm-up, cosine decay, then min_lr."""
    if not knobs.decay_lr:
        return knobs.learning_rate
    if it < knobs.warmup_iters:
        return knobs.learning_rate * (it + 1) / (knobs.warmup_iters + 1)
    ratio = min(1.0, (it - knobs.warmup_iters) / (knobs.lr_decay_iters - knobs.warmup_iters))
    return knobs.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (knobs.learning_rate - knobs.min_lr)


def make_model(knobs, vocab_size, checkpoint, resumed):
    """The model that init_from asks for; `vocab_size` is the corpus's, `checkpoint` that of a resumption or ckpt.pt."""
    shape = {key: getattr(knobs, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    shape["vocab_size"] = knobs.vocab_size or vocab_size
    try:
        if checkpoint:
            model = GPT.from_checkpoint(checkpoint, knobs.init_from, knobs.dropout)
        elif knobs.init_from == "scratch":
            model = GPT(GPTConfig(**shape, dropout=knobs.dropout))
        else:
            model = GPT.from_pretrained(knobs.init_from, knobs.dropout)
        if knobs.block_size < model.config.block_size:
            model.crop_block_size(knobs.block_size)
        found = asdict(model.config)
        asked = shape if checkpoint and not resumed else ["block_size"]  # transformers or the run has said the rest
        other = [f"--{key}={found[key]}" for key in asked if found[key] != shape[key]]
        check(not other, f"--init_from={knobs.init_from}: a model of another shape; use {' '.join(other)}")
        model.to(knobs.device)
    except RuntimeError as error:
        what = f"--n_layer={knobs.n_layer} --n_embd={knobs.n_embd} --init_from={knobs.init_from}"
        raise UserError(f"{what}: there is no making this model here ({str(error).strip():.200})") from error
    what = f"the corpus {knobs.dataset} has {vocab_size} tokens and the model {found['vocab_size']}"
    flags = f"--vocab_size={knobs.vocab_size} --init_from={knobs.init_from}"
    check(found["vocab_size"] >= vocab_size, f"{flags}: {what}; use a vocab_size of 0")
    return model


def compile_model(model, knobs, ranks, n_test_sets):
    """
    (net, compiled): what trains, which averages the gradients of the ranks, and what validates and evaluates. Raises
    UserError where nothing can be compiled.
    """
    if knobs.compile:
        try:
            torch.compile(torch.neg)(torch.ones(1, device=knobs.device))
        except Exception as error:  # each of its parts has exceptions of its own
            what, mend = f"{type(error).__name__}: {error}", "use --compile=False, or install a C++ compiler"
            raise UserError(f"--compile=True: torch.compile does not work here ({what:.150}); {mend}") from error
    # a graph for every shape: training, scoring, validation, and the last batch of each test set
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 + 2 * n_test_sets)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, disable=not knobs.compile)
    if ranks.world == 1:
        return compiled, compiled
    # The buffers are the directions, which every rank computes. torch 2.13 has another name for not sending them.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(compiled, **{buffers: False}), compiled


def state_of(model, optimizer, directions):
    """What a checkpoint keeps of these three; `directions` may be None."""
    state = dict(model=model.state_dict(), model_args=asdict(model.config), optimizer=optimizer.state_dict())
    return state | dict(val_gradients=directions.state() if directions else [])


def restore(checkpoint, model, optimizer, directions):
    """
    Put the states of the optimiser and of the directions back. Returns the iteration, the position among the windows
    and the shares of negative values that no line has told yet, a list of scalars on the device.
    """
    optimizer.load_state_dict(checkpoint["optimizer"])
    if directions:
        directions.load_state(checkpoint["val_gradients"], list(model.parameters()))
    negative = torch.tensor(checkpoint["negative"], device=model.lm_head.weight.device)
    return checkpoint["iter_num"], checkpoint["position"], list(negative)


def mean_loss_of(net, x, y, alpha, knobs):
    """Returns it for a micro-batch x, y, (b, T), with alpha, (b, K), or None."""
    with autocast(knobs):
        return net(x, y, alpha)[1]


def add_gradients(net, directions, micro_steps, knobs, x, y):
    """
    Add a micro-batch's gradients to those of the parameters. Returns its part of the mean loss and, in a run that
    scores to first order, its dots, (b, K).
    """
    alpha = directions.alpha(len(x)) if knobs.score and knobs.value_order == 1 else None
    loss = mean_loss_of(net, x, y, alpha, knobs) / micro_steps
    loss.backward()
    return (loss.detach(),) if alpha is None else (loss.detach(), alpha.grad * (len(x) * micro_steps))


def dots_alone(net, directions, micro_steps, knobs, x, y):
    """Returns the dots of a micro-batch, (b, K); no gradient is added."""
    alpha = directions.alpha(len(x))
    (dots,) = torch.autograd.grad(mean_loss_of(net, x, y, alpha, knobs) / micro_steps, alpha)
    return (dots * (len(x) * micro_steps),)


def validate(net, knobs, x, y):
    """Returns the validation gradient of every parameter, and the mean loss."""
    with autocast(knobs):
        gradient, loss = validation_gradient(net, x, y, knobs.batch_size)
    return *gradient.values(), loss


def seed_dropout(iter_num, micro_step, knobs):
    """The masks depend neither on the number of processes nor on interruptions."""
    if knobs.dropout:
        torch.manual_seed(hash_of(knobs.seed, iter_num, micro_step))


def fresh_gradients(gradient_of, params, windows, iter_num, knobs, ranks):
    """Yields (gradient, mean loss) of every group of this iteration's windows of every set; the ranks share a group."""
    for name in windows.val_sets:
        tokens, ids = windows.validation(name, iter_num)
        for group in np.split(ids, knobs.val_groups):
            mine = np.array_split(group, ranks.world)[ranks.rank]
            *gradient, loss = gradient_of(*windows.batch(tokens, mine))
            gradient = dict(zip(params, gradient, strict=True))
            ranks.average(gradient, loss, len(mine) / len(group))
            yield gradient, loss


@torch.no_grad()
def evaluate(net, windows, tokens, ids, knobs, ranks):
    """Mean loss in nats of the windows `ids` of the Tokens, in eval mode; the ranks take turns at the batches."""
    loss = torch.zeros((), device=knobs.device)
    with eval_mode(net):
        for start in range(ranks.rank * knobs.batch_size, len(ids), ranks.world * knobs.batch_size):
            chunk = ids[start : start + knobs.batch_size]
            with autocast(knobs):
                loss += net(*windows.batch(tokens, chunk))[1] * (len(chunk) / len(ids))
    return ranks.total(loss).item()


def step_loss(net, windows, iter_num, knobs, ranks):
    """The loss that the step of this iteration should lower: of its own windows of the first validation set."""
    return evaluate(net, windows, *windows.validation(next(iter(windows.val_sets)), iter_num), knobs, ranks)


def test_losses(net, windows, iter_num, folder):
    """The metrics of an evaluation on every test set, and the line that says them."""
    how = folder.knobs, folder.ranks
    losses = {name: evaluate(net, windows, *found, *how) for name, found in windows.test_sets.items()}
    if not all(map(math.isfinite, losses.values())):
        folder.stop(f"iteration {iter_num}: a test loss is not finite: {losses}")
    lengths = windows.bytes_per_token
    bpb = {name.replace("loss", "bpb", 1): losses[name] / math.log(2) / lengths[name] for name in lengths}
    said = ", ".join(f"{name.replace('_', ' ', 2)} {value:.4f}" for name, value in (losses | bpb).items())
    return {"iter": iter_num} | losses | bpb, f"iter {iter_num}: {said}"


def predicted_drop(gradient, params, before):
    """-<G, theta_next - theta>: how much the step lowers the validation loss to first order, in nats."""
    return -sum((gradient[p] * (p.detach() - b)).sum() for p, b in zip(params, before, strict=True)).item()


def train(knobs, ranks, stack):
    """The run of this process; `stack` ends what it begins. Returns the signal that has stopped it, or 0."""
    # the windows; the run's folder; the model, the optimiser and the directions, new or as the checkpoint has them
    windows = Windows(knobs)
    folder = RunFolder(knobs, ranks, windows.identity, stack)
    checkpoint = folder.checkpoint()
    torch.manual_seed(knobs.seed)
    model = make_model(knobs, windows.meta["vocab_size"], checkpoint, folder.resumed)
    windows.vocab_size, params = model.config.vocab_size, list(model.parameters())
    betas = (knobs.beta1, knobs.beta2)
    optimizer = model.configure_optimizers(knobs.optimizer, knobs.weight_decay, knobs.learning_rate, betas)
    directions = Directions(model, windows.val_sets, knobs) if knobs.score else None
    net, compiled = compile_model(model, knobs, ranks, len(windows.test_sets))
    iter_num, position = 0, 0
    negative = []  # the share of values below zero, for each iteration since the last printed line
    if folder.resumed:
        iter_num, position, negative = restore(checkpoint, model, optimizer, directions)
        folder.cut_back(checkpoint)
    del checkpoint
    folder.begin(model, windows.coverage)
    windows.describe(ranks)
    signalled = watch_signals(stack, ranks, knobs)
    watch = Watch(folder, model, windows)

    # training
    model.train(knobs.dropout > 0)  # else eval mode is the same, and Python takes a millisecond to change it and back
    micro_steps = knobs.gradient_accumulation_steps // ranks.world  # of this rank
    recorder = recorder_for(knobs, ranks.world)
    train_on = recorded(partial(add_gradients, net, directions, micro_steps, knobs), recorder)
    dots_of = recorded(partial(dots_alone, compiled, directions, micro_steps, knobs), recorder)
    gradient_of = recorded(partial(validate, compiled, knobs), recorder)
    batches = stack.enter_context(closing(windows.batches(position, ranks)))
    val_loss, val_ms = torch.zeros((), device=knobs.device), 0.0
    line_ms, line_steps = 0.0, 0  # what the iterations since the last printed line took, and how many they are
    progress = tqdm(total=knobs.max_iters, initial=iter_num, unit="it", disable=None if ranks.rank == 0 else True)
    while True:
        last = iter_num == knobs.max_iters
        stopped = 0 if last else signalled()
        reports = iter_num % knobs.log_interval == 0 or iter_num == knobs.max_iters - 1
        saves, tests = iter_num % knobs.checkpoint_interval == 0, iter_num % knobs.eval_interval == 0
        if last or stopped or reports or saves or tests:  # what a GPU has still to do belongs to the steps before
            line_ms += watch.check()
        if last or stopped or saves:
            watch.check_parameters(iter_num, optimizer)
            shares = (ranks.total(torch.stack(negative)) / ranks.world).tolist() if negative else []
            progressed = dict(iter_num=iter_num, position=position, negative=shares)
            state = state_of(model, optimizer, directions) | progressed | dict(tokenizer=windows.meta["tokenizer"])
            folder.save(state, directions.names if knobs.score else [])
        if stopped:
            progress.close()
            if ranks.rank == 0:
                print(f"{signal.Signals(stopped).name}: stopped after {iter_num} iterations; {how_to_resume(knobs)}")
            return stopped
        if last or tests:
            folder.record(*test_losses(compiled, windows, iter_num, folder))
        if last:
            break
        if knobs.score and reports:
            loss_before = step_loss(compiled, windows, iter_num, knobs, ranks)
        started = time.perf_counter()

        lr = get_lr(iter_num, knobs)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the directions, from this iteration's own validation windows: nothing of `fresh` is computed before update()
        fresh = fresh_gradients(gradient_of, params, windows, iter_num, knobs, ranks)
        if knobs.score and knobs.value_order == 1:
            val_loss, val_ms = timed(partial(directions.update, fresh, iter_num), knobs.device, reports)
            directions.fill(optimizer)

        # forward and backward; the gradient of alpha is the dot products
        position, ids, micro_batches = next(batches)
        mean_loss, dots = 0.0, []
        for micro_step, batch in micro_batches:
            if ranks.world > 1:
                net.require_backward_grad_sync = micro_step == micro_batches[-1][0]  # DDP averages once
            seed_dropout(iter_num, micro_step, knobs)
            loss, *scored = train_on(*batch)
            mean_loss = mean_loss + loss
            dots += scored

        # the step
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        clip = (knobs.grad_clip / (norm + 1e-6)).clamp(max=1.0) if knobs.grad_clip else torch.ones_like(norm)
        if knobs.grad_clip:
            torch._foreach_mul_([p.grad for p in params], clip)
        watch.note(iter_num, ids, mean_loss, norm, val_loss, sum((d.sum() for d in dots), torch.zeros_like(norm)))
        optimizer.found_inf = watch.found_inf()
        theta = [p.detach().clone() for p in params] if knobs.score and (reports or knobs.value_order == 2) else None
        optimizer.step()

        # to second order: the directions at the step's midpoint, and the batch once more where the step began
        if knobs.score and knobs.value_order == 2:
            theta_next = [p.detach().clone() for p in params]
            retreat_to_midpoint(optimizer)
            val_loss, val_ms = timed(partial(directions.update, fresh, iter_num), knobs.device, reports)
            directions.fill(optimizer, stepped=True)
            with torch.no_grad():
                torch._foreach_copy_(params, theta)
            for micro_step, batch in micro_batches:
                seed_dropout(iter_num, micro_step, knobs)
                dots += dots_of(*batch)
            with torch.no_grad():
                torch._foreach_copy_(params, theta_next)
            watch.note(iter_num, ids, mean_loss, norm, val_loss, torch.cat(dots).sum())
        optimizer.zero_grad(set_to_none=recorder is None)  # a graph adds to gradients that stay where they are
        if knobs.score:
            dots = torch.cat(dots)
            folder.entries.append(dict(iter=iter_num, lr=lr, clip=clip, sample_id=ids, dot_product=dots))
            first_column = dots[:, : knobs.val_groups].mean(1)
            negative.append((first_column < 0).float().mean())

        if reports:
            watch.check()
        line_ms, line_steps = line_ms + (time.perf_counter() - started) * 1000, line_steps + 1
        if reports:
            mean_loss = ranks.total(mean_loss).item() / ranks.world
            metrics = dict(iter=iter_num, loss=mean_loss, lr=lr, grad_norm=norm.item())
            metrics |= step_cost(line_ms / line_steps, model, knobs, ranks.world)
            if knobs.score:
                metrics["negative"] = ranks.total(torch.stack(negative).mean()).item() / ranks.world
                metrics["predicted"] = predicted_drop(directions.gradient(), params, theta)
                metrics["realised"] = loss_before - step_loss(compiled, windows, iter_num, knobs, ranks)
                metrics["value_sum"] = ranks.total(lr * clip / windows.B * first_column.sum()).item()
                metrics["val_ms"] = val_ms
                negative.clear()
            folder.record(metrics, line_of(metrics))
            line_ms, line_steps = 0.0, 0
        iter_num += 1
        progress.update()

    progress.close()
    if knobs.score and ranks.rank == 0:
        print_values(folder, knobs)
    return 0


def print_values(folder, knobs):
    """Write values.npz at the end of a scored run, and say what its share of negatives tells."""
    write_values(knobs.out_dir, knobs.out_dir)
    sample_id, value, visits = load_values(knobs.out_dir)
    folder.summarise(value)
    share = f"{(value < 0).mean():.1%} of them negative"
    print(f"{knobs.out_dir}/values.npz: {len(sample_id):,} windows valued in {visits.sum():,} visits, {share}")
    if not knobs.val_average:  # with it some 40% are negative, although its values agree better
        advice = "; values agree better from run to run with --val_average=32" if knobs.value_order == 1 else ""
        print(f"that share tells how noisy the direction was (README.md, 'Why 34% and not 16%'){advice}")
    print(f"python trial.py {knobs.out_dir} tells whether dropping them pays")


def main():
    knobs = configure(Knobs, sys.argv[1:])
    keep_freed_memory()
    with without_traceback():
        with processes(knobs) as ranks, ExitStack() as stack:
            stopped = train(knobs, ranks, stack)
        if stopped == signal.SIGINT:
            raise KeyboardInterrupt


if __name__ == "__main__":
    main()

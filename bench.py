"""
What scoring costs: a scored step beside a plain one, stock PyTorch's and one backward pass per sample.

    python bench.py                                                          # the demo's shape
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=16 --json
    python bench.py --n_layer=12 --n_head=12 --n_embd=768 --block_size=256 --batch_size=8 --vocab_size=50304 --rounds=5
    python bench.py --budget               # on paper: operations, bytes and times of a step's parts on an H100, no GPU
    python bench.py --budget --gpu=A100 --batch_size=32 --json                    # its knobs: --budget --help

A step is forward, backward and AdamW, without clipping. (a) stock: cross-entropy on all logits at once, as in nanoGPT;
(b) plain: model.py without alpha; (c) val: the validation gradient alone; (d) scored: (c), the direction, and a step
with alpha; (e) order2: (b), (c) at the step's midpoint, and the batch again with alpha; (f) brute: (c) and a backward
pass for each sample. The arms take turns within a round, and each round begins with the next of them. Ratios are of two
times of the same round, medians and quartiles over the rounds: overhead = (scored - val) / plain - 1 is what scoring
costs beyond the validation windows, total = scored / plain - 1, order2_over_plain = (order2 - val) / plain. On a GPU
with compile, (b) to (e) replay CUDA graphs, as train.py does. Stock has none, as nanoGPT.

Peak memory is that of two forward and backward passes (three where the last is recorded), each arm in a process of its
own, above the resident size after import: weights, activations, gradients and the direction.
"""

import gc
import json
import statistics
import subprocess
import sys
from collections import deque
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import data_value
from model import GPT, GPTConfig
from support.configurator import check_each, configure
from support.cost import estimate_mfu, memory_mb, peak_tflops, timed
from support.graphs import EAGER, recorded, recorder_for
from support.processes import autocast, check_device, keep_freed_memory


@dataclass
class Knobs:
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 128  # T
    batch_size: int = 32  # B, in one micro-batch
    val_batch_size: int = 4  # m
    vocab_size: int = 257
    bias: bool = True
    dtype: str = "float32"  # or 'bfloat16', by autocast
    compile: bool = False
    device: str = "cpu"
    value_direction: str = "adam"  # or 'sgd'
    n_directions: int = 1  # dotted in the same backward, all made of the same validation windows
    rounds: int = 15
    json: bool = False  # one object instead of a line for each result
    memory_of: str = ""  # used by the bench itself: measure the peak of this arm and stop

    def __post_init__(self):
        check_each(self, dtype=("float32", "bfloat16"), value_direction=("sgd", "adam"))


def gpt_config(knobs, **changed):
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    return GPTConfig(**{name: getattr(knobs, name) for name in names} | changed)


class StockGPT(GPT):
    """nanoGPT: cross-entropy on all logits at once. Without alpha every layer is its torch.nn namesake."""

    def forward(self, idx, targets):
        logits, _ = super().forward(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Bench:
    """A model of the knobs' shape with its data, and the arms as functions of no arguments."""

    def __init__(self, knobs, stock):
        torch.manual_seed(0)
        self.model = (StockGPT if stock else GPT)(gpt_config(knobs)).to(knobs.device)
        self.model.eval()  # as in train.py: there is no dropout
        options = dict(fullgraph=True, dynamic=False, disable=not knobs.compile)
        self.net = torch.compile(self.model, **options)
        self.precondition = torch.compile(data_value.precondition, **options)
        self.optimizer = self.model.configure_optimizers("adamw", 0.1, 1e-4, (0.9, 0.95))
        windows = torch.randint(knobs.vocab_size, (knobs.batch_size + knobs.val_batch_size, knobs.block_size + 1))
        x, y = windows[:, :-1].to(knobs.device), windows[:, 1:].to(knobs.device)
        B = knobs.batch_size
        self.x, self.y, self.x_val, self.y_val = x[:B], y[:B], x[B:], y[B:]
        self.autocast = autocast(knobs)
        self.adam = self.optimizer if knobs.value_direction == "adam" else None
        self.n_directions = knobs.n_directions
        self.recorder = None if stock else recorder_for(knobs)  # nanoGPT has no graphs
        self.calls, self.replays = {}, True

    def call(self, function, *windows):
        """function(*windows). On a GPU it replays its graph, as train.py does, unless `replays` is False."""
        if function not in self.calls:
            self.calls[function] = recorded(function, self.recorder)
        return (self.calls[function] if self.replays else function)(*windows)

    def loss(self, x, y, *alpha):
        with self.autocast:
            return self.net(x, y, *alpha)[1]

    def alpha(self, x):
        return torch.zeros(len(x), self.n_directions, device=x.device, requires_grad=True)

    def add_gradients(self, x, y):
        self.loss(x, y).backward()
        return ()

    def add_scored_gradients(self, x, y):
        alpha = self.alpha(x)
        self.loss(x, y, alpha).backward()
        return (alpha.grad,)

    def dots_alone(self, x, y):
        alpha = self.alpha(x)
        return torch.autograd.grad(self.loss(x, y, alpha), alpha)

    def validate(self, x, y):
        with self.autocast:
            return tuple(data_value.validation_gradient(self.net, x, y)[0].values())

    def backward(self):
        self.call(self.add_gradients, self.x, self.y)

    def val(self):
        return dict(zip(self.model.parameters(), self.call(self.validate, self.x_val, self.y_val), strict=True))

    def set_directions(self, stepped=False):
        if not hasattr(self, "buffers"):
            self.buffers = data_value.attach_directions(self.model, self.n_directions)
        gradient = self.val()
        for row in range(self.n_directions):
            data_value.set_direction(self.buffers, gradient, self.adam, row, stepped, precondition=self.precondition)

    def dots(self):
        return self.call(self.add_scored_gradients, self.x, self.y)[0][:, 0] * len(self.x)

    def scored_backward(self):
        self.set_directions()
        return self.dots()

    def step(self):
        self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self):
        self.optimizer.zero_grad(set_to_none=self.recorder is None)

    def plain(self):
        self.backward()
        self.step()

    def scored(self):
        self.scored_backward()
        self.step()

    def order2(self):
        """As train.py does: a step, the direction at its midpoint, the batch again where the step began."""
        params = list(self.model.parameters())
        theta = [p.detach().clone() for p in params]
        self.backward()
        self.optimizer.step()
        stepped = [p.detach().clone() for p in params]
        data_value.retreat_to_midpoint(self.optimizer)
        self.set_directions(stepped=True)
        with torch.no_grad():
            torch._foreach_copy_(params, theta)
        self.call(self.dots_alone, self.x, self.y)
        with torch.no_grad():
            torch._foreach_copy_(params, stepped)
        self.forget_gradients()

    def brute(self):
        """(B,): <grad l_i, G>, a batch of one at a time."""
        gradient, dots = self.val(), []
        for x, y in zip(self.x.split(1), self.y.split(1), strict=True):
            with self.autocast:
                loss = self.model(x, y)[1]
            part = torch.autograd.grad(loss, list(gradient))
            dots.append(sum((a * b).sum() for a, b in zip(part, gradient.values(), strict=True)))
        return torch.stack(dots).double()


def seconds(run, device):
    """Wall time of run(), on a GPU until it has nothing left to do."""
    return timed(run, device, True)[1] / 1000


def print_peak(knobs):
    """The peak memory of an arm, in MB: run in a process of its own."""
    before = memory_mb("VmRSS")
    bench = Bench(knobs, knobs.memory_of == "stock")
    bench.adam = None  # its state is the optimiser's
    for _ in range(EAGER + 1 if bench.recorder else 2):
        bench.forget_gradients()
        bench.scored_backward() if knobs.memory_of == "scored" else bench.backward()
    on_gpu = knobs.device.startswith("cuda")
    print(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory_mb("VmHWM") - before)


def take_turns(arms, knobs):
    """The seconds of each arm, functions of no arguments, in each of knobs.rounds rounds."""
    times, names = {name: [] for name in arms}, deque(arms)
    gc.disable()
    for _ in range(knobs.rounds):
        for name in names:
            times[name].append(seconds(arms[name], knobs.device))
        names.rotate(-1)
    gc.enable()
    return times


def ratios(stock, plain, val, scored, order2):
    """Of the times that the arms took in one round."""
    return dict(
        overhead=(scored - val) / plain - 1,
        total=scored / plain - 1,
        plain_over_stock=plain / stock,
        val_over_plain=val / plain,
        order2_over_plain=(order2 - val) / plain,
    )


def measure(knobs):
    """Everything that is printed, as a dict."""
    stock, ours = Bench(knobs, True), Bench(knobs, False)  # of the same weights
    stock.plain(), ours.plain()
    adam, ours.adam = ours.adam, None  # brute force is of G
    ours.val()  # compiles here, if at all, not in brute force's time
    exact, brute_ms = timed(ours.brute, knobs.device, True)
    dots_rel_err = ((ours.scored_backward().double() - exact).norm() / exact.norm()).item()
    ours.forget_gradients()
    ours.adam = adam

    arms = dict(stock=stock.plain, plain=ours.plain, val=ours.val, scored=ours.scored, order2=ours.order2)
    for run in arms.values():
        for _ in range(EAGER + 1 if ours.recorder else 1):  # compiles, and records its graphs
            run()
    times = take_turns(arms, knobs)
    result = {f"{name}_ms": 1000 * statistics.median(values) for name, values in times.items()}
    result["brute_ms"] = brute_ms
    rounds = [ratios(*round_) for round_ in zip(*times.values(), strict=True)]
    for name in rounds[0]:
        low, result[name], high = np.percentile([round_[name] for round_ in rounds], [25, 50, 75]).round(4).tolist()
        result[f"{name}_quartiles"] = [low, high]
    gpu = torch.cuda.get_device_name(knobs.device) if knobs.device.startswith("cuda") else ""
    parameters, peak = sum(p.numel() for p in ours.model.parameters()), peak_tflops(gpu, knobs.dtype)
    tokens = 1000 * knobs.batch_size * knobs.block_size
    for arm in ("stock", "plain", "scored"):
        flags = [f"--{key}={value}" for key, value in asdict(replace(knobs, memory_of=arm)).items()]
        said = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True).stdout
        result[f"{arm}_peak_mb"] = float(said.split()[-1])
        result[f"{arm}_mfu"] = estimate_mfu(knobs, parameters, tokens / result[f"{arm}_ms"], peak)
    result |= dict(dots_rel_err=dots_rel_err, parameters=parameters, knobs=asdict(knobs), gpu=gpu)
    return result | dict(torch=torch.__version__, threads=torch.get_num_threads())


def budget_of(knobs):
    """support/budget.py's result for its knobs and this file's models, as a dict."""
    from support import budget  # the compiler's parts that it needs take seconds to import

    def loss_of(arm, n_layer, windows):
        model = (StockGPT if arm == "stock" else GPT)(gpt_config(knobs, n_layer=n_layer))
        inputs = [torch.zeros(windows, knobs.block_size, dtype=torch.int64) for _ in range(2)]
        if arm == "scored":
            data_value.attach_directions(model, knobs.n_directions)
            inputs.append(torch.zeros(windows, knobs.n_directions, requires_grad=True))
        return lambda: model(*inputs)[1]

    with torch.device("meta"):
        weight = nn.Parameter(torch.empty(sum(p.numel() for p in GPT(gpt_config(knobs)).parameters())))
        weight.grad = torch.empty_like(weight)

    def direction():
        d, g, v = ([torch.empty(weight.numel())] for _ in range(3))
        return lambda: data_value.precondition(d, g, g, v, 0.95, 1e-8, torch.ones(()), False)

    def midpoint():
        optimizer = torch.optim.AdamW([weight])
        optimizer.state[weight] = dict(step=torch.ones(()), exp_avg_sq=torch.empty_like(weight))
        with torch.no_grad():
            theta, stepped = weight.clone(), weight.clone()
            data_value.retreat_to_midpoint(optimizer)
            torch._foreach_copy_([weight], [theta])
            torch._foreach_copy_([weight], [stepped])

    return budget.budget(knobs, loss_of, direction, midpoint, weight.numel())


def main():
    arguments = ["--json=True" if argument == "--json" else argument for argument in sys.argv[1:]]
    if "--budget" in arguments:
        from support import budget

        knobs = configure(budget.Knobs, [argument for argument in arguments if argument != "--budget"])
        result = budget_of(knobs)
        print(json.dumps(result) if knobs.json else "\n".join(budget.table(result)))
        return
    knobs = configure(Knobs, arguments)
    check_device(knobs.device)
    keep_freed_memory()
    if knobs.memory_of:
        print_peak(knobs)
        return
    result = measure(knobs)
    if knobs.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        if value not in (None, ""):  # on a CPU there is neither a GPU nor MFU
            print(f"{key:25} {value:.4g}" if isinstance(value, float) else f"{key:25} {value}")


if __name__ == "__main__":
    main()

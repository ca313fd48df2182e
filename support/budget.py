"""
What a training step must compute and move, on paper: operations, bytes and, for a given GPU, the time of every part.
No GPU is needed and nothing is computed: support/counting.py counts what the compiler's kernels, our operators and
kernels do for the shape itself. Layers are alike, so two and four are compiled and the rest follow.

A part takes the longer of two times: its operations at the GPU's speed for products, with an efficiency, and its bytes
at the memory's. The parts run one after the other, and Python is never late to launch them. The plain step is the stock
step but for the head, since the rest compiles to the same kernels; the scored one is the plain step and what the dot
products add.
"""

import contextlib
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.configurator import check_each
from support.counting import Count, compiled, count

# TFLOP/s of bfloat16 and of float32 products, TB/s of memory. H100 and H200: bfloat16 and memory measured (an
# 8,192-cubed product; a copy, reads and writes counted; this code has run on the H100 alone); the rest from NVIDIA's
# data sheets.
GPUS = {
    "A100": dict(bfloat16=312.0, float32=19.5, tb_s=2.04),
    "H100": dict(bfloat16=764.0, float32=67.0, tb_s=2.98),
    "H200": dict(bfloat16=790.0, float32=67.0, tb_s=4.3),
}
# Of the speed of a large square product, what the products and the attention of GPT-2 124M reach on an H100, batch 16,
# T 1,024, by torch 2.11 (docs/cost.md); on other cards and at other shapes a guess.
PRODUCTS, ATTENTION = 0.95, 0.39

PARTS = {  # and what a `?` in the table stands for: a time that rests on a guess
    "attention": "?",
    "forward": "?",  # the linears' products but the head's
    "dX": "?",
    "dW": "?",  # of every sample where the step is scored
    "head products": "?",  # logits and dX
    "head dW": "?",
    "head softmax": "",  # and whatever else the head does
    "layer norms": "",  # and the residual additions that are fused with them
    "embeddings": "",
    "casts": "",  # of weights to bfloat16 and of their gradients back
    "pointwise": "",  # GELU, sums for biases, copies
    "direction": "",
    "dots": "?",  # the samples' weight gradients read, added up and dotted
    "midpoint": "",  # the second order's copies of parameters, and half a step back
    "AdamW": "",
    "loader": "",  # on a thread, beside the GPU's work: no time
}
ARMS = ("stock", "plain", "scored", "order2")


@dataclass
class Knobs:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # T
    batch_size: int = 16  # B, in one micro-batch
    val_batch_size: int = 1  # m
    vocab_size: int = 50304
    bias: bool = True
    dtype: str = "bfloat16"  # by autocast, or 'float32'
    n_directions: int = 1  # K
    gpu: str = "H100"  # A100, H100 or H200
    tflops: float = 0.0  # of products in dtype; 0: the GPU's
    tb_s: float = 0.0  # of its memory; 0: the GPU's
    json: bool = False  # an object instead of the table

    def __post_init__(self):
        check_each(self, dtype=("float32", "bfloat16"), gpu=tuple(GPUS))


def add_up(*steps):
    """{part: counts} of several, one after the other."""
    sums = defaultdict(lambda: defaultdict(float))
    for step in steps:
        for part, counts in step.items():
            for key, number in counts.items():
                sums[part][key] += number
    return sums


def with_times(parts, knobs):
    """The same parts with "ms" on the knobs' GPU."""
    gpu, efficiency, timed = speeds(knobs), dict.fromkeys(PARTS, PRODUCTS) | {"attention": ATTENTION}, {}
    for part, counts in parts.items():
        compute = counts.get("operations", 0) / (gpu["tflops"] * 1e12 * efficiency[part])
        memory = counts.get("bytes", 0) / (gpu["tb_s"] * 1e12)
        timed[part] = dict(counts, ms=1000 * max(compute, memory) if part != "loader" else 0.0)
    return timed


def speeds(knobs):
    gpu = GPUS[knobs.gpu]
    return dict(tflops=knobs.tflops or gpu[knobs.dtype], tb_s=knobs.tb_s or gpu["tb_s"])


def depths(n_layer):
    """The numbers of layers that are compiled: the compiler fuses every second layer's residuals alike, after two."""
    first = min(n_layer, 2 + n_layer % 2)
    return [first] if n_layer <= first else [first, first + 2]


def layered(graphs, knobs):
    """{part: counts} of knobs.n_layer layers, from the graphs of as many as `depths` says."""
    steps = [add_up(parts, *(count(*call) for call in calls)) for parts, calls in graphs]
    more = (knobs.n_layer - depths(knobs.n_layer)[0]) // 2  # pairs of layers
    few, many = steps[0], steps[-1]
    return {
        part: {key: few[part][key] + more * (number - few[part][key]) for key, number in counts.items()}
        for part, counts in many.items()
    }


def attention(knobs, windows):
    """Operations: 2 products forward and 5 backward, which makes the scores again; half of each, being causal."""
    return 7 * windows * knobs.block_size**2 * knobs.n_embd * knobs.n_layer


def budget(knobs, loss_of, direction, midpoint, parameters):
    """
    Everything that the table and --json show. `loss_of(arm, n_layer, windows)` is a function, made of fake tensors,
    that computes the loss of 'stock', 'plain' or 'scored'; `direction()` is one that makes a direction of one tensor as
    large as the model; `midpoint()` does on meta tensors what the second order does to the parameters.
    """
    B, m, T = knobs.batch_size, knobs.val_batch_size, knobs.block_size
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=knobs.dtype == "bfloat16")
    graphs = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for arm, windows in dict(stock=B, plain=B, scored=B, val=m).items():
            runs = [loss_of("plain" if arm == "val" else arm, n_layer, windows) for n_layer in depths(knobs.n_layer)]
            graphs[arm] = [compiled(run, autocast, windows * T * knobs.vocab_size) for run in runs]
        made, _ = compiled(direction(), contextlib.nullcontext(), 0)
    with Count() as moved:
        midpoint()
    K, direction_bytes = knobs.n_directions, sum(counts["bytes"] for counts in made.values())
    # AdamW, fused: the parameter, its gradient and its two moments are read and all but the gradient written.
    optimizer = {"AdamW": dict(bytes=28 * parameters), "loader": dict(bytes=16 * B * T)}
    extra = {"direction": dict(bytes=K * direction_bytes)}
    half = {"midpoint": dict(bytes=moved.parts["rest"]["bytes"])}

    passes = {}  # {what: {part: counts and ms}}, each a part of a step
    for arm, windows in dict(stock=B, plain=B, scored=B, val=m).items():
        parts = layered(graphs[arm], knobs)
        parts["attention"]["operations"] = attention(knobs, windows)
        passes[arm] = with_times(parts, knobs)
    for name, parts in dict(optimizer=optimizer, direction=extra, midpoint=half).items():
        passes[name] = with_times(parts, knobs)
    steps = {arm: add_up(passes["optimizer"], passes[arm]) for arm in ("stock", "plain")}
    steps["scored"] = add_up(passes["optimizer"], passes["direction"], passes["scored"])
    steps["order2"] = add_up(steps["scored"], passes["midpoint"], passes["plain"])
    steps["val"] = passes["val"]
    sums = {arm: total(parts) for arm, parts in steps.items()}
    result = dict(knobs=asdict(knobs), parameters=parameters, torch=torch.__version__, **speeds(knobs))
    result |= dict(guesses=dict(products=PRODUCTS, attention=ATTENTION), arms=steps, sums=sums, val=sums["val"])
    result["plain_over_stock_bytes"] = sums["plain"]["bytes"] / sums["stock"]["bytes"]
    logits = B * T * knobs.vocab_size * getattr(torch, knobs.dtype).itemsize
    result["plain_over_nanogpt_bytes"] = sums["plain"]["bytes"] / (sums["stock"]["bytes"] + 2 * logits)
    result["plain_over_stock_time"] = sums["plain"]["ms"] / sums["stock"]["ms"]
    result["scored_over_plain_time"] = sums["scored"]["ms"] / sums["plain"]["ms"]
    result["order2_over_plain_time"] = sums["order2"]["ms"] / sums["plain"]["ms"]
    # of as many micro-batches as make 480 windows: the direction and AdamW come once a step
    n, ms = max(2, round(480 / B)), {name: total(parts)["ms"] for name, parts in passes.items()}
    once = ms["direction"] + ms["optimizer"]
    result["scoring_costs"] = {k: (k * ms["scored"] + once) / (k * ms["plain"] + ms["optimizer"]) - 1 for k in (1, n)}
    return result


def total(parts):
    return {key: sum(counts.get(key, 0) for counts in parts.values()) for key in ("operations", "bytes", "ms")}


def table(result):
    """The lines to print."""
    knobs, sums = result["knobs"], result["sums"]
    shape = (
        f"{result['parameters']:,} parameters, {knobs['batch_size']} x {knobs['block_size']} tokens, {knobs['dtype']}"
    )
    speed = f"{result['tflops']:.0f} TFLOP/s, {result['tb_s']:.2f} TB/s"
    lines = [
        f"{shape}; {knobs['gpu']}: {speed}. On paper: nothing of this table is measured.",
        f"Bytes by torch {torch.__version__}'s scheduler for a GPU. ? rests on what an H100 reached at 124M, batch 16:",
        f"products {PRODUCTS:.0%} of those TFLOP/s, attention {ATTENTION:.0%}.",
    ]
    lines.append(f"{'':15}" + "".join(f"{arm:>22} " for arm in ARMS))
    lines.append(f"{'':15}" + f"{'GFLOP':>8}{'GB':>7}{'ms':>7} " * len(ARMS))

    def row(name, cells, mark):
        line = f"{name:15}"
        for counts in cells:
            operations, moved, ms = counts.get("operations", 0) / 1e9, counts.get("bytes", 0) / 1e9, counts.get("ms", 0)
            line += f"{operations:8.0f}" if operations else " " * 8
            line += f"{moved:7.2f}" if moved else " " * 7
            line += f"{ms:7.2f}{mark:1}" if counts else " " * 8
        return line

    for part, mark in PARTS.items():
        lines.append(row(part, [result["arms"][arm].get(part, {}) for arm in ARMS], mark))
    lines.append(row("sum", [sums[arm] for arm in ARMS], "?"))
    lines.append(
        "the loader works beside the GPU, on a thread; the validation pass is apart: " + f"{result['val']['ms']:.2f} ms"
    )
    for name, key in (
        ("plain / stock, bytes", "plain_over_stock_bytes"),
        ("plain / stock, time", "plain_over_stock_time"),
        ("scored / plain, time", "scored_over_plain_time"),
        ("order 2 / plain, time", "order2_over_plain_time"),
    ):
        lines.append(f"{name:26}{result[key]:8.3f}")
    return lines + ["", *conclusions(result)]


def conclusions(result):
    """What follows, in words."""
    ratio, nanogpt = result["plain_over_stock_bytes"], result["plain_over_nanogpt_bytes"]
    plain, scored = result["arms"]["plain"], result["arms"]["scored"]
    added = {part: scored[part]["ms"] - plain.get(part, dict(ms=0))["ms"] for part in scored}
    weights, dots, made = added["dW"] + added["head dW"], added["dots"], added["direction"]
    other = sum(added.values()) - weights - dots - made
    costs = [f"{cost:.1%} (micro-batches a step: {n})" for n, cost in result["scoring_costs"].items()]
    return [
        f"The plain step moves {ratio:.3f} of the bytes of a stock step that returns the loss alone, and {nanogpt:.3f}",
        "of one that returns its logits too, as nanoGPT's does: their gradient is zeros, written and read.",
        f"Scoring adds, validation apart, {', '.join(costs)}:",
        f"writing the samples' gradients {weights:.2f} ms, dotting them {dots:.2f}, the direction {made:.2f}, the rest",
        f"{other:.2f}.",
    ]

"""
What a training step must compute and move, on paper: operations, bytes and, for a given GPU, the time of every part.
No GPU is needed and nothing is computed: support/counting.py counts what the compiler's kernels, our operators and
kernels do for the shape itself. Layers are alike, so two and four are compiled and the rest follow.

A part takes the longer of two times: its operations at the GPU's speed for products, with an efficiency, and its bytes
at the memory's. The parts run one after the other. The plain step is the stock step but for the head, since the rest
compiles to the same kernels; the scored one is the plain step and what the dot products add.
"""

import contextlib
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.configurator import check_each
from support.counting import Count, compiled, count

# TFLOP/s of bfloat16 and of float32 products, TB/s of memory and of the L2 cache, processors. H100 and H200: bfloat16
# and memory measured (an 8,192-cubed product; a copy, reads and writes counted); the rest from NVIDIA's data sheets.
# The L2 cache is a guess. XLA (gpu_dot_fusion_cost_model.cc) has measured 6.65 TB/s within one half of an H100's.
GPUS = {
    "A100": dict(bfloat16=312.0, float32=19.5, tb_s=2.04, l2_tb_s=4.0, processors=108, capability=(8, 0)),
    "H100": dict(bfloat16=798.0, float32=67.0, tb_s=3.0, l2_tb_s=5.5, processors=132, capability=(9, 0)),
    "H200": dict(bfloat16=790.0, float32=67.0, tb_s=4.3, l2_tb_s=5.5, processors=132, capability=(9, 0)),
}
# Guesses: of the speed of a large square product, what our shapes reach (650 of 798 TFLOP/s) and what attention does
# with heads of 64; of cuBLAS's speed, what our weight gradient does.
PRODUCTS, ATTENTION, KERNEL = 650 / 798, 0.25, 0.7

PARTS = {  # and what a `?` in the table stands for: a time that rests on a guess
    "attention": "?",
    "forward": "?",  # the linears' products but the head's
    "dX": "?",
    "dW": "?",  # with the dots where the step is scored
    "head products": "?",  # logits and dX
    "head dW": "?",
    "head softmax": "",  # and whatever else the head does
    "layer norms": "",  # and the residual additions that are fused with them
    "embeddings": "",
    "casts": "",  # of weights to bfloat16 and of their gradients back
    "pointwise": "",  # GELU, sums for biases, copies
    "direction": "",
    "direction tile": "?",  # read from the L2 cache again for every sample
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


def with_times(parts, knobs, kernel=1.0):
    """The same parts with "ms" on the knobs' GPU; `kernel` is the weight gradient's share of cuBLAS's speed."""
    gpu = speeds(knobs)
    efficiency = dict.fromkeys(PARTS, PRODUCTS) | {"attention": ATTENTION, "dW": PRODUCTS * kernel}
    efficiency["head dW"] = efficiency["dW"]
    timed = {}
    for part, counts in parts.items():
        compute = counts.get("operations", 0) / (gpu["tflops"] * 1e12 * efficiency[part])
        memory = counts.get("bytes", 0) / (gpu["tb_s"] * 1e12)
        cache = counts["l2_bytes"] / (gpu["l2_tb_s"] * 1e12) if part == "direction tile" else 0
        timed[part] = dict(counts, ms=1000 * max(compute, memory, cache) if part != "loader" else 0.0)
    return timed


def speeds(knobs):
    gpu = GPUS[knobs.gpu]
    return dict(tflops=knobs.tflops or gpu[knobs.dtype], tb_s=knobs.tb_s or gpu["tb_s"], l2_tb_s=gpu["l2_tb_s"])


def depths(n_layer):
    """The numbers of layers that are compiled: the compiler fuses every second layer's residuals alike, after two."""
    first = min(n_layer, 2 + n_layer % 2)
    return [first] if n_layer <= first else [first, first + 2]


def layered(graphs, knobs, fused):
    """{part: counts} of knobs.n_layer layers, from the graphs of as many as `depths` says."""
    gpu = GPUS[knobs.gpu]
    steps = [add_up(parts, *(count(*call, gpu, fused) for call in calls)) for parts, calls in graphs]
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

    def passes(fused, kernel):
        """{what: {part: counts and ms}}, each a part of a step."""
        result = {}
        for arm, windows in dict(stock=B, plain=B, scored=B, val=m).items():
            parts = layered(graphs[arm], knobs, fused)
            parts["attention"]["operations"] = attention(knobs, windows)
            result[arm] = with_times(parts, knobs, kernel if arm == "scored" else 1.0)
        more = dict(optimizer=optimizer, direction=extra, midpoint=half)
        return result | {name: with_times(parts, knobs) for name, parts in more.items()}

    def arms(parts):
        step = {arm: add_up(parts["optimizer"], parts[arm]) for arm in ("stock", "plain")}
        step["scored"] = add_up(parts["optimizer"], parts["direction"], parts["scored"])
        step["order2"] = add_up(step["scored"], parts["midpoint"], parts["plain"])
        return step

    now = passes(True, KERNEL)
    steps, before = arms(now) | {"val": now["val"]}, arms(passes(False, 0.5))
    sums = {arm: total(parts) for arm, parts in steps.items()}
    result = dict(knobs=asdict(knobs), parameters=parameters, torch=torch.__version__, **speeds(knobs))
    result["guesses"] = dict(products=PRODUCTS, attention=ATTENTION, kernel=KERNEL, l2_tb_s=result["l2_tb_s"])
    result |= dict(arms=steps, sums=sums, before=before, before_sums={a: total(p) for a, p in before.items()})
    result["val"] = sums["val"]
    result["plain_over_stock_bytes"] = sums["plain"]["bytes"] / sums["stock"]["bytes"]
    logits = B * T * knobs.vocab_size * getattr(torch, knobs.dtype).itemsize
    result["plain_over_nanogpt_bytes"] = sums["plain"]["bytes"] / (sums["stock"]["bytes"] + 2 * logits)
    result["plain_over_stock_time"] = sums["plain"]["ms"] / sums["stock"]["ms"]
    result["scored_over_plain_time"] = sums["scored"]["ms"] / sums["plain"]["ms"]
    result["order2_over_plain_time"] = sums["order2"]["ms"] / sums["plain"]["ms"]
    return result | sensitivity(knobs, now)


def total(parts):
    keys = ("operations", "bytes", "l2_bytes", "ms")
    return {key: sum(counts.get(key, 0) for counts in parts.values()) for key in keys}


def sensitivity(knobs, now):
    """
    What scoring costs, as a share of a plain step, with each way to the weight gradient, for one micro-batch a step
    and for as many as make 480 windows; and the speed of the kernel at which it costs 3%.
    """
    ms = {name: total(parts)["ms"] for name, parts in now.items()}
    ms["tile"] = now["scored"]["direction tile"]["ms"]
    weights = ("dW", "head dW")
    fast = {part: with_times({part: now["scored"][part]}, knobs)[part]["ms"] for part in weights}
    rest = ms["scored"] - ms["tile"] - sum(now["scored"][part]["ms"] for part in weights)
    samples = sum(now["scored"][part]["operations"] for part in weights) / knobs.block_size / 2
    written = 2 * getattr(torch, knobs.dtype).itemsize * samples  # the samples' gradients, written and read
    chunked = sum(now["scored"][part]["bmm_bytes"] for part in weights)
    gpu = speeds(knobs)

    def kernel_ms(share):
        return sum(with_times({part: now["scored"][part]}, knobs, share)[part]["ms"] for part in weights)

    ways = {f"kernel at {share} of cuBLAS": kernel_ms(share) + ms["tile"] for share in (0.5, 0.7, 0.85, 1.0)}
    ways |= {f"kernel at {share}, tile hidden": kernel_ms(share) for share in (0.5, 0.7, 0.85, 1.0)}
    ways["bmm through memory"] = sum(fast.values()) + written / gpu["tb_s"] / 1e9
    ways["bmm in chunks in the L2 cache"] = sum(fast.values()) + chunked / gpu["l2_tb_s"] / 1e9
    micro_steps = max(2, round(480 / knobs.batch_size))

    def extra(weight_ms, n):
        """Beyond n plain micro-steps and AdamW, as a share of them."""
        plain = n * ms["plain"] + ms["optimizer"]
        return (n * (rest + weight_ms) + ms["direction"] + ms["optimizer"]) / plain - 1

    def needed(tile, n):
        """The share of cuBLAS's speed at which scoring costs 3%; None where even cuBLAS's costs more."""
        allowed = 0.03 - extra(sum(fast.values()) + tile, n)
        slack = allowed * (ms["plain"] + ms["optimizer"] / n)
        return sum(fast.values()) / (sum(fast.values()) + slack) if slack >= 0 else None

    costs = {way: {n: extra(weight_ms, n) for n in (1, micro_steps)} for way, weight_ms in ways.items()}
    speed = {n: {"tile read": needed(ms["tile"], n), "tile hidden": needed(0, n)} for n in (1, micro_steps)}
    return dict(scoring_costs=costs, needed_kernel_speed=speed)


def table(result):
    """The lines to print."""
    knobs, sums = result["knobs"], result["sums"]
    shape = (
        f"{result['parameters']:,} parameters, {knobs['batch_size']} x {knobs['block_size']} tokens, {knobs['dtype']}"
    )
    lines = [
        f"{shape}; {knobs['gpu']}: {result['tflops']:.0f} TFLOP/s, {result['tb_s']:.2f} TB/s. Nothing here is measured."
    ]
    lines += [
        f"Bytes by torch {torch.__version__}'s scheduler for a GPU. ? rests on a guess: products reach {PRODUCTS:.0%}",
        f"of those TFLOP/s, attention {ATTENTION:.0%}, our weight gradient {KERNEL:.0%} of cuBLAS's speed,",
        f"the L2 cache {result['l2_tb_s']} TB/s.",
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
    lines.append("")
    lines.append("before the row kernels, with a weight gradient at half of cuBLAS's speed:")
    for part in ("head products", "head dW", "head softmax", "dW"):
        lines.append(row(part, [result["before"][arm].get(part, {}) for arm in ARMS], PARTS[part]))
    lines.append(row("sum", [result["before_sums"][arm] for arm in ARMS], "?"))
    old = result["before_sums"]
    lines += ["", f"{'':26}{'now':>8}{'before':>8}"]
    for name, key, was in (
        ("plain / stock, bytes", "plain_over_stock_bytes", old["plain"]["bytes"] / old["stock"]["bytes"]),
        ("plain / stock, time", "plain_over_stock_time", old["plain"]["ms"] / old["stock"]["ms"]),
        ("scored / plain, time", "scored_over_plain_time", old["scored"]["ms"] / old["plain"]["ms"]),
        ("order 2 / plain, time", "order2_over_plain_time", old["order2"]["ms"] / old["plain"]["ms"]),
    ):
        lines.append(f"{name:26}{result[key]:8.3f}{was:8.3f}")
    first, last = next(iter(result["scoring_costs"].values()))
    lines += ["", f"what scoring adds to a plain step{'':12}micro-batches: {first:>3}{last:>10}"]
    for way, costs in result["scoring_costs"].items():
        lines.append(f"  {way:46}" + "".join(f"{cost:+10.1%}" for cost in costs.values()))
    return lines + ["", *conclusions(result)]


def conclusions(result):
    """What follows, in words."""
    ratio, nanogpt = result["plain_over_stock_bytes"], result["plain_over_nanogpt_bytes"]
    plain, scored = result["arms"]["plain"], result["arms"]["scored"]
    added = {part: scored[part]["ms"] - plain.get(part, dict(ms=0))["ms"] for part in scored}
    weights, tile, made = added["dW"] + added["head dW"], added["direction tile"], added["direction"]
    other = sum(added.values()) - weights - tile - made
    cost = result["scored_over_plain_time"] - 1
    lines = [
        f"The plain step moves {ratio:.3f} of the bytes of a stock step that returns the loss alone, and {nanogpt:.3f}",
        "of one that returns its logits too, as nanoGPT's does: their gradient is zeros, written and read.",
        f"Scoring adds {cost:.1%}, validation apart: slower weight gradients {weights:.2f} ms, reading the direction's",
        f"tile {tile:.2f}, making the direction {made:.2f}, all else {other:.2f}.",
    ]
    for n, needed in result["needed_kernel_speed"].items():
        ways = {way: f"{share:.0%}" if share else "more than 100%" for way, share in needed.items()}
        lines.append(
            f"For 3% with {n} micro-batch{'es' if int(n) > 1 else ''} a step the kernel needs {ways['tile hidden']} of"
        )
        lines.append(
            f"cuBLAS's speed where the products hide the reading of the tile, {ways['tile read']} where they do not."
        )
    return lines

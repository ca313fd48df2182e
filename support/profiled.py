"""A step's kernels by torch.profiler, and the parts of support/budget.py that they are for, by names and shapes."""

import re
from collections import Counter, defaultdict

# {part: (its parts in the budget, what kernels of it are called)}, the first that fits. Kernels of torch.compile are
# called after the operators that they fuse. On a CPU operators take the place of kernels.
PARTS = {
    "attention": (["attention"], "attention|flash|sdpa|fmha"),
    "dW": (["dW", "head dW"], "linear_grad"),
    "dots": (["dots"], "add_and_dot_kernel"),
    "forward, dX": (["forward", "dX"], None),  # these two products are told apart from dW by their shapes
    "head products": (["head products"], None),
    "products": ([], r"gemm|gemv|nvjet|cutlass|cublas|splitk|aten::\w*mm"),  # which of them is not known
    "head softmax": (["head softmax"], "cross_entropy|softmax|nll_loss|head_loss"),
    "embeddings": (["embeddings"], "embedding|index_select"),
    "layer norms": (["layer norms"], "layer_?norm"),
    "AdamW": (["AdamW"], "adam"),
    "direction": (["direction"], "triton.*sqrt"),
    "casts, pointwise": (["casts", "pointwise"], "triton|gelu"),
    "midpoint, copies": (["midpoint"], "elementwise|multi_tensor_apply|memcpy|aten::(_foreach_)?copy_|aten::clone"),
    "else": ([], ""),
}
# Of bench.py's arms those that have a budget, which has the validation pass apart.
PASSES = dict(stock=["stock"], plain=["plain"], val=["val"], scored=["scored", "val"], order2=["order2", "val"])


def part_of(name):
    """The part of a kernel with this name."""
    return next(
        part for part, (_, names) in PARTS.items() if names is not None and re.search(names, name, re.IGNORECASE)
    )


def part_of_product(name, shapes, knobs):
    """
    The part of a torch operator on factors of these shapes, None if it is no product, for a model of the knobs' shape:
    a weight gradient's inner dimension is tokens, that of other products a width of the model.
    """
    found = re.fullmatch(r"aten::(add|badd)?b?mm_?", name)
    if not found:
        return None
    a, b = shapes[1:3] if found.group(1) else shapes[:2]  # behind what they are added to
    if a[-1] not in (knobs.n_embd, 3 * knobs.n_embd, 4 * knobs.n_embd, knobs.vocab_size):
        return "dW"
    return "head products" if knobs.vocab_size in (*a, *b) else "forward, dX"


def profiled(run, cuda, knobs):
    """
    ({kernel: [ms, calls]}, the longest first, and {part: ms}) of run(), a step of a model of the knobs' shape; on a CPU
    of its operators, their own time.
    """
    from torch.profiler import ProfilerActivity, profile

    kind, clock = ("CUDA", "self_device_time_total") if cuda else ("CPU", "self_cpu_time_total")
    activities = {ProfilerActivity.CPU, getattr(ProfilerActivity, kind)}
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
    kernels, parts = defaultdict(lambda: [0.0, 0]), Counter()
    for event in profiler.events():
        ms, of_kind = getattr(event, clock) / 1000, event.device_type.name == kind and not event.is_user_annotation
        product = part_of_product(event.name, event.input_shapes, knobs) if event.device_type.name == "CPU" else None
        if of_kind:
            kernels[event.name][0] += ms
            kernels[event.name][1] += 1
            parts[part_of(event.name)] += ms
        if product:  # its kernels' names do not say what they multiply
            parts[product] += ms
            parts["products"] -= ms
    return dict(sorted(kernels.items(), key=lambda item: -item[1][0])), parts


def beside(figures, budget):
    """
    The figures of bench.py's arms, with "budget_ms" in those of an arm as a whole and of its parts: what the budget, a
    result of bench.py --budget, says of the same. Parts that neither of them has are left out.
    """
    if "failure" in budget:
        return [*figures, budget]
    rows = []
    for row in figures:
        parts, passes = [row["part"]] if "part" in row else PARTS, PASSES.get(row.get("arm"), [])
        names = [name for part in parts for name in PARTS[part][0]]
        counts = [budget["arms"][arm].get(name, {}) for arm in passes for name in names]
        budget_ms = sum(count.get("ms", 0.0) for count in counts)
        if passes and "kernel" not in row:
            row = row | dict(budget_ms=budget_ms, budget_for=f"{budget['knobs']['gpu']}, on paper")
        if "part" not in row or "kernel" in row or budget_ms or row["ms"] > 1e-3:
            rows.append(row)
    return rows

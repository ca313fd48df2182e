"""
The bytes that a piece of PyTorch moves and the operations of its matrix products, counted without computing anything.

`Count` watches torch's operators one by one, on meta tensors. `count` runs one of support/operators.py so, as on
a GPU: a kernel of ours does not run there, and `<launcher>_traffic` beside it states its bytes. `compiled` asks
torch.compile's scheduler what its fused kernels for a GPU would read and write.
"""

import contextlib
import math
import operator
from collections import defaultdict
from unittest import mock

import torch
from torch._dynamo.variables import ConstantVariable, TensorVariable
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from support import kernels, operators

# ---------------------------------------------------------------------------------------------------------------------
# What torch's operators move, one by one.

aten = torch.ops.aten
MATRIX_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_}
GATHERS = {aten.gather, aten.index, aten.index_select, aten.embedding}
SCATTERS = {aten.scatter_add_, aten.scatter_add, aten.scatter_, aten.index_add_, aten.index_put_}
FREE = {aten._unsafe_view, aten._reshape_alias, aten.detach, aten.lift_fresh}
OVERWRITES = {aten.copy_, aten._foreach_copy_, aten.zero_, aten.fill_}


def size_of(tensor):
    """Bytes of a tensor in memory; an expanded dimension is there once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride or not size else 1
    return numel * tensor.element_size()


def tensors_in(tree):
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


class Count(TorchDispatchMode):
    """
    {part: {"bytes", "operations"}} of what runs in it. Every operator reads each of its inputs and writes each of its
    outputs once. What it changes in place it reads and writes; `out=` it writes. Views and `empty` are free. Of a
    tensor that is gathered from or scattered to, only the elements that are touched count. A product is `weight`'s
    where its first factor is transposed, as in dY^T X; other products are `products`', all else is `rest`'s.
    """

    def __init__(self, products="products", weight="products", rest="rest"):
        super().__init__()
        self.of = dict(products=products, weight=weight, rest=rest)
        self.parts = defaultdict(lambda: defaultdict(int))

    def add(self, part, **counts):
        for key, number in counts.items():
            self.parts[part][key] += number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # nothing is computed here anyway, and torch 2.11 cannot say what the product with out= and out_dtype= gives
        result = kwargs["out"] if isinstance(kwargs.get("out"), torch.Tensor) else function(*args, **kwargs)
        schema, packet = function._schema, function.overloadpacket
        alias = [returned.alias_info for returned in schema.returns]
        view = any(info is not None and not info.is_write for info in alias)
        if view or packet in FREE or "empty" in schema.name or not schema.name.startswith("aten::"):
            return result
        if packet.__name__.endswith("_like") or packet.__name__.startswith("new_"):
            args = ()  # only their shape and dtype are looked at
        by_name = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        moved, changed, inputs = 0, set(), []
        for argument in schema.arguments:
            write = argument.alias_info is not None and argument.alias_info.is_write
            # of addmm's first argument with beta = 0: only overwritten, if at all
            unread = argument is schema.arguments[0] and by_name.get("beta") == 0
            for tensor in tensors_in(by_name.get(argument.name)):
                passes = 2 if write and not argument.is_out and packet not in OVERWRITES else 1
                size = size_of(tensor)
                if argument is schema.arguments[0] and packet in GATHERS | SCATTERS:
                    others = [result] if packet in GATHERS else tensors_in((args[1:], kwargs))
                    size = min(size, others[0].numel() * tensor.element_size())
                if tensor.is_floating_point() and not argument.is_out:
                    inputs.append(tensor)
                changed |= {id(tensor)} if write else set()
                moved += (passes - unread) * size
        moved += sum(size_of(tensor) for tensor in tensors_in(result) if id(tensor) not in changed)
        if packet not in MATRIX_PRODUCTS:
            self.add(self.of["rest"], bytes=moved)
            return result
        a, b = inputs[-2:]
        transposed = a.stride(-1) != 1 and a.stride(-2) == 1
        part = self.of["weight" if transposed else "products"]
        self.add(part, bytes=moved, operations=2 * a.numel() * b.shape[-1])
        return result


class AsOnGPU(TorchFunctionMode):
    """Tensors say that they are on a GPU; what is made on their device is made on meta."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda")
        return function(*args, **kwargs | ({"device": "meta"} if "device" in kwargs else {}))


def count(name, args):
    """{part: counts} of the operator `name` of support/operators.py on meta tensors `args`, on a GPU."""
    head = name == "head_loss"
    weight = "head dW" if head else "dW"
    counter = Count("head products", weight, "head softmax" if head else weight)

    def weight_gradient(dw, x, dy, direction, add):
        B, T, n_in = x.shape
        shape, K = (B, T, n_in, dy.shape[2]), len(direction)
        products, dots = kernels.weight_gradient_traffic(shape, x.dtype, K, add)
        counter.add(weight, bytes=products, operations=2 * x.numel() * dy.shape[2])
        counter.add("dots", bytes=dots)
        return dw.new_empty(B, K)

    def cross_entropy_rows(logits, *arguments):
        counter.add("head softmax", bytes=kernels.cross_entropy_rows_traffic(logits, *arguments))
        return logits.new_empty(len(logits), dtype=torch.float32)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, "weight_gradient", weight_gradient))
        stack.enter_context(mock.patch.object(kernels, "cross_entropy_rows", cross_entropy_rows))
        stack.enter_context(mock.patch.object(kernels, "runs_on", lambda x: True))
        stack.enter_context(AsOnGPU())
        stack.enter_context(counter)
        getattr(operators, name).function(*args)
    return counter.parts


# ---------------------------------------------------------------------------------------------------------------------
# What torch.compile would launch.


class Schedule:
    """
    In place of inductor's compiler of a graph: `parts` {part: counts} of the kernels that it would launch, and `calls`
    [(operator of ours, its arguments on meta tensors)], of all graphs that it was given. A kernel that touches a tensor
    of `logits` elements is the head's.
    """

    def __init__(self, logits):
        self.logits, self.calls, self.parts = logits, [], defaultdict(lambda: defaultdict(int))

    def __call__(self, graph_module, inputs, is_backward=False, **_):
        fake_mode = torch._guards.detect_fake_mode(inputs)
        record_original_output_strides(graph_module)
        graph = GraphLowering(graph_module, example_inputs=inputs, shape_env=fake_mode.shape_env)
        with V.set_fake_mode(fake_mode), V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            post_grad_passes(graph_module, False)
            graph.run(*inputs)
            graph._update_scheduler()  # fuses; no code is made
            for node in graph.scheduler.nodes:
                part, operations = part_of(node, self.logits, is_backward)
                if part:
                    self.parts[part]["bytes"] += touched(node)
                    self.parts[part]["operations"] += operations
        for node in graph_module.graph.nodes:
            if getattr(node.target, "namespace", "") == "data_value":
                values = tree_map_only(torch.fx.Node, lambda argument: argument.meta["val"], node.args)
                self.calls.append((node.target._opname, tree_map_only(torch.Tensor, on_meta, values)))
        return make_boxed_func(graph_module.forward)


def compiled(run, autocast, logits):
    """
    (parts, calls) of Schedule for run() and its result's backward, in a FakeTensorMode: nothing is computed. With the
    scheduler that fuses for a GPU, and a GPU's branches, on tensors that say 'cpu': autograd takes a GPU's tensors only
    where there is one.
    """
    schedule = Schedule(logits)

    def backend(graph_module, inputs):
        return compile_fx(graph_module, inputs, inner_compile=schedule)

    def on_gpu(tensor, tx):
        return ConstantVariable.create(True)

    def slice_on_gpu(B, T, V, device_type, dtype, head_slice=operators.head_slice):
        return head_slice(B, T, V, "cuda", dtype)

    torch._dynamo.reset()
    with (
        config.patch(cpu_backend="triton", fx_graph_cache=False),
        mock.patch.object(TensorVariable, "method_attr_is_cuda", on_gpu),
        mock.patch.object(kernels, "runs_on", lambda x: True),
        mock.patch.object(operators, "head_slice", slice_on_gpu),
    ):
        with autocast:
            result = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)()
        if result is not None:
            result.backward()
    return schedule.parts, schedule.calls


def on_meta(tensor):
    with unset_fake_temporarily():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def touched(node):
    """
    Bytes that a kernel of the scheduler reads and writes: the compiler's count, but for buffers whose places depend on
    data. The compiler takes all of such a buffer, this as many elements as are gathered, or twice as scattered to.
    """
    counts = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    changed = {name for output in node.get_outputs() for name in output.get_mutations()}
    for name in counts:
        deps = [dep for dep in dependencies(node) if dep.name == name]
        if name in changed and all(isinstance(dep, StarDep) for dep in deps):
            counts[name] = 0  # only an order: what is written there has a name of its own
        elif all(indirect(dep) for dep in deps):
            places = [min(math.prod(map(int, dep.size)), int(V.graph.get_numel(name))) for dep in deps]
            passes = [2 if dep.mode else 1 for dep in deps]  # adding at a place reads it
            counts[name] = sum(map(operator.mul, places, passes)) * V.graph.get_dtype(name).itemsize
    return sum(counts.values())


def dependencies(node):
    return [*node.read_writes.reads, *node.read_writes.writes]


def indirect(dep):
    return isinstance(dep, MemoryDep) and dep.is_indirect()


def part_of(node, logits, backward):
    """(part, operations) of a kernel of the scheduler; (None, 0) of our operators, which are counted apart."""
    origins = [origin for one in node.get_nodes() if one.node is not None for origin in one.node.get_origins()]
    if isinstance(node, ExternKernelSchedulerNode):
        called = str(getattr(node.node, "op_overload", ""))
        if isinstance(node.node, MultiOutput) or called.startswith("data_value"):
            return None, 0
        if "attention" in called:
            return "attention", 0
        origin = node.node.origin_node
        a, b = (argument.meta["val"] for argument in origin.args[-2:])
        head = "lm_head" in module_of(origin)[0]
        if backward and origin.args[0].target is aten.permute.default:
            part = "head dW" if head else "dW"
        else:
            part = "head products" if head else "dX" if backward else "forward"
        return part, 2 * a.numel() * b.shape[-1]
    buffers = {dep.name: (int(V.graph.get_numel(dep.name)), V.graph.get_dtype(dep.name)) for dep in dependencies(node)}
    if any(numel == logits for numel, _ in buffers.values()):
        return "head softmax", 0
    if len(buffers) == 2 and len({numel for numel, _ in buffers.values()}) == 1 < len(set(buffers.values())):
        return "casts", 0
    # What a kernel's outputs are called after; its other origins are what was computed on the way to them.
    own = {module_of(one.node.origin_node) for one in node.get_nodes() if getattr(one.node, "origin_node", None)}
    classes = {kind for _, kind in own}
    if "Embedding" in classes or any(indirect(dep) for dep in dependencies(node)):
        return "embeddings", 0
    if "LayerNorm" in classes:
        return "layer norms", 0
    paths = {path for path, kind in map(module_of, origins) if kind}
    return "head softmax" if paths and all("lm_head" in path for path in paths) else "pointwise", 0


def module_of(origin):
    """(path, class) of the module whose forward or backward made a node of a graph."""
    stack = origin.meta.get("nn_module_stack") or origin.meta.get("fwd_nn_module_stack")
    path, kind = list(stack.values())[-1] if stack else ("", "")
    return str(path), getattr(kind, "__name__", str(kind)).rpartition(".")[2].rstrip("'>")

"""CUDA graphs. Without a GPU: when there are any, and what a recording holds; on one: replays are what they replay."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import TINY, call, corpus, home  # noqa: F401 (fixtures)
from torch.nn import functional as F

import train
from support.configurator import UserError
from support.graphs import EAGER, Recorded, Recorder, recorded, recorder_for
from support.values import read_log

needs_gpu = pytest.mark.gpu


def test_only_compiled_code_on_one_gpu_has_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "stream")
    for compiled, device, world in [(True, "cpu", 1), (False, "cuda", 1), (True, "cuda", 2), (True, "mps", 1)]:
        assert recorder_for(SimpleNamespace(compile=compiled, device=device), world) is None
    recorder = recorder_for(SimpleNamespace(compile=True, device="cuda:1"))
    assert (recorder.pool, recorder.stream) == ((0, 1), "stream") and recorded(len, recorder).function is len
    assert recorded(len, None) is len


def test_a_recording_holds_its_arguments_and_gives_copies_of_its_results(monkeypatch):
    """With a graph that is made up: it computes its function again, from and into the tensors of the recording."""
    made = []

    class Graph:
        def __init__(self):
            made.append(self)

        def replay(self):
            for held, new in zip(self.results, self.function(*self.held), strict=True):
                held.copy_(new)

    class Watched(Recorded):
        def record(self, held):
            graph, results = found = super().record(held)
            graph.function, graph.held, graph.results = self.function, held, results
            return found

    def function(x, y):
        seen.setdefault(x.shape, set()).add((x.data_ptr(), y.data_ptr()))
        return 2 * x, x + y

    double, seen = Watched(function, made_up_recorder(monkeypatch, Graph)), {}
    found, expected = [], []
    for n in range(12):
        both = torch.full((2 + n % 2, 9), float(n)).add_(torch.arange(9))
        x, y = both[:, :-1], both[:, 1:]  # as a batch of windows
        found.append(double(x, y))
        expected.append((2 * x, x + y))
        assert len(made) == max(0, min(2, n + 1 - 2 * EAGER))  # one for each shape, behind the eager calls
    for ours, theirs in zip(found, expected, strict=True):  # later replays have not written over them
        assert all(map(torch.equal, ours, theirs))
    assert [len(places) for places in seen.values()] == [1, 1]  # what is compiled for the first call fits all others


def made_up_recorder(monkeypatch, graph):
    @contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ("pool", recorder.stream, "thread_local")
        yield

    recorder = SimpleNamespace(pool="pool", stream=SimpleNamespace(wait_stream=lambda other: None))
    for name, fake in dict(CUDAGraph=graph, graph=recording, stream=nullcontext).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: recorder.stream)
    return recorder


def test_what_cannot_be_recorded_names_the_flag(monkeypatch):
    calls = []

    def function(x):
        calls.append(x)
        if len(calls) > EAGER:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")
        return (x,)

    function = Recorded(function, made_up_recorder(monkeypatch, SimpleNamespace))
    for _ in range(EAGER):
        function(torch.ones(2))
    said = "--compile=True: no CUDA graph can be recorded here (CUDA out of memory.); use a smaller --batch_size, or"
    with pytest.raises(UserError) as error:
        function(torch.ones(2))
    assert str(error.value) == f"{said} --compile=False"


@pytest.mark.parametrize(
    "flags",
    ["--gradient_accumulation_steps=2 --val_average=4", "--value_order=2 --dropout=0.1", "--val_sets=odd,even"],
)
def test_what_a_recording_needs_stays_where_it_is(home, monkeypatch, flags):  # noqa: F811
    """From the second step on no gradient and no direction moves; and the run is the same as without a recorder."""
    flags, places = f"{TINY} --score=True --val_batch_size=4 --value_direction=adam --grad_clip=1 {flags}", []

    def watched(function, recorder):
        def call_it(*inputs):
            results = function(*inputs)
            if function.func is train.add_gradients:
                net, directions = function.args[:2]
                tensors = [p.grad for p in net.parameters()] + list(directions.buffers.values())
                places.append([tensor.data_ptr() for tensor in (*net.parameters(), *tensors)])
            return tuple(result.clone() for result in results)

        return call_it

    call(train.main, f"{flags} --out_dir=out/without")
    monkeypatch.setattr(train, "recorder_for", lambda *_: "recorder")
    monkeypatch.setattr(train, "recorded", watched)
    call(train.main, f"{flags} --out_dir=out/with")
    assert len(places) >= 8 and all(each == places[0] for each in places)
    without, with_ = (read_log(f"out/{name}")["dot_product"] for name in ("without", "with"))
    assert np.array_equal(without, with_)


@needs_gpu
def test_replays_do_what_the_function_does():
    """Two shapes in turn, random numbers by their seed, products, and sums that grow in place."""
    torch.manual_seed(0)
    weight = torch.randn(300, 200, device="cuda")
    batches = [torch.randn(5 + n % 2, 300, device="cuda") for n in range(12)]
    runs = []
    for recorder in (None, Recorder()):
        w = weight.clone().requires_grad_()

        def add_gradient(x, w=w):
            loss = F.dropout(x @ w, 0.5).square().mean()
            loss.backward()
            return loss.detach(), x.sum(1)

        function, results = recorded(add_gradient, recorder), []
        for n, x in enumerate(batches):
            torch.manual_seed(n)
            results += function(x)
            if n % 3 == 2 and w.grad is not None:
                w.grad.zero_()
        runs.append([*results, w.grad])
        assert recorder is None or len(function.graphs) == 2
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


@needs_gpu
@pytest.mark.parametrize(
    "flags",
    [
        "--value_direction=adam --batch_size=1 --val_batch_size=1",  # y, one window from its second token on
        "--value_direction=adam --val_average=4 --gradient_accumulation_steps=2",
        "--val_sets=odd,even --val_groups=2 --value_direction=sgd,adam --dropout=0.1 --grad_clip=1",
        "--value_order=2 --optimizer=sgd",
    ],
)
def test_a_run_with_graphs_is_the_run_without(home, monkeypatch, flags):  # noqa: F811
    torch._dynamo.reset()  # what another test has compiled
    flags = f"--val_batch_size=4 --max_iters=9 --bias=False {flags}"
    flags = f"{TINY} --device=cuda --compile=True --score=True {flags}"
    record, made = Recorded.record, []
    monkeypatch.setattr(Recorded, "record", lambda self, inputs: made.append(self) or record(self, inputs))
    for name in ("graphs", "again"):  # the second run of a process has its own graphs
        call(train.main, f"{flags} --out_dir=out/{name}")
    assert len({id(one) for one in made}) == 2 * (3 if "order=2" in flags else 2)
    monkeypatch.setattr(train, "recorder_for", lambda *_: None)
    call(train.main, f"{flags} --out_dir=out/eager")
    graphs, again, eager = (read_log(f"out/{name}")["dot_product"] for name in ("graphs", "again", "eager"))
    for found in (graphs, again):
        assert abs(found - eager).max() < 1e-4 * abs(eager).max()

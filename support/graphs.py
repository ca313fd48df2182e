"""
CUDA graphs: the kernels of a function are recorded once and then launched together, so a GPU need not wait for Python.

    recorder = recorder_for(knobs)               # None where nothing is recorded: without a GPU or without compile
    add_gradients = recorded(add_gradients, recorder)
    loss, dots = add_gradients(x, y)             # as before
"""

import torch

EAGER = 2  # calls before the recording: the first compiles, the second is the first to add to gradients that are there


class Recorder:
    """What all graphs of a run share: memory, and the stream on which they are recorded."""

    def __init__(self):
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()


def recorder_for(knobs, world=1):
    """The Recorder of a run, or None where it records nothing. Graphs are for compiled code on one GPU."""
    return Recorder() if knobs.compile and knobs.device.startswith("cuda") and world == 1 else None


def recorded(function, recorder):
    """The function as a Recorded, or as it is where there is no recorder."""
    return Recorded(function, recorder) if recorder else function


class Recorded:
    """
    A function of tensors on the GPU that returns a tuple of tensors. For each set of shapes its first calls run as they
    are, the next one is recorded as a CUDA graph, which it and all later ones replay. So the function must do the same
    at every call: what it reads besides its arguments, and what it writes, such as gradients, stays at its place in
    memory, and nothing in it waits for the GPU. Of random numbers each replay has new ones, by the seed of its time.
    What is returned are copies: the next replay of any graph of this recorder writes over the graph's own.
    """

    def __init__(self, function, recorder):
        self.function, self.recorder = function, recorder
        self.calls, self.graphs = {}, {}  # by the shapes of the arguments

    def __call__(self, *inputs):
        shapes = tuple(x.shape for x in inputs)
        self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if self.calls[shapes] <= EAGER:
            return self.run(inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.record(inputs)
        graph, held, results = self.graphs[shapes]
        torch._foreach_copy_(held, inputs)
        graph.replay()
        return tuple(result.clone() for result in results)

    def run(self, inputs):
        """On the stream of the recordings: autograd adds to a gradient on the stream that has used it first."""
        here, aside = torch.cuda.current_stream(), self.recorder.stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            results = self.function(*inputs)
        here.wait_stream(aside)
        return results

    def record(self, inputs):
        """(graph, its arguments, its results). It computes nothing yet. Other threads may use the GPU meanwhile."""
        # with the strides of the arguments, for which the code has been compiled
        held = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        pool, stream = self.recorder.pool, self.recorder.stream
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            results = self.function(*held)
        return graph, held, results

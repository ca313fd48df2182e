"""
CUDA graphs: the kernels of a function are recorded once and then launched together, so a GPU need not wait for Python.

    recorder = recorder_for(knobs)               # None where nothing is recorded: without a GPU or without compile
    add_gradients = recorded(add_gradients, recorder)
    loss, dots = add_gradients(x, y)             # as before
"""

import torch

from support.configurator import UserError

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
    are. The next one is recorded as a CUDA graph, which it and all later calls replay. So the function must do the same
    at every call: what it reads besides its arguments, and what it writes, such as gradients, stays at its place in
    memory, and nothing in it waits for the GPU. Each replay draws new random numbers from the current seed. What is
    returned are copies, since the next replay of any graph of this recorder writes over the graph's own results.

    Raises UserError where a graph cannot be recorded, as where the GPU's memory has no room for it; then the process
    must end.
    """

    def __init__(self, function, recorder):
        self.function, self.recorder = function, recorder
        self.held, self.calls, self.graphs = {}, {}, {}  # by the shapes of the arguments

    def __call__(self, *inputs):
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.held:  # all calls are of these tensors: code that is compiled for them fits the recording
            self.held[shapes] = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
            self.calls[shapes] = 0
        held = self.held[shapes]
        torch._foreach_copy_(held, inputs)
        self.calls[shapes] += 1
        if self.calls[shapes] <= EAGER:
            return self.run(held)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.record(held)
        graph, results = self.graphs[shapes]
        graph.replay()
        return tuple(result.clone() for result in results)

    def run(self, held):
        """On the stream of the recordings: autograd adds to a gradient on the stream that has used it first."""
        here, aside = torch.cuda.current_stream(), self.recorder.stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            results = self.function(*held)
        here.wait_stream(aside)
        return results

    def record(self, held):
        """(graph, results). Recording computes nothing. Meanwhile other threads may use the GPU."""
        graph, pool, stream = torch.cuda.CUDAGraph(), self.recorder.pool, self.recorder.stream
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                return graph, self.function(*held)
        except RuntimeError as error:
            cause = error.__context__ or error  # behind the first error there is that of a recording cut short
            what = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            mend = "use a smaller --batch_size, or --compile=False"
            raise UserError(f"--compile=True: no CUDA graph can be recorded here ({what:.150}); {mend}") from error

"""
Before any import: no test asks the network for weights, and none waits for its time-outs; torch.compile starts no pool
of processes, which takes seconds. And the process in which Triton's kernels are interpreted.
"""

import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

os.environ["HF_HUB_OFFLINE"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--until", type=float, default=math.inf, help="seconds since 1970: then no test is begun any more")


LONG = ["gpu", "compile", "processes", "run_folder", "docs", "bench"]  # files whose tests are long one by one,
LONG_TOGETHER = ["trial", "kernels", "budget"]  # and in sum


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """
    For make test's three processes, of which one may wait: the tests of long files come first, one by one, so that none
    is left for the end; the tests of another file are a group that one of the processes runs, because they share what
    takes time to make.
    """
    order = [f"test_{name}.py" for name in LONG + LONG_TOGETHER]
    items.sort(key=lambda item: [*order, item.path.name].index(item.path.name))
    for item in items:
        if config.pluginmanager.hasplugin("xdist") and item.path.name not in order[: len(LONG)]:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_runtest_setup(item):
    if time.time() > item.config.getoption("--until"):
        pytest.skip("out of time")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def interpreter():
    """
    A process that runs Triton's kernels in its interpreter, on CPU tensors: `interpreter.submit(function, ...)`. It is
    one of its own, since Triton reads TRITON_INTERPRET when it is imported.
    """
    triton = pytest.importorskip("triton", reason="triton is not installed")
    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} fails with numpy {np.__version__}")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            process.submit(torch.set_num_threads, 1).result()
        yield process

"""Where the tests for a GPU run, and what becomes of those that fail while its time is short.

FASTATTN_TEST_LOG=FILE: each failure is appended to it at once, whatever ends the run. A test that loses the GPU, by an
access outside its memory, would let all tests behind it in its process fail: the process ends, and with pytest-xdist
another takes over.
"""

import os
from pathlib import Path

import pytest
import torch

from . import COMPILED


@pytest.fixture(
    params=[
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
        "cpu",
    ]
)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def kernels():
    """Let CPU tensors take the compiled kernels if an architecture is given."""
    if COMPILED is None:
        yield
        return
    from tests.ptx.launches import emulated, on_the_way_of_a_gpu

    with emulated(int(COMPILED)), on_the_way_of_a_gpu():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note a failure, and whether the GPU survived it."""
    report = yield
    if report.failed:
        lost = gpu_is_lost()
        if log := os.environ.get("FASTATTN_TEST_LOG"):
            with Path(log).open("a") as file:
                file.write(
                    f"{item.nodeid} ({report.when}){', THE GPU WAS LOST' if lost else ''}\n{report.longrepr}\n\n"
                )
        if lost and hasattr(item.config, "workerinput"):
            os._exit(1)
        elif lost:
            pytest.exit(f"the GPU was lost in {item.nodeid}", returncode=1)
    return report


def gpu_is_lost() -> bool:
    """Return whether the GPU takes no more work from this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

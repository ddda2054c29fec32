"""Where the tests for a GPU run."""

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

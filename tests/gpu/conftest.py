"""Where the tests for a GPU run: there, or, so that they are tested themselves and the kernels without one, on a CPU.

FASTATTN_TEST_DEVICE=cpu: in PyTorch. FASTATTN_TEST_PTX=90 beside it: the kernels as compiled for sm_90, see tests/ptx.
"""

import os

import pytest
import torch


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
    arch = os.environ.get("FASTATTN_TEST_PTX")
    if arch is None:
        yield
        return
    from tests.ptx.launches import emulated, on_the_way_of_a_gpu

    with emulated(int(arch)), on_the_way_of_a_gpu():
        yield

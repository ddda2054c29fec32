"""Where the tests of a kernel run: on a GPU, and, so that they are tested themselves, in PyTorch on a CPU."""

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

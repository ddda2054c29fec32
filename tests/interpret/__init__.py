"""The kernels at small sizes: in Triton's interpreter, or as compiled for a GPU, on a CPU in both cases.

TRITON_INTERPRET=1: interpreted. FASTATTN_TEST_PTX=90: compiled for sm_90 and run by tests/ptx.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ARCH = os.environ.get("FASTATTN_TEST_PTX")

runs_kernels = [
    pytest.mark.interpret,
    pytest.mark.skipif(not (INTERPRETED or ARCH), reason="needs TRITON_INTERPRET=1 or FASTATTN_TEST_PTX=90"),
]
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")

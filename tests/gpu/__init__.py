"""The tests for a GPU: there, or, so that they are tested themselves and the kernels without one, on a CPU.

FASTATTN_TEST_DEVICE=cpu: in PyTorch, at small sizes. FASTATTN_TEST_PTX=90 beside it: the kernels as compiled for sm_90,
run by tests/ptx.
"""

import os

COMPILED = os.environ.get("FASTATTN_TEST_PTX")

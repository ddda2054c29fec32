"""Which way the kernels run."""

import pytest

from . import ARCH


@pytest.fixture(autouse=True)
def kernels():
    """Run them as compiled if an architecture is given."""
    if ARCH is None:
        yield
        return
    from tests.ptx.launches import emulated

    with emulated(int(ARCH)):
        yield

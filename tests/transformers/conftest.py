"""What all tests against transformers share: few threads, no progress output, warnings that come again."""

import pytest
import torch
from transformers.utils import logging

from hf_fastattn import fallback


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers():
    logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _fresh_warnings():
    """Let every test see the warnings that the package gives once per process."""
    fallback._warn.cache_clear()
    yield
    torch._dynamo.reset()

"""What all tests against transformers share: few threads, no progress output, warnings that come again; our loop."""

import importlib

import pytest
import torch
from transformers.utils import logging

from hf_fastattn import PagedCache, fallback

loop = importlib.import_module("hf_fastattn.generate")


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers():
    logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _fresh_warnings():
    """Let every test see the warnings that the package gives once per process."""
    fallback._warn.cache_clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def runs(monkeypatch):
    """Count the calls that our loop runs itself."""
    counts = []
    original = loop._Loop.run
    monkeypatch.setattr(loop._Loop, "run", lambda self, kwargs: counts.append(1) or original(self, kwargs))
    return counts


@pytest.fixture(params=[False, True], ids=["at_once", "deferred"])
def deferred(request, monkeypatch):
    """Look at the end of a step at once, as on a CPU, or one forward pass later, as on a GPU."""
    if request.param:
        monkeypatch.setattr(loop, "_defers", lambda device, cache: isinstance(cache, PagedCache))
    return request.param


@pytest.fixture
def forwards(llama):
    """Count forward passes of the model."""
    calls = []
    hook = llama.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()

"""What every test shares: memory that nobody wrote holds garbage, and tiny models whose attention is sharp."""

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a hub, nor wait for one that is not there

import pytest
import torch

from hf_fastattn import kv_pool
from hf_fastattn.block_pool import BlockTables
from tests.op_calls import NAN
from tests.tiny import Pair, make_pair


@pytest.fixture
def by_table(monkeypatch):
    """Let a CPU read and write blocks by their table always, as a GPU does, instead of viewing even runs."""
    monkeypatch.setattr(BlockTables, "even_runs", lambda tables: None)


@pytest.fixture(scope="session", autouse=True)
def all_by_table():
    """The same for all tests if FASTATTN_TEST_BY_TABLE is set, as it is in one of the two runs of the glue's tests."""
    patch = pytest.MonkeyPatch()
    if os.environ.get("FASTATTN_TEST_BY_TABLE"):
        patch.setattr(BlockTables, "even_runs", lambda tables: None)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """Fill memory with what shows when it is read before it was written: NaN; in a CPU's blocks, the garbage of others.

    NaN there would only show how attention avoids it, see tests/test_cpu_schedule.py and tests/test_cache_failures.py.
    """
    patch = pytest.MonkeyPatch()
    for owner, name, value in ((torch, "empty", NAN), (torch.Tensor, "new_empty", NAN), (kv_pool, "_zero_pages", 1e4)):
        patch.setattr(owner, name, _poisoned(getattr(owner, name), value))
    yield
    patch.undo()


def _poisoned(make, value):
    @functools.wraps(make)
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(value)
        return tensor

    return poisoned


@pytest.fixture(scope="session")
def llama() -> Pair:
    """A tiny Llama with grouped queries, under fastattn and under eager attention."""
    return make_pair("llama")


@pytest.fixture(scope="session")
def mistral() -> Pair:
    """A tiny Mistral whose window is 11 tokens, under fastattn and under eager attention."""
    return make_pair("mistral", sliding_window=11)


@pytest.fixture
def no_grad():
    """Let a test, or with usefixtures all tests of a file, run without gradients."""
    with torch.no_grad():
        yield


SIZES = {"growing": {}, "fixed": {"num_blocks": 24}, "reserved": {"max_length": 80}}


@pytest.fixture(params=SIZES)
def sizes(request):
    """The three ways of sizing a cache."""
    return SIZES[request.param]

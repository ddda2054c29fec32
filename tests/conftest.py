"""What every test shares: memory that nobody wrote is NaN, and tiny models whose attention is sharp."""

import os

import pytest
import torch

from hf_fastattn.block_pool import BlockTables
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
    """Fill what torch.empty and new_empty return with NaN: whatever is read before it was written shows."""
    patch = pytest.MonkeyPatch()
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        patch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield
    patch.undo()


def _poisoned(make):
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
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

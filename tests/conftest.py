"""What every test shares: memory that nobody wrote is NaN, and tiny models whose attention is sharp."""

import pytest
import torch

from tests.tiny import Pair, make_pair


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

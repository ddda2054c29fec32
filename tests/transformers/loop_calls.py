"""Calls through our decoding loop, and what the tests of it compare."""

import torch
from models import generate

import hf_fastattn

OURS = {"custom_generate": hf_fastattn.generate}


def check_same(out, wanted):
    """Assert that two results hold the same kinds of things with the same values."""
    assert type(out) is type(wanted)
    assert out.keys() == wanted.keys()
    assert torch.equal(out.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        values, others = getattr(out, name), getattr(wanted, name)
        assert (values is None) == (others is None)
        for value, other in zip(values or (), others or (), strict=True):
            assert torch.equal(value, other)


def eos_of(model, inputs, row, steps, **kwargs):
    """Return a token that ends one row of a batch after so many steps, and not before."""
    new = generate(model, **inputs, **kwargs).sequences[row, inputs["input_ids"].shape[1] :].tolist()
    assert new[steps - 1] not in new[: steps - 1]
    return new[steps - 1]

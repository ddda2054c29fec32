"""Our loop over caches that fill up, memory that runs out, capacities that stay and caches that are used again."""

import importlib

import pytest
import torch
from loop_calls import OURS, check_same, eos_of
from models import build, generate, left_padded, paged, prompt
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn import BlockPoolExhausted

loop = importlib.import_module("hf_fastattn.generate")


@pytest.fixture(scope="module")
def llama():
    return hf_fastattn.paged(build("llama", "fastattn"))


def test_full_fixed_pool_is_an_error_only_if_the_token_is_wanted(llama, deferred):
    """16 tokens fit: the pass that would store the 17th fails, and may be one that nobody wanted."""
    inputs = {"input_ids": prompt(1)}
    eos = eos_of(llama, inputs, 0, 3)
    wanted = generate(llama, eos_token_id=eos, **inputs)
    out = generate(llama, paged(llama, num_blocks=1), eos_token_id=eos, **inputs, **OURS)
    check_same(out, wanted)
    assert out.past_key_values.get_seq_length() == 16
    with pytest.raises(BlockPoolExhausted):
        generate(llama, paged(llama, num_blocks=1), **inputs, **OURS)


def test_memory_that_runs_out_is_an_error_only_if_the_token_is_wanted(llama, forwards, deferred):
    inputs = {"input_ids": prompt(1)}
    eos = eos_of(llama, inputs, 0, 3)
    wanted = generate(llama, eos_token_id=eos, **inputs)
    del forwards[:]

    def full(*_):
        if len(forwards) == 4:  # the prompt and two tokens are through
            raise torch.OutOfMemoryError("as planned")

    hook = llama.model.layers[1].register_forward_pre_hook(full)
    try:
        out = generate(llama, eos_token_id=eos, **inputs, **OURS)
        check_same(out, wanted)
        assert out.past_key_values.get_seq_length() == 16
        del forwards[:]
        with pytest.raises(torch.OutOfMemoryError, match="as planned"):
            generate(llama, **inputs, **OURS)
    finally:
        hook.remove()
    said = {"input_ids": torch.cat([out.sequences, prompt(1, 5, seed=6)], 1)}
    check_same(generate(llama, out.past_key_values, **said), generate(llama, wanted.past_key_values, **said))


def test_compiled_steps(llama, deferred, runs):
    """One graph over several calls; rows that end early, and the capacity is kept."""
    from test_compiled import Graphs, _compiled

    graphs = Graphs()
    compiled = _compiled(graphs)
    inputs = left_padded(prompt(2), 4, 0)
    eos = eos_of(llama, inputs, 0, 5)
    for batch, end in ((inputs, None), (left_padded(prompt(2, 9, seed=3), 0, 1), None), (inputs, eos)):
        wanted = generate(llama, eos_token_id=end, **batch)
        out = generate(llama, paged(llama, max_length=64), eos_token_id=end, **batch, **compiled, **OURS)
        check_same(out, wanted)
        assert out.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()
        assert graphs.count == 1
    assert len(runs) == 3
    with pytest.raises(BlockPoolExhausted, match="max_length is 32"):
        generate(llama, paged(llama, max_length=32), max_new_tokens=25, **batch, **compiled, **OURS)


def test_second_turn_over_a_returned_cache(llama, deferred):
    """The column of the pass too many must be gone: the next prompt is stored from there on."""
    inputs = {"input_ids": prompt(1)}
    eos = eos_of(llama, inputs, 0, 4)
    results = []
    for how in ({}, OURS):
        first = generate(llama, eos_token_id=eos, **inputs, **how)
        said = torch.cat([first.sequences, prompt(1, 7, seed=8)], 1)
        results.append(generate(llama, first.past_key_values, input_ids=said, **how))
    check_same(results[1], results[0])


def test_prefill_that_runs_out_of_memory_is_cut(llama, monkeypatch):
    """Memory for a third of the prompt: halves fail, quarters pass; the result is that of chunked prefill."""
    monkeypatch.setattr(loop, "MIN_CHUNK", 4)
    inputs, widths = left_padded(prompt(2, 50), 13, 0), []

    def full(module, args, kwargs):
        widths.append(kwargs["inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"].shape[1])
        if widths[-1] > 17:
            raise torch.OutOfMemoryError("as planned")

    wanted = generate(llama, prefill_chunk_size=13, **inputs)
    hook = llama.register_forward_pre_hook(full, with_kwargs=True)
    try:
        out = generate(llama, **inputs, **OURS)
        assert widths[:6] == [50, 25, 13, 13, 13, 11]
        monkeypatch.setattr(loop, "MIN_CHUNK", 25)
        with pytest.raises(torch.OutOfMemoryError):
            generate(llama, **inputs, **OURS)
        with pytest.raises(torch.OutOfMemoryError):  # a cache that is not ours cannot go back
            generate(llama, DynamicCache(), **inputs, **OURS)
        monkeypatch.setattr(loop, "MIN_CHUNK", 4)
        with pytest.raises(torch.OutOfMemoryError):  # those of all but the last piece would be missing
            generate(llama, output_hidden_states=True, **inputs, **OURS)
        with pytest.raises(torch.OutOfMemoryError), torch.no_grad():  # whatever else there is may not be cut alike
            generate(llama, inputs_embeds=llama.get_input_embeddings()(inputs["input_ids"]), **inputs, **OURS)
    finally:
        hook.remove()
    check_same(out, wanted)

"""When the cache that generate() makes is sized, so that its decode step is compiled; and what if that fails."""

import copy
import gc
import warnings

import pytest
import torch
from models import build, check_logits, generate, in_float64, left_padded, prompt, run_eager
from test_compiled import Graphs, _compiled

import hf_fastattn
from hf_fastattn import compile_policy

OURS = {"custom_generate": hf_fastattn.generate}


@pytest.fixture
def model():
    return hf_fastattn.paged(build("llama", "fastattn"))


def where(cache):
    """Return the addresses that a captured step would read and write."""
    [tables] = cache.state.devices.values()
    of_tables = (tables.block_table, tables.past_lens, tables.seq_lens, tables.columns)
    return [t.data_ptr() for layer in cache.paged_layers for t in layer.blocks.tensors] + [
        t.data_ptr() for t in of_tables
    ]


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
def test_second_call_of_a_bucket_is_compiled_at_the_same_addresses(model, how):
    """Five calls of one bucket: other prompts, paddings and lengths; the first is eager, the others share one graph."""
    graphs, places, exact = Graphs(), [], in_float64(build("llama"))
    eager = build("llama")
    for i, (length, pads, new) in enumerate([(9, 0, 12), (9, 3, 12), (30, 7, 40), (14, 0, 200), (5, 2, 12)]):
        inputs, steps = left_padded(prompt(2, length, seed=i), pads, 0), {"max_new_tokens": new}
        out = generate(model, **steps, **inputs, **_compiled(graphs), **how)
        wanted, wide = generate(eager, **steps, **inputs), generate(exact, **steps, **inputs)
        assert torch.equal(out.sequences, wanted.sequences)
        check_logits(*(torch.stack(result.logits) for result in (out, wanted, wide)))
        cache = out.past_key_values
        assert cache.is_compileable == (i > 0)
        assert graphs.count == (i > 0)
        if i:
            assert cache.get_max_length() == 256
            places.append(where(cache))
        del out, cache
    assert all(place == places[0] for place in places)


def test_bucket_is_rows_length_and_dtype(model):
    graphs = Graphs()

    def sized(rows, **kwargs):
        out = generate(model, input_ids=prompt(rows), **_compiled(graphs), **kwargs)
        return out.past_key_values.state.max_length

    assert [sized(2), sized(2)] == [None, 256]
    assert [sized(3), sized(2, max_new_tokens=300)] == [None, None]
    assert sized(2, max_new_tokens=450) == 512
    assert sized(1, do_sample=True, num_return_sequences=3) == 256  # three rows again
    model.double()
    assert [sized(2), sized(2)] == [None, 256]


def test_nobody_else_is_sized(model):
    """Without a GPU, with disable_compile, with beams or an assistant: never, however often."""
    for options in ({}, {"disable_compile": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        graphs = Graphs()
        compiled = {} if not options else _compiled(graphs)
        for _ in range(3):
            out = generate(model, input_ids=prompt(1), **options, **compiled)
            assert not out.past_key_values.is_compileable
        assert graphs.count == 0


def test_no_room_for_a_sized_cache(model, monkeypatch):
    monkeypatch.setattr(compile_policy, "_free_bytes", lambda model: 100_000)  # a bucket takes 196 608 bytes
    for _ in range(2):
        out = generate(model, input_ids=prompt(2), **_compiled(Graphs()))
        assert out.past_key_values.state.max_length is None


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
def test_a_returned_cache_that_was_sized_still_grows(model, how):
    """The size was ours: a second turn whose new tokens go beyond it, a copy and a fork are no errors."""
    compiled = _compiled(Graphs())
    generate(model, input_ids=prompt(), **compiled)
    first = generate(model, input_ids=prompt(), **compiled, **how)
    cache = first.past_key_values
    twins = [copy.deepcopy(cache), cache.fork(1)]
    said = torch.cat([first.sequences, prompt(2, 225, seed=1)], 1)

    def cold(other, _):
        return [generate(other, input_ids=said, max_new_tokens=20)]

    wanted = run_eager(build("llama"), cold)
    assert cache.is_compileable
    for continued in (cache, *twins):
        out = generate(model, continued, input_ids=said, max_new_tokens=20, **compiled, **how)
        wanted.check([out])
        assert out.past_key_values.get_seq_length() == 26 + 225 + 19


def test_forward_passes_beyond_the_size_are_no_error(model):
    """A loop of the user's own over a returned cache."""
    compiled = _compiled(Graphs())
    generate(model, input_ids=prompt(), **compiled)
    cache = generate(model, input_ids=prompt(), **compiled).past_key_values
    with torch.no_grad():
        model(prompt(2, 300), past_key_values=cache)
    assert cache.get_seq_length() == 25 + 300
    assert not cache.is_compileable


def test_failure_to_compile_costs_a_warning(model):
    """No compiler, an unsupported model: the call goes on, and the next does not try again."""
    tries = []

    def broken(graph, inputs):
        tries.append(1)
        raise RuntimeError("no compiler here")

    compiled, inputs = _compiled(broken), left_padded(prompt(), 3, 0)
    wanted = generate(build("llama"), **inputs)
    generate(model, **inputs, **compiled)
    with pytest.warns(RuntimeWarning, match="could not be compiled .*no compiler here.*eager mode") as caught:
        out = generate(model, **inputs, **compiled)
    assert len([w for w in caught if "compiled" in str(w.message)]) == 1
    assert out.sequences.tolist() == wanted.sequences.tolist()
    assert out.past_key_values.get_seq_length() == 25
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for how in ({}, OURS):
            again = generate(model, **inputs, **compiled, **how)
            assert again.sequences.tolist() == wanted.sequences.tolist()
            assert again.past_key_values.state.max_length is None
    assert len(tries) == 1


def test_errors_of_the_model_stay_errors(model):
    compiled = _compiled("eager")
    generate(model, input_ids=prompt(), **compiled)
    hook = model.model.layers[1].register_forward_pre_hook(_fail_at_one_token)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with pytest.raises(ZeroDivisionError):
                generate(model, input_ids=prompt(), **compiled)
    finally:
        hook.remove()


def _fail_at_one_token(module, args):
    if args[0].shape[1] == 1:
        raise ZeroDivisionError


def test_offloaded_model_is_not_sized(model):
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    for _ in range(2):
        assert not generate(model, input_ids=prompt(), **_compiled(Graphs())).past_key_values.is_compileable


def test_tables_are_kept_for_the_next_cache_only(model):
    """A cache that somebody holds keeps its own tables."""
    compiled = _compiled(Graphs())
    generate(model, input_ids=prompt(), **compiled)
    held = generate(model, input_ids=prompt(), **compiled).past_key_values
    other = generate(model, input_ids=prompt(), **compiled).past_key_values
    assert not set(where(held)) & set(where(other))
    del held
    gc.collect()
    third = generate(model, input_ids=prompt(), **compiled).past_key_values
    assert not set(where(third)) & set(where(other))


def test_lengths_are_rounded_up_by_a_quarter_at_most():
    assert [compile_policy.bucket_length(n) for n in (1, 256, 257, 5000, 8193)] == [256, 256, 512, 5120, 10240]
    for n in range(1, 40_000, 37):
        length = compile_policy.bucket_length(n)
        assert n <= length <= max(256, n + 256, 1.25 * n)
        assert compile_policy.bucket_length(length) == length

"""custom_generate=hf_fastattn.generate: what transformers' own loop returns, to the bit, and which calls it runs."""

import importlib
import itertools

import pytest
import torch
from loop_calls import OURS, check_same, eos_of
from models import (
    NEW_TOKENS,
    SCENARIOS,
    build,
    expected,
    generate,
    left_padded,
    peft_with_prompts,
    prompt,
    under,
)
from transformers import DynamicCache, MaxLengthCriteria, StaticCache, StoppingCriteriaList

import hf_fastattn
from hf_fastattn import PagedCache

loop = importlib.import_module("hf_fastattn.generate")


@pytest.fixture(scope="module")
def llama():
    return hf_fastattn.paged(build("llama", "fastattn"))


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in ("prompt_lookup", "assisted", "beams")])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_scenarios_equal_eager(family, scenario, runs, monkeypatch):
    """Every kind of call that the cache is tested with, but through our loop."""
    model = hf_fastattn.paged(build(family, "fastattn"))
    native = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, *args, **kw: native(self, *args, **kw, **OURS))
    expected(family, scenario).check(SCENARIOS[scenario](model, lambda _: None))
    assert runs


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("make", [None, DynamicCache, PagedCache])
def test_everything_returned_is_equal(llama, make, sampling, runs, deferred):
    def call(**kwargs):
        cache = None if make is None else make(config=llama.config)
        options = {"do_sample": sampling, "output_scores": True, "output_hidden_states": True}
        return generate(llama, cache, **options, **left_padded(prompt(3), 5, 0, 2), **kwargs)

    wanted, out = call(), call(**OURS)
    check_same(out, wanted)
    for states, others in zip(out.hidden_states, wanted.hidden_states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))
    assert type(out.past_key_values) is type(wanted.past_key_values)
    assert out.past_key_values.get_seq_length() == 14 + NEW_TOKENS - 1
    for ours, theirs in zip(out.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    assert len(runs) == 1


def test_ids_alone(llama, runs):
    plain = {"return_dict_in_generate": False, "output_logits": False, "input_ids": prompt()}
    wanted, out = generate(llama, **plain), generate(llama, **plain, **OURS)
    assert type(out) is torch.Tensor
    assert out.is_contiguous()
    assert torch.equal(out, wanted)
    assert runs


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_rows_that_end_early(llama, steps, deferred, forwards, runs):
    """One row ends after some steps and is padded, the other goes on: then both end, and nothing is left behind."""
    inputs = left_padded(prompt(2), 4, 0)
    eos = eos_of(llama, inputs, 0, steps)
    for rows in (2, 1):
        batch = {name: value[:rows] for name, value in inputs.items()}
        wanted = generate(llama, eos_token_id=eos, **batch)
        del forwards[:]
        out = generate(llama, eos_token_id=eos, **batch, **OURS)
        check_same(out, wanted)
        stopped = out.sequences.shape[1] < 14 + NEW_TOKENS
        assert out.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()
        assert len(forwards) == out.sequences.shape[1] - 14 + (deferred and stopped)
        for ours, theirs in zip(out.past_key_values.layers, wanted.past_key_values.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
    assert out.sequences.shape[1] == 14 + steps
    assert len(runs) == 2


def test_random_numbers_are_used_as_before(llama, deferred):
    """A pass too many must not draw a token: a second call without a new seed would differ."""
    inputs = {"input_ids": prompt(1)}
    eos = eos_of(llama, inputs, 0, 4, do_sample=True)
    after = []
    for how in ({}, OURS):
        generate(llama, do_sample=True, eos_token_id=eos, **inputs, **how)  # seeds
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_cache_is_told_who_finished(llama, deferred, monkeypatch):
    """Nobody sees this call's cache: it need not store the padding of rows that are finished."""
    from hf_fastattn.paged_state import PagedState

    told, finish = [], PagedState.finish
    monkeypatch.setattr(PagedState, "finish", lambda self, flags: told.append(list(flags)) or finish(self, flags))
    inputs = left_padded(prompt(3), 4, 0, 2)
    eos = eos_of(llama, inputs, 0, 3)
    plain = {"return_dict_in_generate": False, "output_logits": False, "eos_token_id": eos, **inputs}
    wanted = generate(llama, **plain)
    assert told
    del told[:]
    assert torch.equal(generate(llama, **plain, **OURS), wanted)
    assert told[0] == [True, False, False]
    assert all(before != after for before, after in itertools.pairwise(told))


def test_32_bit_ids(llama, runs):
    wanted, out = (generate(llama, input_ids=prompt().int(), **how) for how in ({}, OURS))
    assert wanted.sequences.dtype == out.sequences.dtype == torch.long
    check_same(out, wanted)
    assert runs


@pytest.mark.parametrize("room", [1, 5])
def test_room_for_ids_and_mask_grows(llama, room, runs, monkeypatch):
    """A limit that no memory could hold; under sdpa the mask grows too."""
    monkeypatch.setattr(loop, "ROOM", room)
    inputs = left_padded(prompt(2, 3), 1, 0)
    with under(llama, "sdpa"):
        limit = {"stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: torch.tensor(ids.shape[1] == 40)])}
        wanted = generate(llama, max_new_tokens=10**12, **inputs, **limit)
        eos = wanted.sequences[:, -1].tolist()
        for options in (limit, {"eos_token_id": eos, "min_new_tokens": 35}):
            wanted = generate(llama, max_new_tokens=10**12, **inputs, **options)
            check_same(generate(llama, max_new_tokens=10**12, **inputs, **options, **OURS), wanted)
            assert wanted.sequences.shape[1] >= 38
    assert len(runs) == 2


def test_mask_that_is_much_longer_than_the_ids(llama, runs, monkeypatch):
    """Only the new tokens of a chat are passed, or embeddings: the mask covers all columns."""
    monkeypatch.setattr(loop, "ROOM", 4)
    with under(llama, "sdpa"):
        first = left_padded(prompt(2, 40), 9, 0)
        results = []
        for how in ({}, OURS):
            cache = DynamicCache(config=llama.config)
            said = generate(llama, cache, **first).sequences
            new = torch.cat([said[:, -1:], prompt(2, 3, seed=4)], 1)
            mask = torch.cat([first["attention_mask"], torch.ones(2, NEW_TOKENS + 3, dtype=torch.long)], 1)
            results.append(generate(llama, cache, input_ids=new, attention_mask=mask, **how))
            with torch.no_grad():
                embeds = llama.get_input_embeddings()(first["input_ids"])
            mask = first["attention_mask"]
            results.append(generate(llama, DynamicCache(), inputs_embeds=embeds, attention_mask=mask, **how))
    check_same(results[2], results[0])
    check_same(results[3], results[1])
    assert len(runs) == 2


def test_beyond_the_positions_of_a_model(deferred, monkeypatch):
    """The warning comes as before, also for a prompt that is too long; no pass too many goes beyond."""
    model = hf_fastattn.paged(build("llama", "fastattn", max_position_embeddings=18))
    logger, warned, passes = importlib.import_module("transformers.generation.stopping_criteria").logger, [], []
    monkeypatch.setattr(logger, "warning_once", warned.append)
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    for length, steps in ((14, 5), (20, 2), (14, 3)):
        inputs, counts = {"input_ids": prompt(1, length)}, []
        eos = eos_of(model, inputs, 0, steps)
        for how in ({}, OURS):
            del warned[:], passes[:]
            out = generate(model, eos_token_id=eos, **inputs, **how)
            counts.append(
                (
                    out.sequences.tolist(),
                    len(set(warned)),
                    len(passes) - (deferred and bool(how) and length + steps <= 18),
                )
            )
        assert counts[1] == counts[0]
        assert counts[0][1] == (length + steps > 18)


def test_own_length_criterion_is_obeyed(llama, runs):
    for limit in (17, 40):
        criteria = StoppingCriteriaList([MaxLengthCriteria(limit)])
        wanted = generate(llama, input_ids=prompt(), stopping_criteria=criteria)
        check_same(generate(llama, input_ids=prompt(), stopping_criteria=criteria, **OURS), wanted)
        assert wanted.sequences.shape[1] == limit
    assert len(runs) == 2


def test_prompt_as_long_as_the_limit_still_gets_a_token(llama):
    criteria = StoppingCriteriaList([MaxLengthCriteria(10)])
    wanted = generate(llama, input_ids=prompt(), stopping_criteria=criteria)
    check_same(generate(llama, input_ids=prompt(), stopping_criteria=criteria, **OURS), wanted)
    assert wanted.sequences.shape[1] == 15


def test_other_modes(llama, runs):
    with pytest.raises(ValueError, match="got assisted generation: call generate\\(\\) without custom_generate"):
        generate(llama, input_ids=prompt(1), prompt_lookup_num_tokens=3, **OURS)
    with pytest.raises(ValueError, match="assisted generation"):
        generate(llama, input_ids=prompt(1), assistant_model=build("llama"), **OURS)
    for options in ({"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"use_cache": False}):
        wanted = generate(llama, input_ids=prompt(), **options)
        out = generate(llama, input_ids=prompt(), **options, **OURS)
        assert torch.equal(out.sequences, wanted.sequences)
    static = [StaticCache(llama.config, max_cache_len=64) for _ in range(2)]
    wanted = generate(llama, static[0], input_ids=prompt())
    check_same(generate(llama, static[1], input_ids=prompt(), **OURS), wanted)
    phi = hf_fastattn.paged(build("phi3", "fastattn"))
    check_same(generate(phi, input_ids=prompt(), **OURS), generate(phi, input_ids=prompt()))
    assert not runs


def test_methods_replaced_on_the_object_are_heeded(llama, runs, monkeypatch):
    """PEFT gives the model that it wraps another prepare_inputs_for_generation while it generates."""
    calls, native = [], llama.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        calls.append(1)
        return native(*args, **kwargs)

    monkeypatch.setattr(llama, "prepare_inputs_for_generation", prepare)
    generate(llama, input_ids=prompt(), **OURS)
    assert len(calls) == NEW_TOKENS
    assert not runs


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_prefix_tuning(runs):
    peft = peft_with_prompts()
    model = hf_fastattn.paged(build("llama", "fastattn"))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(model, config).eval()
    inputs = left_padded(prompt(), 4, 0)
    check_same(generate(model, **inputs, **OURS), generate(model, **inputs))
    assert not runs


def test_native_class_is_refused_before_a_streamer_is_lost():
    model = build("llama", "fastattn")
    with pytest.raises(TypeError, match=r"call hf_fastattn.paged\(model\) first"):
        generate(model, input_ids=prompt(), **OURS)


def test_another_attention_and_no_mask_at_all(llama, runs):
    for implementation in ("sdpa", "eager"):
        with under(llama, implementation):
            for inputs in (left_padded(prompt(), 3, 0), {"input_ids": prompt()}):
                wanted = generate(llama, **inputs)
                check_same(generate(llama, **inputs, **OURS), wanted)
    assert len(runs) == 4

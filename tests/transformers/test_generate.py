"""custom_generate=hf_fastattn.generate: what transformers' own loop returns, to the bit, and who else may notice."""

import importlib
import itertools
import queue

import pytest
import torch
from models import (
    NEW_TOKENS,
    SCENARIOS,
    VOCAB,
    build,
    expected,
    generate,
    left_padded,
    paged,
    peft_with_prompts,
    prompt,
    under,
)
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import hf_fastattn
from hf_fastattn import BlockPoolExhausted, PagedCache

loop = importlib.import_module("hf_fastattn.generate")
OURS = {"custom_generate": hf_fastattn.generate}


@pytest.fixture(scope="module")
def llama():
    return hf_fastattn.paged(build("llama", "fastattn"))


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


# The same results


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


class Watch(LogitsProcessor):
    """Notes what it is given; insists on contiguous ids."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.view(-1).tolist())
        scores[:, self.seen[-1][-1]] -= 5.0  # in place, as processors may
        return scores


class Odd(StoppingCriteria):
    """Ends a row when it has seen a number of tokens that depends on the row; counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.view(-1).tolist(), None if scores is None else len(scores)))
        return torch.tensor([input_ids.shape[1] >= 18 + 2 * row for row in range(len(input_ids))])


def test_processors_and_criteria_see_the_same(llama, deferred, runs):
    results = []
    for how in ({}, OURS):
        watch, odd = Watch(), Odd()
        out = generate(
            llama,
            input_ids=prompt(3),
            output_scores=True,
            logits_processor=[watch],
            stopping_criteria=StoppingCriteriaList([odd]),
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            max_new_tokens=20,
            **how,
        )
        results.append((out, watch.seen, odd.calls))
    check_same(results[1][0], results[0][0])
    assert results[1][1:] == results[0][1:]
    assert results[1][0].sequences.shape[1] == 22  # all rows have ended
    assert runs


class Editor(LogitsProcessor):
    """Replaces the last token of every row in place."""

    def __call__(self, input_ids, scores):
        input_ids[:, -1] = (input_ids[:, -1] + 1) % VOCAB
        return scores


class EditingStop(StoppingCriteria):
    """The same after a token was chosen, before the next forward pass; answers with integers."""

    def __call__(self, input_ids, scores, **kwargs):
        input_ids[:, -1] = input_ids[:, -1] * 3 % VOCAB
        return torch.zeros(len(input_ids), dtype=torch.long)


@pytest.mark.parametrize("rows", [1, 3])
def test_ids_that_others_edit_or_keep(llama, rows, deferred, runs):
    results = []
    for how in ({}, OURS):
        kept = []

        def keep(input_ids, scores, kept=kept, **kwargs):
            kept.append(input_ids)
            return torch.zeros(len(input_ids), dtype=torch.bool)

        criteria = StoppingCriteriaList([EditingStop(), keep])
        out = generate(
            llama,
            input_ids=prompt(rows),
            logits_processor=[Editor()],
            stopping_criteria=criteria,
            output_scores=True,
            **how,
        )
        results.append((out, [ids.tolist() for ids in kept]))
    check_same(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]
    assert runs


def test_integer_verdicts_end_rows(llama, deferred, runs):
    def stop(input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] == 17, input_ids.shape[1] == 20]).long()

    results = []
    for how in ({}, OURS):
        results.append(generate(llama, input_ids=prompt(), stopping_criteria=StoppingCriteriaList([stop]), **how))
    check_same(results[1], results[0])
    assert results[1].sequences.shape[1] == 20
    assert runs


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


class Streamer(BaseStreamer):
    """Collects what comes."""

    def __init__(self):
        self.values = queue.SimpleQueue()

    def put(self, value):
        self.values.put(value)  # itself: another thread may look at it later

    def end(self):
        self.values.put("end")

    def all(self):
        values = [self.values.get_nowait() for _ in range(self.values.qsize())]
        return [value if isinstance(value, str) else value.tolist() for value in values]


@pytest.mark.parametrize("ends", [False, True])
def test_streamer_gets_every_token_once(llama, deferred, ends):
    inputs = {"input_ids": prompt(1)}
    eos = eos_of(llama, inputs, 0, 5) if ends else None
    received = []
    for how in ({}, OURS):
        streamer = Streamer()
        out = generate(llama, streamer=streamer, eos_token_id=eos, **inputs, **how)
        received.append(streamer.all())
    assert received[1] == received[0]
    assert received[1][-1] == "end"
    assert [token for [token] in received[1][1:-1]] == out.sequences[0, 14:].tolist()
    assert len(received[1]) == (5 if ends else NEW_TOKENS) + 2


def test_tokenizer_for_stop_strings_arrives(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(importlib.import_module("pathlib").Path(__file__).parents[2] / "examples" / "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastattn")
    inputs = tokenizer("def add(a, b):", return_tensors="pt")
    options = {"max_new_tokens": 40, "do_sample": False, "stop_strings": ["\n"], "tokenizer": tokenizer}
    wanted = model.generate(**inputs, **options)
    assert wanted.shape[1] < inputs["input_ids"].shape[1] + 40
    assert torch.equal(model.generate(**inputs, **options, **OURS), wanted)
    assert runs


# Caches


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


# Who does it


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


def test_eos_criterion_of_the_user(llama, deferred):
    criteria = StoppingCriteriaList([EosTokenCriteria(eos_of(llama, {"input_ids": prompt()}, 1, 3))])
    wanted = generate(llama, input_ids=prompt(), stopping_criteria=criteria)
    check_same(generate(llama, input_ids=prompt(), stopping_criteria=criteria, **OURS), wanted)

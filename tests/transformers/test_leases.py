"""Whose cache a call uses, and pools that outlive their caches: never overwritten while somebody holds them."""

import gc
import threading
import weakref

import pytest
import torch
from models import FAMILIES, build, build_from, expected, generate, left_padded, paged, prompt, run_eager, under
from transformers import DynamicCache, LogitsProcessor, MambaConfig, StaticCache

import hf_fastattn
from hf_fastattn import PagedCache, auto, leases, paged_state, release
from hf_fastattn.block_pool import BlockPoolExhausted
from hf_fastattn.generate import CACHE_NAME

LAYERS = 3


@pytest.fixture
def model():
    """A model that is paged by default and has no idle pool."""
    return hf_fastattn.paged(build("llama", "fastattn"))


def addresses(cache):
    return [blocks.data_ptr() for layer in cache.paged_layers for blocks in layer.blocks.tensors]


def pool_bytes(cache):
    return sum(t.numel() * t.element_size() for layer in cache.paged_layers for t in layer.blocks.tensors)


def contents(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.to_dynamic().layers]


def equal(a, b):
    return all(torch.equal(x, y) for pair, other in zip(a, b, strict=True) for x, y in zip(pair, other, strict=True))


# Who chooses the cache


@pytest.mark.parametrize("make", [DynamicCache, StaticCache, PagedCache])
def test_a_cache_that_is_passed_wins(model, make):
    cache = make(config=model.config, **({"max_cache_len": 40} if make is StaticCache else {}))
    out = generate(model, cache, input_ids=prompt())
    assert out.past_key_values is cache
    assert cache.get_seq_length() == 25
    assert not leases.idle_bytes(model)


@pytest.mark.parametrize(("name", "kind"), [("static", StaticCache), ("dynamic", DynamicCache)])
@pytest.mark.parametrize("by_call", [True, False])
def test_a_cache_implementation_wins(model, name, kind, by_call):
    if not by_call:
        model.generation_config.cache_implementation = name
    out = generate(model, input_ids=prompt(), **({"cache_implementation": name} if by_call else {}))
    assert type(out.past_key_values) is kind
    expected("llama", "greedy").check([out])


def test_hubs_hybrid_default_is_no_choice(model):
    """Gemma's checkpoints name "hybrid", which transformers itself takes back."""
    model.generation_config.cache_implementation = "hybrid"
    assert type(generate(model, input_ids=prompt()).past_key_values) is PagedCache


def test_no_cache_and_other_attention_are_obeyed(model):
    out = generate(model, input_ids=prompt(), use_cache=False)
    assert out.past_key_values is None
    expected("llama", "greedy").check([out])
    with under(model, "sdpa"):
        assert type(generate(model, input_ids=prompt()).past_key_values) is DynamicCache
    assert type(generate(model, input_ids=prompt()).past_key_values) is PagedCache


def test_model_with_other_state_keeps_its_own_cache():
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)
    mamba = build_from(config)
    wanted = generate(mamba, input_ids=prompt())
    mamba.__class__ = auto._paged_class(type(mamba))  # paged() itself refuses
    with under(mamba):
        out = generate(mamba, input_ids=prompt())
    assert out.sequences.tolist() == wanted.sequences.tolist()


def test_training_mode_and_gradients(model):
    """Nothing a forward pass records may keep a pool from the next call, or break it."""
    model.train()
    wanted = expected("llama", "greedy")
    for _ in range(2):
        wanted.check([generate(model, input_ids=prompt())])
        model(prompt(), labels=prompt()).loss.backward()
    with torch.inference_mode():
        wanted.check([generate(model, input_ids=prompt())])
    wanted.check([generate(model, input_ids=prompt())])


def test_default_cache_is_not_compiled(model):
    assert not generate(model, input_ids=prompt()).past_key_values.is_compileable


# Size


def test_first_reservation_and_growth(model, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 8192)
    for new_tokens, tokens in ((12, 14 + 11), (2000, 14 + 1024)):
        stop = {"stopping_criteria": [lambda ids, scores: ids[:, 0] > -1]}  # after one token
        cache = generate(model, input_ids=prompt(), max_new_tokens=new_tokens, **stop).past_key_values
        assert cache.state.pool.num_blocks == 2 * -(-tokens // 64)
        del cache
        release()
    monkeypatch.setattr(paged_state, "EXPECTED_SLACK", 1)
    out = generate(model, input_ids=prompt(), max_new_tokens=100)
    assert out.past_key_values.state.pool.num_blocks >= 2 * 2
    long = run_eager(build("llama"), lambda m, _: [generate(m, input_ids=prompt(), max_new_tokens=100)])
    long.check([out])


def test_reserve_is_checked(model):
    with pytest.raises(ValueError, match="reserve must be at least 1, got 0"):
        PagedCache(model.config, reserve=0)


# Leases


def test_returned_cache_is_not_overwritten(model):
    first = generate(model, input_ids=prompt()).past_key_values
    before, where = contents(first), addresses(first)
    second = generate(model, input_ids=prompt(seed=5)).past_key_values
    assert equal(contents(first), before)
    assert not equal(contents(second), before)
    assert not set(where) & set(addresses(second))


def test_idle_pool_is_reused_and_released(model):
    out = generate(model, input_ids=prompt())
    size, where = pool_bytes(out.past_key_values), addresses(out.past_key_values)
    blocks = weakref.ref(out.past_key_values.paged_layers[0].k_cache)
    assert not leases.idle_bytes(model)
    gc.disable()  # a cache must not need the garbage collector to go
    try:
        for batch in (left_padded(prompt(), 5, 0), {"input_ids": prompt(1)}, {"input_ids": prompt()}):
            del out
            assert leases.idle_bytes(model) == size
            out = generate(model, **batch)
            assert addresses(out.past_key_values) == where
            assert not leases.idle_bytes(model)
    finally:
        gc.enable()
    expected("llama", "greedy").check([out])
    assert release(model) == release() == 0  # in use
    del out
    assert release(build("llama")) == 0
    assert release(model) == size
    assert blocks() is None
    assert release() == 0


def test_larger_call_gets_a_larger_pool_which_is_the_one_kept(model):
    small = generate(model, input_ids=prompt()).past_key_values
    size = pool_bytes(small)
    del small
    out = generate(model, input_ids=prompt(6, 80), max_new_tokens=4)
    large = pool_bytes(out.past_key_values)
    assert large > 5 * size
    assert leases.idle_bytes(model) == 0
    held = generate(model, input_ids=prompt()).past_key_values
    del out
    del held
    assert leases.idle_bytes(model) == large


def test_chat_over_the_returned_cache(model):
    """The second turn is longer than the first call; the third call in between has a pool of its own."""
    first = generate(model, input_ids=prompt(2, 9), max_new_tokens=5)
    generate(model, input_ids=prompt(2, 30, seed=9))
    said = torch.cat([first.sequences, prompt(2, 150, seed=1)], 1)
    second = generate(model, first.past_key_values, input_ids=said, max_new_tokens=40)
    assert second.past_key_values is first.past_key_values
    assert second.past_key_values.get_seq_length() == 9 + 5 + 150 + 39

    def cold(model, _):
        return [generate(model, input_ids=said, max_new_tokens=40)]

    run_eager(build("llama"), cold).check([second])


def test_many_calls_of_any_shape_leave_one_pool_and_no_cache(model):
    ways = [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 4}]
    caches = weakref.WeakSet()
    model.register_forward_pre_hook(lambda _, args, kwargs: caches.add(kwargs[CACHE_NAME]), with_kwargs=True)
    gc.disable()
    try:
        for i in range(24):
            generate(model, input_ids=prompt(1 + i % 3, 5 + i), max_new_tokens=2 + i % 5, **ways[i % 4])
            assert not len(caches)
        pools = [size for size in (leases.idle_bytes(model), release(), release()) if size]
    finally:
        gc.enable()
    assert len(pools) == 2
    assert pools[0] == pools[1]


class Fails(LogitsProcessor):
    def __init__(self, after):
        self.left = after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("as planned")
        return scores


@pytest.mark.parametrize("after", [0, 3])
def test_pool_comes_back_after_an_error(model, after):
    where = addresses(generate(model, input_ids=prompt()).past_key_values)
    with pytest.raises(RuntimeError, match="as planned"):
        generate(model, input_ids=prompt(), logits_processor=[Fails(after)])
    gc.collect()  # the error's traceback holds the call's frames
    out = generate(model, input_ids=prompt())
    assert addresses(out.past_key_values) == where
    expected("llama", "greedy").check([out])


def test_pool_comes_back_when_nothing_ran(model):
    where = addresses(generate(model, input_ids=prompt()).past_key_values)
    hook = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, input_ids=prompt())
    hook.remove()
    gc.collect()
    assert addresses(generate(model, input_ids=prompt()).past_key_values) == where


def test_model_that_changed_its_dtype_gets_new_blocks(model):
    generate(model, input_ids=prompt(8, 100))
    large = leases.idle_bytes(model)
    model.to(torch.float64)
    out = generate(model, input_ids=prompt())
    assert {t.dtype for layer in out.past_key_values.paged_layers for t in layer.blocks.tensors} == {torch.float64}
    assert pool_bytes(out.past_key_values) < large  # made to measure, not as many blocks as the old pool
    assert leases.idle_bytes(model) == 0
    assert out.sequences.tolist() == expected("llama", "greedy").tokens[0].tolist()
    del out
    model.to(torch.float32)
    expected("llama", "greedy").check([generate(model, input_ids=prompt())])


def test_model_takes_its_pool_along():
    model = hf_fastattn.paged(build("llama", "fastattn"))
    blocks = weakref.ref(generate(model, input_ids=prompt()).past_key_values.paged_layers[0].k_cache)
    assert blocks() is not None
    del model
    gc.collect()
    assert blocks() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads_have_a_pool_each(family):
    model = hf_fastattn.paged(build(family, "fastattn"))
    inputs = [left_padded(prompt(seed=seed), seed, 0) for seed in (1, 2)]
    wanted = [(out.sequences, torch.stack(out.logits)) for out in (generate(model, **batch) for batch in inputs)]
    assert leases.idle_bytes(model)
    outputs, together = [None, None], threading.Barrier(2, timeout=60)

    def run(i):
        def wait(ids, scores):  # both are in the middle of a call at every step
            together.wait()
            return scores

        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        outputs[i] = model.generate(
            **inputs[i], **options, logits_processor=[wait], return_dict_in_generate=True, output_logits=True
        )

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, (sequences, logits) in zip(outputs, wanted, strict=True):
        assert torch.equal(out.sequences, sequences)
        assert torch.equal(torch.stack(out.logits), logits)
    assert not set(addresses(outputs[0].past_key_values)) & set(addresses(outputs[1].past_key_values))


def test_idle_pool_of_another_shape_is_not_used(model):
    """A pool serves caches of its block size and number of layers; a cache whose pool is fixed makes its own."""
    first = generate(model, input_ids=prompt()).past_key_values
    where, num_layers = addresses(first), len(first.paged_layers)
    kept = [layer.blocks.tensors for layer in first.paged_layers]  # so that no address comes again
    del first
    cache = paged(model, block_size=64, num_blocks=3)
    generate(model, cache, input_ids=prompt())
    assert not set(addresses(cache)) & set(where)
    for block_size, layers in ((32, num_layers), (64, num_layers + 1)):
        assert leases.idle_bytes(model)
        assert not any(layer.tensors for layer in leases.lease(model, block_size, layers).layers)
        generate(model, input_ids=prompt())
    del kept
    with pytest.raises(BlockPoolExhausted):
        generate(model, paged(model, block_size=64, num_blocks=1), input_ids=prompt())


def test_fork_keeps_the_pool_of_a_cache_that_is_gone(model):
    out = generate(model, input_ids=prompt())
    fork = out.past_key_values.fork(2)
    size = pool_bytes(fork)
    del out
    assert not leases.idle_bytes(model)
    generate(model, input_ids=prompt())
    del fork
    assert leases.idle_bytes(model) >= size


@pytest.mark.parametrize(
    ("options", "group"),
    [
        ({"num_beams": 3}, 3),
        ({"num_beams": 3, "num_return_sequences": 2}, 3),
        ({"do_sample": True, "num_return_sequences": 4}, 4),
        ({}, 1),
    ],
    ids=str,
)
def test_prompt_is_stored_once(model, options, group):
    """The hook says how many rows start from each prompt."""
    out = generate(model, input_ids=prompt().repeat(1, 30), **options)
    stats = out.past_key_values.stats()
    assert out.past_key_values.state.group == group
    assert (stats.shared_blocks > 0) == (group > 1)

"""What full pools and failed passes leave behind, and that nothing is read from blocks that nobody owns."""

import copy
import gc
import weakref

import pytest
import torch

from hf_fastattn import BlockPoolExhausted
from tests.test_cache_machine import check_state
from tests.tiny import assert_logits, assert_same, eager, failing, feed, left_padding, picture, tokens

pytestmark = pytest.mark.usefixtures("no_grad")


def check_exhaustion(error, wanted, free, total, *words):
    assert (error.value.wanted, error.value.free, error.value.total) == (wanted, free, total)
    for word in (
        f"{free} of {total} blocks free",
        f"{wanted} were wanted",
        f"{16 * wanted} tokens",
        f"{16 * total} tokens",
        "MiB",
        "as it was before the call",
        *words,
    ):
        assert word in str(error.value)


def test_a_full_pool_says_what_is_missing_and_stays_usable(llama):
    cache, ids = llama.cache(num_blocks=5), tokens(2, 33)
    llama.fast(ids[:, :20], past_key_values=cache)  # 2 blocks each
    before = picture(cache)
    with pytest.raises(BlockPoolExhausted) as error:
        llama.fast(tokens(2, 20), past_key_values=cache)
    check_exhaustion(error, 2, 1, 5, "larger num_blocks")
    assert_same(before, picture(cache))
    with pytest.raises(BlockPoolExhausted):
        cache.batch_repeat_interleave(2)
    assert_same(before, picture(cache))
    assert_logits(feed(llama.fast, ids[:, 20:32], cache, steps=[1, 11]), eager(llama, ids)[:, 20:32])
    with pytest.raises(BlockPoolExhausted):
        llama.fast(ids[:, 32:], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert_logits(feed(llama.fast, ids[1:, 32:], cache), eager(llama, ids)[1:, 32:])
    check_state(cache)


def test_a_first_batch_that_does_not_fit_may_be_smaller_next_time(llama):
    cache, ids = llama.cache(num_blocks=3), tokens(1, 40)
    with pytest.raises(BlockPoolExhausted) as error:
        llama.fast(tokens(2, 40), past_key_values=cache)
    check_exhaustion(error, 6, 3, 3, "a smaller batch")
    assert_logits(feed(llama.fast, ids, cache, steps=[40]), eager(llama, ids))


@pytest.mark.parametrize("num_blocks", [None, 20])
def test_a_sequence_that_reaches_max_length_is_an_error(llama, num_blocks):
    cache, ids = llama.cache(max_length=32, num_blocks=num_blocks), tokens(2, 32)
    llama.fast(ids[:, :30], past_key_values=cache)
    before, free = picture(cache), cache.state.pool.num_free
    with pytest.raises(BlockPoolExhausted) as error:
        llama.fast(tokens(2, 3), past_key_values=cache)
    total = cache.state.pool.num_blocks
    check_exhaustion(error, 1, free, total, "would reach 33 tokens, max_length is 32", "larger max_length")
    assert_same(before, picture(cache))
    assert_logits(feed(llama.fast, ids[:, 30:], cache, steps=[2]), eager(llama, ids)[:, 30:])


def test_padding_does_not_count_towards_max_length(llama):
    cache, ids, mask = llama.cache(max_length=16), tokens(2, 40), left_padding([16, 9], 40)
    assert_logits(feed(llama.fast, ids, cache, mask, [40]), eager(llama, ids, mask), mask)


def test_freed_blocks_are_returned_and_nothing_leaks(llama):
    cache = llama.cache(num_blocks=12)
    for round_ in range(5):
        ids = tokens(2, 50, seed=round_)
        got = feed(llama.fast, ids, cache, steps=[40] + [1] * 10)
        assert_logits(got, eager(llama, ids))
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.crop(-20)
        cache.batch_repeat_interleave(2)
        check_state(cache)
        cache.reset()
        assert cache.state.pool._runs == [[0, 12]]
    tensors = [weakref.ref(layer.k_cache) for layer in cache.layers]
    whole = weakref.ref(cache)
    del cache
    gc.collect()
    assert whole() is None
    assert all(tensor() is None for tensor in tensors)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_nan_in_blocks_that_nobody_owns_reaches_no_logits(request, name):
    pair, ids, mask = request.getfixturevalue(name), tokens(2, 60), left_padding([60, 41])
    cache = pair.cache(num_blocks=16)
    got = [feed(pair.fast, ids[:, :37], cache, mask, [37])]
    for layer in cache.layers:
        for tensor in (layer.k_cache, layer.v_cache):
            tensor[[block for block in range(16) if cache.state.pool.is_free(block)]] = float("nan")
            for row, seq_len in zip(cache.state.tables.rows, cache.state.tables.lens, strict=True):
                tensor[row[-1], seq_len % 16 :] = float("inf")
    got.append(feed(pair.fast, ids[:, 37:], cache, mask, [1, 1, 5, 16]))
    assert_logits(torch.cat(got, 1), eager(pair, ids, mask), mask)


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
def test_a_block_freed_by_one_sequence_never_leaks_into_another(llama, poison):
    cache, ids = llama.cache(num_blocks=8), tokens(2, 50)
    llama.fast(tokens(2, 60, seed=1), past_key_values=cache)
    for layer in cache.layers:
        layer.k_cache.fill_(poison)
        layer.v_cache.fill_(poison)
    cache.reset()
    assert_logits(feed(llama.fast, ids, cache, steps=[20, 1, 1, 28]), eager(llama, ids))
    cache.crop(-40)
    for layer in cache.layers:
        for tensor in (layer.k_cache, layer.v_cache):
            for block in range(8):
                if cache.state.pool.is_free(block):
                    tensor[block] = poison
    assert_logits(feed(llama.fast, ids[:, 10:], cache, steps=[1, 30, 9]), eager(llama, ids)[:, 10:])


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("then", ["go on", "deepcopy", "fork", "reorder", "crop"])
def test_the_mask_of_a_pass_that_failed_is_forgotten(request, name, then):
    pair, ids = request.getfixturevalue(name), tokens(2, 30)
    cache, mask = pair.cache(), torch.ones(2, 25, dtype=torch.long)
    feed(pair.fast, ids[:, :20], cache, steps=[20])
    mask[0, 3:9] = mask[1, 12] = 0
    with failing(pair.fast):
        feed(pair.fast, ids[:, 20:25], cache, mask, [5])
    if then == "deepcopy":
        cache = copy.deepcopy(cache)
    elif then == "fork":
        cache = cache.fork(1)
    elif then == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
        ids = ids[[1, 0]]
    elif then == "crop":
        cache.crop(-2)
    past = cache.get_seq_length()
    assert_logits(feed(pair.fast, ids[:, past:], cache, steps=[1, 30 - past - 1]), eager(pair, ids)[:, past:])


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_forward_pass_that_fails_midway_has_not_been(request, name, length, fresh, sizes):
    pair, ids, mask = request.getfixturevalue(name), tokens(2, 30), left_padding([30, 17])
    cache = pair.cache(**sizes)
    done = 0 if fresh else 20
    if done:
        feed(pair.fast, ids[:, :done], cache, mask, [done])

    before = picture(cache)
    with failing(pair.fast):
        feed(pair.fast, tokens(2, length, seed=1), cache, mask, [length])
    if done:
        assert_same(before, picture(cache))
        assert cache.to_dynamic().get_seq_length() == done
    assert cache.get_seq_length() == done
    twin = copy.deepcopy(cache)
    steps = [20 - done, 1, 9] if fresh else [1, 9]
    for past in (cache, twin):
        got = feed(pair.fast, ids[:, done:], past, mask, steps)
        assert_logits(got, eager(pair, ids, mask)[:, done:], mask[:, done:])
        check_state(past)


def test_a_failed_first_pass_does_not_fix_the_batch_size(llama, sizes):
    cache, ids = llama.cache(**sizes), tokens(3, 20)
    with failing(llama.fast):
        llama.fast(tokens(2, 20), past_key_values=cache)
    assert_logits(feed(llama.fast, ids, cache, steps=[19, 1]), eager(llama, ids))

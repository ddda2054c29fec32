"""reset, crop, reorder, repeat and select: rows of the block table move, keys and values stay where they are."""

import copy
import pickle

import pytest
import torch

from hf_fastattn import BlockPoolExhausted
from hf_fastattn.cache import CROPS_TO_LENGTH
from hf_fastattn.paged_state import PagedState
from tests.test_cache_machine import check_state
from tests.tiny import CopiedBytes, assert_logits, assert_same, eager, feed, left_padding, picture, tokens, used_blocks

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize(("sizes", "longest"), [({}, -1), ({"max_length": 40}, 40)])
def test_peft_is_told_how_long_a_cache_may_become(llama, sizes, longest):
    """By the name that caches had for it in older versions; prompt tuning asks before the first pass."""
    assert llama.cache(**sizes).max_cache_len == longest


def test_reset_forgets_tokens_and_keeps_memory(llama, sizes):
    cache, ids = llama.cache(**sizes), tokens(2, 30)
    llama.fast(tokens(3, 40, seed=1), past_key_values=cache, attention_mask=left_padding([40, 3, 8]))
    pools = [layer.k_cache.data_ptr() for layer in cache.layers]
    cache.reset()
    assert (cache.get_seq_length(), used_blocks(cache), cache.batch_size) == (0, 0, -1)
    assert_logits(feed(llama.fast, ids, cache, steps=[20, 1, 9]), eager(llama, ids))
    assert [layer.k_cache.data_ptr() for layer in cache.layers] == pools


@pytest.mark.parametrize("count", [0, 1, 4, 13, 29, 30, 100])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_crop_removes_the_last_columns(request, name, count, sizes):
    pair, ids, mask = request.getfixturevalue(name), tokens(2, 30), left_padding([30, 12])
    cache = pair.cache(**sizes)
    feed(pair.fast, ids, cache, mask, [25, 5])
    cache.crop(-count)
    kept = max(30 - count, 0)
    assert cache.get_seq_length() == kept
    assert cache.state.tables.lens == [kept, max(kept - 18, 0)]
    check_state(cache)
    mask = torch.cat([mask[:, :kept], torch.ones(2, 20, dtype=torch.long)], 1)
    again = torch.cat([ids[:, :kept], tokens(2, 20, seed=5)], 1)
    got = feed(pair.fast, again[:, kept:], cache, mask, [1, 7, 12])
    assert_logits(got, eager(pair, again, mask)[:, kept:])


def test_the_cache_is_iterated_like_a_dynamic_one(llama):
    cache, ids = llama.cache(), tokens(2, 30)
    llama.fast(ids, past_key_values=cache)
    want = llama.eager(ids).past_key_values
    for (k, v, window), (want_k, want_v, _) in zip(cache, want, strict=True):
        assert window is None
        assert torch.allclose(k, want_k, atol=1e-5)
        assert torch.allclose(v, want_v, atol=1e-5)


def test_what_a_layer_shows_cannot_be_set(llama):
    cache = llama.cache()
    llama.fast(tokens(2, 30), past_key_values=cache)
    for name in ("keys", "values"):
        with pytest.raises(TypeError, match='pass cache_implementation="dynamic"'):
            setattr(cache.layers[0], name, getattr(cache.layers[0], name)[:, :, -8:])


def test_a_deepcopy_hides_nothing_of_the_original(llama):
    """Each goes on under masks of its own, which hide what is cached."""
    cache, ids, mask = llama.cache(), tokens(1, 30), torch.ones(1, 12, dtype=torch.long)
    mask[0, 9] = 0
    feed(llama.fast, ids[:, :10], cache, steps=[10])
    llama.fast(ids[:, 10:12], past_key_values=cache, attention_mask=mask)
    twin = copy.deepcopy(cache)
    other = torch.nn.functional.pad(mask, (0, 2), value=1)
    other[0, :6] = 0
    llama.fast(ids[:, 20:22], past_key_values=twin, attention_mask=other)
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    got = llama.fast(ids[:, 12:13], past_key_values=cache, attention_mask=mask).logits
    assert_logits(got, eager(llama, ids[:, :13], mask)[:, 12:])


@pytest.mark.skipif(not CROPS_TO_LENGTH, reason="with later transformers than 5.17, crop takes no positive number")
def test_crop_to_a_length(llama):
    cache, ids = llama.cache(), tokens(2, 30)
    llama.fast(ids, past_key_values=cache)
    cache.crop(40)
    assert cache.get_seq_length() == 30
    cache.crop(9)
    assert_logits(llama.fast(ids[:, 9:], past_key_values=cache).logits, eager(llama, ids)[:, 9:])


@pytest.mark.skipif(CROPS_TO_LENGTH, reason="with transformers 5.17, that is the length to crop to")
def test_crop_takes_no_positive_number(llama):
    cache = llama.cache()
    cache.crop(0)
    cache.crop(-5)  # nothing there: nothing to do
    llama.fast(tokens(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="0 or a negative number of tokens to remove, got 3"):
        cache.crop(3)
    assert cache.get_seq_length() == 4


def test_crop_into_shared_blocks_leaves_the_other_sequence_alone(llama, sizes):
    ids = tokens(1, 32)
    cache = llama.cache(**sizes)
    llama.fast(ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    cache.crop(-5)
    check_state(cache)
    rest = tokens(3, 9, seed=2)
    want = eager(llama, torch.cat([ids[:, :27].repeat(3, 1), rest], 1))[:, 27:]
    assert_logits(feed(llama.fast, rest, cache, steps=[1, 1, 7]), want)


def test_crop_into_shared_blocks_finds_room_in_a_growing_pool(llama):
    cache = llama.cache()
    llama.fast(tokens(1, 32), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.state.memory.resize(used_blocks(cache))
    assert cache.state.pool.num_free == 0
    cache.crop(-5)
    check_state(cache)


def test_crop_without_room_changes_nothing(llama):
    cache = llama.cache(num_blocks=2)
    mask = torch.ones(1, 33, dtype=torch.long)
    mask[:, 3] = 0
    llama.fast(tokens(1, 33), past_key_values=cache, attention_mask=mask)  # 32 tokens
    cache.batch_repeat_interleave(2)
    before = picture(cache)
    with pytest.raises(BlockPoolExhausted):
        cache.crop(-5)
    assert_same(before, picture(cache))
    check_state(cache)


@pytest.mark.parametrize("index", [[1, 0, 2], [0, 0, 0], [2, 2, 1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_reorder(request, name, index, sizes):
    pair, ids, mask = request.getfixturevalue(name), tokens(3, 37), left_padding([37, 20, 29])
    cache = pair.cache(**sizes)
    feed(pair.fast, ids, cache, mask, [30, 7])
    cache.reorder_cache(torch.tensor(index, dtype=torch.int32))
    check_state(cache)
    rest = tokens(3, 20, seed=3)
    ids, mask = torch.cat([ids[index], rest], 1), torch.cat([mask[index], torch.ones_like(rest)], 1)
    assert_logits(feed(pair.fast, rest, cache, mask, [1, 1, 4, 14]), eager(pair, ids, mask)[:, 37:])


def test_a_reorder_that_changes_nothing_leaves_the_tables_alone(llama, sizes, monkeypatch):
    cache = llama.cache(**sizes)
    feed(llama.fast, tokens(3, 21), cache, steps=[20, 1])
    before = picture(cache)
    monkeypatch.setattr(PagedState, "refresh", lambda state: pytest.fail("tables were written"))
    cache.reorder_cache(torch.arange(3))
    cache.batch_repeat_interleave(1)
    cache.batch_select_indices(torch.ones(3, dtype=torch.bool))
    assert_same(before, picture(cache))
    with pytest.raises(pytest.fail.Exception):
        cache.reorder_cache(torch.tensor([0, 2, 1]))


def test_beam_reorder_copies_at_most_the_partly_filled_last_block(llama, sizes):
    cache = llama.cache(**sizes)
    llama.fast(tokens(4, 37), past_key_values=cache)  # 2 full blocks and one of 5 tokens each
    block = sum(t[0].numel() * t.element_size() for layer in cache.layers for t in (layer.k_cache, layer.v_cache))
    pools = [layer.k_cache.data_ptr() for layer in cache.layers]
    for index, copies in (([0, 1, 2, 3], 0), ([3, 2, 1, 0], 0), ([1, 1, 2, 2], 2), ([0, 0, 0, 0], 3)):
        before = [layer.k_cache.clone() for layer in cache.layers]
        with CopiedBytes() as copied:
            cache.reorder_cache(torch.tensor(index))
        assert copied.count == 2 * copies * block  # a gather and a scatter
        for layer, old in zip(cache.layers, before, strict=True):
            same = (layer.k_cache.nan_to_num() == old.nan_to_num()).flatten(1).all(1)
            assert int((~same).sum()) <= copies
        check_state(cache)
    assert [layer.k_cache.data_ptr() for layer in cache.layers] == pools
    llama.fast(tokens(4, 11), past_key_values=cache)  # 48 tokens: every block is full
    with CopiedBytes() as copied:
        cache.reorder_cache(torch.tensor([2, 2, 2, 3]))
    assert copied.count == 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_repeat_shares_blocks_until_sequences_part_ways(request, name, sizes):
    pair, ids, mask = request.getfixturevalue(name), tokens(2, 40), left_padding([40, 25])
    cache = pair.cache(**sizes)
    feed(pair.fast, ids, cache, mask, [40])
    cache.batch_repeat_interleave(3)
    check_state(cache)
    if not cache.state.reserved:
        assert used_blocks(cache) == (2 + 3) + (1 + 3)
    rest = tokens(6, 12, seed=4)
    ids, mask = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    mask = torch.cat([mask, torch.ones_like(rest)], 1)
    want = eager(pair, torch.cat([ids, rest], 1), mask)[:, 40:]
    assert_logits(feed(pair.fast, rest, cache, mask, [1, 3, 8]), want)


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([2, 0]),
        torch.tensor([1, 1, 1, 0], dtype=torch.int32),
        torch.tensor([False, True, True]),
    ],
)
def test_select(llama, index, sizes):
    ids, mask = tokens(3, 37), left_padding([37, 20, 29])
    cache = llama.cache(**sizes)
    feed(llama.fast, ids, cache, mask, [37])
    cache.batch_select_indices(index)
    check_state(cache)
    ids, mask = ids[index], mask[index]
    assert cache.batch_size == len(ids)
    rest = tokens(len(ids), 9, seed=3)
    want = eager(llama, torch.cat([ids, rest], 1), torch.cat([mask, torch.ones_like(rest)], 1))[:, 37:]
    assert_logits(feed(llama.fast, rest, cache, steps=[1] * 9), want)


def test_selecting_nothing_empties_the_cache(llama, sizes):
    cache = llama.cache(**sizes)
    llama.fast(tokens(2, 20), past_key_values=cache)
    cache.batch_select_indices(torch.zeros(2, dtype=torch.bool))
    assert (cache.get_seq_length(), used_blocks(cache), cache.batch_size) == (0, 0, -1)
    ids = tokens(3, 20)
    assert_logits(feed(llama.fast, ids, cache, steps=[19, 1]), eager(llama, ids))


def test_operations_on_an_empty_cache_do_nothing(llama, sizes):
    cache = llama.cache(**sizes)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert (cache.get_seq_length(), cache.batch_size, cache.get_query_offset()) == (0, -1, 0)
    assert copy.deepcopy(cache).get_seq_length() == pickle.loads(pickle.dumps(cache)).get_seq_length() == 0


def test_layers_refuse_what_concerns_them_all(llama):
    cache = llama.cache()
    llama.fast(tokens(1, 5), past_key_values=cache)
    for name in ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch"):
        with pytest.raises(TypeError, match="share their blocks"):
            getattr(cache.layers[0], name)(0)

"""The Cache protocol of PagedCache, through forward passes of tiny models with sharp attention."""

import copy
import itertools
import pickle

import pytest
import torch
from transformers import DynamicCache

from hf_fastattn import PagedCache
from tests.test_cache_machine import check_state
from tests.tiny import assert_logits, assert_same, eager, feed, holey_mask, left_padding, picture, tokens

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("steps", [[50], [1] * 50, [20, 1, 1, 5, 23], [3, 16, 16, 15], [33, 17]], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_any_way_of_feeding_tokens_gives_the_same_logits(request, name, steps, sizes):
    pair, ids = request.getfixturevalue(name), tokens(2, 50)
    cache = pair.cache(**sizes)
    assert_logits(feed(pair.fast, ids, cache, steps=steps), eager(pair, ids))
    assert cache.get_seq_length() == 50
    check_state(cache)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("steps", [[20] + [1] * 20, [7, 13, 4, 1, 15]], ids=str)
def test_left_padding_is_never_stored(request, name, steps, sizes):
    pair, ids, mask = request.getfixturevalue(name), tokens(3, 40), left_padding([40, 21, 33])
    cache = pair.cache(**sizes)
    assert_logits(feed(pair.fast, ids, cache, mask, steps), eager(pair, ids, mask), mask)
    assert cache.state.tables.lens == [40, 21, 33]
    assert cache.get_seq_length() == 40
    if not cache.state.reserved:
        assert [len(row) for row in cache.state.tables.rows] == [3, 2, 3]


@pytest.mark.parametrize("steps", [[30, 1, 1, 3, 5], [15, 15, 1, 1, 8], [9, 9, 1, 11, 10]], ids=str)
def test_holes_are_compacted(llama, steps, sizes):
    ids, mask = tokens(3, 40), torch.cat([holey_mask(), torch.ones(3, 10, dtype=torch.long)], 1)
    cache = llama.cache(**sizes)
    assert_logits(feed(llama.fast, ids, cache, mask, steps), eager(llama, ids, mask), mask)
    assert cache.state.tables.lens == mask.sum(1).tolist()


def test_holes_keep_their_columns_under_a_sliding_window(mistral, sizes):
    ids, mask = tokens(3, 40), torch.cat([holey_mask(), torch.ones(3, 10, dtype=torch.long)], 1)
    cache = mistral.cache(**sizes)
    assert_logits(feed(mistral.fast, ids, cache, mask, [15, 15, 1, 1, 3, 5]), eager(mistral, ids, mask), mask)
    assert cache.state.tables.lens == [36, 40, 40]  # only what comes before a row's first token is left out


def test_hidden_keys_stay_hidden_behind_sequences_of_one_length(mistral, sizes):
    """All columns are stored, so the sequences could be viewed as one tensor; but not all of them may be seen."""
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, 9], mask[1, 12] = 0, 0
    cache = mistral.cache(**sizes)
    assert_logits(feed(mistral.fast, ids, cache, mask, [15, 1, 1, 3]), eager(mistral, ids, mask), mask)
    assert cache.state.tables.lens == [20, 20]


def test_layers_see_each_others_blocks_but_not_each_others_keys(llama):
    cache = llama.cache()
    llama.fast(tokens(1, 20), past_key_values=cache)
    assert not torch.equal(cache.layers[0].keys, cache.layers[1].keys)
    assert cache.layers[0].k_cache.shape == cache.layers[1].k_cache.shape


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_dense_views_are_what_a_dynamic_cache_holds(request, name, sizes):
    pair, ids, mask = request.getfixturevalue(name), tokens(2, 37), left_padding([37, 20])
    cache, oracle = pair.cache(**sizes), DynamicCache()
    assert cache.layers[0].keys is None
    for model, past in ((pair.fast, cache), (pair.eager, oracle)):
        feed(model, ids, past, mask, [36, 1])
    for got, want in zip([*cache.layers, *cache.to_dynamic().layers], [*oracle.layers] * 2, strict=True):
        for a, b in ((got.keys, want.keys), (got.values, want.values)):
            assert a.shape == b.shape
            torch.testing.assert_close(a.transpose(1, 2)[mask.bool()], b.transpose(1, 2)[mask.bool()])
            assert not a.transpose(1, 2)[~mask.bool()].any()


def test_to_dynamic_and_back_continue_alike(llama, sizes):
    ids, mask = tokens(2, 40), left_padding([40, 23])
    cache = llama.cache(**sizes)
    feed(llama.fast, ids[:, :30], cache, mask, [30])
    dense = cache.to_dynamic()
    again = PagedCache.from_dynamic(dense, llama.fast.config, attention_mask=mask[:, :30], block_size=32)
    want = eager(llama, ids, mask)[:, 30:]
    for past in (cache, dense, again):
        assert_logits(feed(llama.fast, ids[:, 30:], past, mask, [1, 9]), want)
    assert again.state.tables.lens == [40, 23]


def test_from_dynamic_refuses_layers_that_dropped_columns(mistral):
    dense = DynamicCache(config=mistral.eager.config)
    mistral.eager(tokens(1, 20), past_key_values=dense)
    with pytest.raises(ValueError, match="expected layers that hold all columns"):
        PagedCache.from_dynamic(dense, mistral.fast.config)


def test_early_initialization_allocates_every_layer(llama, sizes):
    cache = llama.cache(**sizes)
    cache.early_initialization(2, 2, 8, torch.float32, "cpu")
    pools = [layer.k_cache.data_ptr() for layer in cache.layers]
    assert all(layer.is_initialized for layer in cache.layers)
    assert (cache.get_seq_length(), cache.batch_size) == (0, 2)
    ids = tokens(2, 12)
    assert_logits(feed(llama.fast, ids, cache, steps=[8, 4]), eager(llama, ids))
    assert [layer.k_cache.data_ptr() for layer in cache.layers] == pools


def test_a_chat_outgrows_its_first_capacity(llama):
    cache, ids = llama.cache(), tokens(2, 420)
    steps = [20, 1, 1, 250, 1, 1, 140, 6]
    assert_logits(feed(llama.fast, ids, cache, steps=steps), eager(llama, ids))
    assert cache.state.pool.num_blocks >= 2 * 27
    check_state(cache)


def test_sequences_lie_in_runs_after_growing(llama):
    cache = llama.cache()
    feed(llama.fast, tokens(3, 330), cache, steps=[10, 300, 20])
    for row in cache.state.tables.rows:
        assert row == list(range(row[0], row[0] + len(row)))


def test_deepcopy_has_a_pool_of_its_own_and_the_models_config(llama, sizes):
    ids, mask = tokens(2, 40), left_padding([40, 27])
    cache = llama.cache(**sizes)
    feed(llama.fast, ids[:, :30], cache, mask, [30])
    twin = copy.deepcopy(cache)
    assert twin.config is cache.config is llama.fast.config
    assert all(layer.cache is twin for layer in twin.layers)
    pools = [{t.data_ptr() for layer in c.layers for t in (layer.k_cache, layer.v_cache)} for c in (cache, twin)]
    assert not pools[0] & pools[1]
    want = eager(llama, ids, mask)[:, 30:]
    other = tokens(2, 10, seed=9)
    llama.fast(other, past_key_values=twin, attention_mask=mask)
    assert_logits(feed(llama.fast, ids[:, 30:], cache, mask, [1, 9]), want)
    twin.crop(-10)
    assert_logits(feed(llama.fast, ids[:, 30:], twin, mask, [9, 1]), want)
    cache.reset()
    check_state(twin)


def test_pickle_continues_alike(llama, mistral, sizes):
    for pair in (llama, mistral):
        ids, mask = tokens(3, 40), torch.cat([holey_mask(), torch.ones(3, 10, dtype=torch.long)], 1)
        cache = pair.cache(**sizes)
        feed(pair.fast, ids[:, :30], cache, mask, [30])
        cache.batch_select_indices(torch.tensor([0, 0, 2]))
        ids, mask = ids[[0, 0, 2]], mask[[0, 0, 2]]
        twin = pickle.loads(pickle.dumps(cache))
        check_state(twin)
        assert twin.state.pool.num_blocks == cache.state.pool.num_blocks
        assert twin.is_compileable == cache.is_compileable
        got = [feed(pair.fast, ids[:, 30:], past, mask, [1, 1, 8]) for past in (cache, twin)]
        assert torch.equal(*got)
        assert_logits(got[0], eager(pair, ids, mask)[:, 30:])


def test_a_pickle_holds_used_blocks_only(llama):
    pickles = []
    for num_blocks in (10, 500):
        cache = llama.cache(num_blocks=num_blocks)
        llama.fast(tokens(2, 40), past_key_values=cache)
        pickles.append(len(pickle.dumps(cache)))
    assert abs(pickles[0] - pickles[1]) < 50
    cache.batch_repeat_interleave(4)
    shared = len(pickle.dumps(cache))
    assert shared < 3 * pickles[0]  # 2 x 2 full blocks and 8 tails: twice the blocks


def test_lengths_and_flags(llama):
    growing, fixed = llama.cache(), llama.cache(num_blocks=9)
    reserved, both = llama.cache(max_length=64), llama.cache(max_length=64, num_blocks=9)
    assert [c.get_max_length() for c in (growing, fixed, reserved, both)] == [-1, -1, 64, 64]
    assert [c.is_compileable for c in (growing, fixed, reserved, both)] == [False, False, True, False]
    assert all(c.layers[0].is_croppable and not c.layers[0].is_sliding for c in (growing, reserved))
    assert growing.get_mask_sizes(5, 0) == (-1, 0)
    assert reserved.get_mask_sizes(5, 0) == (-64, 0)
    llama.fast(tokens(2, 7), past_key_values=reserved)
    assert reserved.get_mask_sizes(1, 0) == (-64, 1)  # the mask of the first single column is looked at
    llama.fast(tokens(2, 1), past_key_values=growing)
    assert growing.get_mask_sizes(1, 0) == (-1, 0)
    assert growing.get_mask_sizes(2, 0) == (-1, 0)
    assert reserved.get_seq_length() == reserved.get_query_offset() == reserved.layers[1].get_seq_length() == 7
    assert len(reserved) == 2
    assert "sequences=2, columns=7, layers=2" in repr(reserved)


def test_sizes_are_true_under_another_implementation(llama):
    cache = PagedCache(llama.eager.config, block_size=16, max_length=64)
    assert not cache.is_compileable
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    ids, mask = tokens(2, 30), left_padding([30, 17])
    got = feed(llama.eager, ids, cache, mask, [20, 1, 9])
    assert_logits(got, eager(llama, ids, mask), mask)
    assert cache.get_mask_sizes(5, 0) == (35, 0)
    assert cache.state.tables.lens == [30, 30]  # whoever reads dense keys expects every column


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 48}, "block_size must be 16, 32, 64, 128 or 256 tokens, got 48"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"max_length": -1}, "max_length must be at least 1, got -1"),
    ],
)
def test_bad_sizes(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        PagedCache(llama.fast.config, **arguments)


def test_another_batch_size_is_an_error(llama, sizes):
    cache, ids = llama.cache(**sizes), tokens(2, 12)
    llama.fast(ids[:, :10], past_key_values=cache)
    before = picture(cache)
    with pytest.raises(ValueError, match="holds 2 sequences, the forward pass brings 3"):
        llama.fast(tokens(3, 1), past_key_values=cache)
    assert_same(before, picture(cache))
    assert_logits(feed(llama.fast, ids[:, 10:], cache), eager(llama, ids)[:, 10:])


def test_a_mask_that_shows_what_was_not_stored_is_an_error(llama, sizes):
    cache, ids, mask = llama.cache(**sizes), tokens(2, 14), left_padding([14, 5])
    feed(llama.fast, ids[:, :10], cache, mask, [10])
    for wrong in (torch.ones_like(mask), left_padding([14, 6]), None):
        with pytest.raises(ValueError, match="shows columns that an earlier mask has hidden"):
            llama.fast(ids[:, 10:], past_key_values=cache, attention_mask=wrong)
    with pytest.raises(ValueError, match="shape"):
        llama.fast(ids[:, 10:], past_key_values=cache, attention_mask=mask[:, :13])
    assert_logits(feed(llama.fast, ids[:, 10:], cache, mask, [4]), eager(llama, ids, mask)[:, 10:])


def test_sequences_that_need_a_block_soon_get_it_along_with_the_first_that_does(llama):
    """The blocks of a ragged batch after each step: three sequences, one to three tokens apart, get theirs at once."""
    lens, columns = [30, 29, 27, 20], 44
    ids, mask = tokens(4, columns), left_padding(lens, 30)
    mask = torch.cat([mask, torch.ones(4, columns - 30, dtype=torch.long)], 1)
    for sizes, together in (({}, True), ({"num_blocks": 16}, False)):
        cache = llama.cache(**sizes)
        got, counts = [feed(llama.fast, ids[:, :30], cache, mask, [30])], []
        for i in range(30, columns):
            got.append(feed(llama.fast, ids[:, i : i + 1], cache, mask))
            counts.append([len(row) for row in cache.state.tables.rows])
        check_state(cache)
        assert_logits(torch.cat(got, 1), eager(llama, ids, mask), mask)
        changes = [counts[0], *(new for old, new in itertools.pairwise(counts) if old != new)]
        if together:
            assert changes == [[2, 2, 2, 2], [3, 3, 3, 2], [3, 3, 3, 3]]
        else:
            assert changes == [[2, 2, 2, 2], [3, 2, 2, 2], [3, 3, 2, 2], [3, 3, 3, 2], [3, 3, 3, 3]]


def test_looking_ahead_stops_at_max_length(llama):
    """One sequence needs its second block when the other is about to fill the last one that max_length allows."""
    ids, mask = tokens(2, 32), left_padding([16, 30], 30)
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    cache = llama.cache(max_length=32, offload=True)
    got = [feed(llama.fast, ids[:, :30], cache, mask, [30])]
    cache.state.memory.make_room(8)  # as it is where several caches lie on one pool
    got.append(feed(llama.fast, ids[:, 30:], cache, mask))
    assert [len(row) for row in cache.state.tables.rows] == [2, 2]
    assert_logits(torch.cat(got, 1), eager(llama, ids, mask), mask)

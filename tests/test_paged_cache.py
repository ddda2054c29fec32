"""The Cache protocol of PagedCache, through forward passes of tiny models with sharp attention."""

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from hf_fastattn import BlockPoolExhausted, PagedCache
from hf_fastattn.handles import Handle
from tests.test_cache_machine import check_state
from tests.tiny import assert_logits, left_padding, make_pair, tokens

SIZES = {"growing": {}, "fixed": {"num_blocks": 24}, "reserved": {"max_length": 80}}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=SIZES)
def sizes(request):
    """The three ways of sizing a cache."""
    return SIZES[request.param]


def eager(pair, ids, mask=None):
    """Return the eager model's logits, (num_seqs, columns, vocabulary)."""
    return pair.eager(ids, attention_mask=mask, use_cache=False).logits


def feed(model, ids, cache, mask=None, steps=None):
    """Return the logits of ids fed in pieces of those lengths (one token each where none are given)."""
    done, out = cache.get_seq_length(), []
    for length in steps or [1] * ids.shape[1]:
        piece = ids[:, sum(o.shape[1] for o in out) :][:, :length]
        done += length
        out.append(model(piece, past_key_values=cache, attention_mask=None if mask is None else mask[:, :done]).logits)
    return torch.cat(out, 1)


def used_blocks(cache):
    return cache.state.pool.num_used


def picture(cache):
    """Everything the host knows, and what the stored tokens are."""
    state = cache.state
    tables = [list(row) for row in state.tables.rows], list(state.tables.lens), state.columns
    return tables, [layer.keys.clone() for layer in cache.layers if layer.is_initialized]


@contextmanager
def failing(model):
    """Let a forward pass of a model fail between its first layer and its second."""
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            yield
    finally:
        hook.remove()


def assert_same(before, after):
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


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


def holey_mask():
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 7:12] = 0
    mask[1, 17] = 0
    mask[2, 25:] = 0  # right padding
    return mask


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


class CopiedBytes(TorchDispatchMode):
    """Count the bytes that index and copy operations write to floating-point tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        if any(word in name for word in ("index", "copy", "clone", "cat", "gather", "repeat", "empty", "zeros")):
            tensor = args[2] if "index_put" in name else out
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.count += tensor.numel() * tensor.element_size()
        return out


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
    assert reserved.get_mask_sizes(1, 0) == (-64, 0)
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


def test_a_mask_that_changes_cached_columns_is_an_error(llama, sizes):
    cache, ids, mask = llama.cache(**sizes), tokens(2, 14), left_padding([14, 5])
    feed(llama.fast, ids[:, :10], cache, mask, [10])
    for wrong in (torch.ones_like(mask), left_padding([14, 6]), None):
        with pytest.raises(ValueError, match="changes columns that are cached already"):
            llama.fast(ids[:, 10:], past_key_values=cache, attention_mask=wrong)
    with pytest.raises(ValueError, match="shape"):
        llama.fast(ids[:, 10:], past_key_values=cache, attention_mask=mask[:, :13])
    assert_logits(feed(llama.fast, ids[:, 10:], cache, mask, [4]), eager(llama, ids, mask)[:, 10:])


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
            assert tensor.isnan().any()
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


def handles(pair, query_len=3):
    """Return a cache with 4 columns and the handles of layer 0 for query_len more, beside their dense tensors."""
    cache = pair.cache()
    pair.fast(tokens(2, 4), past_key_values=cache)
    k, v = torch.randn(2, 2, query_len, 8), torch.randn(2, 2, query_len, 8)
    dense = [torch.cat([old, new], 2) for old, new in ((cache.layers[0].keys, k), (cache.layers[0].values, v))]
    return cache, cache.update(k, v, 0), dense


def test_a_handle_tells_its_shape_without_being_touched(llama):
    cache, (key, value), dense = handles(llama)
    assert isinstance(key, Handle)
    assert isinstance(value, Handle)
    for handle in (key, value):
        assert handle.shape == handle.size() == dense[0].shape
        assert (handle.size(2), handle.dim(), handle.dtype, handle.device.type) == (7, 4, torch.float32, "cpu")
        assert handle.to("cpu") is handle
        assert "(2, 2, 3, 8)" in repr(handle)
    assert not cache.made_dense


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h * 2,
        lambda h: 2 * h,
        lambda h: h[:, :, -1:],
        lambda h: h.transpose(1, 2),
        lambda h: h.repeat_interleave(2, 1),
        lambda h: torch.cat([h, h], 1),
        lambda h: torch.matmul(h, h.transpose(2, 3)),
        lambda h: h @ h.mT,
        lambda h: -h + h,
        lambda h: h.to(torch.float64),
    ],
)
@pytest.mark.filterwarnings("ignore:a model computes with cached keys")
def test_whoever_touches_a_handle_gets_the_dense_tensor(llama, use):
    cache, pair, dense = handles(llama)
    for handle, tensor in zip(pair, dense, strict=True):
        assert torch.equal(use(handle), use(tensor))
    assert cache.made_dense
    assert cache.get_mask_sizes(1, 0) == (5, 0)
    cache.reset()
    assert not cache.made_dense


def test_touching_a_handle_warns_once(llama):
    _, (key, value), _ = handles(llama)
    with pytest.warns(RuntimeWarning, match="a model computes with cached keys or values itself"):
        key.sum()
    value.sum()  # and not again: pytest would list it


@pytest.mark.parametrize("touched", [0, 1])
def test_a_layer_may_touch_one_handle_and_pass_on_the_other(touched, sizes):
    pair = make_pair()
    cache, ids = pair.cache(**sizes), tokens(2, 30)

    def touching(update):
        def wrapped(*args, **kwargs):
            out = list(update(*args, **kwargs))
            out[touched] = out[touched] * 1.0
            return out

        return wrapped

    cache.update = touching(cache.update)
    with pytest.warns(RuntimeWarning, match="computes with cached"):
        got = feed(pair.fast, ids, cache, steps=[20, 1, 9])
    assert_logits(got, eager(pair, ids))


@pytest.mark.parametrize("steps", [[1, 9], [10]], ids=str)
def test_gradients_after_a_padded_prompt(steps, sizes):
    """The first step that needs gradients turns the cache dense: its padding columns must stay hidden."""
    pair, ids, mask = make_pair(), tokens(2, 30), left_padding([30, 12])
    cache = pair.cache(**sizes)
    feed(pair.fast, ids[:, :20], cache, mask, [20])
    pair.fast.requires_grad_(True)
    with torch.enable_grad():
        got = feed(pair.fast, ids[:, 20:], cache, mask, steps)
    assert_logits(got.detach(), eager(pair, ids, mask)[:, 20:])


def test_gradients_flow_through_the_keys_and_values_of_the_pass():
    gradients = []
    for implementation in ("fastattn", "eager"):
        pair, ids = make_pair(), tokens(2, 20)
        model = pair.fast if implementation == "fastattn" else pair.eager
        cache = pair.cache() if implementation == "fastattn" else DynamicCache()
        model(ids[:, :9], past_key_values=cache)
        model.requires_grad_(True)
        with torch.enable_grad():
            model(ids[:, 9:], past_key_values=cache).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert not any(layer.keys.requires_grad for layer in cache.layers) or implementation == "eager"
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    "modes",
    [
        (torch.inference_mode, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
        (torch.inference_mode, torch.inference_mode),
    ],
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_inference_mode_may_come_and_go(request, name, modes, sizes):
    pair, ids, mask = request.getfixturevalue(name), tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :5], mask[1, 8:11] = 0, 0
    cache, got = pair.cache(**sizes), []
    for mode, stop, steps in ((modes[0], 30, [20, 1, 9]), (modes[1], 50, [1, 1, 18])):
        with mode():
            got.append(feed(pair.fast, ids[:, cache.get_seq_length() : stop], cache, mask, steps))
            cache.reorder_cache(torch.tensor([0, 0]))
            cache.batch_select_indices(torch.tensor([0]))
            cache.batch_repeat_interleave(2)
        ids, mask = ids[[0, 0]], mask[[0, 0]]
    assert_logits(torch.cat(got, 1)[:1], eager(pair, ids, mask)[:1], mask[:1])


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(llama, strict):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama.fast

        def forward(self, ids):
            return self.model(ids, past_key_values=llama.cache(max_length=32)).logits

    # strict export wraps the sentence in an error of its own
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match=r"cannot be exported|Observed exception"):
        torch.export.export(Wrapper(), (tokens(1, 5),), strict=strict)


def test_update_says_why_it_cannot_be_exported(llama, monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    with pytest.raises(RuntimeError, match="a PagedCache cannot be exported: its block tables change on the host"):
        llama.fast(tokens(1, 3), past_key_values=llama.cache())


@pytest.mark.parametrize("sizes", [{}, {"max_length": 48}], ids=str)
def test_a_compiled_model_fills_the_same_cache(llama, sizes):
    """Every step of a compiled forward, padded prefill included; the host's counts keep up."""
    ids, mask = tokens(2, 30), left_padding([30, 23])
    torch._dynamo.reset()
    compiled = torch.compile(llama.fast, backend="eager")
    cache = llama.cache(**sizes)
    got = [feed(compiled, ids[:, :25], cache, mask, [20] + [1] * 5)]
    assert cache.get_seq_length() == 25
    check_state(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    got.append(feed(llama.fast, ids[:, 25:], cache, mask, [1, 4]))
    assert_logits(torch.cat(got, 1), eager(llama, ids, mask), mask)
    check_state(cache)

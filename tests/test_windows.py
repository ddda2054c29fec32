"""Models whose layers all slide: blocks behind the window are freed, and nobody sees the difference."""

import copy
import pickle

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn import PagedCache, PrefixStore, ops, paged_state, reference
from hf_fastattn.block_pool import NO_BLOCK, BlockPool, BlockTables
from hf_fastattn.kv_pool import KVPool, LayerBlocks
from hf_fastattn.model_config import window_of_all_layers
from tests.test_cache_machine import BRIEF, MAX_COLUMNS, CacheMachine, check_state
from tests.tiny import TOLERANCE, assert_logits, left_padding, make_pair, tokens

WINDOW = 11
BLOCK = 16


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def brief_margin(monkeypatch):
    """Free blocks soon, so that short tests get there."""
    monkeypatch.setattr(paged_state, "WINDOW_MARGIN", 4)


def filled(pair, ids, mask=None, **sizes):
    """Return a cache over ids; block 0 and everything free is NaN afterwards."""
    cache = pair.cache(**sizes)
    pair.fast(ids, past_key_values=cache, attention_mask=mask)
    poison(cache)
    return cache


def poison(cache):
    """Make every block that the cache does not hold NaN."""
    held = {block for row in cache.state.block_rows() for block in row}
    for layer in cache.paged_layers:
        for block in set(range(len(layer.k_cache))) - held:
            layer.k_cache[block] = layer.v_cache[block] = float("nan")


def freed_blocks(cache):
    return [row.count(NO_BLOCK) for row in cache.state.tables.rows]


def check_next(pair, cache, ids, mask=None, count=3, seed=9):
    """Feed new tokens in one pass; logits are those of a pass over everything."""
    new = tokens(len(ids), count, seed)
    ids = torch.cat([ids, new], 1)
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    got = pair.fast(new, past_key_values=cache, attention_mask=mask).logits
    assert_logits(got, pair.eager(ids, attention_mask=mask).logits[:, -count:])
    check_state(cache)
    return ids, mask


def test_a_long_generation_holds_a_window_of_blocks():
    """1000 tokens with a window of 64: never more blocks than window, margin and two partly used ones need."""
    pair = make_pair("mistral", sliding_window=64)
    cache = pair.cache()
    used = []
    pair.fast.model.layers[0].register_forward_pre_hook(lambda *_: used.append(cache.state.pool.num_used))
    out = pair.fast.generate(
        tokens(2, 20),
        past_key_values=cache,
        min_new_tokens=1000,
        max_new_tokens=1000,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    limit = (64 - 1 + paged_state.WINDOW_MARGIN) // BLOCK + 2
    assert len(used) == 1000
    assert max(used) <= 2 * limit
    assert cache.state.pool.num_blocks <= 2 * (64 + paged_state.WINDOW_MARGIN + paged_state.GROWTH_SLACK) // BLOCK
    assert cache.get_seq_length() == 1019
    logits = torch.stack(out.logits, 1)
    assert_logits(logits, pair.eager(out.sequences).logits[:, 19:-1])
    stats = cache.stats()
    assert stats.used_blocks == len({b for row in cache.state.block_rows() for b in row}) <= 2 * limit
    assert stats.waste < 0.2
    assert stats.saved == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"sliding_window": 8}, 8),
        ({"sliding_window": None}, None),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, 8),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, None),
    ],
)
def test_a_window_counts_only_if_all_layers_have_it(overrides, expected):
    config = type("Config", (), overrides)()
    assert window_of_all_layers(config) == expected


@pytest.mark.parametrize("num_new", [1, 5, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_passes_over_freed_blocks(mistral, brief_margin, padded, num_new):
    """Whatever the number of queries: one, a few (decode), or many with a mask (prefill over blocks)."""
    ids = tokens(3, 90)
    mask = left_padding([90, 41, 70]) if padded else None
    cache = filled(mistral, ids, mask)
    lens = [90, 41, 70] if padded else [90] * 3
    assert freed_blocks(cache) == [(n - WINDOW + 1 - 4) // BLOCK for n in lens]
    ids, mask = check_next(mistral, cache, ids, mask, num_new)
    poison(cache)
    check_next(mistral, cache, ids, mask, 1)


def test_reserved_room_and_full_layers_keep_everything(llama, mistral, brief_margin):
    for pair, sizes in ((mistral, {"max_length": 120}), (llama, {})):
        cache = filled(pair, tokens(2, 90), **sizes)
        check_next(pair, cache, tokens(2, 90))
        assert freed_blocks(cache) == [0, 0]


def test_crop_goes_back_by_the_margin_and_no_further(mistral):
    margin = paged_state.WINDOW_MARGIN
    ids = tokens(2, WINDOW - 1 + margin + 3 * BLOCK)
    cache = filled(mistral, ids)
    assert freed_blocks(cache) == [3, 3]
    with pytest.raises(
        ValueError, match=rf"from {ids.shape[1]} to {ids.shape[1] - margin - 1} columns.*at most {margin}"
    ):
        cache.crop(-margin - 1)
    assert cache.get_seq_length() == ids.shape[1]
    check_state(cache)
    cache.crop(-margin)
    check_next(mistral, cache, ids[:, :-margin])
    cache.crop(-cache.get_seq_length())
    assert cache.state.pool.num_used == 0
    check_next(mistral, cache, ids[:, :0])


def test_keep_prefix_starts_over_where_blocks_are_gone(mistral, brief_margin):
    ids = tokens(1, 90)
    other = ids.clone()
    other[:, 30:] = tokens(1, 60, 3)
    cache = filled(mistral, ids)
    assert cache.keep_prefix(ids, other) == 0
    check_next(mistral, cache, other[:, :0], count=40)
    cache = filled(mistral, ids)
    assert cache.keep_prefix(ids, torch.cat([ids[:, :88], other[:, :5]], 1)) == 88
    check_next(mistral, cache, ids[:, :88])


def test_assisted_decoding_crops_within_the_margin(mistral):
    """Prompt lookup crops rejected candidates off, while blocks are freed."""
    pattern = tokens(1, 12).repeat(1, 14)
    cache = mistral.cache()
    given = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    got = mistral.fast.generate(pattern, past_key_values=cache, prompt_lookup_num_tokens=6, **given)
    want = mistral.fast.generate(pattern, past_key_values=DynamicCache(), **given)
    assert freed_blocks(cache)[0] > 0
    assert torch.equal(got, want)
    logits = mistral.fast(got[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1:]
    assert_logits(logits, mistral.eager(got).logits[:, -1:])


def test_beams_over_freed_blocks(mistral, brief_margin):
    ids, mask = tokens(2, 60), left_padding([60, 33])
    given = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    given |= {"return_dict_in_generate": True, "output_scores": True}
    cache = mistral.cache(sequences_per_prompt=3)
    got = mistral.fast.generate(ids, past_key_values=cache, **given)
    want = mistral.eager.generate(ids, **given)
    assert min(freed_blocks(cache)) > 0
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=1e-4, atol=1e-4)
    check_state(cache)


def test_forks_copies_and_pickles_of_freed_rows(mistral, brief_margin):
    ids, mask = tokens(2, 90), left_padding([90, 60])
    cache = filled(mistral, ids, mask)
    before = freed_blocks(cache)
    assert min(before) > 0
    twin, copied, loaded = cache.fork(2), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    for other, index in ((twin, [0, 0, 1, 1]), (copied, [0, 1]), (loaded, [0, 1]), (cache, [0, 1])):
        assert freed_blocks(other) == [before[i] for i in index]
        given = check_next(mistral, other, ids[index], mask[index], 7)
        check_next(mistral, other, *given, 30)
        assert freed_blocks(other) > [before[i] for i in index]
    del twin, other
    check_state(cache)
    assert cache.state.pool.num_used == len({b for row in cache.state.block_rows() for b in row})


def test_the_pool_grows_around_freed_rows(mistral, brief_margin, monkeypatch):
    """Renumbering leaves the places of freed blocks alone."""
    monkeypatch.setattr(paged_state, "GROWTH_SLACK", 0)
    ids = tokens(2, 90)
    cache = filled(mistral, ids)
    total = cache.state.pool.num_blocks
    for _ in range(4):
        ids, _ = check_next(mistral, cache, ids, None, 80)
    assert cache.state.pool.num_blocks > total
    assert min(freed_blocks(cache)) > 20


def test_dense_readers_see_zeros_behind_the_window(mistral, brief_margin):
    ids, mask = tokens(2, 90), left_padding([90, 50])
    cache, oracle = filled(mistral, ids, mask), DynamicCache()
    mistral.eager(ids, past_key_values=oracle, attention_mask=mask)
    dense = cache.to_dynamic()
    gone = [(0, BLOCK * n) for n in freed_blocks(cache)]
    assert min(gone)[1] > 0
    for layer, want in zip(dense.layers, oracle.layers, strict=True):
        for row, (_, count) in enumerate(gone):
            start = 90 - int(mask[row].sum())
            assert not layer.keys[row, :, : start + count].any()
            assert not layer.values[row, :, : start + count].any()
            got, expected = layer.keys[row, :, start + count :], want.keys[row, :, start + count :]
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * float(expected.norm()))


def test_another_attention_continues_on_freed_rows_and_frees_no_more(brief_margin):
    pair = make_pair("mistral", sliding_window=WINDOW)
    ids = tokens(2, 90)
    cache = filled(pair, ids)
    before = freed_blocks(cache)
    pair.fast.set_attn_implementation("sdpa")
    ids, _ = check_next(pair, cache, ids)
    pair.fast.set_attn_implementation(hf_fastattn.IMPLEMENTATION)
    check_next(pair, cache, ids, None, 40)
    assert freed_blocks(cache) == before
    cache.reset()
    check_next(pair, cache, ids[:, :0], None, 90)
    assert min(freed_blocks(cache)) > 0


def test_a_mask_that_shows_freed_keys_is_refused(mistral, brief_margin):
    ids = tokens(1, 90)
    position = torch.arange(91)
    inside = (position > 90 - WINDOW)[None, None, None]
    got = mistral.fast(ids[:, :1], past_key_values=filled(mistral, ids), attention_mask=inside).logits
    assert_logits(got, mistral.eager(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:])
    for everything in (torch.ones_like(inside), torch.zeros(1, 1, 1, 91)):  # bool, additive
        with pytest.raises(ValueError, match=f"behind the model's window of {WINDOW} tokens and were freed"):
            mistral.fast(ids[:, :1], past_key_values=filled(mistral, ids), attention_mask=everything)


def test_a_layer_that_looks_further_back_than_its_config_says(brief_margin):
    """Nothing is freed if it shows in time; if not, it is an error, never a wrong result."""
    pair = make_pair("mistral", sliding_window=WINDOW)
    attention = pair.fast.model.layers[1].self_attn
    attention.config = copy.copy(pair.fast.config)
    attention.config.sliding_window = None
    cache = filled(pair, tokens(1, 90))
    assert freed_blocks(cache) == [0]
    attention.config.sliding_window = WINDOW
    cache = filled(pair, tokens(1, 90))
    assert freed_blocks(cache) == [4]
    attention.config.sliding_window = None
    with pytest.raises(RuntimeError, match=f"looks back .* tokens, but its config says that all layers see {WINDOW}"):
        pair.fast(tokens(1, 1), past_key_values=cache)


def test_a_store_keeps_no_chain_with_a_gap(mistral, brief_margin):
    store = PrefixStore(mistral.fast, block_size=BLOCK)
    ids = tokens(1, 90)

    def run(ids):
        cache = store.cache(ids)
        reused = cache.get_seq_length()
        got = mistral.fast(ids[:, reused:], past_key_values=cache).logits[:, -1:]
        assert_logits(got, mistral.eager(ids).logits[:, -1:])
        check_state(cache)
        return cache, reused

    cache, _ = run(ids)
    assert store.add(cache, ids) == 0  # its first blocks are gone
    cache, reused = run(ids[:, :23])  # nothing gone yet
    assert reused == 0
    assert store.add(cache, ids) == 2
    cache, reused = run(ids)
    assert reused == 23
    assert freed_blocks(cache) == [4]
    assert store.add(cache, ids) == 0  # block 0 is known, those behind it are not there
    assert run(ids[:, :40])[1] == 23
    del cache
    store.clear()
    assert store.pool.ids.num_used == 0


def test_a_converted_cache_frees_nothing_before_a_layer_has_attended(mistral, brief_margin):
    ids = tokens(1, 90)
    dense = DynamicCache()
    mistral.eager(ids, past_key_values=dense)
    cache = PagedCache.from_dynamic(dense, mistral.fast.config, block_size=BLOCK)
    assert freed_blocks(cache) == [0]
    check_next(mistral, cache, ids)
    assert freed_blocks(cache) == [4]


def test_tables_free_and_truncate():
    pool = BlockPool(12)
    tables = BlockTables(pool, 4)
    tables.add_rows([16, 8])
    tables.lens = [14, 6]
    assert not tables.free_before([3, -5])
    assert tables.free_before([9, 3])
    assert [row[:2] for row in tables.rows] == [[NO_BLOCK, NO_BLOCK], tables.rows[1]]
    assert tables.num_freed(0) == 2
    assert tables.num_freed(1) == 0
    assert not tables.free_before([9, 3])
    assert pool.num_used == 4
    tables.select([0, 0, 1])
    assert pool.num_used == 5
    tables.truncate([9, 9, 0])
    assert [len(row) for row in tables.rows] == [3, 3, 0]
    assert tables.free_before([12, 12, 0])
    assert tables.num_freed(0) == 3
    tables.reserve([16, 16, 4])
    tables.release()
    assert pool.num_used == 0


def test_room_for_tails_does_not_count_places_of_freed_blocks():
    """A full pool: a place without a block is no block that selecting would set free."""
    pool = BlockPool(2)
    tables = BlockTables(pool, 4)
    tables.add_rows([4, 4])
    tables.lens = [4, 3]
    tables.free_before([4, 0])
    tables.rows[0].append(pool.allocate(1)[0])
    tables.lens[0] = 7
    before = [list(row) for row in tables.rows]
    with pytest.raises(hf_fastattn.BlockPoolExhausted):
        tables.select([0, 0, 1])
    assert tables.rows == before


@pytest.mark.parametrize("query_len", [1, 4, 20])
@pytest.mark.parametrize("lens", [(70, 70), (70, 39)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_ops_read_nothing_behind_the_window(query_len, lens, masked, positions):
    """The oracle has the blocks; the ops have -1 in their places, and NaN in block 0."""
    window, size = 9, 16
    random = torch.Generator().manual_seed(query_len)
    blocks = [-(-n // size) for n in lens]
    k, v = (torch.randn(sum(blocks) + 1, size, 2, 8, generator=random) for _ in range(2))
    table = torch.full((2, max(blocks)), -1, dtype=torch.int32)
    order = (torch.randperm(sum(blocks), generator=random) + 1).int()
    table[0, : blocks[0]], table[1, : blocks[1]] = order[: blocks[0]], order[blocks[0] :]
    q = torch.randn(2, 4, query_len, 8, generator=random)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    given = {"softmax_scale": 1.0, "block_table": table, "seq_lens": seq_lens, "window": window}
    if masked:
        given["key_mask"] = (torch.rand(2, max(blocks) * size, generator=random) > 0.2).to(torch.int8)
    if positions:
        given["query_positions"] = seq_lens[:, None] - query_len + torch.arange(query_len, dtype=torch.int32)
        given["query_positions"][1, 0] = -1
        if query_len > 3:
            given["query_positions"][1, 2] = -1  # a gap, which a mask has to skip
    want = reference.prefill_attention(q, k, v, **given)
    for row, n in enumerate(lens):
        gone = (n - query_len - window + 1) // size
        table[row, : max(gone, 0)] = -1
        k[list(set(range(len(k))) - set(table.flatten().tolist()))] = float("nan")
        v[list(set(range(len(v))) - set(table.flatten().tolist()))] = float("nan")
    op = ops.prefill_attention if positions else ops.decode_attention
    torch.testing.assert_close(op(q, k, v, **given), want, rtol=1e-5, atol=1e-5)


class WindowMachine(CacheMachine):
    """The machine of test_cache_machine over a window short enough that blocks are freed all the time."""

    pair = make_pair("mistral", sliding_window=7)

    def teardown(self):
        paged_state.WINDOW_MARGIN = 128
        super().teardown()

    def forget(self):
        paged_state.WINDOW_MARGIN = 5
        super().forget()

    @precondition(lambda self: self.columns > 0)
    @rule(share=st.sampled_from([0.02, 0.1, 0.5, 1.0]))
    def crop(self, share):
        count = max(int(share * self.columns), 1)
        state = self.cache.state
        before = [list(row) for row in state.tables.rows], list(state.tables.lens)
        if state.can_go_back(self.columns - count):
            if self.attempt(lambda: self.cache.crop(-count)):
                if count == self.columns:
                    return self.forget()
                self.oracle.crop(-count)
                self.mask = self.mask[:, : self.columns - count]
            return None
        assert count > 5
        with pytest.raises(ValueError, match="cannot be cropped"):
            self.cache.crop(-count)
        assert ([list(row) for row in state.tables.rows], list(state.tables.lens)) == before

    @precondition(lambda self: self.columns > 0)
    @rule()
    def to_dynamic(self):
        dense = self.cache.to_dynamic()
        kept = self.mask.clone()
        for row, freed in enumerate(freed_blocks(self.cache)):
            stored = self.mask[row].cumsum(0) > 0  # with a window, holes are stored too
            kept[row] &= (stored.cumsum(0) > freed * 16) & stored
        for got, want in zip(dense.layers, self.oracle.layers, strict=True):
            a, b = (layer.keys.transpose(1, 2)[kept] for layer in (got, want))
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * float(b.norm()))


def window_machine(name, **sizes):
    case = type(name, (WindowMachine,), {"sizes": sizes}).TestCase
    case.settings = BRIEF
    return case


TestFreedGrowing = window_machine("FreedGrowing")
TestFreedTight = window_machine("FreedTight", num_blocks=9)
TestFreedLimited = window_machine("FreedLimited", num_blocks=24, max_length=MAX_COLUMNS)


def test_the_machine_frees_blocks():
    """Rules that never reach a freed block would test nothing."""
    paged_state.WINDOW_MARGIN = 5
    try:
        cache = filled(WindowMachine.pair, tokens(1, 40))
    finally:
        paged_state.WINDOW_MARGIN = 128
    assert freed_blocks(cache) == [1]


def test_pools_users_report_only_blocks_that_they_hold(mistral, brief_margin):
    """A pool that keeps its numbers when it grows (GPUs) must not take -1 for a block."""
    pool = KVPool(BLOCK, None, [LayerBlocks() for _ in range(2)])
    cache = PagedCache(mistral.fast.config, pool=pool)
    mistral.fast(tokens(1, 90), past_key_values=cache)
    assert [NO_BLOCK in row for row in cache.state.block_rows()] == [False]
    assert cache.state.tables.rows[0][0] == NO_BLOCK

"""PrefixStore: what is known is not computed again, and nothing is used for what it is not."""

import copy
import gc

import pytest
import torch

import hf_fastattn
from hf_fastattn import PagedCache, PrefixStore, prefix_store
from tests.tiny import assert_logits, left_padding, make_pair, tokens


@pytest.fixture(scope="module")
def llama():
    return make_pair("llama")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def store(llama):
    return PrefixStore(llama.fast, block_size=16)


class Turn:
    """One generate() call through a store, checked against a run of the eager model without a cache."""

    def __init__(self, pair, store, ids, mask=None, *, new=12, add=True, **options):
        self.columns = []
        hook = pair.fast.model.layers[0].register_forward_pre_hook(
            lambda _, args: self.columns.append(args[0].shape[1])
        )
        mask = torch.ones_like(ids) if mask is None else mask
        self.cache = store.cache(ids, mask, **options)
        self.hits = self.cache.state.prefix_hits[1]
        given = {"max_new_tokens": new, "min_new_tokens": new, "attention_mask": mask}
        given |= {"return_dict_in_generate": True, "output_logits": True}
        try:
            out = pair.fast.generate(ids, past_key_values=self.cache, **given)
        finally:
            hook.remove()
        want = pair.eager.generate(ids, **given)
        assert torch.equal(out.sequences, want.sequences)
        assert_logits(torch.stack(out.logits, 1), torch.stack(want.logits, 1))
        self.ids = out.sequences
        if add:
            store.add(self.cache, self.ids)

    @property
    def prefilled(self):
        return self.columns[0]


def check_pool(store, *caches):
    """Assert that every block has the owners that it ought to."""
    ids = store.pool.ids
    owners = [0] * ids.num_blocks
    for user in [store, *(cache.state for cache in caches)]:
        for row in user.block_rows():
            for block in row:
                owners[block] += 1
    assert owners == [ids.num_owners(block) for block in range(ids.num_blocks)]


def test_what_a_later_mask_hides_ends_what_is_kept(llama, store):
    """Its keys lie between those of other tokens: nothing behind it is the prefix of anything."""
    ids, mask = tokens(2, 64), torch.ones(2, 64, dtype=torch.long)
    mask[0, 20:30] = 0
    cache = store.cache(ids)
    llama.fast(ids[:, :40], past_key_values=cache)
    llama.fast(ids[:, 40:], past_key_values=cache, attention_mask=mask)
    store.add(cache, ids)
    assert Turn(llama, store, ids[:1][mask[:1].bool()][None], add=False).hits == 20
    assert Turn(llama, store, ids[:1], add=False).hits == 20
    assert Turn(llama, store, ids[1:], add=False).hits == 63
    check_pool(store, cache)


def test_a_second_turn_computes_only_what_is_new(llama, store):
    first = Turn(llama, store, tokens(1, 50))
    assert first.prefilled == 50
    known = first.ids[:, :-1]  # the last token was never fed
    second = Turn(llama, store, torch.cat([first.ids, tokens(1, 9, seed=1)], 1))
    assert second.prefilled == 1 + 9
    assert second.hits == known.shape[1]
    edited = torch.cat([first.ids[:, :37], tokens(1, 20, seed=2)], 1)  # history changed inside a block
    third = Turn(llama, store, edited)
    assert third.prefilled == 20
    assert store.stats().hit_rate == pytest.approx((61 + 37) / (50 + 71 + 57))
    check_pool(store, first.cache, second.cache, third.cache)


def test_the_second_prefill_writes_new_blocks_only(llama, store):
    first = Turn(llama, store, tokens(1, 64), new=1)
    kept = first.cache.state.tables.rows[0][:4]
    layers = [(layer.k_cache.clone(), layer.v_cache.clone()) for layer in store.pool.layers]
    size = len(layers[0][0])
    second = Turn(llama, store, torch.cat([tokens(1, 64), tokens(1, 30, seed=3)], 1), new=1)
    assert second.cache.state.tables.rows[0][:4] == kept
    assert len(store.pool.layers[0].k_cache) == size  # not moved
    for (k, v), layer in zip(layers, store.pool.layers, strict=True):
        assert torch.equal(k[kept], layer.k_cache[kept])
        assert torch.equal(v[kept], layer.v_cache[kept])


def test_one_system_prompt_under_many_questions(llama, store):
    system = tokens(1, 40)
    Turn(llama, store, system, new=1)
    questions = torch.cat([system.repeat(3, 1), tokens(3, 11, seed=4)], 1)
    turn = Turn(llama, store, questions)
    assert turn.prefilled == 11
    rows = turn.cache.state.tables.rows
    assert rows[0][:2] == rows[1][:2] == rows[2][:2]
    assert len({row[2] for row in rows}) == 3  # the partly filled block was copied
    check_pool(store, turn.cache)


def test_rows_use_their_own_match_up_to_a_common_column(llama, store):
    long, short = tokens(1, 48, seed=5), tokens(1, 20, seed=6)
    for ids in (long, short):
        Turn(llama, store, ids, new=1)
    ids = torch.zeros(2, 60, dtype=torch.long)
    ids[0, 2:] = torch.cat([long, tokens(1, 10, seed=7)], 1)[0]
    ids[1, 30:] = torch.cat([short, tokens(1, 10, seed=8)], 1)[0]
    turn = Turn(llama, store, ids, left_padding([58, 30], 60))
    assert turn.cache.state.tables.lens[0] - turn.cache.state.tables.lens[1] == 28
    assert turn.prefilled == 10  # both prefixes end in column 50
    assert turn.hits == 48 + 20
    ids[1, 35] = 3 if ids[1, 35] != 3 else 4
    turn = Turn(llama, store, ids, left_padding([58, 30], 60), add=False)
    assert turn.prefilled == 60 - 35
    assert turn.hits == 33 + 5


def test_a_row_that_begins_behind_the_common_prefix_has_nothing_yet(llama, store):
    Turn(llama, store, tokens(1, 33), new=1)
    ids = torch.zeros(2, 60, dtype=torch.long)
    ids[0] = torch.cat([tokens(1, 33), tokens(1, 27, seed=1)], 1)[0]
    ids[1, 50:] = tokens(1, 10, seed=2)[0]
    turn = Turn(llama, store, ids, left_padding([60, 10]))
    assert turn.prefilled == 60 - 33


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_holes_in_a_mask(kind):
    pair = make_pair(kind, **({"sliding_window": 11} if kind == "mistral" else {}))
    store = PrefixStore(pair.fast, block_size=16)
    ids = tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[0, 20:23] = 0
    for _ in range(2):
        turn = Turn(pair, store, ids, mask)
    assert turn.prefilled == (1 if kind == "llama" else 30)  # a window counts columns, so holes lie in the blocks


def test_beams_over_a_known_prefix(llama, store):
    Turn(llama, store, tokens(1, 40), new=1)
    ids = torch.cat([tokens(1, 40), tokens(1, 7, seed=3)], 1)
    cache = store.cache(ids, copies=3)
    got = llama.fast.generate(ids, past_key_values=cache, num_beams=3, max_new_tokens=15)
    assert torch.equal(got, llama.eager.generate(ids, num_beams=3, max_new_tokens=15))
    assert cache.state.prefix_hits == (47, 40)


# What must not be shared


def test_nothing_crosses_salts(llama, store):
    ids = tokens(1, 40)
    Turn(llama, store, ids, salt="one")
    assert Turn(llama, store, ids, salt="two").hits == 0
    assert Turn(llama, store, ids).hits == 0
    assert Turn(llama, store, ids, salt="one").hits == 39


@pytest.mark.parametrize("same", [b"", b"k" * 32], ids=["empty key", "one key"])
def test_colliding_keys_do_not_leak(llama, store, monkeypatch, same):
    monkeypatch.setattr(prefix_store, "_digest", lambda parent, content: same)
    ids = tokens(1, 40)
    first = Turn(llama, store, ids)
    other = tokens(1, 40, seed=1)
    assert Turn(llama, store, other).hits == 0
    mixed = torch.cat([ids[:, :16], other[:, 16:]], 1)
    assert Turn(llama, store, mixed).hits == 16
    assert Turn(llama, store, ids, salt="else").hits == 0
    check_pool(store, first.cache)


def change_weight(model):
    model.model.layers[0].self_attn.k_proj.weight.mul_(1.1)


def change_dtype(model):
    model.to(torch.float64)


def change_data(model):
    """As weights are synchronised and averaged: nobody counts this as a new version of the tensor."""
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data.copy_(weight * 1.1)


def change_element(model):
    """One that is not among those that are compared."""
    model.model.layers[0].self_attn.k_proj.weight[5, 7] += 3.0


@pytest.mark.parametrize("change", [change_weight, change_dtype, change_data, change_element])
def test_a_changed_model_starts_anew(change):
    pair = make_pair("llama")
    store = PrefixStore(pair.fast, block_size=16)
    ids = tokens(1, 40)
    stale = Turn(pair, store, ids, add=False)
    Turn(pair, store, ids)
    for model in (pair.fast, pair.eager):
        change(model)
    assert store.add(stale.cache, stale.ids) == 0  # of the old weights
    assert store.cache(ids).state.prefix_hits[1] == 0
    if change is not change_dtype:
        assert Turn(pair, store, ids).hits == 0
        assert Turn(pair, store, ids).hits == 39


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_adapters_have_prefixes_of_their_own():
    peft = pytest.importorskip("peft")
    pair = make_pair("llama")
    model = peft.get_peft_model(
        pair.fast, peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    )
    store = PrefixStore(pair.fast, block_size=16)
    ids = tokens(1, 40)

    def hits():
        cache = store.cache(ids)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=4)
        store.add(cache, out)
        return cache.state.prefix_hits[1]

    assert [hits(), hits()] == [0, 39]
    with model.disable_adapter():
        assert [hits(), hits()] == [0, 39]
    assert hits() == 39
    for name, module in model.named_modules():
        if name.endswith("k_proj"):
            module.scale_layer(0.5)
    assert [hits(), hits()] == [0, 39]


def test_autocast_has_prefixes_of_its_own_and_erases_nothing(llama):
    """Keys of another dtype find no room beside those of a cache in use, and take the place of what was only kept."""
    store, ids = PrefixStore(llama.fast, block_size=16), tokens(1, 40)
    turn = Turn(llama, store, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = store.cache(ids)
        assert cache.state.prefix_hits[1] == 0
        with pytest.raises(ValueError, match=r"other caches on this pool hold keys of torch.float32"):
            llama.fast(ids, past_key_values=cache)
    assert turn.cache.layers[0].keys.abs().sum() > 0
    more = torch.cat([turn.ids, tokens(1, 5, seed=3)], 1)
    out = llama.fast(more[:, 51:], past_key_values=turn.cache)  # all but the last of the 12 new tokens are there
    assert_logits(out.logits, llama.eager(more).logits[:, 51:])
    del turn, cache, out
    gc.collect()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = store.cache(ids)
        store.add(cache, llama.fast.generate(ids, past_key_values=cache, max_new_tokens=2))
        assert store.cache(ids).state.prefix_hits[1] == 39
        del cache
    gc.collect()
    assert Turn(llama, store, ids).hits == 0


def test_of_beams_the_prompt_is_kept(llama, store):
    """What generate() returns is sorted by score, and no longer the rows of the cache."""
    ids = tokens(2, 40)
    cache = store.cache(ids, copies=3)
    out = llama.fast.generate(ids, past_key_values=cache, num_beams=3, num_return_sequences=3, max_new_tokens=20)
    out = torch.nn.functional.pad(out, (0, 60 - out.shape[1]))
    assert store.add(cache, out) == 2 * 3
    del cache
    gc.collect()
    turn = Turn(llama, store, out[1::3], add=False)
    assert turn.hits == 2 * 40


def test_tokens_that_stand_for_images_need_a_salt(monkeypatch):
    pair = make_pair("llama")
    monkeypatch.setattr(pair.fast.config, "image_token_id", 7, raising=False)
    store, ids = PrefixStore(pair.fast, block_size=16), tokens(1, 40)
    ids[ids == 7] = 8
    store.cache(ids)
    ids[0, 20] = 7
    with pytest.raises(ValueError, match="give its content a name in salt"):
        store.cache(ids)
    assert store.cache(ids, salt="cat.png").state.prefix_hits == (40, 0)


# Memory


def test_least_recently_used_blocks_go_first(llama):
    store = PrefixStore(llama.fast, block_size=16, max_tokens=96)
    one, two, three = (tokens(1, 48, seed=seed) for seed in range(3))
    for ids in (one, two):
        Turn(llama, store, ids, new=1)
        gc.collect()
    Turn(llama, store, one, new=1)  # used again
    Turn(llama, store, three, new=1)
    gc.collect()
    assert Turn(llama, store, one, new=1, add=False).hits == 47
    assert Turn(llama, store, three, new=1, add=False).hits == 47
    assert Turn(llama, store, two, new=1, add=False).hits < 47
    assert store.stats().kept_blocks <= 6
    assert store.stats().evicted_blocks == 3


def test_a_full_pool_takes_blocks_from_the_store_but_never_those_in_use(llama):
    store = PrefixStore(llama.fast, block_size=16, num_blocks=11)
    held = Turn(llama, store, tokens(1, 60, seed=1), new=1)
    Turn(llama, store, tokens(1, 60, seed=2), new=1)
    gc.collect()
    assert store.pool.ids.num_free == 3
    big = Turn(llama, store, tokens(1, 90, seed=3), new=1, add=False)  # 6 blocks
    assert big.prefilled == 90
    again = store.cache(tokens(1, 60, seed=1))
    assert again.state.prefix_hits[1] == 59
    check_pool(store, held.cache, big.cache, again)
    with pytest.raises(hf_fastattn.BlockPoolExhausted):
        Turn(llama, store, tokens(1, 100, seed=4), new=1)
    check_pool(store, held.cache, big.cache, again)


def test_a_growing_pool_keeps_what_is_known(llama, store):
    prompts = [tokens(1, 40, seed=seed) for seed in range(3)]
    for ids in prompts:
        Turn(llama, store, ids)
    blocks, places = store.pool.ids.num_blocks, sorted(map(tuple, store.block_rows()))
    Turn(llama, store, tokens(4, 400, seed=9), new=1, add=False)
    assert store.pool.ids.num_blocks > blocks
    assert sorted(map(tuple, store.block_rows())) != places
    for ids in prompts:
        assert Turn(llama, store, ids).hits == 39


def test_a_cache_goes_on_after_it_was_added(llama, store):
    """The store keeps the beginning of a block that the cache goes on filling, and that it may cut back."""
    first = Turn(llama, store, tokens(1, 40))
    ids = first.ids
    first.cache.crop(-5)
    new = tokens(1, 8, seed=9)
    kept = first.cache.get_seq_length()
    got = llama.fast(new, past_key_values=first.cache).logits
    want = llama.eager(torch.cat([ids[:, :kept], new], 1)).logits[:, kept:]
    assert_logits(got, want)
    again = Turn(llama, store, torch.cat([ids[:, :-1], tokens(1, 3, seed=2)], 1))
    assert again.prefilled == 3


def test_clear_gives_everything_back(llama, store):
    Turn(llama, store, tokens(2, 40))
    assert store.stats().kept_blocks
    store.clear()
    gc.collect()
    assert store.stats().kept_blocks == 0
    assert store.pool.ids.num_used == 0
    assert Turn(llama, store, tokens(2, 40)).hits == 0


# Bad input


def test_caches_and_tokens_that_do_not_belong(llama, store):
    ids = tokens(1, 20)
    cache = PagedCache(llama.fast.config)
    llama.fast(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"a cache that this store's cache\(\) made"):
        store.add(cache, ids)
    turn = Turn(llama, store, ids, add=False)
    with pytest.raises(ValueError, match="1 sequences and at least 31 columns, got"):
        store.add(turn.cache, ids)
    with pytest.raises(ValueError, match=r"a mask like them, got \(1, 20\) and \(1, 19\)"):
        store.cache(ids, torch.ones(1, 19))
    with pytest.raises(ValueError, match="at least one block of 16 tokens, got 3"):
        PrefixStore(llama.fast, block_size=16, max_tokens=3)
    config = copy.deepcopy(llama.fast.config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = copy.copy(llama.fast)
    model.config = config
    with pytest.raises(ValueError, match="depends on the sequence's length"):
        PrefixStore(model)


def test_keep_prefix_cuts_a_stale_cache(llama):
    cache = llama.cache()
    old = tokens(2, 40)
    llama.fast(old, past_key_values=cache)
    new = old.clone()
    new[1, 25] = 3 if new[1, 25] != 3 else 4
    new = torch.cat([new, tokens(2, 5, seed=3)], 1)
    assert cache.keep_prefix(old, new) == 25
    got = llama.fast.generate(new, past_key_values=cache, max_new_tokens=8)
    assert torch.equal(got, llama.eager.generate(new, max_new_tokens=8))
    cache = llama.cache()
    llama.fast(old, past_key_values=cache)
    assert cache.keep_prefix(old, old) == 39  # one column is left to compute
    with pytest.raises(ValueError, match="2 sequences and 39 columns"):
        cache.keep_prefix(old[:, :10], new)

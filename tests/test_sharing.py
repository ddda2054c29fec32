"""Sequences that share blocks: prompts stored once, forks, and what it saves, counted from outside."""

import copy
import pickle

import pytest
import torch

import hf_fastattn
from hf_fastattn import BlockPoolExhausted, PagedCache, device_tables, ops
from hf_fastattn.device_tables import DeviceTables, common_prefixes
from hf_fastattn.kv_pool import KVPool
from tests.test_cache_machine import check_state
from tests.tiny import CopiedBytes, assert_logits, eager, running_out, tokens, used_blocks

pytestmark = pytest.mark.usefixtures("no_grad", "both_ways")


@pytest.fixture(params=["by view", "by table"])
def both_ways(request):
    """Every test twice: even runs of blocks viewed, as a CPU does, and blocks read by their table, as a GPU does."""
    if request.param == "by table":
        request.getfixturevalue("by_table")


def forward(pair, cache, ids, mask=None):
    """Run new tokens over the cache; the oracle's logits come from a run without a cache."""
    return pair.fast(ids, past_key_values=cache, attention_mask=mask).logits


def check_continuation(pair, cache, history, steps=20):
    """Feed each sequence tokens of its own; logits are those of the whole sequences. Returns the new history."""
    for step in range(steps):
        new = tokens(len(history), 1, seed=100 + step)
        got = forward(pair, cache, new)
        history = torch.cat([history, new], 1)
        assert_logits(got, pair.eager(history).logits[:, -1:], torch.ones(len(history), 1, dtype=torch.bool))
        check_state(cache)
    return history


@pytest.mark.parametrize("length", [5, 16, 37, 64])
@pytest.mark.parametrize("sizes", [{}, {"max_length": 100}, {"num_blocks": 40}], ids=str)
def test_a_group_stores_its_prompt_once(llama, length, sizes):
    cache = llama.cache(sequences_per_prompt=3, **sizes)
    ids = tokens(2, length).repeat_interleave(3, 0)
    got = forward(llama, cache, ids)
    assert_logits(got, llama.eager(ids).logits, torch.ones_like(ids, dtype=torch.bool))
    if "max_length" not in sizes:
        assert used_blocks(cache) == 2 * -(-length // 16)
    history = check_continuation(llama, cache, ids)
    full = length // 16
    rows = cache.state.tables.rows
    assert rows[0][:full] == rows[1][:full] == rows[2][:full]
    assert len({row[full] for row in rows}) == 6
    assert cache.stats().shared_blocks == 2 * full
    assert history.shape[1] == cache.get_seq_length()


def test_the_first_of_a_group_stores_for_all(llama):
    """Rows of a group that differ, which is the caller's error, show whose keys and values are in the blocks."""
    cache, plain, ids = llama.cache(sequences_per_prompt=2), llama.cache(), tokens(4, 20)
    forward(llama, cache, ids)
    forward(llama, plain, ids[::2])
    for got, want in zip(cache.to_dynamic().layers, plain.to_dynamic().layers, strict=True):
        for both, one in ((got.keys, want.keys), (got.values, want.values)):
            torch.testing.assert_close(both, one.repeat_interleave(2, 0))


def test_padded_prompts_of_a_group_are_shared_too(llama):
    ids = tokens(2, 40).repeat_interleave(2, 0)
    mask = torch.ones_like(ids)
    mask[:2, :17] = 0
    cache = llama.cache(sequences_per_prompt=2)
    got = forward(llama, cache, ids, mask)
    assert cache.state.tables.lens == [23, 23, 40, 40]
    assert used_blocks(cache) == 2 + 3
    assert_logits(got, llama.eager(ids, attention_mask=mask).logits, mask.bool())
    new = tokens(4, 1, seed=5)
    mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
    got = forward(llama, cache, new, mask)
    want = llama.eager(torch.cat([ids, new], 1), attention_mask=mask).logits[:, -1:]
    assert_logits(got, want, torch.ones(4, 1, dtype=torch.bool))


def test_a_prompt_in_chunks_is_shared_as_far_as_it_is_known(llama):
    ids = tokens(1, 60).repeat_interleave(4, 0)
    cache = llama.cache(sequences_per_prompt=4)
    cache.state.prompt_columns = 60
    for chunk in ids.split(25, 1):
        got = forward(llama, cache, chunk)
    assert used_blocks(cache) == 4
    assert_logits(got, llama.eager(ids).logits[:, 50:], torch.ones_like(chunk, dtype=torch.bool))
    check_continuation(llama, cache, ids, steps=5)


def test_only_full_blocks_of_a_group_are_told_to_be_shared(llama):
    """The kernels take what is shared to lie before the queries of all."""
    cache = llama.cache(sequences_per_prompt=2)
    forward(llama, cache, tokens(1, 20).repeat_interleave(2, 0))
    cache.state.refresh()
    [tables] = cache.state.devices.values()
    assert tables.shared_prefixes.tolist() == [[0, 2, 0, 1]]


def test_groups_of_a_sized_cache_part_behind_the_prompt(llama):
    """A compiled step, which comes next, could not copy the block that they share."""
    cache = llama.cache(sequences_per_prompt=2, max_length=64)
    forward(llama, cache, tokens(1, 20).repeat_interleave(2, 0))
    one, two = cache.state.tables.rows
    assert one[0] == two[0]
    assert not set(one[1:]) & set(two[1:])


def test_masks_that_differ_within_a_group_are_refused(llama):
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="2 sequences per prompt, but their attention masks differ"):
        forward(llama, llama.cache(sequences_per_prompt=2), ids, mask)


def test_a_batch_that_is_no_whole_number_of_groups_is_refused(llama):
    with pytest.raises(ValueError, match="batch of 3 sequences per prompt, got 4 sequences"):
        forward(llama, llama.cache(sequences_per_prompt=3), tokens(4, 5))


def test_a_prompt_for_which_there_is_no_room_leaves_the_cache_usable(llama):
    cache = llama.cache(num_blocks=4, sequences_per_prompt=2)
    ids = tokens(1, 60).repeat_interleave(2, 0)
    forward(llama, cache, ids)  # 4 blocks; the second sequence's last block has no place
    for _ in range(2):
        with pytest.raises(BlockPoolExhausted, match="1 were wanted"):
            forward(llama, cache, tokens(2, 1))
    assert cache.get_seq_length() == 60
    cache.batch_select_indices(torch.tensor([0]))
    check_continuation(llama, cache, ids[:1], steps=3)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_made_while_prompts_are_shared_goes_on_alike(llama, copier):
    ids = tokens(2, 21).repeat_interleave(2, 0)
    cache = llama.cache(sequences_per_prompt=2)
    forward(llama, cache, ids)
    twin = copier(cache)
    check_continuation(llama, twin, ids, steps=3)
    check_continuation(llama, cache, ids, steps=3)


@pytest.mark.parametrize(("beams", "goal"), [(4, 0.55), (8, 0.70)])
def test_beams_save_the_memory_of_their_prompt(llama, beams, goal):
    cache = llama.cache(sequences_per_prompt=beams, block_size=64)
    prompt = tokens(1, 1000)
    out = llama.fast.generate(prompt, num_beams=beams, max_new_tokens=60, min_new_tokens=60, past_key_values=cache)
    want = llama.eager.generate(prompt, num_beams=beams, max_new_tokens=60, min_new_tokens=60)
    assert torch.equal(out, want)
    separate = beams * -(-cache.get_seq_length() // 64)
    assert 1 - used_blocks(cache) / separate >= goal
    assert cache.stats().saved >= goal
    check_state(cache)


def test_decoding_gets_what_is_shared_and_one_schedule_per_step(llama, monkeypatch):
    ids = tokens(2, 40).repeat_interleave(3, 0)
    cache = llama.cache(sequences_per_prompt=3)
    forward(llama, cache, ids)
    attends, schedules = [], []
    attend, schedule = ops.decode_attention, ops.decode_schedule
    monkeypatch.setattr(ops, "decode_attention", lambda *a, **kw: (attends.append(kw), attend(*a, **kw))[1])
    monkeypatch.setattr(ops, "decode_schedule", lambda *a, **kw: (schedules.append(kw), schedule(*a, **kw))[1])
    for step in range(2):
        forward(llama, cache, tokens(6, 1, seed=step))
    assert len(attends) == 4  # two layers
    assert len(schedules) == 2
    for given in [*attends, *schedules]:
        assert given["shared_prefixes"][:3].tolist() == [[0, 3, 0, 2], [3, 3, 0, 2], [0, 0, 0, 0]]
    assert attends[0]["schedule"] is attends[1]["schedule"]
    assert len(attends[0]["shared_prefixes"]) <= 8


def test_reordering_beams_copies_no_more_than_last_blocks(llama):
    cache = llama.cache(block_size=16)
    forward(llama, cache, tokens(4, 200))
    block = cache.state.memory.bytes_per_block
    before = cache.state.memory.layers[0].k_cache.data_ptr()
    with CopiedBytes() as copied:
        cache.reorder_cache(torch.tensor([2, 2, 0, 2]))
    assert 0 < copied.count <= 2 * 2 * block  # two copies of a last block, read and written
    assert cache.state.memory.layers[0].k_cache.data_ptr() == before
    with CopiedBytes() as copied:
        cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
    assert copied.count == 0


def test_waste_is_a_part_of_the_last_block(llama):
    for block_size, limit in ((16, 0.04), (64, 0.06)):
        cache = llama.cache(block_size=block_size)
        forward(llama, cache, tokens(3, 1001))
        stats = cache.stats()
        assert stats.waste == pytest.approx(1 - 1001 / (-(-1001 // block_size) * block_size))
        assert stats.waste < limit
        assert stats.tokens == stats.stored_tokens == 3003
        assert stats.used_bytes == stats.used_blocks * cache.state.memory.bytes_per_block


# Forks


@pytest.mark.parametrize("length", [5, 16, 37])
@pytest.mark.parametrize("sizes", [{}, {"max_length": 100}, {"num_blocks": 60}], ids=str)
def test_a_fork_goes_on_by_itself(llama, length, sizes):
    cache = llama.cache(**sizes)
    system = tokens(1, length)
    forward(llama, cache, system)
    before = used_blocks(cache)
    fork = cache.fork(3)
    if "max_length" not in sizes:
        assert used_blocks(cache) == before + (3 if length % 16 else 0)
    assert fork.get_seq_length() == length
    history = check_fork(llama, fork, system.repeat(3, 1))
    other = cache.fork(2)
    check_fork(llama, other, system.repeat(2, 1), seed=9)
    check_fork(llama, cache, system, seed=11)  # the parent is untouched by its forks
    check_fork(llama, fork, history, seed=12)


def check_fork(pair, cache, history, seed=7):
    """Continue a cache by a few tokens at once and then by single ones, against whole sequences."""
    new = tokens(len(history), 6, seed=seed)
    got = forward(pair, cache, new)
    history = torch.cat([history, new], 1)
    assert_logits(got, pair.eager(history).logits[:, -6:], torch.ones_like(new, dtype=torch.bool))
    for _ in range(13):
        new = tokens(len(history), 1, seed=seed)
        got = forward(pair, cache, new)
        history = torch.cat([history, new], 1)
        assert_logits(got, pair.eager(history).logits[:, -1:], torch.ones_like(new, dtype=torch.bool))
    return history


def test_blocks_of_a_fork_that_is_gone_come_back(llama):
    cache = llama.cache()
    forward(llama, cache, tokens(1, 30))
    before = used_blocks(cache)
    fork = cache.fork(4)
    forward(llama, fork, tokens(4, 40))
    assert used_blocks(cache) > before
    del fork
    assert used_blocks(cache) == before
    fork = cache.fork(2)
    memory = cache.state.memory
    del cache
    check_fork(llama, fork, tokens(1, 30).repeat(2, 1))
    del fork
    assert memory.ids.num_free == memory.ids.num_blocks


def test_a_fork_keeps_padding_and_its_masks(llama):
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    mask[1, 3] = 0
    cache = llama.cache()
    forward(llama, cache, ids, mask)
    fork = cache.fork(2)
    new = tokens(4, 7, seed=3)
    mask = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, 7, dtype=torch.long)], 1)
    got = forward(llama, fork, new, mask)
    want = llama.eager(torch.cat([ids.repeat_interleave(2, 0), new], 1), attention_mask=mask).logits[:, -7:]
    assert_logits(got, want, torch.ones_like(new, dtype=torch.bool))


def test_a_fork_without_room_changes_nothing(llama):
    cache = llama.cache(num_blocks=3)
    forward(llama, cache, tokens(1, 20))
    rows = [list(row) for row in cache.state.tables.rows]
    with pytest.raises(BlockPoolExhausted, match="2 were wanted"):
        cache.fork(2)
    assert cache.state.tables.rows == rows
    assert used_blocks(cache) == 2
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cache.fork(0)


def test_a_fork_generates_what_a_fresh_cache_does(llama):
    system, questions = tokens(1, 45), tokens(3, 12, seed=4)
    cache = llama.cache()
    forward(llama, cache, system)
    full = torch.cat([system.repeat(3, 1), questions], 1)
    got = llama.fast.generate(full, past_key_values=cache.fork(3), max_new_tokens=20)
    assert torch.equal(got, llama.eager.generate(full, max_new_tokens=20))


# Pools


def test_a_growing_pool_moves_all_caches_on_it(llama):
    cache = llama.cache()
    forward(llama, cache, tokens(1, 30))
    fork = cache.fork(2)
    total = cache.state.pool.num_blocks
    ids = tokens(2, 400, seed=8)
    forward(llama, fork, ids)
    assert cache.state.pool.num_blocks > total
    assert fork.state.pool is cache.state.pool
    check_fork(llama, cache, tokens(1, 30))
    check_fork(llama, fork, torch.cat([tokens(1, 30).repeat(2, 1), ids], 1))


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_memory_that_runs_out_while_a_pool_grows_changes_nothing(llama, fails_at):
    cache = llama.cache()
    ids = tokens(3, 30)
    forward(llama, cache, ids)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    ids = ids[[2, 0, 2]]
    with running_out(fails_at + 1), pytest.raises(torch.OutOfMemoryError):
        forward(llama, cache, tokens(3, 900))
    assert cache.get_seq_length() == 30
    check_fork(llama, cache, ids)


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_decoding_goes_on_where_a_pool_that_could_not_grow_has_left_the_blocks(llama, fails_at):
    """Decode steps take views that were made ahead: not of memory that the attempt has left behind."""
    cache, ids = llama.cache(), tokens(2, 30)
    for part in (slice(0, 28), slice(28, 29)):
        forward(llama, cache, ids[:, part])
    with running_out(fails_at + 1), pytest.raises(torch.OutOfMemoryError):
        cache.state.memory.make_room(900)
    forward(llama, cache, ids[:, 29:])
    cache.reorder_cache(torch.tensor([1, 0]))  # read by table from now on
    check_fork(llama, cache, ids[[1, 0]])


@pytest.mark.parametrize("columns", [1, 4])
def test_rows_of_a_prompt_may_differ_from_the_second_pass_on(llama, columns):
    """In what their masks hide, too."""
    cache, ids = llama.cache(sequences_per_prompt=2), tokens(1, 20).repeat(2, 1)
    forward(llama, cache, ids)
    more, mask = tokens(2, columns, seed=1), torch.ones(2, 20 + columns, dtype=torch.long)
    mask[0, 20 : 20 + columns // 2] = 0
    got = llama.fast(more, past_key_values=cache, attention_mask=mask).logits
    want = eager(llama, torch.cat([ids, more], 1), mask)[:, 20:]
    assert_logits(got, want, mask[:, 20:].bool())


@pytest.mark.parametrize(("most", "entries"), [(10_000, 16), (10, 10), (1, 8)])
def test_room_for_shared_prefixes_is_bounded(monkeypatch, most, entries):
    """24 sequences in 12 pairs; what finds no room is read by each sequence."""
    monkeypatch.setattr(device_tables, "MOST_SHARED", most)
    rows = [[i // 2, 100 + i] for i in range(24)]
    tables = DeviceTables(rows, [20] * 24, 20, width=2, block_size=16, device=torch.device("cpu"))
    shared = tables.shared_prefixes.tolist()
    assert len(shared) == entries
    assert [entry for entry in shared if entry[1]] == [[2 * i, 2, 0, 1] for i in range(min(entries, 12))]
    tables.write([[*row[:1], row[1] + 1] for row in rows], [20] * 24, 20)
    assert tables.shared_prefixes.tolist() == shared


def test_common_prefixes():
    assert common_prefixes([[1, 2, 3], [1, 2, 4], [5, 2, 3]], [3, 3, 3]) == [[0, 2, 0, 2]]
    assert common_prefixes([[1, 2, 3], [1, 2, 3]], [2, 3]) == [[0, 2, 0, 2]]
    assert common_prefixes([[1, 2], [1, 2], [1, 3], [1, 3]], [2] * 4) == [[0, 4, 0, 1], [0, 2, 1, 2], [2, 2, 1, 2]]
    assert common_prefixes([[-1, -1, 3], [-1, -1, 4]], [3, 3]) == []  # freed behind a window
    assert common_prefixes([[-1, 2, 3], [-1, 2, 4]], [3, 3]) == [[0, 2, 0, 2]]
    assert common_prefixes([[1], [2]], [1, 1]) == common_prefixes([[1]], [1]) == common_prefixes([], []) == []
    assert common_prefixes([[1, 2, 3, 9], [1, 2, 3, 8], [1, 2, 7, 6]], [4, 4, 4]) == [[0, 3, 0, 2], [0, 2, 2, 3]]


def test_plot_shows_every_block(llama):
    pytest.importorskip("matplotlib")
    cache = llama.cache(num_blocks=20, sequences_per_prompt=2)
    forward(llama, cache, tokens(1, 40).repeat(2, 1))
    forward(llama, cache, tokens(2, 1))
    figure = hf_fastattn.plot_blocks(cache, columns=8)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["2", "2"]
    colors = {patch.get_facecolor() for patch in axes.patches}
    assert len(colors) >= 5  # free, shared, and two sequences, filled and not
    assert "4 of 20 blocks (2 shared" in axes.get_title()


def test_a_pool_given_by_hand_serves_several_caches(llama):
    config = llama.fast.config
    pool = KVPool(16, 30, [hf_fastattn.kv_pool.LayerBlocks() for _ in range(config.num_hidden_layers)])
    one, two = (PagedCache(config, pool=pool) for _ in range(2))
    a, b = tokens(1, 50), tokens(2, 20, seed=1)
    forward(llama, one, a)
    forward(llama, two, b)
    check_fork(llama, one, a)
    check_fork(llama, two, b)
    with pytest.raises(BlockPoolExhausted):
        forward(llama, one, tokens(1, 480))

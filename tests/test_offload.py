"""Offloaded caches: right logits whenever the copies come, two layers on the device, clear errors when memory ends."""

import gc
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fastattn import BlockPoolExhausted, PagedCache, kv_pool, offload
from hf_fastattn.kv_pool import KVPool
from hf_fastattn.offload import CopyQueue, OffloadedBlocks, offloaded_layers
from hf_fastattn.paged_state import PagedState
from tests.test_cache_machine import check_state
from tests.tiny import assert_logits, left_padding, make_pair, tokens

LAYERS = 5
AT_ONCE = pytest.mark.parametrize("queues", ["at once"], indirect=True)


class LateQueue(CopyQueue):
    """Copies as late as their order allows, into room that is NaN where nothing is copied to."""

    def __init__(self):
        self.waiting, self.done, self.rooms, self.copied = [], 0, [], []

    def copy(self, source, target, runs):
        inwards = any(target[0] is room for room in self.rooms)
        self.copied.append((inwards, sum(end - start for start, end in runs)))
        self.waiting.append((source, target, runs, inwards))
        return self.done + len(self.waiting)

    def join(self, mark):
        while self.done < mark:
            source, target, runs, inwards = self.waiting.pop(0)
            if inwards:
                for room in target:
                    room.fill_(float("nan"))
            super().copy(source, target, runs)
            self.done += 1

    def finish(self):
        self.join(self.done + len(self.waiting))

    def uses(self, tensor):
        self.rooms.append(tensor)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, params=["at once", "late"])
def queues(request, monkeypatch):
    """The queues that were made: copies are done at once, or as late as they may."""
    made = []

    def make(device):
        made.append(LateQueue() if request.param == "late" else CopyQueue())
        return made[-1]

    monkeypatch.setattr(offload, "make_queue", make)
    return made


@pytest.fixture(scope="module")
def llama():
    return make_pair("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def mistral():
    return make_pair("mistral", num_hidden_layers=LAYERS, sliding_window=11)


def forward(pair, cache, ids, mask=None):
    return pair.fast(ids, past_key_values=cache, attention_mask=mask).logits


def layer_bytes(cache):
    """Bytes of the pool in one layer."""
    stats = cache.stats()
    assert stats.pool_bytes % LAYERS == 0
    return stats.pool_bytes // LAYERS


def check(pair, cache, ids, cuts, mask=None):
    """Feed tokens in pieces; the logits are those of the whole without a cache."""
    full = torch.ones_like(ids) if mask is None else mask
    want = pair.eager(ids, attention_mask=full).logits
    start = cache.get_seq_length()
    for end in cuts:
        got = forward(pair, cache, ids[:, start:end], None if mask is None else mask[:, :end])
        assert_logits(got, want[:, start:end], full[:, start:end])
        assert 0 < cache.stats().device_bytes <= 2 * layer_bytes(cache)
        check_state(cache)
        start = end


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("sizes", [{}, {"num_blocks": 20}, {"max_length": 90}, {"reserve": 80}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_logits_of_prefill_chunks_and_decode(request, kind, sizes, padded):
    pair = request.getfixturevalue(kind)
    cache = pair.cache(offload=True, **sizes)
    ids = tokens(3, 86)
    mask = torch.cat([left_padding([9, 26, 13]), torch.ones(3, 60, dtype=torch.long)], 1) if padded else None
    check(pair, cache, ids, [26, 27, 28, 61, 62, 80, *range(81, 87)], mask)
    stats = cache.stats()
    assert stats.host_bytes == stats.pool_bytes == LAYERS * layer_bytes(cache) > 0
    assert stats.device_bytes == 2 * layer_bytes(cache)
    assert "of it on the device" in str(stats)


def test_growth_drops_the_copies_and_makes_larger_ones(llama):
    cache = llama.cache(offload=True)
    ids = tokens(1, 700)
    check(llama, cache, ids, [20, 21, 22, 620, 621, 700])
    assert len(cache.layers[0].k_cache) > 40


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_beams_are_those_of_a_cache_without_offload(request, kind):
    pair = request.getfixturevalue(kind)
    ids, mask = tokens(2, 30), left_padding([17, 30])
    given = {"num_beams": 3, "max_new_tokens": 24, "return_dict_in_generate": True, "output_scores": True}
    one, two = (
        pair.fast.generate(ids, attention_mask=mask, past_key_values=pair.cache(offload=offload), **given)
        for offload in (False, True)
    )
    assert torch.equal(one.sequences, two.sequences)
    assert torch.equal(one.sequences_scores, two.sequences_scores)
    assert two.past_key_values.stats().host_bytes > 0
    want = pair.eager.generate(ids, attention_mask=mask, **given)
    torch.testing.assert_close(two.sequences_scores, want.sequences_scores, rtol=1e-4, atol=1e-5)


def test_prompts_that_are_shared(llama):
    cache = llama.cache(offload=True, sequences_per_prompt=3)
    ids = tokens(2, 50).repeat_interleave(3, 0)
    assert_logits(forward(llama, cache, ids), llama.eager(ids).logits)
    ids = torch.cat([ids, tokens(6, 6, seed=1)], 1)
    check(llama, cache, ids, range(51, 57))
    assert cache.stats().shared_blocks == 2 * 3


def test_forks_crop_select_pickle_and_reset(llama):
    ids = tokens(2, 60)
    cache = llama.cache(offload=True)
    check(llama, cache, ids, [40, 41])
    fork = cache.fork(1)
    check(llama, cache, ids, [42, 60])
    other = torch.cat([ids[:, :41], tokens(2, 19, seed=3)], 1)
    check(llama, fork, other, [42, 60])
    cache.crop(-25)
    again = torch.cat([ids[:, :35], tokens(2, 25, seed=4)], 1)
    check(llama, cache, again, [36, 60])
    loaded = pickle.loads(pickle.dumps(cache))
    assert loaded.state.memory.offload
    loaded.batch_select_indices(torch.tensor([1]))
    check(llama, loaded, torch.cat([again[1:], tokens(1, 3)], 1), [61, 62, 63])
    check(llama, cache, torch.cat([again, tokens(2, 3)], 1), [61, 62, 63])
    cache.reset()
    check(llama, cache, other, [30, 31, 32])


@pytest.mark.parametrize("failing", range(LAYERS))
def test_a_forward_pass_that_failed_leaves_no_copy_behind(llama, failing):
    """What it had copied lacks what happened to the blocks since: a sequence that parts gets a block of its own."""
    ids = tokens(2, 40)
    cache = llama.cache(offload=True)
    check(llama, cache, ids, [30])

    def fail(*args):
        raise ZeroDivisionError

    hook = llama.fast.model.layers[failing].register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            forward(llama, cache, tokens(2, 1, seed=9))
    finally:
        hook.remove()
    cache.batch_select_indices(torch.tensor([1, 1]))
    check(llama, cache, torch.cat([ids[[1, 1], :30], tokens(2, 10, seed=8)], 1), [31, 32, 40])


@pytest.mark.parametrize("queues", ["late"], indirect=True)
def test_only_what_is_used_goes_in_and_only_what_is_new_comes_back(llama, queues):
    cache = llama.cache(offload=True, num_blocks=30)
    forward(llama, cache, tokens(2, 40))
    forward(llama, cache, tokens(2, 1))
    queues[0].copied.clear()
    forward(llama, cache, tokens(2, 1))  # token 42 of each: 3 blocks hold the others, the last one takes it
    forward(llama, cache, tokens(2, 7))  # up to token 49: a fourth block
    inwards, back = ([n for to_device, n in queues[0].copied if to_device == way] for way in (True, False))
    assert inwards == [6] * LAYERS + [6] * LAYERS
    assert back == [2] * LAYERS + [4] * LAYERS


def test_the_next_layer_is_copied_before_its_turn(llama, monkeypatch):
    cache = llama.cache(offload=True)
    forward(llama, cache, tokens(1, 20))
    forward(llama, cache, tokens(1, 1))
    log, copy, fetch = [], offload.Staging.copy, OffloadedBlocks.fetch

    def logged_copy(self, blocks, *args):
        log.append(f"copy {blocks.index}")
        return copy(self, blocks, *args)

    def logged_fetch(self, *args):
        log.append(f"fetch {self.index}")
        return fetch(self, *args)

    monkeypatch.setattr(offload.Staging, "copy", logged_copy)
    monkeypatch.setattr(OffloadedBlocks, "fetch", logged_fetch)
    forward(llama, cache, tokens(1, 1))
    later = [word for i in range(1, LAYERS) for word in (f"copy {i}", f"fetch {i}")]
    assert log == ["fetch 0", "copy 0", *later]


class DeviceMemory:
    """Room for so many bytes of blocks, whichever of them are alive."""

    def __init__(self, limit):
        self.limit, self.used, self.peak, self.make = limit, 0, 0, kv_pool.allocate_blocks

    def allocate(self, like, shape):
        tensor = self.make(like, shape)
        num_bytes = tensor.numel() * tensor.element_size()
        if self.used + num_bytes > self.limit:
            raise torch.OutOfMemoryError(f"{self.used} of {self.limit} bytes used, {num_bytes} wanted")
        self.used += num_bytes
        self.peak = max(self.peak, self.used)
        weakref.finalize(tensor, self.free, num_bytes)
        return tensor

    def free(self, num_bytes):
        self.used -= num_bytes


def test_a_context_larger_than_the_device_finishes(llama, monkeypatch):
    ids = tokens(1, 460)
    needed = LAYERS * 2 * 460 * 2 * 8 * 4  # of the keys and values: layers, sides, tokens, heads, head_dim, fp32
    device = DeviceMemory(limit=needed // 2)
    with monkeypatch.context() as patch:
        patch.setattr(kv_pool, "allocate_blocks", device.allocate)
        with pytest.raises(torch.OutOfMemoryError):
            check(llama, llama.cache(num_blocks=30), ids, [460])
    gc.collect()
    assert device.used == 0
    monkeypatch.setattr(offload, "_like", lambda host, _: tuple(device.allocate(x, x.shape) for x in host))
    cache = llama.cache(offload=True, num_blocks=30)
    check(llama, cache, ids, [400, 450, *range(451, 461)])
    assert 0 < device.peak <= device.limit < needed
    assert cache.stats().host_bytes >= needed


def test_a_full_pool_says_so_and_leaves_the_cache_as_it_was(llama):
    cache = llama.cache(offload=True, num_blocks=5)
    ids = tokens(1, 90)
    check(llama, cache, ids, [70])
    for _ in range(2):
        with pytest.raises(BlockPoolExhausted, match=r"Pass a larger num_blocks to PagedCache"):
            forward(llama, cache, ids[:, 70:])
    check(llama, cache, ids, [71, 80])


def fail_beyond(monkeypatch, num_blocks):
    """Let the host have no memory for more than so many blocks of a layer."""
    make = offload.allocate_blocks

    def allocate(like, shape):
        if shape[0] > num_blocks:
            raise RuntimeError("as planned")  # like torch's allocator for the CPU
        return make(like, shape)

    monkeypatch.setattr(offload, "allocate_blocks", allocate)


def test_when_the_host_is_full_growth_says_so_and_leaves_the_cache_as_it_was(llama, monkeypatch):
    cache = llama.cache(offload=True)
    ids = tokens(1, 900)
    check(llama, cache, ids, [100, 101])
    total = cache.state.pool.num_blocks
    fail_beyond(monkeypatch, total)
    for _ in range(2):
        with pytest.raises(BlockPoolExhausted, match="the host's memory does not hold that many") as caught:
            forward(llama, cache, ids[:, 101:])
        assert "Pass a smaller batch, or shorter sequences" in str(caught.value)
        assert (caught.value.total, cache.get_seq_length()) == (total, 101)
    check(llama, cache, ids, [102, 200])


def test_when_the_host_is_full_the_first_forward_pass_says_so(llama, monkeypatch):
    fail_beyond(monkeypatch, 29)
    with pytest.raises(BlockPoolExhausted, match="the host's memory does not hold that many"):
        forward(llama, llama.cache(offload=True, num_blocks=30), tokens(1, 20))
    check(llama, llama.cache(offload=True, num_blocks=29), tokens(1, 20), [20])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_readers_see_all_columns(implementation):
    pair = make_pair("llama", num_hidden_layers=LAYERS)
    pair.fast.set_attn_implementation(implementation)
    cache = pair.cache(offload=True)
    ids, mask = tokens(2, 40), left_padding([29, 40])
    check(pair, cache, ids, [30, 31, 32, 40], mask)
    dense = cache.to_dynamic()
    plain = pair.cache()
    check_plain = pair.fast(ids, past_key_values=plain, attention_mask=mask).logits
    assert check_plain.isfinite().all()
    for layer, other in zip(dense.layers, plain.to_dynamic().layers, strict=True):
        seen = mask.bool()[:, None, :, None].expand_as(layer.keys)
        torch.testing.assert_close(layer.keys[seen], other.keys[seen], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values[seen], other.values[seen], rtol=1e-4, atol=1e-4)


def test_from_dynamic_and_back(llama):
    ids = tokens(1, 50)
    source = llama.cache(offload=True)
    check(llama, source, ids, [40])
    cache = PagedCache.from_dynamic(source.to_dynamic(), llama.fast.config, block_size=16, offload=True)
    check(llama, cache, ids, [41, 50])


@AT_ONCE
def test_a_compiled_model_stays_right(llama):
    cache = llama.cache(offload=True, max_length=64)
    ids = tokens(1, 40)
    forward(llama, cache, ids[:, :30])
    assert not cache.is_compileable
    compiled = torch.compile(llama.fast, backend="eager")
    want = llama.eager(ids).logits
    try:
        for i in range(30, 34):
            got = compiled(ids[:, i : i + 1], past_key_values=cache).logits
            assert_logits(got, want[:, i : i + 1])
    finally:
        torch._dynamo.reset()
    assert cache.get_seq_length() == 34
    check(llama, cache, ids, [35, 40])


class Counted(TorchDispatchMode):
    """Count the copies."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.copies += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def test_runs_are_copied_whole(llama):
    state = PagedState(KVPool(16, 40, offloaded_layers(1)), max_length=None, keep_hidden=False)
    k = torch.randn(1, 2, 300, 8)
    state.add_batch(1, 300)
    state.memory.allocate(0, k, k)
    step = state.begin(0, k)
    blocks = state.memory.layers[0]
    blocks.fetch(state, step)
    with Counted() as counted:
        blocks.written(state, step)
        blocks.staging.finish()
    assert counted.copies == 2  # keys and values


def test_layers_of_other_shapes_have_slots_of_their_own():
    dims = [8, 16, 16, 8, 8]
    state = PagedState(KVPool(16, 12, offloaded_layers(len(dims))), max_length=None, keep_hidden=False)
    given = [[] for _ in dims]
    for length in (20, 1, 30):
        new = [torch.randn(2, 2, length, dim) for dim in dims]
        if not state.num_seqs:
            state.add_batch(2, length)
            for i, k in enumerate(new):
                state.memory.allocate(i, k, k + 1)
        step = state.begin(0, new[0])
        for i, k in enumerate(new):
            given[i].append(k)
            blocks = state.memory.layers[i]
            for side, cache in enumerate(blocks.fetch(state, step)):
                assert cache.shape[-1] == dims[i]
                for row in range(2):
                    for j in range(length):
                        block, offset = divmod(step.lens[row] - length + j, 16)
                        cache[state.tables.rows[row][block], offset] = k[row, :, j] + side
            blocks.written(state, step)
        state.commit()
    sizes = [sum(t[0].numel() for t in slot.caches) for slots in blocks.staging.slots.values() for slot in slots]
    assert sorted(sizes) == [2 * 16 * 2 * 8] * 2 + [2 * 16 * 2 * 16] * 2
    for i, parts in enumerate(given):
        want = torch.cat(parts, 2)
        blocks = state.memory.layers[i]
        for side, cache in enumerate((blocks.k_cache, blocks.v_cache)):
            for row, places in enumerate(state.tables.rows):
                got = cache[places].flatten(0, 1)[: want.shape[2]]
                assert torch.equal(got.transpose(0, 1), want[row] + side)


@AT_ONCE
def test_threads_do_not_take_each_others_room(llama):
    """Forks of one cache, each in a thread: each has room of its own, which ends with the thread."""
    cache = llama.cache(offload=True, num_blocks=60)
    ids = tokens(1, 40)
    check(llama, cache, ids, [40])
    start, before = threading.Barrier(3), sys.getswitchinterval()

    def work(seed):
        with torch.no_grad():
            fork = forks[seed]
            start.wait()
            longer = torch.cat([ids, tokens(1, 60, seed=seed)], 1)
            want = llama.eager(longer).logits
            for end in range(41, 101):
                assert_logits(forward(llama, fork, longer[:, end - 1 : end]), want[:, end - 1 : end])

    forks = [cache.fork(1) for _ in range(3)]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(work, seed) for seed in range(3)]:
                done.result()
    finally:
        sys.setswitchinterval(before)
    assert cache.stats().device_bytes <= 7 * layer_bytes(cache)
    for blocks in cache.state.memory.layers:
        blocks.staging.slots.pop((threading.get_ident(), blocks.kind), None)
    forward(llama, cache, tokens(1, 1))
    assert cache.stats().device_bytes == 2 * layer_bytes(cache)


def test_a_cache_that_nobody_holds_is_gone_at_once(llama, queues):
    cache = llama.cache(offload=True)
    check(llama, cache, tokens(1, 20), [20])
    queues.clear()
    gc.collect()
    gc.disable()
    try:
        blocks = [weakref.ref(cache.layers[0].k_cache), weakref.ref(cache.layers[0].blocks.resident[0])]
        del cache
        assert [block() for block in blocks] == [None, None]
    finally:
        gc.enable()


def test_offload_is_yes_or_no(llama):
    with pytest.raises(TypeError, match="offload must be True or False, got 'cpu'"):
        llama.cache(offload="cpu")
    plain = llama.cache()
    forward(llama, plain, tokens(1, 5))
    assert (plain.stats().host_bytes, plain.stats().device_bytes) == (0, plain.stats().pool_bytes)

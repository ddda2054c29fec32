"""Several threads over one model and one pool: the results of each are those of running alone."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import hf_fastattn
from hf_fastattn import PrefixStore, paged_state, pool_lock
from hf_fastattn.kv_pool import KVPool, LayerBlocks
from hf_fastattn.pool_lock import PoolLock, in_forward_pass
from tests.test_cache_machine import check_state
from tests.tiny import assert_logits, make_pair, tokens

THREADS = 3
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def pair():
    return make_pair("llama")


@pytest.fixture(autouse=True)
def switch_often():
    """Let threads interrupt each other in the middle of bookkeeping."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with torch.no_grad():
        yield
    sys.setswitchinterval(before)


def in_threads(work, count=THREADS):
    """Return what work(0), work(1), ... return, each in a thread of its own, all begun together."""
    start = threading.Barrier(count)

    def run(index):
        start.wait()
        with torch.no_grad():
            return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def check_generated(pair, out):
    check_logits(pair, out.sequences, torch.stack(out.logits, 1))


def check_logits(pair, sequences, logits):
    """Compare with a pass of the eager model over everything."""
    assert_logits(logits, pair.eager(sequences).logits[:, -1 - logits.shape[1] : -1])


def test_calls_on_one_model_do_not_see_each_other():
    model_pair = make_pair("llama")
    hf_fastattn.paged(model_pair.fast)
    prompts = [tokens(2, 9 + 7 * i, seed=i) for i in range(THREADS)]

    def work(index):
        return [model_pair.fast.generate(prompts[index], max_new_tokens=40, **GREEDY) for _ in range(3)]

    for outs in in_threads(work):
        for out in outs:
            check_generated(model_pair, out)


def test_forks_in_threads_on_a_pool_that_grows(pair, monkeypatch):
    """Growth moves every block (on a CPU it renumbers them), in the middle of the others' generations."""
    monkeypatch.setattr(paged_state, "GROWTH_SLACK", 0)
    grown = []
    resize = KVPool.resize
    monkeypatch.setattr(
        KVPool, "resize", lambda self, count: (grown.append(threading.get_ident()), resize(self, count))
    )
    prompt = tokens(1, 37)
    cache = pair.cache()
    pair.fast(prompt[:, :-1], past_key_values=cache)

    def work(index):
        outs = []
        for turn in range(3):
            fork = cache.fork(1)
            outs.append(
                pair.fast.generate(prompt, past_key_values=fork, max_new_tokens=30 + 40 * index + turn, **GREEDY)
            )
        return outs

    for outs in in_threads(work):
        for out in outs:
            check_generated(pair, out)
    del out, outs  # they hold their caches
    assert len(grown) > 2
    check_state(cache)
    assert cache.state.pool.num_used == len(cache.state.tables.rows[0])


class Held:
    """A forward pass of another thread that stands still in the middle, over a fork."""

    def __init__(self, pair, cache, new):
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.pair, self.cache, self.new = pair, cache, new
        self.hook = pair.fast.model.layers[1].register_forward_pre_hook(self.hold)
        self.thread = threading.Thread(target=self.run)
        self.logits = None

    def hold(self, *_):
        if threading.current_thread() is self.thread:
            self.reached.set()
            assert self.go_on.wait(60)

    def run(self):
        with torch.no_grad():
            self.logits = self.pair.fast(self.new, past_key_values=self.cache).logits

    def __enter__(self):
        self.thread.start()
        assert self.reached.wait(60)
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self.thread.join(60)
        self.hook.remove()


def forked(pair, monkeypatch, length=20):
    """Return tokens and two caches over them on one pool that has no room left."""
    monkeypatch.setattr(paged_state, "GROWTH_SLACK", 0)
    ids = tokens(1, length)
    cache = pair.cache()
    pair.fast(ids, past_key_values=cache)
    twin = cache.fork(1)
    assert cache.state.pool.num_free <= 1
    return ids, cache, twin


def test_growth_waits_for_the_end_of_another_threads_pass(pair, monkeypatch):
    ids, cache, twin = forked(pair, monkeypatch)
    new, long = tokens(1, 2, 1), tokens(1, 100, 2)
    with Held(pair, twin, new) as held, ThreadPoolExecutor(1) as other:
        total, before = cache.state.pool.num_blocks, [list(row) for row in twin.state.tables.rows]
        growing = other.submit(lambda: pair.fast(long, past_key_values=cache).logits)
        time.sleep(0.5)
        assert not growing.done()
        assert twin.state.tables.rows == before
        held.go_on.set()
        logits = growing.result(60)
    assert cache.state.pool.num_blocks > total
    assert_logits(held.logits, pair.eager(torch.cat([ids, new], 1)).logits[:, -2:])
    assert_logits(logits, pair.eager(torch.cat([ids, long], 1)).logits[:, -100:])
    check_state(cache)
    check_state(twin)


def test_growth_does_not_come_between_the_counts_of_a_pass(pair, monkeypatch):
    _, cache, twin = forked(pair, monkeypatch)
    advance, reached = twin.state._advance_devices, threading.Event()

    def advance_slowly(step):
        advance(step)
        reached.set()
        time.sleep(0.3)

    def forward():
        with torch.no_grad():
            pair.fast(tokens(1, 2, 1), past_key_values=twin)

    monkeypatch.setattr(twin.state, "_advance_devices", advance_slowly)
    with ThreadPoolExecutor(1) as other:
        done = other.submit(forward)
        assert reached.wait(30)
        total = cache.state.pool.num_blocks
        pair.fast(tokens(1, 100, 2), past_key_values=cache)
        done.result(60)
    assert cache.state.pool.num_blocks > total
    check_state(cache)
    check_state(twin)


def test_a_pass_that_does_not_end_is_an_error_that_changes_nothing(pair, monkeypatch):
    monkeypatch.setattr(pool_lock, "GROWTH_WAIT", 0.2)
    ids, cache, twin = forked(pair, monkeypatch)
    long = tokens(1, 100, 2)
    with Held(pair, twin, tokens(1, 2, 1)) as held:
        with pytest.raises(RuntimeError, match="another thread has been in a forward pass over it for"):
            pair.fast(long, past_key_values=cache)
        assert cache.get_seq_length() == 20
    assert held.logits is not None
    logits = pair.fast(long, past_key_values=cache).logits
    assert_logits(logits, pair.eager(torch.cat([ids, long], 1)).logits[:, -100:])


def test_waiting_growth_goes_before_new_passes(pair, monkeypatch):
    """A thread that generates all the time does not starve one that waits for a gap between its passes."""
    ids, cache, twin = forked(pair, monkeypatch)
    twin_ids, stop = [ids], threading.Event()

    def step_after_step():
        with torch.no_grad():
            for i in range(900):
                if stop.is_set():
                    return
                twin_ids.append(tokens(1, 1, i))
                pair.fast(twin_ids[-1], past_key_values=twin)

    thread = threading.Thread(target=step_after_step)
    thread.start()
    for turn in range(5):
        pair.fast(tokens(1, 100, turn), past_key_values=cache)
    ended = thread.is_alive()
    stop.set()
    thread.join(60)
    assert ended
    last = tokens(1, 1, 999)
    everything = torch.cat([*twin_ids, last], 1)
    assert_logits(pair.fast(last, past_key_values=twin).logits, pair.eager(everything).logits[:, -1:])


def test_a_pass_waits_for_growth_that_waits(monkeypatch):
    """The lock alone: whoever begins a pass stays behind growth for as long as that waits."""
    monkeypatch.setattr(pool_lock, "in_forward_pass", lambda thread: True)
    lock, order, passes = PoolLock(free=lambda row: None), [], [threading.get_ident()]

    def grow():
        with lock:
            lock.wait_for(lambda: list(passes))
            order.append("growth")

    def begin():
        with lock:
            lock.begin_pass()
            order.append("pass")

    growth, new_pass = threading.Thread(target=grow), threading.Thread(target=begin)
    growth.start()
    while not lock._growing:
        time.sleep(0.001)
    new_pass.start()
    new_pass.join(0.5)
    assert order == []
    passes.clear()
    growth.join()
    new_pass.join()
    assert order == ["growth", "pass"]


def test_a_pass_that_failed_in_another_thread_holds_nobody_up(pair, monkeypatch):
    """The thread lives on, its cache holds an unfinished pass, and growth does not wait for it."""
    ids, cache, twin = forked(pair, monkeypatch)
    with ThreadPoolExecutor(1) as other:
        hook = pair.fast.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.submit(lambda: pair.fast(tokens(1, 2), past_key_values=twin)).result(60)
        hook.remove()
        assert twin.state.pass_thread() is not None
        start = time.monotonic()
        pair.fast(tokens(1, 100, 2), past_key_values=cache)
        assert time.monotonic() - start < 5
        new = tokens(1, 2, 1)
        got = pair.fast(new, past_key_values=twin).logits  # and the cache is as before the failed pass, for any thread
    assert_logits(got, pair.eager(torch.cat([ids, new], 1)).logits[:, -2:])


def test_one_cache_in_two_threads_is_refused(pair):
    cache = pair.cache()
    ids, new = tokens(1, 20), tokens(1, 2, 1)
    pair.fast(ids, past_key_values=cache)
    with Held(pair, cache, new) as held, pytest.raises(RuntimeError, match="give each thread a cache of its own"):
        pair.fast(new, past_key_values=cache)
    assert_logits(held.logits, pair.eager(torch.cat([ids, new], 1)).logits[:, -2:])


def test_a_prefix_store_serves_threads(pair):
    store = PrefixStore(pair.fast, block_size=16, max_tokens=160)
    prompts = [torch.cat([tokens(1, 35), tokens(1, 6 + 9 * i, seed=i + 1)], 1) for i in range(THREADS)]

    def work(index):
        outs = []
        for _ in range(6):
            cache = store.cache(prompts[index])
            out = pair.fast.generate(prompts[index], past_key_values=cache, max_new_tokens=25, **GREEDY)
            store.add(cache, out.sequences)
            outs.append((out.sequences, torch.stack(out.logits, 1)))
        return outs

    for outs in in_threads(work):
        for sequences, logits in outs:
            check_logits(pair, sequences, logits)
    stats = store.stats()
    assert stats.reused > 0
    assert store.pool.ids.num_used == stats.kept_blocks
    store.clear()
    assert store.pool.ids.num_used == 0


def test_what_garbage_collection_gives_back_waits_for_the_lock(pair):
    """A cache may end in the middle of bookkeeping, in this thread or another: its blocks are freed afterwards."""
    pool = KVPool(16, None, [LayerBlocks() for _ in range(2)])

    def cache():
        made = hf_fastattn.PagedCache(pair.fast.config, pool=pool)
        pair.fast(tokens(1, 40), past_key_values=made)
        return made

    first, others = cache(), [cache()]
    used = pool.ids.num_used
    with pool.lock:
        del first
        thread = threading.Thread(target=others.clear)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()  # it does not wait
        assert pool.ids.num_used == used == 6
    assert pool.ids.num_used == 0
    last = cache()
    assert pool.ids.num_used == 3
    del last
    assert pool.ids.num_used == 0


def test_the_lock_lets_no_second_thread_in():
    lock = pool_lock.PoolLock(lambda row: None)
    inside, most = [], []

    def work(index):
        for _ in range(50):
            with lock, lock:
                inside.append(index)
                most.append(len(inside))
                time.sleep(1e-5)
                inside.remove(index)

    in_threads(work)
    assert set(most) == {1}


def test_who_is_in_a_forward_pass():
    seen = []
    layer = torch.nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda *_: seen.append(in_forward_pass(threading.get_ident())))
    layer(torch.ones(1, 2))
    assert seen == [True]
    assert not in_forward_pass(threading.get_ident())
    assert not in_forward_pass(-1)

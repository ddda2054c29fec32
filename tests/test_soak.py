"""Thousands of calls of generate() of random kinds and shapes over one model and one pool: nothing is left behind."""

import gc
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList

import hf_fastattn
from hf_fastattn import BlockPoolExhausted, PrefixStore, leases, paged_state
from tests.tiny import VOCAB_SIZE, assert_logits, make_pair

BLOCK = 16
MAX_PROMPT = 60
MAX_NEW = 12
MAX_ROWS = 8
ROUND = 40
"""Calls after which everything is dropped and counted."""


class Interrupted(Exception):
    """What the failing logits processor raises."""


class Soak:
    """One model, one pool under a prefix store, and what a careless program does with them."""

    kinds = ("greedy", "sampled", "beams", "returned", "assisted", "default", "chat", "fork", "interrupted", "reset")

    def __init__(self, pair, num_blocks=None, seed=0):
        self.pair, self.model = pair, hf_fastattn.paged(pair.fast)
        self.store = PrefixStore(self.model, block_size=BLOCK, num_blocks=num_blocks, max_tokens=40 * BLOCK)
        self.random = random.Random(seed)
        self.system = [self.random.randrange(3, VOCAB_SIZE) for _ in range(MAX_PROMPT // 2)]
        self.held = []  # (cache, ids, mask) of earlier calls, to be gone on with
        self.done = Counter()
        self.hits = self.peak = 0

    def prompt(self):
        """Return random padded prompts, some of which begin alike: ids and mask (num_seqs, columns)."""
        rows = []
        for _ in range(self.random.randint(1, 4)):
            shared = self.system[: self.random.choice([0, len(self.system) // 2, len(self.system)])]
            own = [self.random.randrange(3, VOCAB_SIZE) for _ in range(self.random.randint(1, MAX_PROMPT // 2))]
            rows.append(shared + own)
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def call(self, kind):
        """Generate once; the logits of a greedy call are checked now and then."""
        ids, mask = self.prompt()
        given = {"do_sample": False, "max_new_tokens": self.random.randint(1, MAX_NEW)}
        copies = 1
        if kind == "sampled":
            given |= {"do_sample": True, "top_k": 5}
        elif kind == "beams":
            copies = self.random.randint(2, 3)
            given |= {"num_beams": copies, "num_return_sequences": self.random.randint(1, copies)}
        elif kind == "returned":
            copies = self.random.randint(2, 3)
            given |= {"do_sample": True, "num_return_sequences": copies}
        elif kind == "assisted":
            ids, mask = ids[:1], mask[:1]
            given["prompt_lookup_num_tokens"] = 4
        elif kind == "interrupted":
            given["logits_processor"] = LogitsProcessorList([self.interrupt])
        if kind in ("default", "assisted"):  # transformers' assisted decoding takes no cache that holds something
            self.model.generate(ids, attention_mask=mask, **given)
            return
        if kind in ("chat", "fork", "reset") and self.held:
            self.go_on(kind, given)
            return
        cache = self.store.cache(ids, mask, copies=copies)
        self.hits += cache.get_seq_length() > 0
        out = self.generate(cache, ids, mask, given)
        if kind in ("greedy", "sampled", "chat"):
            self.keep(cache, out, mask)
            if self.random.random() < 0.5:
                self.store.add(cache, out)

    def go_on(self, kind, given):
        """Go on with an earlier cache: another turn, a fork of it, or a new prompt over an emptied one."""
        cache, ids, mask = self.random.choice(self.held)
        if kind == "reset":
            cache.reset()
            self.held = [entry for entry in self.held if entry[0] is not cache]
            self.generate(cache, *self.prompt(), given)
            return
        if ids.shape[1] > 4 * MAX_PROMPT:
            self.held.clear()
            return
        if kind == "fork":
            copies = self.random.randint(1, 2 if 2 * len(ids) <= MAX_ROWS else 1)
            cache, ids, mask = cache.fork(copies), ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
        else:
            self.held = [entry for entry in self.held if entry[0] is not cache]
        turn = torch.tensor([[self.random.randrange(3, VOCAB_SIZE) for _ in range(5)] for _ in ids])
        ids, mask = torch.cat([ids, turn], 1), torch.cat([mask, torch.ones_like(turn)], 1)
        self.keep(cache, self.generate(cache, ids, mask, given), mask)

    def keep(self, cache, out, mask):
        columns = torch.ones(len(out), out.shape[1] - mask.shape[1], dtype=mask.dtype)
        self.held = [*self.held[-5:], (cache, out, torch.cat([mask, columns], 1))]

    def generate(self, cache, ids, mask, given):
        try:
            given = {"min_new_tokens": given["max_new_tokens"], **given}  # no finished rows, whose padding is no turn
            out = self.model.generate(ids, attention_mask=mask, past_key_values=cache, **given)
        finally:
            check_owners(self.store.pool)
            self.peak = max(self.peak, self.store.pool.ids.num_used)
        if self.random.random() < 0.3 and cache.batch_size == len(out) == len(ids):
            mask = torch.cat([mask, mask.new_ones(len(out), out.shape[1] - mask.shape[1])], 1)
            new = slice(cache.get_seq_length(), None)
            given = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, new] - 1}
            got = self.model(out[:, new], past_key_values=cache.fork(1), **given).logits[:, -1:]
            assert_logits(got, self.pair.eager(out, attention_mask=mask).logits[:, -1:])
            self.done["compared"] += 1
        return out

    def interrupt(self, ids, scores):
        if self.random.random() < 0.3:
            raise Interrupted
        return scores

    def round(self):
        """Make some calls, drop everything, and count."""
        for _ in range(ROUND):
            kind = self.random.choice(self.kinds)
            try:
                self.call(kind)
                self.done[kind] += 1
            except Interrupted:
                self.done["really interrupted"] += 1
            except BlockPoolExhausted:
                self.done["pool full"] += 1
                self.held.clear()
        self.held.clear()
        gc.collect()
        ids = self.store.pool.ids
        assert ids.num_used == self.store.stats().kept_blocks
        assert ids.num_free == ids.num_blocks - ids.num_used
        assert set(self.store.pool.users) == {self.store}
        if self.random.random() < 0.2:
            self.store.clear()
            assert ids.num_used == 0


def check_owners(pool):
    """Assert that every block has as many owners as caches and the store say."""
    owners = Counter(block for user in pool.users for row in user.block_rows() for block in row)
    assert [pool.ids.num_owners(block) for block in range(pool.ids.num_blocks)] == [
        owners[block] for block in range(pool.ids.num_blocks)
    ]


def footprint():
    """Return live tensors, and megabytes of the process (0 where that cannot be read)."""
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text(encoding="utf-8").split()[1]) if statm.exists() else 0
    return tensors, pages * 4096 / 2**20


def run(soak, rounds):
    """Run; nothing may have grown since the first third."""
    torch.manual_seed(0)
    sizes = []
    with torch.no_grad():
        for _ in range(rounds):
            soak.round()
            pool = soak.store.pool
            sizes.append((*footprint(), pool.ids.num_blocks, leases.idle_bytes(soak.model)))
    tensors, megabytes, blocks, idle = zip(*sizes, strict=True)
    first = rounds // 3
    assert max(tensors[first:]) <= tensors[first - 1] + 8
    assert megabytes[-1] <= megabytes[first - 1] + 40
    assert blocks[-1] <= 2 * (soak.peak + MAX_ROWS * paged_state.GROWTH_SLACK // BLOCK)  # what was needed at once
    assert idle[-1] <= max(idle[first - 1], 2**22)
    for kind in soak.kinds:
        assert soak.done[kind] > 0, f"no {kind} call in {soak.done}"
    assert min(soak.done["really interrupted"], soak.done["compared"]) > 0
    assert soak.hits > 0
    leases.release(soak.model)


def test_a_few_hundred_calls():
    run(Soak(make_pair("llama")), rounds=6)


def test_a_few_hundred_calls_over_a_window(monkeypatch):
    monkeypatch.setattr(paged_state, "WINDOW_MARGIN", 16)
    run(Soak(make_pair("mistral", sliding_window=11)), rounds=6)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("num_blocks", [None, 60], ids=["growing", "fixed"])
@pytest.mark.parametrize("window", [None, 11], ids=["full", "window"])
def test_thousands_of_calls(monkeypatch, window, num_blocks, seed):
    monkeypatch.setattr(paged_state, "WINDOW_MARGIN", 16)
    pair = make_pair("llama") if window is None else make_pair("mistral", sliding_window=window)
    soak = Soak(pair, num_blocks, seed)
    run(soak, rounds=60)
    assert (soak.done["pool full"] > 0) == (num_blocks is not None)

"""PagedCache against DynamicCache: random histories of forward passes and cache operations, equal logits throughout."""

import contextlib
import copy
import os
import pickle
from collections import Counter
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from hf_fastattn import BlockPoolExhausted, PagedCache, paged_state
from hf_fastattn.block_pool import BlockTables
from tests.tiny import TOLERANCE, VOCAB_SIZE, assert_logits, make_pair, running_out

BRIEF = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    phases=list(Phase) if os.environ.get("HF_FASTATTN_SHRINK") else [Phase.generate],  # shrinking takes many minutes
)
LONG = settings(BRIEF, max_examples=150, stateful_step_count=50)
MAX_COLUMNS = 72
MAX_BATCH = 4


def check_state(cache: PagedCache) -> None:
    """Assert what holds for every cache between forward passes."""
    state = cache.state
    pool, rows, lens = state.pool, state.tables.rows, state.tables.lens
    owners = Counter(block for user in state.memory.users for row in user.block_rows() for block in row)
    assert [pool.num_owners(block) for block in range(pool.num_blocks)] == [owners[i] for i in range(pool.num_blocks)]
    free = [block for start, length in pool._runs for block in range(start, start + length)]
    assert free == [block for block in range(pool.num_blocks) if not owners[block]]
    assert all(a[0] + a[1] < b[0] for a, b in zip(pool._runs, pool._runs[1:], strict=False))
    for row, seq_len in zip(rows, lens, strict=True):
        held = [block for block in row if block >= 0]
        assert len(set(held)) == len(held)
        assert row == [-1] * (len(row) - len(held)) + held  # blocks behind a sliding window may be gone
        assert len(row) * state.block_size >= seq_len
        assert all(owners[block] == 1 for block in row[seq_len // state.block_size :])
    assert all(n <= state.columns for n in lens)
    for mask in (state.padding.seen, state.padding.stored):
        assert mask is None or mask.shape[0] == len(rows)
        assert mask is None or mask.shape[1] <= state.columns
    for layer in cache.paged_layers:
        for tensor in (layer.k_cache, layer.v_cache):
            assert tensor is None or tensor.shape[:2] == (pool.num_blocks, state.block_size)
    if rows:
        for tables in state.devices.values():
            assert tables.past_lens.tolist() == lens
            assert int(tables.columns) == state.columns
            width = tables.block_table.shape[1]
            assert tables.block_table.tolist() == [row + [-1] * (width - len(row)) for row in rows]


class CacheMachine(RuleBasedStateMachine):
    """One model with a PagedCache and the same weights with eager attention and a DynamicCache."""

    pair = make_pair("llama")
    sizes: ClassVar[dict[str, int]] = {}
    by_table = False  # blocks are read and written by their table always, as on a GPU

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.slack, paged_state.GROWTH_SLACK = paged_state.GROWTH_SLACK, 5  # the pool has to grow now and then
        self.even_runs = BlockTables.even_runs
        if self.by_table:
            BlockTables.even_runs = lambda tables: None
        self.cache = self.pair.cache(**self.sizes)
        self.others = []  # forks, on the same pool
        self.forget()

    def teardown(self):
        if hasattr(self, "slack"):
            paged_state.GROWTH_SLACK, BlockTables.even_runs = self.slack, self.even_runs

    def forget(self):
        self.oracle = DynamicCache()
        self.mask = torch.ones(0, 0, dtype=torch.bool)

    @property
    def batch(self):
        return self.mask.shape[0]

    @property
    def columns(self):
        return self.mask.shape[1]

    def draw(self, low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=self.random)

    def attempt(self, call):
        """Return whether the call found room in the pool; if it did not, nothing changed."""
        state = self.cache.state
        before = [list(row) for row in state.tables.rows], list(state.tables.lens), state.columns
        try:
            call()
        except BlockPoolExhausted as full:
            self.refused = full
            after = [list(row) for row in state.tables.rows], list(state.tables.lens), state.columns
            if before[2]:  # sequences without tokens may come and go
                assert after == before
            return False
        return True

    def more_tokens(self, length):
        """Return arguments for a forward pass over that many visible tokens more."""
        mask = torch.cat([self.mask, self.mask.new_ones(self.batch, length)], 1)
        return {"input_ids": self.draw(3, VOCAB_SIZE - 1, self.batch, length), "attention_mask": mask.long()}

    def forward(self, new):
        """Run both models on columns whose mask is new (batch, columns)."""
        ids = self.draw(3, VOCAB_SIZE - 1, *new.shape)
        mask = torch.cat([self.mask if self.columns else new[:, :0], new], 1)
        given = {} if mask.all() and self.draw(0, 1) else {"attention_mask": mask.long()}
        with torch.no_grad():
            out = []
            if not self.attempt(lambda: out.append(self.pair.fast(ids, past_key_values=self.cache, **given).logits)):
                return
            want = self.pair.eager(ids, past_key_values=self.oracle, attention_mask=mask.long()).logits
        self.mask = mask
        assert_logits(out[0], want, new)

    @precondition(lambda self: self.columns < MAX_COLUMNS - 20)
    @rule(length=st.integers(1, 20), batch=st.integers(1, MAX_BATCH), kind=st.sampled_from(["full", "left", "holes"]))
    def several_tokens(self, length, batch, kind):
        new = torch.ones(batch if self.columns == 0 else self.batch, length, dtype=torch.bool)
        if kind == "left" and length > 1:
            new = torch.arange(length) >= self.draw(0, length - 1, len(new), 1)
        elif kind == "holes" and length > 1:
            new = self.draw(0, 3, *new.shape) > 0
            new[torch.arange(len(new)), self.draw(0, length - 1, len(new))] = True
        self.forward(new)

    @precondition(lambda self: 0 < self.columns < MAX_COLUMNS - 5)
    @rule(count=st.integers(1, 5))
    def one_token_at_a_time(self, count):
        for _ in range(count):
            self.forward(torch.ones(self.batch, 1, dtype=torch.bool))

    @precondition(lambda self: self.columns < MAX_COLUMNS - 5)
    @rule(count=st.integers(1, 5), batch=st.integers(1, MAX_BATCH))
    def one_token_of_some(self, count, batch):
        """One column at a time, padding in other sequences each time."""
        for _ in range(count):
            self.forward(self.draw(0, 2, batch if self.columns == 0 else self.batch, 1) > 0)

    @precondition(lambda self: 0 < self.columns < MAX_COLUMNS - 5)
    @rule(length=st.integers(2, 5))
    def hide_what_is_cached(self, length):
        """The mask of several new columns hides some of those before them."""
        mask, columns = self.mask, self.columns
        self.mask = mask & (self.draw(0, 4, *mask.shape) > 0)
        self.forward(torch.ones(self.batch, length, dtype=torch.bool))
        if self.columns == columns:  # there was no room
            self.mask = mask

    @precondition(lambda self: self.columns > 0)
    @rule(share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    def crop(self, share):
        count = int(share * self.columns)
        if self.attempt(lambda: self.cache.crop(-count)):
            if count == self.columns:
                return self.forget()  # cropped to nothing, a DynamicCache would insist on its old batch size
            self.oracle.crop(-count)
            self.mask = self.mask[:, : self.columns - count]

    def choose(self, index):
        self.oracle.batch_select_indices(index)
        self.mask = self.mask[index]

    @precondition(lambda self: self.columns > 0)
    @rule()
    def reorder(self):
        index = self.draw(0, self.batch - 1, self.batch)
        if self.attempt(lambda: self.cache.reorder_cache(index.int())):
            self.choose(index)

    @precondition(lambda self: self.columns > 0)
    @rule(count=st.integers(1, MAX_BATCH), as_mask=st.booleans())
    def select(self, count, as_mask):
        index = self.draw(0, self.batch - 1, count)
        if as_mask:
            index = torch.zeros(self.batch, dtype=torch.bool).index_fill(0, index, True)
        if self.attempt(lambda: self.cache.batch_select_indices(index)):
            self.choose(index)

    @precondition(lambda self: self.columns > 0 and self.batch <= MAX_BATCH // 2)
    @rule()
    def repeat(self):
        if self.attempt(lambda: self.cache.batch_repeat_interleave(2)):
            self.choose(torch.arange(self.batch).repeat_interleave(2))

    @precondition(lambda self: self.columns > 0)
    @rule()
    def reset(self):
        self.cache.reset()
        self.forget()

    @precondition(lambda self: self.columns > 0)
    @rule(keep_original=st.booleans())
    def deepcopy(self, keep_original):
        twin = copy.deepcopy(self.cache)
        used, other = (self.cache, twin) if keep_original or self.others else (twin, self.cache)
        with torch.no_grad():  # whatever happens to one of them is not seen by the other
            self.attempt(lambda: self.pair.fast(past_key_values=other, **self.more_tokens(7)))
        for layer in other.paged_layers:
            layer.k_cache.fill_(float("nan"))
            layer.v_cache.fill_(float("nan"))
        other.reset()
        self.cache = used

    @precondition(lambda self: self.columns > 0)
    @rule(copies=st.integers(1, 2), keep_original=st.booleans(), first=st.booleans())
    def fork(self, copies, keep_original, first):
        """Two caches on one pool: what one of them does is not seen by the other."""
        if self.batch * copies > MAX_BATCH:
            return
        forks = []
        if not self.attempt(lambda: forks.append(self.cache.fork(copies))):
            return
        index = torch.arange(self.batch).repeat_interleave(copies)
        with torch.no_grad():
            if keep_original:
                ids = {key: value[index] for key, value in self.more_tokens(9).items()}
                other = forks[0]
            else:
                ids, other, self.cache = self.more_tokens(9), self.cache, forks[0]
                self.choose(index)
            if first:  # else the other only holds its blocks
                self.attempt(lambda: self.pair.fast(past_key_values=other, **ids))
        self.others.append(other)

    @precondition(lambda self: self.others)
    @rule()
    def drop_others(self):
        self.others.clear()
        self.state_is_consistent()

    @precondition(lambda self: 0 < self.columns < MAX_COLUMNS - 5)
    @rule(count=st.integers(1, 4), length=st.integers(1, 20))
    def failing_allocation(self, count, length):
        """Memory runs out in the middle of the pool's growth, if it grows: nothing has changed."""
        columns = self.cache.get_seq_length()
        with contextlib.suppress(torch.OutOfMemoryError, BlockPoolExhausted), running_out(count), torch.no_grad():
            self.cache.fork(1)
            self.pair.fast(past_key_values=copy.deepcopy(self.cache), **self.more_tokens(length))
            self.cache.fork(3)
        assert self.cache.get_seq_length() == columns

    @precondition(lambda self: self.columns > 0)
    @rule()
    def pickle(self):
        self.cache = pickle.loads(pickle.dumps(self.cache))

    @precondition(lambda self: self.columns > 0)
    @rule(convert_back=st.booleans())
    def to_dynamic(self, convert_back):
        dense = self.cache.to_dynamic()
        for got, want in zip(dense.layers, self.oracle.layers, strict=True):
            for name in ("keys", "values"):
                a, b = (getattr(layer, name).transpose(1, 2)[self.mask] for layer in (got, want))
                torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * float(b.norm()))
        if convert_back:

            def make():
                return PagedCache.from_dynamic(
                    dense, self.pair.fast.config, attention_mask=self.mask.long(), **({"block_size": 16} | self.sizes)
                )

            made = []
            if self.attempt(lambda: made.append(make())):
                self.cache = made[0]

    @precondition(lambda self: 0 < self.columns < MAX_COLUMNS - 5)
    @rule(layer=st.integers(0, 1), length=st.integers(1, 4))
    def failing_forward(self, layer, length):
        """A layer fails before it attends, the first or the last: either is as if the forward pass had not been."""

        def fail(*args):
            raise ZeroDivisionError

        hook = self.pair.fast.model.layers[layer].register_forward_pre_hook(fail)
        before = list(self.cache.state.tables.lens), self.cache.get_seq_length()
        try:
            with torch.no_grad(), pytest.raises((ZeroDivisionError, BlockPoolExhausted)):
                self.pair.fast(past_key_values=self.cache, **self.more_tokens(length))
        finally:
            hook.remove()
        assert (list(self.cache.state.tables.lens), self.cache.get_seq_length()) == before

    @invariant()
    def state_is_consistent(self):
        if hasattr(self, "cache"):
            assert self.cache.get_seq_length() == self.columns
            check_state(self.cache)


def machine(name, kind="llama", sizes=None, effort=BRIEF, by_table=False, **config):
    """Return a test case for a kind of model and cache."""
    attributes = {"pair": make_pair(kind, **config), "sizes": sizes or {}, "by_table": by_table}
    case = type(name, (CacheMachine,), attributes).TestCase
    case.settings = effort
    return case


TestGrowing = machine("Growing")
TestFixed = machine("Fixed", sizes={"num_blocks": 40})
TestTight = machine("Tight", sizes={"num_blocks": 9})
TestReserved = machine("Reserved", sizes={"max_length": MAX_COLUMNS + 8})
TestLimited = machine("Limited", sizes={"max_length": 40, "num_blocks": 30})
TestWindow = machine("Window", "mistral", sliding_window=11)
TestWindowReserved = machine("WindowReserved", "mistral", {"max_length": MAX_COLUMNS + 8}, sliding_window=11)
TestThreeLayers = machine("ThreeLayers", num_hidden_layers=3, num_key_value_heads=1)
TestByTable = machine("ByTable", by_table=True)
TestByTableWindow = machine("ByTableWindow", "mistral", by_table=True, sliding_window=11)
TestOffload = machine("Offload", sizes={"offload": True}, num_hidden_layers=3)
TestOffloadWindow = machine("OffloadWindow", "mistral", {"offload": True, "num_blocks": 30}, sliding_window=11)

SLOW = {"effort": LONG, "seed": 1}
TestGrowingLong = pytest.mark.soak(machine("GrowingLong", **SLOW))
TestTightLong = pytest.mark.soak(machine("TightLong", sizes={"num_blocks": 11}, **SLOW))
TestReservedLong = pytest.mark.soak(machine("ReservedLong", sizes={"max_length": MAX_COLUMNS + 8}, **SLOW))
TestWindowLong = pytest.mark.soak(machine("WindowLong", "mistral", {"num_blocks": 30}, sliding_window=7, **SLOW))

"""Random histories of a PrefixStore: hits, evictions, full and growing pools, failing allocations."""

import contextlib

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_fastattn import BlockPoolExhausted, PrefixStore
from tests.test_prefix_store import check_pool
from tests.tiny import assert_logits, make_pair, running_out, tokens


class PrefixMachine(RuleBasedStateMachine):
    """Prompts whose beginnings come from a few stems, through one store."""

    pair = make_pair("llama")

    @initialize(num_blocks=st.sampled_from([None, 9, 16]), max_tokens=st.sampled_from([48, 4096]))
    def start(self, num_blocks, max_tokens):
        self.store = PrefixStore(self.pair.fast, block_size=16, num_blocks=num_blocks, max_tokens=max_tokens)
        self.held = []

    def fill(self, ids, salt):
        """Return a cache that was filled with prompts through the store, None if there was no room."""
        try:
            cache = self.store.cache(ids, salt=salt)
            with torch.no_grad():
                got = self.pair.fast(ids[:, cache.get_seq_length() :], past_key_values=cache).logits
        except BlockPoolExhausted:
            return None
        with torch.no_grad():
            assert_logits(got, self.pair.eager(ids).logits[:, -got.shape[1] :])
        return cache

    @rule(
        stems=st.lists(st.integers(0, 2), min_size=1, max_size=2),
        cut=st.integers(0, 50),
        more=st.integers(1, 20),
        seed=st.integers(0, 3),
        salt=st.sampled_from(["", "other"]),
        add=st.booleans(),
        hold=st.booleans(),
    )
    def ask(self, stems, cut, more, seed, salt, add, hold):
        begin = torch.cat([tokens(1, 50, seed=stem) for stem in stems])[:, :cut]
        ids = torch.cat([begin, tokens(len(stems), more, seed)], 1)
        cache = self.fill(ids, salt)
        if cache is None:
            return
        if add:
            self.store.add(cache, ids)
            if len(self.held) == 0 and self.store.pool.num_blocks is None and self.store.max_tokens > 1000:
                assert self.store.cache(ids, salt=salt).state.prefix_hits[1] == len(stems) * (ids.shape[1] - 1)
        if hold:
            self.held.append(cache)

    @precondition(lambda self: self.held)
    @rule(step=st.booleans())
    def go_on_or_drop(self, step):
        if not step:
            self.held.pop(0)
            return
        try:
            with torch.no_grad():
                self.pair.fast(tokens(self.held[0].batch_size, 3), past_key_values=self.held[0])
        except BlockPoolExhausted:
            pass

    @rule(count=st.integers(1, 4), length=st.integers(1, 70))
    def failing_allocation(self, count, length):
        """Memory runs out while the pool grows, if it does."""
        with contextlib.suppress(torch.OutOfMemoryError), running_out(count):
            self.fill(tokens(3, length, seed=9), "")

    @rule()
    def clear(self):
        self.store.clear()

    @invariant()
    def owners_are_conserved(self):
        if hasattr(self, "store"):
            check_pool(self.store, *self.held)


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, derandomize=True, phases=[Phase.generate]
)

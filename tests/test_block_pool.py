"""Blocks and their owners, without tensors: BlockPool and BlockTables against a model that counts tokens."""

import pickle
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_fastattn.block_pool import NO_BLOCK, BlockPool, BlockPoolExhausted, BlockTables


def picture(pool):
    """Everything that a failed call must leave alone."""
    return [pool.num_owners(block) for block in range(pool.num_blocks)], [list(run) for run in pool._runs]


def check_pool(pool, owners):
    """Assert that blocks have these owners and that the free list is the rest, in merged runs."""
    assert [pool.num_owners(block) for block in range(pool.num_blocks)] == [
        owners.get(block, 0) for block in range(pool.num_blocks)
    ]
    free = [block for block in range(pool.num_blocks) if not owners.get(block)]
    assert [block for start, length in pool._runs for block in range(start, start + length)] == free
    assert all(length > 0 for _, length in pool._runs)
    assert all(a[0] + a[1] < b[0] for a, b in zip(pool._runs, pool._runs[1:], strict=False))  # apart: else one run
    assert pool.num_free == len(free)


def make_tables(num_blocks, *lens, block_size=4):
    """Return tables of sequences that hold that many tokens."""
    tables = BlockTables(BlockPool(num_blocks), block_size)
    tables.add_rows([0] * len(lens))
    tables.reserve(lens)
    tables.lens = list(lens)
    return tables


def test_blocks_come_in_one_run():
    pool = BlockPool(10)
    assert pool.allocate(4) == [0, 1, 2, 3]
    assert pool.allocate(3, after=3) == [4, 5, 6]
    check_pool(pool, dict.fromkeys(range(7), 1))


def test_allocation_takes_the_longest_run_and_joins_runs_when_none_is_long_enough():
    pool = BlockPool(10)
    pool.allocate(10)
    pool.free([1, 4, 5, 6, 8])
    assert pool.allocate(2) == [4, 5]
    assert sorted(pool.allocate(3)) == [1, 6, 8]
    assert pool.num_free == 0


def test_allocation_continues_behind_a_block_as_far_as_it_goes():
    pool = BlockPool(10)
    pool.allocate(10)
    pool.free([3, 4, 6, 7, 8])
    assert pool.allocate(4, after=2) == [3, 4, 6, 7]


@pytest.mark.parametrize("order", [range(6), reversed(range(6)), (0, 2, 4, 1, 3, 5), (1, 0, 5, 4, 2, 3)])
def test_freed_blocks_merge_into_one_run(order):
    pool = BlockPool(6)
    pool.allocate(6)
    for block in order:
        pool.free([block])
    assert pool._runs == [[0, 6]]


def test_a_shared_block_is_freed_by_its_last_owner():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.free(blocks)
    assert [pool.num_owners(block) for block in blocks] == [1, 1]
    assert pool.num_free == 1
    pool.free(blocks)
    check_pool(pool, {})


def test_rows_are_evenly_spaced_with_room_to_grow():
    pool = BlockPool(20)
    assert pool.allocate_rows([2, 1, 0, 3]) == [[0, 1], [5], [], [15, 16, 17]]
    assert pool.allocate(3, after=1) == [2, 3, 4]
    assert pool.allocate(1, after=4) == [6]  # the next row's block is in the way, what is free behind it is not


def test_rows_that_do_not_fit_evenly_are_allocated_one_by_one():
    pool = BlockPool(6)
    rows = pool.allocate_rows([1, 4])
    assert list(map(len, rows)) == [1, 4]
    check_pool(pool, Counter(block for row in rows for block in row))


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_rows_of_no_blocks(counts):
    for pool in (BlockPool(0), BlockPool(4)):
        assert pool.allocate_rows(counts) == [[] for _ in counts]
        check_pool(pool, {})


def test_growing_adds_a_run_and_never_shrinks():
    pool = BlockPool(2)
    pool.allocate(1)
    pool.grow(5)
    assert pool._runs == [[1, 4]]
    pool.grow(3)
    assert pool.num_blocks == 5


@pytest.mark.parametrize(
    "call",
    [
        lambda pool: pool.allocate(4),
        lambda pool: pool.allocate(4, after=0),
        lambda pool: pool.allocate_rows([1, 3]),
    ],
)
def test_a_pool_that_is_too_full_is_left_alone(call):
    pool = BlockPool(5)
    pool.allocate(2)
    before = picture(pool)
    with pytest.raises(BlockPoolExhausted, match=r"3 of 5 blocks free, 4 were wanted") as caught:
        call(pool)
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (4, 3, 5)
    assert picture(pool) == before


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BlockPoolExhausted(3, 1, 8, "; say more")))
    assert (error.wanted, error.free, error.total) == (3, 1, 8)
    assert str(error).endswith("3 were wanted; say more")


@pytest.mark.parametrize(
    "misuse", [lambda pool: pool.free([1]), lambda pool: pool.share([1]), lambda p: p.free([0, 0])]
)
def test_owners_never_fall_below_zero(misuse):
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="is free"):
        misuse(pool)


def test_a_repeated_sequence_shares_its_full_blocks_and_copies_its_last():
    tables = make_tables(10, 10)
    assert tables.rows == [[0, 1, 2]]
    copies = tables.select([0, 0, 0])
    assert [row[:2] for row in tables.rows] == [[0, 1]] * 3
    assert len({row[2] for row in tables.rows}) == 3
    assert sorted(source for source, _ in copies) == [2, 2]
    assert {target for _, target in copies} | {2} == {row[2] for row in tables.rows}


def test_a_sequence_of_full_blocks_is_repeated_without_a_copy():
    tables = make_tables(10, 8)
    assert tables.select([0, 0]) == []
    assert tables.rows == [[0, 1], [0, 1]]


def test_blocks_reserved_behind_the_end_become_private_without_a_copy():
    tables = BlockTables(BlockPool(12), 4)
    tables.add_rows([16])
    tables.lens = [6]
    copies = tables.select([0, 0])
    assert len(copies) == 1
    assert [len(row) for row in tables.rows] == [4, 4]
    assert tables.rows[0][0] == tables.rows[1][0]
    assert not set(tables.rows[0][1:]) & set(tables.rows[1][1:])


def test_cutting_into_a_shared_block_makes_it_private():
    tables = make_tables(10, 12)
    tables.select([0, 0])
    copies = tables.truncate([5, 12])
    assert tables.rows[1] == [0, 1, 2]
    assert tables.rows[0][0] == 0
    assert copies == [(1, tables.rows[0][1])]
    check_pool(tables.pool, {0: 2, 1: 1, 2: 1, tables.rows[0][1]: 1})


def test_cutting_with_blocks_kept_frees_nothing():
    tables = make_tables(6, 12)
    assert tables.truncate([1], keep_blocks=True) == []
    assert tables.rows == [[0, 1, 2]]
    assert tables.lens == [1]


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ([[3, 4, 5]], (0, 3, 3)),
        ([[0, 1], [4, 5], [8, 9]], (0, 0, 4)),
        ([[NO_BLOCK, 1], [NO_BLOCK, 6]], (1, 1, 5)),
        ([[0, 1], [2, 3]], (0, 0, 2)),
        ([[0, 1], [4, 5], [7, 8]], None),  # not evenly spaced
        ([[0, 2], [4, 5]], None),  # not a run
        ([[0, 1], [4, 5, 6]], None),  # not of one length
        ([[0, 1], [0, 1]], None),  # shared: nobody may write there
        ([[0, 1, 2], [2, 3, 4]], None),  # overlapping
        ([[4, 5], [0, 1]], None),  # backwards
        ([[NO_BLOCK, 1], [5, 6]], None),  # freed in one of them
        ([[NO_BLOCK, NO_BLOCK]], None),
        ([[], []], None),
        ([], None),
    ],
)
def test_even_runs(rows, runs):
    tables = BlockTables(BlockPool(10), 16)
    tables.rows = rows
    assert tables.even_runs() == runs


def test_missing_and_reserve_count_blocks_not_tokens():
    tables = make_tables(8, 3, 5)
    assert tables.missing([4, 8]) == 0
    assert not tables.reserve([4, 8])
    assert tables.missing([5, 13]) == 3
    assert tables.reserve([5, 13])
    assert [len(row) for row in tables.rows] == [2, 4]


@pytest.mark.parametrize(
    "call",
    [
        lambda tables: tables.reserve([13, 21]),
        lambda tables: tables.select([0, 0, 1, 1]),
        lambda tables: tables.add_rows([4, 4]),
    ],
    ids=["reserve", "select", "add_rows"],
)
def test_tables_are_left_alone_when_the_pool_is_full(call):
    tables = make_tables(6, 7, 10)  # one block free
    before = [list(row) for row in tables.rows], list(tables.lens), picture(tables.pool)
    with pytest.raises(BlockPoolExhausted):
        call(tables)
    assert ([list(row) for row in tables.rows], list(tables.lens), picture(tables.pool)) == before


def test_a_truncation_without_room_for_private_tails_changes_nothing():
    tables = make_tables(2, 8)
    tables.select([0, 0])
    before = [list(row) for row in tables.rows], list(tables.lens), picture(tables.pool)
    with pytest.raises(BlockPoolExhausted, match="1 were wanted"):
        tables.truncate([6, 8])
    assert ([list(row) for row in tables.rows], list(tables.lens), picture(tables.pool)) == before


def test_a_truncation_may_use_the_blocks_that_it_frees():
    tables = make_tables(3, 12)
    tables.select([0, 0])
    copies = tables.truncate([6, 6])
    assert copies == [(1, 2)]
    assert sorted(row[1] for row in tables.rows) == [1, 2]


def test_a_group_shares_the_blocks_of_its_first_sequence_until_its_tails_part():
    tables = BlockTables(BlockPool(20), 4)
    tables.add_rows([0] * 6)
    assert tables.missing([10, 10, 10, 3, 3, 3], group=3) == 4
    assert tables.reserve([10, 10, 10, 3, 3, 3], group=3)
    assert tables.rows[0] == tables.rows[1] == tables.rows[2]
    assert tables.pool.num_free == 16
    assert tables.reserve([13, 13, 13, 3, 3, 3], group=3)  # a second chunk of the prompt
    assert [len(row) for row in tables.rows] == [4, 4, 4, 1, 1, 1]
    assert tables.pool.num_free == 15
    tables.lens = [13, 13, 13, 3, 3, 3]
    first, second = tables.rows[0][3], tables.rows[3][0]
    copies = tables.make_tails_private()
    assert sorted(source for source, _ in copies) == sorted([first, first, second, second])
    assert len({row[3] for row in tables.rows[:3]}) == 3
    assert tables.rows[0][3] == first  # the first of a group keeps its own
    assert tables.rows[0][:3] == tables.rows[1][:3] == tables.rows[2][:3]
    check_pool(tables.pool, Counter(block for row in tables.rows for block in row))


def test_blocks_of_two_tables_on_one_pool_part_ways_too():
    one = make_tables(4, 6)
    two = BlockTables(one.pool, 4)
    one.pool.share(one.rows[0])
    two.rows, two.lens = [list(one.rows[0])], [6]
    assert two.make_tails_private() == [(1, 2)]
    assert (one.rows, two.rows) == ([[0, 1]], [[0, 2]])
    one.pool.share(one.rows[0])
    two.release()
    one.pool.share(one.rows[0])
    two.rows, two.lens = [list(one.rows[0]) for _ in range(2)], [6, 6]
    one.pool.allocate(1)
    before = picture(one.pool)
    with pytest.raises(BlockPoolExhausted, match="1 of 4 blocks free, 2 were wanted"):
        two.make_tails_private()
    assert two.rows == [[0, 1], [0, 1]]
    assert picture(one.pool) == before


def test_release_gives_everything_back():
    tables = make_tables(9, 7, 10, 3)
    tables.select([2, 0, 0])
    tables.release()
    assert tables.rows == tables.lens == []
    check_pool(tables.pool, {})


class BlockMachine(RuleBasedStateMachine):
    """BlockTables against lists of tokens: what is read through the tables is what was appended."""

    @initialize(
        num_blocks=st.integers(4, 40),
        block_size=st.sampled_from([1, 4, 16]),
        capacities=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    )
    def start(self, num_blocks, block_size, capacities):
        self.tables = BlockTables(BlockPool(num_blocks), block_size)
        self.contents: list[list[int]] = []
        self.slots: dict[tuple[int, int], int] = {}
        self.next_token = 0
        self.add(capacities)

    @property
    def empty(self):
        return not self.tables.rows

    def attempt(self, call):
        """Return whether the call succeeded; if it did not, nothing changed."""
        tables = self.tables
        before = [list(row) for row in tables.rows], list(tables.lens), picture(tables.pool)
        refused = None
        try:
            copies = call()
        except BlockPoolExhausted as full:
            refused = full
        if refused is not None:
            assert refused.free < refused.wanted
            assert ([list(row) for row in tables.rows], list(tables.lens), picture(tables.pool)) == before
            return False
        if isinstance(copies, list):
            size = tables.block_size
            moved = {(t, i): self.slots[s, i] for s, t in copies for i in range(size) if (s, i) in self.slots}
            self.slots.update(moved)
        return True

    @precondition(lambda self: self.empty)
    @rule(capacities=st.lists(st.integers(0, 20), min_size=1, max_size=4))
    def add(self, capacities):
        if self.attempt(lambda: self.tables.add_rows(capacities)):
            self.contents = [[] for _ in capacities]

    @precondition(lambda self: not self.empty)
    @rule(data=st.data())
    def append(self, data):
        tables = self.tables
        counts = [data.draw(st.integers(0, 9)) for _ in tables.rows]
        if not self.attempt(lambda: tables.reserve([n + c for n, c in zip(tables.lens, counts, strict=True)])):
            return
        for row, (count, content) in enumerate(zip(counts, self.contents, strict=True)):
            for _ in range(count):
                block, offset = divmod(tables.lens[row], tables.block_size)
                self.slots[tables.rows[row][block], offset] = self.next_token
                content.append(self.next_token)
                tables.lens[row] += 1
                self.next_token += 1

    @precondition(lambda self: not self.empty)
    @rule(data=st.data())
    def select(self, data):
        index = data.draw(st.lists(st.integers(0, len(self.contents) - 1), max_size=5))
        if self.attempt(lambda: self.tables.select(index)):
            self.contents = [list(self.contents[i]) for i in index]

    @precondition(lambda self: not self.empty)
    @rule(data=st.data(), keep_blocks=st.booleans())
    def truncate(self, data, keep_blocks):
        lens = [data.draw(st.integers(0, n)) for n in self.tables.lens]
        if self.attempt(lambda: self.tables.truncate(lens, keep_blocks=keep_blocks)):
            self.contents = [content[:n] for content, n in zip(self.contents, lens, strict=True)]

    @rule(count=st.integers(0, 8))
    def grow(self, count):
        self.tables.pool.grow(self.tables.pool.num_blocks + count)

    @rule()
    def release(self):
        self.tables.release()
        self.contents = []
        assert self.tables.pool._runs == [[0, self.tables.pool.num_blocks]]

    @invariant()
    def owners_are_conserved(self):
        check_pool(self.tables.pool, Counter(block for row in self.tables.rows for block in row))
        assert all(len(set(row)) == len(row) for row in self.tables.rows)

    @invariant()
    def tails_are_private(self):
        tables = self.tables
        for row, seq_len in zip(tables.rows, tables.lens, strict=True):
            assert all(tables.pool.num_owners(block) == 1 for block in row[seq_len // tables.block_size :])

    @invariant()
    def tokens_are_read_back(self):
        tables, size = self.tables, self.tables.block_size
        assert tables.lens == list(map(len, self.contents))
        for row, content in zip(tables.rows, self.contents, strict=True):
            assert [self.slots[row[i // size], i % size] for i in range(len(content))] == content


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)


def test_the_first_tokens_of_a_batch_leave_each_sequence_room_to_grow():
    tables = BlockTables(BlockPool(40), 16)
    tables.add_rows([0, 0, 0, 0])
    tables.reserve([64, 64, 50, 64])
    tables.lens = [64, 64, 50, 64]
    tables.reserve([65 + 5 * 16] * 4)
    assert [row[0] for row in tables.rows] == [0, 10, 20, 30]
    assert all(row == list(range(row[0], row[0] + 10)) for row in tables.rows)

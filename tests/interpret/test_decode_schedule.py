"""The schedule kernel in Triton's interpreter writes the list that plain Python makes of the same lengths."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn.kernels import decode_schedule
from hf_fastattn.kernels._decode_plan import SHARED_LEVELS, DecodeConfig, Segment, make_plan, own_ranges, share, work
from hf_fastattn.ops.shapes import NO_WINDOW

from . import runs_kernels
from .decode_call import poisoned_new_empty

pytestmark = runs_kernels

KV_BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty(torch.Tensor.new_empty))


class Written:
    """A schedule that the kernel wrote, taken apart."""

    def __init__(
        self,
        lens,
        entries=(),
        *,
        num_programs=5,
        heads=2,
        kv_heads=1,
        query_len=1,
        window=NO_WINDOW,
        tile=(4, 16),
        block=4,
    ):
        q = torch.zeros(len(lens), heads, query_len, 16)
        k = torch.zeros(2, KV_BLOCK_SIZE, kv_heads, 16)
        table = torch.zeros(len(lens), 64, dtype=torch.int32)
        shared = torch.tensor(entries, dtype=torch.int32) if entries else None
        config = DecodeConfig(*tile, 4, 3)
        call = (q, k, k, table, torch.tensor(lens, dtype=torch.int32), shared, window, self.invariant)
        options = {"config": config, "num_programs": num_programs}
        words = decode_schedule.launch(*call, **options, block=block).flatten().tolist()
        _, self.plan = make_plan(q, k, k, table, shared, self.invariant, **options)
        self.totals, self.count, self.ranges = words[:2], words[2], words[7]
        self.starts = [words[8 + 4 * i : 12 + 4 * i] for i in range(num_programs)]
        begin, needed, counters = words[4:7]
        self.segments = [words[begin + 9 * i : begin + 9 * i + 9] for i in range(len(entries) + len(lens))]
        self.shared, self.own = self.segments[: self.count], self.segments[len(entries) :]
        self.needed = words[needed : needed + len(lens)]
        self.counters = words[counters : counters + len(lens) * kv_heads * self.plan.row_tiles]
        self.expected = work(self.plan, lens, entries, query_len=query_len, window=window, block_size=KV_BLOCK_SIZE)

    invariant = False


class WrittenInvariant(Written):
    """The same with the cuts of a batch-invariant call."""

    invariant = True


def words_of(segment: Segment):
    return [value for name, value in vars(segment).items() if name != "units"]


def check(written):
    shared, own, tiles = written.expected
    programs = written.plan.num_programs
    assert written.shared == [words_of(segment) for segment in shared]
    assert written.own == [words_of(segment) for segment in own]
    lists = ([(s, i) for i, s in enumerate(shared)], [(s, written.plan.num_shared + i) for i, s in enumerate(own)])
    sizes = []
    assert written.ranges == own_ranges(written.totals[1], written.plan.balance, programs)
    for index, (segments, total) in enumerate(zip(lists, written.totals, strict=True)):
        ranges = programs if index == 0 else written.ranges
        assert total == sum(segment.num_tiles * segment.units for segment, _ in segments)
        item = 0
        for place in range(programs):
            start = written.starts[programs - 1 - place if index == 0 else place][2 * index :][:2]
            if item < total:
                assert start == [item, [number for s, number in segments if s.first_item <= item][-1]]
            sizes.append(share(place, total, ranges) if place < ranges else 0)
            item += sizes[-1]
        assert item == total
    assert tiles == [a + b for a, b in zip(reversed(sizes[:programs]), sizes[programs:], strict=True)]
    for seq, segment in enumerate(own):
        needed, parent = segment.num_tiles, segment.parent
        while parent >= 0:
            needed, parent = needed + shared[parent].num_tiles, shared[parent].parent
        assert written.needed[seq] == needed
    assert not any(written.counters)


@pytest.mark.parametrize("num_programs", [1, 3, 16, 100])
@pytest.mark.parametrize("lens", [(5,), (0, 0, 1), (200, 3, 3, 16, 17, 0, 90, 4, 5)], ids=str)
def test_lengths(lens, num_programs):
    check(Written(lens, num_programs=num_programs, heads=6, kv_heads=2, query_len=3))


@pytest.mark.parametrize("window", [NO_WINDOW, 1, 40])
@pytest.mark.parametrize("tile", [(4, 16), (16, 32), (32, 64)])
def test_shared_prefixes(tile, window):
    entries = [(0, 6, 0, 3), (0, 0, 0, 0), (1, 2, 3, 4), (3, 3, 3, 5), (3, 2, 5, 6), (6, 2, 0, 1)]
    lens = (100, 70, 80, 120, 130, 99, 20, 17)
    check(Written(lens, entries, num_programs=7, window=window, tile=tile, kv_heads=2, heads=4))


@pytest.mark.parametrize("num_programs", [1, 11])
def test_many_prefixes_side_by_side_have_slots_of_their_own(num_programs):
    """Pairs, a triple and the rest: as many units as there are tiles of members, not as entries times sequences."""
    entries = [(2 * i, 2, 0, 1) for i in range(6)] + [(12, 3, 0, 2), (15, 5, 0, 1)]
    written = Written((40,) * 20, entries, num_programs=num_programs, kv_heads=2, heads=4)
    check(written)
    assert written.plan.members_per_tile == 2
    assert [words[8] for words in written.shared] == [0, 2, 4, 6, 8, 10, 12, 16]


@pytest.mark.parametrize("levels", [SHARED_LEVELS, 2 * SHARED_LEVELS])
def test_prefixes_behind_each_other_are_shared_as_far_as_there_is_room(levels):
    entries = [(0, 20, level, level + 1) for level in range(levels)]
    written = Written([16 * levels + seq for seq in range(20)], entries)
    check(written)
    assert len(written.shared) == (levels if levels == SHARED_LEVELS else 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.integers(0, 300), min_size=1, max_size=9),
    num_programs=st.integers(1, 20),
    query_len=st.integers(1, 9),
    window=st.sampled_from([NO_WINDOW, 1, 33, 100]),
    first=st.integers(0, 8),
    count=st.integers(0, 9),
    depth=st.integers(0, 6),
)
def test_any_list(lens, num_programs, query_len, window, first, count, depth):
    first = min(first, len(lens) - 1)
    entries = [(first, min(count, len(lens) - first), 0, depth), (first, min(count, 1), depth, depth + 1)]
    check(Written(lens, entries, num_programs=num_programs, query_len=query_len, window=window, tile=(16, 16)))


@pytest.mark.parametrize("num_programs", [1, 3, 20, 70])
def test_a_batch_invariant_program_begins_with_a_whole_piece(num_programs):
    written = WrittenInvariant((900, 0, 130, 1000), num_programs=num_programs, kv_heads=2)
    _, own, _ = written.expected
    pieces = []
    for segment in own:
        size = max(-(-segment.num_tiles // 32), 8)
        for unit in range(segment.units):
            begin = segment.first_item + unit * segment.num_tiles
            pieces += range(begin, begin + segment.num_tiles, size)
    end, item = written.totals[1], 0
    for place in range(num_programs):
        start, segment = written.starts[place][2:]
        assert start == min((piece for piece in pieces if piece >= item), default=end)
        if start < end:
            assert segment == [i for i, s in enumerate(own) if s.first_item <= start][-1]
        item += share(place, end, num_programs)

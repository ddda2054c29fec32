"""How a CPU reads the blocks of a decode step: worked out once for all layers of a kind.

A call takes a CPU as long as reading some hundred KiB. So all sequences are attended to in one call, under a mask where
their lengths differ, if their tokens can be viewed as one tensor or are few enough to be copied; else each run of
blocks in a call of its own. Blocks that sequences share are read once for all of them, where that saves more than it
costs (a cascade, as in Juravsky et al., "Hydragen", 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ._views import check_lens, is_flat
from .shapes import NO_WINDOW

CALL_BYTES = 2**18
"""Bytes of keys and values that are read in the time of one more call."""

COPIED = 2
"""Bytes read in the time in which one is copied first, and read then."""


class Reading:
    """The tokens begins[i] to ends[i] - 1 of some sequences i as one tensor.

    Args:
        rows: blocks of each sequence.
        begins, ends: see above; nothing is read of a sequence where they are equal.
        block_size: tokens per block.
        num_blocks: of the caches that will be read.

    Attributes:
        count: tokens that are read of each sequence, as many as of the one with most.
        even: first slot that is read of the first sequence, and slots from there to that of the next one, where the
            sequences can be viewed; else None. A view reaches behind the ends of the others, into whatever lies there.
        visible: (num_seqs, count) bool, which tokens were asked for; None if all.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        begins: Sequence[int],
        ends: Sequence[int],
        block_size: int,
        num_blocks: int,
    ) -> None:
        self.rows, self.begins, self.ends, self.block_size = rows, begins, ends, block_size
        self.count = _longest(begins, ends)
        starts = _starts(rows, begins, ends, block_size)
        self.even = starts and _even(starts, begins, self.count, block_size * num_blocks)
        if starts and self.even is None:  # windows begin where they like: read them from one token on
            begin = min((b for b, e in zip(begins, ends, strict=True) if b < e), default=0)
            common = [begin] * len(rows)
            count = _longest(common, ends)
            if count < COPIED * self.count:
                self.even = _even(starts, common, count, block_size * num_blocks)
            if self.even is not None:
                self.begins, self.count = common, count
        inside = [(b - first, max(e - first, 0)) for b, e, first in zip(begins, ends, self.begins, strict=True)]
        self.visible: Tensor | None = None
        if any(part != (0, self.count) for part in inside):
            place, (low, high) = torch.arange(self.count), torch.tensor(inside).T[:, :, None]
            self.visible = (place >= low) & (place < high)
        self._biases: dict[torch.dtype, Tensor] = {}
        self._places: dict[tuple[int, int, int], Tensor] = {}  # in caches by their strides and heads

    @cached_property
    def slots(self) -> Tensor:
        """(num_seqs * count,) int64, where to find what is read; where a sequence has ended, its last token again."""
        if self.even:
            first, distance = self.even
            return (first + torch.arange(len(self.rows))[:, None] * distance + torch.arange(self.count)).flatten()
        width = max(map(len, self.rows))
        table = torch.tensor([[*row, *[0] * (width - len(row))] for row in self.rows])
        begins, ends = torch.tensor([self.begins, self.ends])[:, :, None]
        place = torch.minimum(begins + torch.arange(self.count), ends - 1).clamp(min=0)
        return (table.gather(1, place // self.block_size) * self.block_size + place % self.block_size).flatten()

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return what to add to scores so that only visible tokens count, (num_seqs, 1, 1, count)."""
        if self.visible is None:
            return None
        if dtype not in self._biases:
            bias = torch.zeros(self.visible.shape, dtype=dtype).masked_fill_(~self.visible, float("-inf"))
            self._biases[dtype] = bias[:, None, None]
        return self._biases[dtype]

    def read(self, cache: Tensor) -> Tensor:
        """Return the tokens of one layer's cache, (num_seqs, num_kv_heads, count, head_dim)."""
        num_blocks, block_size, num_heads, head_dim = cache.shape
        shape, (_, slot, head, dim) = (len(self.rows), num_heads, self.count, head_dim), cache.stride()
        flat = is_flat(cache)
        if self.even and flat:
            first, distance = self.even
            return cache.as_strided(shape, (distance * slot, head, slot, dim), cache.storage_offset() + first * slot)
        if flat and dim == 1 and not (slot % head_dim or head % head_dim):  # one row per token and head, in any order
            apart = slot // head_dim, head // head_dim, num_heads
            if apart not in self._places:
                heads = torch.arange(num_heads)[:, None] * apart[1]
                self._places[apart] = (self.slots.view(-1, 1, self.count) * apart[0] + heads).flatten()
            length = (num_blocks * block_size - 1) * apart[0] + (num_heads - 1) * apart[1] + 1
            tokens = cache.as_strided((length, head_dim), (head_dim, 1))
            return tokens.index_select(0, self._places[apart]).view(shape)
        tokens = cache[self.slots // block_size, self.slots % block_size]
        return tokens.view(len(self.rows), self.count, num_heads, head_dim).transpose(1, 2)

    def cost(self, token_bytes: int) -> int:
        """Return how long a call takes that reads this, in bytes read."""
        return CALL_BYTES + len(self.rows) * self.count * token_bytes * (1 if self.even else COPIED)


@dataclass(frozen=True)
class Part:
    """What the sequences ``first`` to ``end - 1`` attend to in one call.

    Attributes:
        reading: the tokens of each, or of the first for all of them.
        shared: all of them see the same tokens.
    """

    first: int
    end: int
    reading: Reading
    shared: bool = False


class CpuSchedule:
    """How to read the tokens of a decode step with one query per sequence.

    Args:
        table: (num_seqs, max_blocks) int32, as decode_attention takes it.
        lens: tokens of each sequence; not all 0.
        shared: entries of shared_prefixes, outer levels before inner ones.
        block_size, num_blocks: sizes of the caches.
        window: tokens that a query sees.
        token_bytes: of the keys and values of a token in a layer.

    Raises:
        ValueError: a sequence that is longer than the table.
    """

    def __init__(
        self,
        table: Tensor,
        lens: list[int],
        shared: Sequence[Sequence[int]] = (),
        *,
        block_size: int,
        num_blocks: int,
        window: int = NO_WINDOW,
        token_bytes: int,
    ) -> None:
        check_lens(lens, table, block_size)
        self.rows = [row[: -(-n // block_size)] for row, n in zip(table.tolist(), lens, strict=True)]
        self.lens, self.shared, self.token_bytes = lens, shared, token_bytes
        self.block_size, self.num_blocks = block_size, num_blocks
        self.begins = [max(n - window, 0) for n in lens]

    @cached_property
    def together(self) -> Reading:
        """All tokens that the queries see."""
        return Reading(self.rows, self.begins, self.lens, self.block_size, self.num_blocks)

    @cached_property
    def parts(self) -> list[Part]:
        """The same in the calls that take least time together; results for the same sequences have to be joined."""
        parts, begins = [], list(self.begins)
        for first, count, _, end_block in self.shared if not any(begins) else ():
            begin, end = begins[first], end_block * self.block_size
            if count and (count - 1) * (end - begin) * self.token_bytes > 2 * CALL_BYTES:
                parts += [Part(first, first + count, run, shared=True) for run in self._runs(first, begin, end)]
                begins[first : first + count] = [end] * count
        live = [row for row, (begin, end) in enumerate(zip(begins, self.lens, strict=True)) if begin < end]
        if not live:
            return parts
        together = self.together if not parts else self._read(self.rows, begins, self.lens)
        time, needed = together.cost(self.token_bytes), (sum(self.lens) - sum(begins)) * self.token_bytes
        if time > needed + CALL_BYTES * len(live):  # a call for each would be faster, if it copied nothing
            alone = [Part(row, row + 1, run) for row in live for run in self._runs(row, begins[row], self.lens[row])]
            joins = len(alone) if parts or len(alone) > len(live) else 0
            if sum(part.reading.cost(self.token_bytes) for part in alone) + joins * CALL_BYTES < time:
                return [*parts, *alone]
        return [*parts, Part(0, len(self.rows), together)]

    @cached_property
    def disjoint(self) -> bool:
        """Whether every sequence is in one part, so that there is nothing to join."""
        rows = [row for part in self.parts for row in range(part.first, part.end)]
        return rows == list(range(len(self.rows))) and not any(part.shared for part in self.parts)

    def _runs(self, row: int, begin: int, end: int) -> list[Reading]:
        """Return how to read tokens of one sequence: run by run if the runs are long enough, else all at once."""
        size, blocks = self.block_size, self.rows[row]
        places = range(begin // size + 1, -(-end // size))
        cuts = [begin, *(i * size for i in places if blocks[i] != blocks[i - 1] + 1), end]
        if (end - begin) * self.token_bytes < (len(cuts) - 1) * CALL_BYTES:
            cuts = [begin, end]
        return [self._read([blocks], [low], [high]) for low, high in pairwise(cuts)]

    def _read(self, rows: Sequence[Sequence[int]], begins: Sequence[int], ends: Sequence[int]) -> Reading:
        return Reading(rows, begins, ends, self.block_size, self.num_blocks)


def _longest(begins: Sequence[int], ends: Sequence[int]) -> int:
    return max(end - begin for begin, end in zip(begins, ends, strict=True))


def _starts(
    rows: Sequence[Sequence[int]], begins: Sequence[int], ends: Sequence[int], block_size: int
) -> list[int | None] | None:
    """Return the slot at which each sequence would start if its blocks were a run from the first one on.

    None for a sequence of which nothing is read; no list if the tokens of any other do not lie in one run.
    """
    starts: list[int | None] = []
    for row, begin, end in zip(rows, begins, ends, strict=True):
        if begin >= end:
            starts.append(None)
            continue
        first = begin // block_size
        blocks = list(row[first : -(-end // block_size)])
        if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
            return None
        starts.append((blocks[0] - first) * block_size)
    return starts


def _even(starts: Sequence[int | None], begins: Sequence[int], count: int, num_slots: int) -> tuple[int, int] | None:
    """Return (first slot, distance) if count slots of each sequence from its token begins[i] on can be viewed."""
    places = [(i, start + begins[i]) for i, start in enumerate(starts) if start is not None]
    distances = {divmod(b - a, j - i) for (i, a), (j, b) in pairwise(places)} or {(0, 0)}
    distance, rest = distances.pop()
    if not places or distances or rest or distance < 0:
        return None
    first = places[0][1] - places[0][0] * distance
    return (first, distance) if first >= 0 and first + (len(starts) - 1) * distance + count <= num_slots else None

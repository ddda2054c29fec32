"""Blocks of a paged KV cache: who owns which, without tensors, kernels or transformers.

:class:`BlockPool` hands out block ids and counts their owners; :class:`BlockTables` keeps the blocks of each
sequence on top of it and says which blocks have to be copied when sequences that share blocks part ways (copy on
write). Both change nothing when they raise. Source: Kwon et al., "Efficient Memory Management for Large Language
Model Serving with PagedAttention", 2023, section 4. The one decision: free blocks are kept as runs and sequences
are placed apart, so that a sequence usually lies in one run, which a CPU reads without a copy.
"""

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NO_BLOCK = -1
"""Stands in a sequence's row for a block that was freed because no query will look back that far."""


class BlockPoolExhausted(RuntimeError):
    """There are not enough free blocks; nothing was changed.

    Attributes:
        wanted: blocks asked for. free: blocks that were free. total: blocks of the pool.
    """

    def __init__(self, wanted: int, free: int, total: int, detail: str = "") -> None:
        self.wanted, self.free, self.total, self.detail = wanted, free, total, detail
        super().__init__(f"the block pool has {free} of {total} blocks free, {wanted} were wanted{detail}")

    def __reduce__(self) -> tuple[type, tuple[int, int, int, str]]:
        return type(self), (self.wanted, self.free, self.total, self.detail)


class BlockPool:
    """Hand out block ids 0 to num_blocks - 1 and count the owners of each."""

    def __init__(self, num_blocks: int) -> None:
        self._owners = [0] * num_blocks
        self._runs: list[list[int]] = [[0, num_blocks]] if num_blocks else []  # free [start, length], by start

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, free or not."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return sum(length for _, length in self._runs)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - self.num_free

    def num_owners(self, block: int) -> int:
        """Return how many sequences own a block."""
        return self._owners[block]

    def is_free(self, block: int) -> bool:
        """Return whether a block exists and has no owner."""
        return 0 <= block < len(self._owners) and self._owners[block] == 0

    def grow(self, num_blocks: int) -> None:
        """Add free blocks until the pool has num_blocks."""
        first = len(self._owners)
        if num_blocks > first:
            self._owners.extend([0] * (num_blocks - first))
            self._add_run(first, num_blocks - first)

    def replace(self, other: "BlockPool") -> None:
        """Become what another pool is."""
        self._owners, self._runs = other._owners, other._runs

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take count blocks, in one run where there is one.

        Args:
            count: blocks wanted.
            after: the sequence's last block; the run is continued there if the next blocks are free.

        Raises:
            BlockPoolExhausted: fewer than count blocks are free.
        """
        if count > self.num_free:
            raise BlockPoolExhausted(count, self.num_free, self.num_blocks)
        blocks: list[int] = []
        if after is not None:
            while len(blocks) < count and self.is_free(after + 1 + len(blocks)):
                blocks.append(after + 1 + len(blocks))
            self._take_run(blocks)
        while len(blocks) < count:
            start, length = max(self._runs, key=lambda run: run[1])
            part = list(range(start, start + min(length, count - len(blocks))))
            self._take_run(part)
            blocks += part
        return blocks

    def allocate_rows(self, counts: Sequence[int]) -> list[list[int]]:
        """Take counts[i] blocks for each of several new sequences, evenly spaced with room to grow where they fit.

        Raises:
            BlockPoolExhausted: fewer than sum(counts) blocks are free.
        """
        if sum(counts) > self.num_free:
            raise BlockPoolExhausted(sum(counts), self.num_free, self.num_blocks)
        start, length = max(self._runs, key=lambda run: run[1], default=[0, 0])
        step = length // max(len(counts), 1)
        if max(counts, default=0) > step:
            return [self.allocate(count) for count in counts]
        rows = [list(range(start + i * step, start + i * step + count)) for i, count in enumerate(counts)]
        for row in rows:
            self._take_run(row)
        return rows

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each block; NO_BLOCK stands for none."""
        for block in blocks:
            if block == NO_BLOCK:
                continue
            assert self._owners[block] > 0, f"block {block} is free and cannot be shared"
            self._owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take an owner from each block but NO_BLOCK; a block without owners can be handed out again."""
        for block in blocks:
            if block == NO_BLOCK:
                continue
            assert self._owners[block] > 0, f"block {block} is free already"
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._add_run(block, 1)

    def _take_run(self, blocks: Sequence[int]) -> None:
        """Give one owner to blocks, which lie side by side in one free run."""
        if not blocks:
            return
        index = bisect.bisect_right(self._runs, blocks[0], key=lambda run: run[0]) - 1
        start, length = self._runs[index]
        before, after = blocks[0] - start, start + length - blocks[-1] - 1
        assert before >= 0 and after >= 0
        left = [[start, before]] if before else []
        right = [[blocks[-1] + 1, after]] if after else []
        self._runs[index : index + 1] = left + right
        for block in blocks:
            self._owners[block] = 1

    def _add_run(self, start: int, length: int) -> None:
        index = bisect.bisect_left(self._runs, start, key=lambda run: run[0])
        if index < len(self._runs) and self._runs[index][0] == start + length:
            length += self._runs.pop(index)[1]
        if index and sum(self._runs[index - 1]) == start:
            self._runs[index - 1][1] += length
        else:
            self._runs.insert(index, [start, length])


class EvenRuns(NamedTuple):
    """Rows of blocks that are runs of one length, side by side or evenly spaced.

    Attributes:
        freed: blocks at the beginning of each row that were freed.
        first: the block behind those in the first row.
        distance: blocks from there to the same place in the next row.
    """

    freed: int
    first: int
    distance: int


class BlockTables:
    """The blocks and lengths of a batch of sequences over one pool.

    Attributes:
        rows: the blocks of each sequence, in order; they may reach beyond its length (reserved), and begin with
            NO_BLOCK where :meth:`free_before` was called.
        lens: tokens stored of each sequence.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.rows: list[list[int]] = []
        self.lens: list[int] = []

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold that many tokens."""
        return -(-tokens // self.block_size)

    def add_rows(self, capacities: Sequence[int]) -> None:
        """Add empty sequences with blocks for that many tokens each.

        Raises:
            BlockPoolExhausted: not enough free blocks; nothing was changed.
        """
        self.rows += self.pool.allocate_rows([self.blocks_for(tokens) for tokens in capacities])
        self.lens += [0] * len(capacities)

    def missing(self, capacities: Sequence[int], group: int = 1) -> int:
        """Return how many blocks the sequences lack to hold that many tokens each, see :meth:`reserve`."""
        missing, size = 0, self.block_size
        for tokens, row in zip(capacities[::group], self.rows[::group], strict=True):
            if tokens > len(row) * size:
                missing += self.blocks_for(tokens) - len(row)
        return missing

    def reserve(self, capacities: Sequence[int], group: int = 1) -> bool:
        """Give each sequence blocks for that many tokens; return whether any block was added.

        Args:
            capacities: tokens of each sequence.
            group: so many consecutive sequences hold the same tokens and share the blocks of the first of them.

        Raises:
            BlockPoolExhausted: not enough free blocks; nothing was changed.
        """
        missing = self.missing(capacities, group)
        if missing > self.pool.num_free:
            raise BlockPoolExhausted(missing, self.pool.num_free, self.pool.num_blocks)
        if not any(self.rows):  # the first tokens of a batch: place its sequences apart
            counts = [self.blocks_for(tokens) for tokens in capacities]
            spread = self.pool.allocate_rows([0 if i % group else count for i, count in enumerate(counts)])
            for row, blocks in zip(self.rows, spread, strict=True):
                row += blocks
        for i in range(0, len(self.rows), group):
            row, count = self.rows[i], self.blocks_for(capacities[i]) - len(self.rows[i])
            if count > 0:
                row += self.pool.allocate(count, after=row[-1] if row else None)
            for follower in self.rows[i + 1 : i + group]:
                shared = row[len(follower) :]
                self.pool.share(shared)
                follower += shared
        return missing > 0

    def truncate(self, lens: Sequence[int], *, keep_blocks: bool = False) -> list[tuple[int, int]]:
        """Cut each sequence to that many tokens and free what is behind, unless keep_blocks.

        Returns:
            (source, target) blocks to copy, see :meth:`make_tails_private`.

        Raises:
            BlockPoolExhausted: not enough blocks for the private tails; nothing was changed.
        """
        assert all(0 <= new <= old for old, new in zip(self.lens, lens, strict=True))
        kept = [len(row) if keep_blocks else self.blocks_for(new) for row, new in zip(self.rows, lens, strict=True)]
        self._check_room([row[:count] for row, count in zip(self.rows, kept, strict=True)], lens)
        for row, count in zip(self.rows, kept, strict=True):
            self.pool.free(row[count:])
            del row[count:]
        self.lens = list(lens)
        return self.make_tails_private()

    def even_runs(self) -> EvenRuns | None:
        """Return where the rows lie if each is one run of blocks, as long as the others, and they are evenly spaced."""
        if not self.rows or not self.rows[0]:
            return None
        freed = self.num_freed(0)
        begins = [row[freed] if freed < len(row) else NO_BLOCK for row in self.rows]
        length = len(self.rows[0]) - freed
        distance = begins[1] - begins[0] if len(begins) > 1 else length
        if begins[0] == NO_BLOCK or distance < length:
            return None
        for i, row in enumerate(self.rows):
            first = begins[0] + i * distance
            if row[freed:] != list(range(first, first + length)) or row[:freed] != self.rows[0][:freed]:
                return None
        return EvenRuns(freed, begins[0], distance)

    def free_before(self, ends: Sequence[int]) -> bool:
        """Free the blocks of each sequence that end at or before its token ends[i]; return whether there were any.

        NO_BLOCK takes their places, so that a token's place in its row stays what it was.
        """
        freed = []
        for row, end in zip(self.rows, ends, strict=True):
            last = min(end // self.block_size, len(row)) - 1
            while last >= 0 and row[last] != NO_BLOCK:
                freed.append(row[last])
                row[last] = NO_BLOCK
                last -= 1
        self.pool.free(freed)
        return bool(freed)

    def empty(self, indices: Iterable[int]) -> None:
        """Free all blocks of some sequences, which have no tokens then."""
        for index in indices:
            self.pool.free(self.rows[index])
            self.rows[index], self.lens[index] = [], 0

    def num_freed(self, row: int) -> int:
        """Return how many blocks of a sequence :meth:`free_before` has freed."""
        blocks = self.rows[row]
        return next((i for i, block in enumerate(blocks) if block != NO_BLOCK), len(blocks))

    def select(self, index: Sequence[int]) -> list[tuple[int, int]]:
        """Make the batch rows[index[0]], rows[index[1]], ...; a sequence named twice shares its full blocks.

        Returns:
            (source, target) blocks to copy, see :meth:`make_tails_private`.

        Raises:
            BlockPoolExhausted: not enough blocks for the private tails; nothing was changed.
        """
        rows = [list(self.rows[i]) for i in index]
        lens = [self.lens[i] for i in index]
        self._check_room(rows, lens)
        kept = Counter(index)
        for i, row in enumerate(self.rows):
            for _ in range(kept[i] - 1):
                self.pool.share(row)
            if not kept[i]:
                self.pool.free(row)
        self.rows, self.lens = rows, lens
        return self.make_tails_private()

    def make_tails_private(self) -> list[tuple[int, int]]:
        """Give each sequence blocks of its own from its next token on.

        Returns:
            (source, target) pairs: the partly filled blocks whose content has to be copied before anything is written.

        Raises:
            BlockPoolExhausted: not enough free blocks; nothing was changed.
        """
        self._check_room(self.rows, self.lens)
        copies = []
        for row, seq_len in zip(reversed(self.rows), reversed(self.lens), strict=True):
            first = seq_len // self.block_size
            for i in range(first, len(row)):
                if self.pool.num_owners(row[i]) == 1:
                    continue
                block = self.pool.allocate(1, after=row[i - 1] if i else None)[0]
                if i == first and seq_len % self.block_size:
                    copies.append((row[i], block))
                self.pool.free([row[i]])
                row[i] = block
        return copies

    def release(self) -> None:
        """Free all blocks and forget all sequences."""
        for row in self.rows:
            self.pool.free(row)
        self.rows, self.lens = [], []

    def _check_room(self, rows: Sequence[Sequence[int]], lens: Sequence[int]) -> None:
        """Raise BlockPoolExhausted if the tails of the planned rows could not be made private."""
        tails = sum(len(row) - n // self.block_size for row, n in zip(rows, lens, strict=True))
        if tails <= self.pool.num_free:  # more than enough: spare the count of a long batch
            return
        held = Counter(block for row in self.rows for block in row if block != NO_BLOCK)
        elsewhere = {block for block, count in held.items() if self.pool.num_owners(block) > count}
        inside = {b for row, n in zip(rows, lens, strict=True) for b in row[: n // self.block_size]}
        shared = Counter(b for row, n in zip(rows, lens, strict=True) for b in row[n // self.block_size :])
        wanted = sum(count - 1 + (block in inside or block in elsewhere) for block, count in shared.items())
        dropped = held.keys() - elsewhere - inside - shared.keys()
        free = self.pool.num_free + len(dropped)
        if wanted > free:
            raise BlockPoolExhausted(wanted, free, self.pool.num_blocks)

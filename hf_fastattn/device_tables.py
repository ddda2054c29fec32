"""What kernels on one device read of a paged cache: block table, lengths, key padding, shared prefixes.

A tensor keeps its place for as long as its shape does, and the tables of sized caches outlive them: a captured decode
step reads them where they were. The one decision: on a CPU the counts lie in buffers that Python writes to, because
there a tensor operation per step costs more than the step's bookkeeping.
"""

import itertools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .block_pool import NO_BLOCK
from .columns import Step
from .kv_pool import persistent

LEAST_SHARED = 8
"""Shared prefixes that there is room for at least, once there is one."""

MOST_SHARED = 256
"""Shared prefixes that there is room for at most: in every decode step one program goes through them."""

MAX_KEPT = 16
"""Sets of device tables that a pool keeps for caches of the same sizes to come."""


class DeviceTables:
    """The tensors that kernels on one device read.

    Attributes:
        on_host: the device is a CPU.
        block_table: (num_seqs, max_blocks) int32, -1 padded.
        past_lens: (num_seqs,) int32, tokens stored by complete forward passes.
        seq_lens: (num_seqs,) int32, the same with the tokens of the current pass, unless the pass has ``runs``.
        columns: () int64, columns of complete forward passes.
        key_mask: (num_seqs, max_blocks * block_size) int8, 0 where a stored token may not be seen; None when all may.
        shared_prefixes: (at least 1, 4) int32, blocks that neighbours share, see :func:`common_prefixes`; None so far.

    Args:
        rows: blocks of each sequence. lens: its tokens. columns: see above.
        width: max_blocks.
        block_size: tokens per block.
        device: where.
    """

    @persistent
    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        lens: Sequence[int],
        columns: int,
        *,
        width: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.device, self.block_size, self.on_host = device, block_size, device.type == "cpu"
        self.key_mask: Tensor | None = None
        self.shared_prefixes: Tensor | None = None
        self._past = self._columns = None  # the buffers behind past_lens and columns, on a CPU
        if self.on_host and lens:
            self._past, self._columns = array("i", lens), array("q", [columns])
            self.past_lens = torch.frombuffer(self._past, dtype=torch.int32)
            self.columns = torch.frombuffer(self._columns, dtype=torch.int64).view(())
        else:
            self.past_lens = torch.tensor(lens, dtype=torch.int32, device=device)
            self.columns = torch.tensor(columns, dtype=torch.int64, device=device)
        self.seq_lens = self.past_lens.clone()
        self.block_table = _table(rows, width).to(device)
        self._written = self._blocks(rows, lens)
        self._write_shared_prefixes(*self._written)
        for tensor in (self.block_table, self.past_lens, self.seq_lens, self.columns):
            torch._dynamo.mark_static_address(tensor)
        torch._dynamo.maybe_mark_dynamic(self.block_table, 1)  # a compiled step serves tables of any width

    @property
    def width(self) -> int:
        """Blocks per sequence that there is room for."""
        return self.block_table.shape[1]

    def fits(self, rows: Sequence[Sequence[int]]) -> bool:
        """Return whether the tables have room for the rows as they are."""
        return len(rows) == len(self.block_table) and self.width >= max(map(len, rows), default=0)

    def write(self, rows: Sequence[Sequence[int]], lens: Sequence[int], columns: int) -> None:
        """Take over other rows and counts, in place: a captured step goes on reading the same tensors."""
        blocks = self._blocks(rows, lens)
        if blocks != self._written:  # not so when a check of speculative decoding takes a few tokens back
            self._send(_table(rows, self.width), self.block_table)
            self._write_shared_prefixes(*blocks)
            self._written = blocks
        self._send(torch.tensor(lens, dtype=torch.int32), self.past_lens)
        self.columns.fill_(columns)

    def _blocks(self, rows: Sequence[Sequence[int]], lens: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """Return what block table and shared prefixes follow from: all blocks, and how many of each row are full."""
        return [list(row) for row in rows], [n // self.block_size for n in lens]

    def plan(self, step: Step, past: Sequence[int]) -> None:
        """Set seq_lens and key_mask for a forward pass; past: tokens of each sequence before it."""
        if step.positions is None:
            torch.add(self.past_lens, step.query_len, out=self.seq_lens)
        else:
            self._send(torch.tensor(step.lens, dtype=torch.int32), self.seq_lens)
            step.positions = self._send(step.positions)
        hides = False
        if step.positions is not None and step.mask is not None:
            step.mask = self._send(step.mask)
            hides = step.changes or bool(((step.positions >= 0) & (step.mask == 0)).any())
        if self.key_mask is None and hides:
            self.widen_key_mask(None)
        if step.changes:
            self.show(step.seen, step.stored, step.lens)
        elif self.key_mask is not None:
            for row, (begin, end) in enumerate(zip(past, step.lens, strict=True)):
                seen = None if step.positions is None or step.mask is None else step.mask[row][step.positions[row] >= 0]
                self.key_mask[row, begin:end] = 1 if seen is None else seen

    def show(self, seen: Tensor | None, stored: Tensor | None, lens: Sequence[int]) -> None:
        """Write anew which tokens may be seen, if there is a key mask: see Columns for seen and stored."""
        if self.key_mask is None:
            return
        for row, seq_len in enumerate(lens):
            self.key_mask[row, :seq_len] = 1
            if seen is not None:
                tokens = seen[row] if stored is None else seen[row][stored[row]]
                self.key_mask[row, : len(tokens)] = tokens.to(self.key_mask)

    def slots(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return block and place in the block of each sequence's next token, (num_seqs,) int64 each; once per step.

        The host has seen to it that there is room. If it had not, the last token would be overwritten, nobody else's.
        """
        if self.device not in step.slots:
            last = self.width * self.block_size - 1
            position = self.past_lens.long().clamp(max=last)
            block = self.block_table.gather(1, (position // self.block_size)[:, None])[:, 0].long()
            step.slots[self.device] = block, position % self.block_size
        return step.slots[self.device]

    def advance(self, step: Step, columns: int) -> None:
        """Count a forward pass as complete; columns: those before it, as the host knows them."""
        if step.runs is not None and self._past is not None and self._columns is not None:
            for row, seq_len in enumerate(step.lens):
                self._past[row] = seq_len
            self._columns[0] = columns + step.query_len
            return
        self.past_lens.copy_(self.seq_lens)
        self.columns.add_(step.query_len)

    @persistent
    def widen_key_mask(self, old: Tensor | None) -> None:
        """Make a key mask for the whole table: ``old``, and 1 behind it."""
        mask = torch.ones(len(self.block_table), self.width * self.block_size, dtype=torch.int8, device=self.device)
        if old is not None:
            mask[:, : old.shape[1]] = old[:, : mask.shape[1]]
        self.key_mask = mask

    @persistent
    def selected_key_mask(self, index: Sequence[int]) -> Tensor | None:
        """Return the key mask of some sequences."""
        return None if self.key_mask is None else self.key_mask[torch.tensor(index, device=self.device)]

    @persistent
    def _write_shared_prefixes(self, rows: Sequence[Sequence[int]], num_full: Sequence[int]) -> None:
        """Write the shared prefixes, into the tensor that there is: a captured step reads it.

        The outer levels are worth their room, as far as MOST_SHARED goes: what has no entry is read by each sequence.
        """
        shared = common_prefixes(rows, num_full)
        if shared:
            outer = sum(entry[2] == 0 for entry in shared)
            room = max(min(1 << (outer - 1).bit_length(), MOST_SHARED), LEAST_SHARED)
            room = min(room, len(rows) - 1)
            if self.shared_prefixes is None or room > len(self.shared_prefixes):
                self.shared_prefixes = torch.zeros(room, 4, dtype=torch.int32, device=self.device)
                torch._dynamo.mark_static_address(self.shared_prefixes)
        if self.shared_prefixes is not None:
            room = len(self.shared_prefixes)
            unused = [[0, 0, 0, 0]] * (room - len(shared))
            entries = torch.tensor((shared + unused)[:room], dtype=torch.int32)
            self._send(entries.view(-1, 4), self.shared_prefixes)

    def _send(self, host: Tensor, target: Tensor | None = None) -> Tensor:
        """Copy to the device, into ``target`` if given; the host does not wait for a GPU to have finished."""
        if self.device.type == "cuda" and host.is_cpu:
            host = host.pin_memory()
        if target is None:
            return host.to(self.device, non_blocking=True)
        return target.copy_(host, non_blocking=True)


def keep_tables(kept: dict[tuple[int, int, torch.device], DeviceTables], devices: Mapping[Any, DeviceTables]) -> None:
    """Keep the tables of a sized cache that is gone, of the last few sizes, for the next cache on the pool."""
    for device, tables in devices.items():
        tables.key_mask = None
        kept[len(tables.block_table), tables.width, device] = tables
    while len(kept) > MAX_KEPT:
        kept.pop(next(iter(kept)))


def common_prefixes(rows: Sequence[Sequence[int]], num_full: Sequence[int]) -> list[list[int]]:
    """Return the blocks that neighbouring sequences share.

    Args:
        rows: blocks of each sequence.
        num_full: how many of them are filled by complete forward passes.

    Returns:
        [first sequence, number of sequences, first block, end block] each, outer levels before inner ones: the blocks
        first block to end block - 1 of these sequences are the same. At most len(rows) - 1 entries.
    """
    common = []
    for (one, two), limit in zip(itertools.pairwise(rows), map(min, num_full, num_full[1:]), strict=True):
        count = 0
        if limit and one[0] == two[0]:
            count = next((i for i in range(limit) if one[i] != two[i]), limit)
        if count and one[count - 1] == NO_BLOCK:  # freed in both: not shared, and behind the window
            count = 0
        common.append(count)
    entries = []
    todo = [(0, len(rows), 0)]  # sequences first to end - 1, which share the blocks before start
    while todo:
        first, end, start = todo.pop(0)
        inside = common[first : end - 1]
        cuts = [first, *(first + i + 1 for i, count in enumerate(inside) if count <= start), end]
        for begin, stop in itertools.pairwise(cuts):
            if stop - begin > 1:
                shared = min(common[begin : stop - 1])
                entries.append([begin, stop - begin, start, shared])
                todo.append((begin, stop, shared))
    return entries


def _table(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int32).view(len(rows), width)

"""Columns and tokens of a batch: which columns a mask hides, which of them are stored, and where.

transformers counts columns: every row of a batch has as many, padding included. Blocks hold tokens: a column that the
mask hides is not stored (a layer with a sliding window, which counts columns, needs those behind the first token).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .block_pool import EvenRuns


@dataclass
class Step:
    """One forward pass over the cache.

    Attributes:
        query_len: new columns.
        fresh: nothing was cached before, so that the new keys are all keys.
        first_layer: the layer that attended first.
        positions: (num_seqs, query_len) int32, position of each new column in its sequence, -1 where it is not stored;
            None when every column is stored.
        queries: like positions, for what the new columns' queries see: one that is not stored stands at the last column
            before it that is. None too where sequences rest.
        changes: the mask hides columns that are stored, or shows some again: all that may be seen is to be told anew.
        mask: (num_seqs, query_len) int8, non-zero where the new column may be seen; None when all may.
        lens: tokens of each sequence, those of this pass included; empty in a compiled graph, where only the device
            knows.
        seen, stored: (num_seqs, columns) bool on the host, which columns may be seen and are stored; None when all.
        handles: the masks of the pass were made for handles, so that all its layers have to be given some.
        last_layer: the model's last layer, with which the pass ends; None until a layer has said so.
        group: so many consecutive sequences hold the same tokens, which the first of them stores for all.
        schedules: what decode_schedule returned for each kind of layer that has attended.
        attended: a layer has said how far it looks back.
        slots: in a compiled graph, block and place in the block of each sequence's new token, by device.
        runs: where all tokens lie, if on a CPU the blocks of all sequences are even runs that a layer can view.
        views: layers get such views in place of handles, see :meth:`~hf_fastattn.paged_state.PagedState.repeat`.
    """

    query_len: int
    fresh: bool
    first_layer: int
    positions: Tensor | None = None
    queries: Tensor | None = None
    changes: bool = False
    mask: Tensor | None = None
    lens: list[int] = field(default_factory=list)
    seen: Tensor | None = None
    stored: Tensor | None = None
    handles: bool = True
    last_layer: int | None = None
    group: int = 1
    schedules: dict[tuple[object, ...], Any] = field(default_factory=dict)
    attended: bool = False
    slots: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    runs: EvenRuns | None = None
    views: bool = False


class _Announced(threading.local):
    """What the mask function knows of the forward pass that begins in this thread.

    Attributes:
        hidden: the mask hides the pass's one new column in some sequence.
    """

    hidden = False


announced = _Announced()


class Columns:
    """The columns of complete forward passes.

    Attributes:
        count: how many there are.
        seen, stored: (num_seqs, at most count) bool on the host, which of them may be seen and are stored; all behind
            the last column of these, and all if None.
        finished: which sequences let go of their tokens, see :meth:`finish`; None if none did.

    Args:
        keep_hidden: store hidden columns too, except before a sequence's first token.
    """

    def __init__(self, *, keep_hidden: bool) -> None:
        self.keep_hidden = keep_hidden
        self.clear()

    def clear(self) -> None:
        """Forget all columns."""
        self.count = 0
        self.seen: Tensor | None = None
        self.stored: Tensor | None = None
        self.finished: list[bool] | None = None

    def plan(self, step: Step, lens: Sequence[int], mask: Tensor | None, *, mask_known: bool, group: int) -> None:
        """Decide which new columns of a forward pass are stored, and where.

        Args:
            step: the pass, which gets positions, queries, changes, mask, lens, seen and stored.
            lens: tokens stored of each sequence.
            mask: (num_seqs, columns so far + query_len), non-zero where a column may be seen; None for all.
            mask_known: False if somebody else masks: all new columns are stored, and earlier ones are not compared.
            group: so many consecutive sequences have to have the same new columns.

        Raises:
            ValueError: a mask that does not belong to the columns so far, or shows some that were not stored.
        """
        num_seqs = len(lens)
        if mask is None and mask_known and step.query_len == 1 and self.count and self.finished is not None:
            self._plan_rest(step, lens, self.finished)
            return
        if mask is None and (step.query_len == 1 or self.seen is None):
            self._plan_all(step, lens)
            return
        new = None
        if mask is not None:
            mask = mask.to("cpu", torch.bool)
            if mask.shape != (num_seqs, self.count + step.query_len):
                raise ValueError(
                    f"expected an attention mask of shape {(num_seqs, self.count + step.query_len)} for "
                    f"{self.count} cached and {step.query_len} new columns, got {tuple(mask.shape)}"
                )
            new = mask[:, self.count :]
        before = _extend(self.seen, num_seqs, self.count)
        old = torch.ones_like(before) if mask is None else mask[:, : self.count]
        if mask_known and step.query_len > 1 and not torch.equal(before, old):
            if bool((old & ~_extend(self.stored, num_seqs, self.count)).any()):
                raise ValueError(
                    "the attention mask shows columns that an earlier mask has hidden, and that were not stored: pass "
                    "the full mask, earlier padding included, or start from an empty cache"
                )
            before, step.changes = old, True
        if new is None:
            new = torch.ones(num_seqs, step.query_len, dtype=torch.bool)
        if not step.changes and bool(new.all()):
            self._plan_all(step, lens)
            return
        past = torch.tensor(lens)
        stored = new if not self.keep_hidden else (new.cumsum(1) > 0) | (past > 0)[:, None]
        step.seen = torch.cat([before, new], 1)
        step.stored = torch.cat([_extend(self.stored, num_seqs, self.count), stored], 1)
        step.mask = new.to(torch.int8)
        if group > 1 and not bool((new.unflatten(0, (-1, group)) == new[::group, None]).all()):
            raise ValueError(f"the cache was made for {group} sequences per prompt, but their attention masks differ")
        step.queries = (past[:, None] + stored.cumsum(1) - 1).to(torch.int32)
        step.positions = torch.where(stored, step.queries, -1)
        step.lens = (past + stored.sum(1)).tolist()

    def _plan_all(self, step: Step, lens: Sequence[int]) -> None:
        """Store all new columns."""
        step.seen, step.stored = self.seen, self.stored
        step.lens = [past + step.query_len for past in lens]

    def _plan_rest(self, step: Step, lens: Sequence[int], finished: Sequence[bool]) -> None:
        """Store the new column of the sequences that have not finished."""
        going = ~torch.tensor(finished)[:, None]
        step.lens = [past + (not done) for past, done in zip(lens, finished, strict=True)]
        step.seen, step.stored = (
            torch.cat([_extend(known, len(lens), self.count), going], 1) for known in (self.seen, self.stored)
        )
        step.positions = torch.where(going, torch.tensor(lens)[:, None], -1).to(torch.int32)

    def advance(self, step: Step) -> None:
        """Count a forward pass as complete."""
        self.count += step.query_len
        self.seen, self.stored = step.seen, step.stored

    def finish(self, finished: Sequence[bool], emptied: Sequence[int]) -> None:
        """Take note of sequences that have finished; emptied: those of them whose columns are padding from now on."""
        self.finished = list(finished)
        if emptied:
            self.seen, self.stored = (_extend(known, len(finished), self.count) for known in (self.seen, self.stored))
            self.seen[emptied] = self.stored[emptied] = False

    def prefix(self, row: int) -> list[int]:
        """Return the columns of a sequence's first tokens: up to one that is stored but hidden."""
        if self.seen is None:
            return list(range(self.count))
        stored = _extend(self.stored, len(self.seen), self.count)[row].tolist()
        seen = _extend(self.seen, len(self.seen), self.count)[row].tolist()
        end = next((i for i in range(self.count) if stored[i] and not seen[i]), self.count)
        return [i for i in range(end) if stored[i]]

    def tokens_in(self, columns: int, lens: Sequence[int]) -> list[int]:
        """Return how many of each sequence's tokens lie in the first columns; lens: all its tokens."""
        if self.stored is None:
            return [max(n - (self.count - columns), 0) for n in lens]
        stored = self.stored[:, :columns]
        return (stored.sum(1) + columns - stored.shape[1]).tolist()

    def crop(self, columns: int) -> None:
        """Keep the first columns."""
        self.count, self.finished = columns, None
        self.seen = None if self.seen is None else self.seen[:, :columns]
        self.stored = None if self.stored is None else self.stored[:, :columns]

    def select(self, index: Sequence[int]) -> None:
        """Make the batch sequences index[0], index[1], ..."""
        self.finished = None
        self.seen = None if self.seen is None else self.seen[list(index)]
        self.stored = None if self.stored is None else self.stored[list(index)]


def _extend(mask: Tensor | None, num_seqs: int, columns: int) -> Tensor:
    """Return a host mask over all columns; those behind its end are True."""
    full = torch.ones(num_seqs, columns, dtype=torch.bool)
    if mask is not None:
        full[:, : mask.shape[1]] = mask
    return full

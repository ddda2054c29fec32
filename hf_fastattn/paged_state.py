"""What a paged cache knows besides its keys and values: blocks, lengths, columns and padding. No transformers here.

transformers counts columns: every row of a batch has as many, padding included. The blocks hold tokens: a column
that the mask hides is not stored, so rows have lengths of their own. :class:`PagedState` keeps both counts, on the
host (for allocation) and on each device (for the kernels), and moves from one to the next in steps: ``begin`` plans
a forward pass, ``commit`` makes it count. A forward pass that fails between the two leaves the cache as it was.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .block_pool import NO_BLOCK, BlockPoolExhausted, BlockTables
from .kv_pool import KVPool, move_blocks, persistent
from .pool_lock import PoolLock, in_forward_pass, locked

GROWTH_SLACK = 256
"""Tokens per sequence that an unsized cache makes room for beyond its first forward pass."""

LEAST_SHARED = 8
"""Shared prefixes that there is room for at least, once there is one."""

EXPECTED_SLACK = 1024
"""The same where the length that sequences can reach is known, which is then the limit."""

WINDOW_MARGIN = 128
"""Tokens behind a sliding window that are kept, so that crop() can go back by as many (assisted decoding does)."""


MAX_KEPT = 16
"""Sets of device tables that a pool keeps for caches of the same sizes to come."""


@dataclass
class Step:
    """One forward pass over the cache.

    Attributes:
        query_len: new columns.
        fresh: nothing was cached before, so that the new keys are all keys.
        positions: (num_seqs, query_len) int32, position of each new column in its sequence, -1 where it is not stored;
            None when every column is stored.
        mask: (num_seqs, query_len) int8, non-zero where the new column may be seen; None when all may.
        last_layer: the model's last layer, with which the pass ends; None until a layer has said so.
        handles: the masks of the pass were made for handles, so that all its layers have to be given some.
        group: so many consecutive sequences hold the same tokens, which the first of them stores for all.
        schedules: what decode_schedule returned for each kind of layer that has attended.
        attended: a layer has said how far it looks back.
        rests: some sequences have finished; positions serve store_kv only, and what their queries see is nobody's
            business.
    """

    query_len: int
    fresh: bool
    first_layer: int
    positions: Tensor | None = None
    mask: Tensor | None = None
    lens: list[int] = field(default_factory=list)
    seen: Tensor | None = None  # (num_seqs, columns) bool on the host, None when all columns may be seen
    stored: Tensor | None = None  # (num_seqs, columns) bool on the host, None when all columns are stored
    handles: bool = True
    last_layer: int | None = None
    group: int = 1
    schedules: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    attended: bool = False
    rests: bool = False


@dataclass
class DeviceTables:
    """The tensors that kernels on one device read.

    Attributes:
        block_table: (num_seqs, max_blocks) int32, -1 padded.
        past_lens: (num_seqs,) int32, tokens stored by complete forward passes.
        seq_lens: (num_seqs,) int32, the same with the tokens of the current pass.
        columns: () int64, columns of complete forward passes.
        key_mask: (num_seqs, max_blocks * block_size) int8, 0 where a stored token may not be seen; None when all may.
        shared_prefixes: (at least 1, 4) int32, blocks that neighbours share, see :func:`common_prefixes`; None so far.
    """

    block_table: Tensor
    past_lens: Tensor
    seq_lens: Tensor
    columns: Tensor
    key_mask: Tensor | None = None
    shared_prefixes: Tensor | None = None


class PagedState:
    """Bookkeeping of one paged cache: see the module's docstring.

    Args:
        memory: the pool that the blocks come from; other caches may use it too.
        max_length: tokens that each sequence is given room for at once; None gives blocks as they are needed.
        keep_hidden: store hidden columns too, except before a sequence's first token. A sliding window counts columns.
        reserve: tokens per sequence that are expected at most, see EXPECTED_SLACK.
        sequences_per_prompt: so many consecutive sequences begin with the same prompt and share its blocks.
        window: tokens that a query sees at most, in every layer: blocks behind that are freed unless room is reserved.
    """

    def __init__(
        self,
        memory: KVPool,
        *,
        max_length: int | None,
        keep_hidden: bool,
        reserve: int | None = None,
        sequences_per_prompt: int = 1,
        window: int | None = None,
    ) -> None:
        self.memory, self.pool, self.block_size = memory, memory.ids, memory.block_size
        self.max_length, self.keep_hidden, self.reserve = max_length, keep_hidden, reserve
        self.group, self.window = sequences_per_prompt, window
        self.frees = window is not None and not self.reserved  # dense readers of the cache may look anywhere
        self.sharing = self.group > 1
        self.prompt_columns = 0  # columns in which the sequences of a group are the same; at least the first pass
        self.tables = BlockTables(self.pool, self.block_size)
        self.devices: dict[torch.device, DeviceTables] = {}
        self.step: Step | None = None
        self.thread = 0  # that began the step
        self.finished: list[bool] | None = None  # see finish()
        self.columns = 0
        self.seen: Tensor | None = None
        self.stored: Tensor | None = None
        self.behind = False  # a compiled step ran: the device's counts are ahead of the host's
        self.unsynced = 0
        self.elastic = False  # max_length was chosen for the speed of one call, and is no limit
        self.prefix_hits = (0, 0)  # tokens asked of a prefix store, tokens that it had
        self.prefix_root: Any = None  # the store's key for what was asked of it
        self.lock = memory.lock
        with self.lock:
            memory.users.add(self)
        weakref.finalize(self, _give_back, self.lock, self.tables).atexit = False  # others may go on using the pool
        if self.reserved:
            weakref.finalize(self, _keep_tables, memory.kept_tables, self.devices).atexit = False

    @property
    def num_seqs(self) -> int:
        """Rows of the batch, 0 before the first forward pass."""
        return len(self.tables.rows)

    def stretch(self) -> None:
        """Forget max_length if nobody asked for it: from now on blocks come as they are needed."""
        if self.elastic:
            self.sync()
            self.max_length, self.elastic = None, False

    @property
    def reserved(self) -> bool:
        """Whether every sequence has blocks for max_length tokens, so that steps allocate nothing."""
        return self.max_length is not None and self.memory.num_blocks is None and not self.memory.offload

    @locked
    def add_batch(self, num_seqs: int, query_len: int) -> None:
        """Make the (empty) sequences of the first forward pass.

        Raises:
            BlockPoolExhausted: no room. ValueError: not a whole number of groups.
        """
        if num_seqs % self.group:
            raise ValueError(f"expected a batch of {self.group} sequences per prompt, got {num_seqs} sequences")
        tokens = query_len + (GROWTH_SLACK if self.reserve is None else EXPECTED_SLACK)
        if self.reserve is not None:
            tokens = max(query_len, min(tokens, self.reserve))
        if self.frees and self.window is not None:
            tokens = min(tokens, max(query_len, self.window + WINDOW_MARGIN) + GROWTH_SLACK)
        if self.max_length is not None:
            tokens = self.max_length
        blocks, group = self.tables.blocks_for(tokens), self._group
        if self.memory.num_blocks is None:
            shared = query_len // self.block_size
            self.memory.make_room(num_seqs // group * (blocks + (group - 1) * (blocks - shared)))
        self.tables.add_rows([0] * num_seqs)
        if self.reserved:
            self.tables.reserve([tokens] * num_seqs, group)
        self.refresh()

    def on(self, device: torch.device) -> DeviceTables:
        """Return the tables on a device, made on first use."""
        if device not in self.devices:
            self._add_device(device)
        return self.devices[device]

    @locked
    def _add_device(self, device: torch.device) -> None:
        self.devices[device] = self._make_tables(device)
        if self.step is not None:
            self._plan_on(device, self.step)

    @locked
    def begin(self, layer_idx: int, new: Tensor, mask: Tensor | None = None, *, mask_known: bool = True) -> Step:
        """Plan a forward pass: find room for its tokens and set ``seq_lens``.

        Args:
            layer_idx: the layer that attends first.
            new: (num_seqs, num_kv_heads, query_len, head_dim), its new keys.
            mask: (num_seqs, columns so far + query_len), non-zero where a column may be seen; None for all.
            mask_known: False if somebody else masks: all new columns are stored, and earlier ones are not compared.

        Raises:
            BlockPoolExhausted: no room; ValueError: another batch size, or a mask that does not belong to the cache.
            RuntimeError: another thread is in the middle of a forward pass over the cache.
        """
        me = threading.get_ident()
        if self.step is None:
            self.lock.begin_pass()
        elif self.thread != me and in_forward_pass(self.thread):
            raise RuntimeError(
                "another thread is in the middle of a forward pass over this cache: give each thread a cache of its "
                "own; caches that fork() made share what they have in common"
            )
        self.sync()
        num_seqs, _, query_len, _ = new.shape
        if self.columns == 0 and num_seqs != self.num_seqs:
            self.release()  # the batch of a first forward pass that failed, or of early initialization
        if self.num_seqs == 0:
            self.add_batch(num_seqs, query_len)
        self.on(new.device)
        if num_seqs != self.num_seqs:
            raise ValueError(f"the cache holds {self.num_seqs} sequences, the forward pass brings {num_seqs}")
        step = Step(query_len, self.columns == 0, layer_idx)
        self._plan_columns(step, mask, mask_known)
        if self.sharing and self.columns and (step.rests or self.columns + query_len > self.prompt_columns):
            self._end_sharing()
        step.group = self._group
        self._reserve(step.lens)
        for device in self.devices:
            self._plan_on(device, step)
        self.step, self.thread = step, me
        return step

    def begin_compiled(self, layer_idx: int, query_len: int, device: torch.device) -> Step:
        """Plan a forward pass in a compiled graph: room is reserved, all columns are stored, host counts lag."""
        tables = self.devices[device]
        tables.seq_lens.copy_(tables.past_lens + query_len)
        self.behind = True
        step = Step(query_len, False, layer_idx)
        self.step = step
        return step

    def commit(self) -> None:
        """End the forward pass: its tokens count from now on."""
        if not torch.compiler.is_compiling():
            self._commit_all()
            return
        step = self._advance_devices()
        if step.lens:
            self._commit_outside(step)
        self.step = None

    @locked
    def _commit_all(self) -> None:
        """Advance all counts at once: growth in another thread, which reads the host's, must not come between."""
        step = self._advance_devices()
        if step.lens:
            self._commit_counts(step)
        self.step = None

    def _advance_devices(self) -> Step:
        step = self.step
        assert step is not None
        for tables in self.devices.values():
            tables.past_lens.copy_(tables.seq_lens)
            tables.columns.add_(step.query_len)
        return step

    @torch.compiler.disable
    def _commit_outside(self, step: Step) -> None:
        """Advance the host's counts in the middle of a compiled graph, which breaks there."""
        self._commit_counts(step)

    @locked
    def _commit_counts(self, step: Step) -> None:
        """Advance the host's counts: it planned the forward pass, even if a compiled graph ended it."""
        self.lock.end_pass()
        self.tables.lens = step.lens
        self.columns += step.query_len
        self.seen, self.stored = step.seen, step.stored
        if self.sharing and self.reserved:  # a compiled step that follows cannot do it
            self._end_sharing()
        if self.frees and step.attended and self.window is not None:
            reach = self.window - 1 + WINDOW_MARGIN
            if self.tables.free_before([seq_len - reach for seq_len in self.tables.lens]):
                self.refresh()

    @locked
    def finish(self, finished: Sequence[bool]) -> None:
        """Let go of sequences that have finished: their blocks are freed, and decode steps store nothing of theirs.

        Their columns count as padding, which later masks have to hide; until sequences are chosen or columns removed.

        Args:
            finished: whether each sequence has finished.
        """
        if self.reserved or not any(finished):
            return
        if len(finished) != self.num_seqs:
            raise ValueError(f"expected to hear about {self.num_seqs} sequences, got {len(finished)}")
        self.finished = list(finished)
        newly = [row for row, done in enumerate(finished) if done and self.tables.lens[row]]
        if newly:
            self.tables.empty(newly)
            self.seen, self.stored = (_extend(known, self.num_seqs, self.columns) for known in (self.seen, self.stored))
            self.seen[newly] = self.stored[newly] = False
            self.refresh()

    def look_back(self, step: Step, window: int) -> None:
        """Take note of how many tokens a layer sees: if more than the model's config says, nothing may be freed.

        Raises:
            RuntimeError: blocks that the layer needs were freed already.
        """
        if self.window is None:
            return
        step.attended = True
        if self.frees and window > self.window:
            self.frees = False
            if any(row and row[0] == NO_BLOCK for row in self.tables.rows):
                raise RuntimeError(
                    f"a layer looks back {window} tokens, but its config says that all layers see {self.window}, and "
                    "blocks behind those were freed: set the config's sliding_window or layer_types right"
                )

    def sync(self) -> None:
        """Bring the host's counts up to the device's, after compiled steps."""
        self.unsynced = 0
        if not self.behind:
            return
        tables = next(iter(self.devices.values()))
        self.columns = int(tables.columns)
        self.tables.lens = tables.past_lens.tolist()
        self.behind = False

    @locked
    def crop(self, tokens: int) -> None:
        """Remove the last columns.

        Raises:
            ValueError: queries from there on would see blocks behind the window that were freed.
        """
        self.sync()
        columns = max(self.columns - tokens, 0)
        lens = self._lens_at(columns)
        if not self.can_go_back(columns):
            raise ValueError(
                f"the cache cannot be cropped from {self.columns} to {columns} columns: the model sees {self.window} "
                f"tokens, and blocks more than {WINDOW_MARGIN} tokens behind them were freed. Crop by at most "
                f"{WINDOW_MARGIN} tokens, or to 0 and compute the prompt again"
            )
        self.step = self.finished = None
        self.memory.copy(self._growing(lambda: self.tables.truncate(lens, keep_blocks=self.reserved)))
        self.sharing = False
        self.columns = columns
        self.stored = None if self.stored is None else self.stored[:, :columns]
        self.seen = None if self.seen is None else self.seen[:, :columns]
        for tables in self.devices.values():
            for row, end in enumerate(lens):
                if tables.key_mask is not None:
                    tables.key_mask[row, end:] = 1
        self.refresh()

    def can_go_back(self, columns: int) -> bool:
        """Return whether every block that the queries from that column on may see is still there."""
        self.sync()
        if self.window is None:
            return True
        needed = (n - self.window + 1 if n else self.columns for n in self._lens_at(columns))
        return all(self.tables.num_freed(row) * self.block_size <= max(n, 0) for row, n in enumerate(needed))

    def _lens_at(self, columns: int) -> list[int]:
        """Return how many tokens of each sequence lie in the first columns."""
        if self.stored is None:
            return [max(n - (self.columns - columns), 0) for n in self.tables.lens]
        stored = self.stored[:, :columns]
        return (stored.sum(1) + columns - stored.shape[1]).tolist()

    @locked
    def select(self, index: Sequence[int]) -> None:
        """Make the batch sequences index[0], index[1], ...; blocks are shared, only partly filled last ones copied."""
        self.sync()
        self.step = self.finished = None
        if not index:
            self.release()
            return
        self.memory.copy(self._growing(lambda: self.tables.select(index)))
        self.sharing = False
        self.seen = None if self.seen is None else self.seen[list(index)]
        self.stored = None if self.stored is None else self.stored[list(index)]
        for tables in self.devices.values():
            if tables.key_mask is not None:
                tables.key_mask = self._rows(tables.key_mask, index)
        self.refresh()

    @locked
    def release(self) -> None:
        """Free all blocks and forget all sequences; the pool stays."""
        self.tables.release()
        for tables in self.devices.values():
            tables.key_mask = None
            tables.columns.zero_()
        self.step, self.columns, self.seen, self.stored, self.behind, self.unsynced = None, 0, None, None, False, 0
        self.sharing = self.group > 1
        self.frees, self.finished = self.window is not None and not self.reserved, None

    def refresh(self) -> None:
        """Write the host's tables and lengths to every device, in place where the shapes allow."""
        for device, old in list(self.devices.items()):
            rows, width = old.block_table.shape
            if rows == self.num_seqs and width >= max(map(len, self.tables.rows), default=0):
                old.block_table.copy_(self._table(width))
                old.past_lens.copy_(torch.tensor(self.tables.lens, dtype=torch.int32))
                old.columns.fill_(self.columns)
                self._set_shared_prefixes(old, device)
            else:
                self.devices[device] = self._make_tables(device)
                if old.key_mask is not None:
                    self.devices[device].key_mask = self._fit_key_mask(old.key_mask, device)

    @locked
    def fork(self, index: Sequence[int]) -> "PagedState":
        """Return a state whose sequences are copies of the sequences ``index``; they share the blocks, copy on write.

        Raises:
            BlockPoolExhausted: no room for the partly filled last blocks; nothing was changed.
        """
        self.sync()
        twin = PagedState(
            self.memory,
            max_length=None if self.elastic else self.max_length,
            keep_hidden=self.keep_hidden,
            reserve=self.reserve,
            window=self.window,
        )
        twin.frees = self.frees
        lens = [self.tables.lens[i] for i in index]
        rows = [self.tables.rows[i][: self.tables.blocks_for(n)] for i, n in zip(index, lens, strict=True)]
        twin.adopt(rows, lens, seen=torch.ones(len(index), self.columns, dtype=torch.bool))
        twin.seen = None if self.seen is None else self.seen[list(index)]
        twin.stored = None if self.stored is None else self.stored[list(index)]
        for device, tables in self.devices.items():
            mine = twin.on(device)
            if tables.key_mask is not None:
                mine.key_mask = twin._fit_key_mask(self._rows(tables.key_mask, index), device)
        return twin

    @locked
    def adopt(self, rows: Sequence[Sequence[int]], lens: Sequence[int], *, seen: Tensor) -> None:
        """Become sequences that share blocks which hold their tokens already; self is new.

        Args:
            rows: blocks of each sequence. lens: its tokens.
            seen: (num_seqs, columns) bool on the host, the columns that the tokens stand in.

        Raises:
            BlockPoolExhausted: no room for the partly filled last blocks; nothing was changed.
        """
        self.tables.rows, self.tables.lens = [list(row) for row in rows], list(lens)
        for row in rows:
            self.pool.share(row)
        self.columns, self.sharing = seen.shape[1], False
        self.seen = self.stored = None if bool(seen.all()) else seen
        try:
            self.memory.copy(self._growing(self.tables.make_tails_private))
            self._reserve([self.max_length] * len(lens) if self.reserved and self.max_length else lens)
        except BlockPoolExhausted:
            self.release()
            raise
        self.refresh()

    def block_rows(self) -> Sequence[Sequence[int]]:
        """Return the blocks of each sequence."""
        return [[block for block in row if block != NO_BLOCK] for row in self.tables.rows]

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Follow the pool when it has grown."""
        self.tables.rows = [[moved.get(block, block) for block in row] for row in self.tables.rows]
        self.refresh()

    def reclaim(self, count: int) -> None:
        """Nothing to give: a cache holds no block that it does not need."""

    def pass_thread(self) -> int | None:
        """Return the thread that has begun a forward pass, None if none has: growth must not move its blocks."""
        return None if self.step is None else self.thread

    def too_long(self, tokens: int) -> BlockPoolExhausted:
        """Return the error for a sequence that would outgrow max_length."""
        assert self.max_length is not None
        wanted = self.tables.blocks_for(tokens) - self.tables.blocks_for(self.max_length)
        detail = f"; a sequence would reach {tokens} tokens, max_length is {self.max_length}"
        return BlockPoolExhausted(max(wanted, 1), self.pool.num_free, self.pool.num_blocks, detail)

    @locked
    def snapshot(self) -> dict[str, Any]:
        """Return the state and the blocks that hold tokens, and no others."""
        self.sync()
        rows = [row[: self.tables.blocks_for(n)] for row, n in zip(self.tables.rows, self.tables.lens, strict=True)]
        used = list(dict.fromkeys(block for row in rows for block in row if block != NO_BLOCK))
        place = {block: i for i, block in enumerate(used)} | {NO_BLOCK: NO_BLOCK}
        ids = torch.tensor(used, dtype=torch.long)
        return {
            "sizes": {
                "block_size": self.block_size,
                "num_blocks": self.memory.num_blocks,
                "offload": self.memory.offload,
                "max_length": None if self.elastic else self.max_length,
                "reserve": self.reserve,
                "sequences_per_prompt": self.group,
            },
            "sharing": (self.sharing, self.prompt_columns),
            "total": self.pool.num_blocks,
            "rows": [[place[block] for block in row] for row in rows],
            "lens": self.tables.lens,
            "columns": self.columns,
            "masks": (self.seen, self.stored),
            "key_masks": {device: tables.key_mask for device, tables in self.devices.items()},
            "caches": [
                tuple(None if c is None else c[ids.to(c.device)] for c in (layer.k_cache, layer.v_cache))
                for layer in self.memory.layers
            ],
            "layer_devices": [layer.device for layer in self.memory.layers],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Become the state that snapshot() returned; self is new."""
        self.pool.grow(saved["total"])
        self.tables.rows, self.tables.lens = [list(row) for row in saved["rows"]], list(saved["lens"])
        count = len({block for row in self.block_rows() for block in row})
        self.pool.allocate(count)
        owned: set[int] = set()
        for row in self.tables.rows:
            self.pool.share(block for block in row if block in owned)
            owned.update(row)
        self.sharing, self.prompt_columns = saved["sharing"]
        if self.reserved and self.max_length is not None:
            self.tables.reserve([self.max_length] * self.num_seqs, self._group)
        self.columns, (self.seen, self.stored) = saved["columns"], saved["masks"]
        ids = torch.arange(count)
        for layer, device, caches in zip(self.memory.layers, saved["layer_devices"], saved["caches"], strict=True):
            layer.device = device
            layer.k_cache, layer.v_cache = (
                None if c is None else move_blocks(c, saved["total"], ids, ids, layer.new_tensor) for c in caches
            )
        for device, key_mask in saved["key_masks"].items():
            self.on(device).key_mask = key_mask

    def _plan_columns(self, step: Step, mask: Tensor | None, mask_known: bool) -> None:
        """Decide which new columns are stored."""
        if mask is None and mask_known and step.query_len == 1 and self.columns and self.finished is not None:
            going = ~torch.tensor(self.finished)[:, None]
            step.rests = True
            step.lens = [past + (not done) for past, done in zip(self.tables.lens, self.finished, strict=True)]
            step.seen, step.stored = (
                torch.cat([_extend(known, self.num_seqs, self.columns), going], 1) for known in (self.seen, self.stored)
            )
            past = torch.tensor(self.tables.lens)[:, None]
            step.positions = torch.where(going, past, -1).to(torch.int32)
            return
        if mask is None and (step.query_len == 1 or self.seen is None):
            step.seen, step.stored = self.seen, self.stored
            step.lens = [past + step.query_len for past in self.tables.lens]
            return
        new = None
        if mask is not None:
            mask = mask.to("cpu", torch.bool)
            if mask.shape != (self.num_seqs, self.columns + step.query_len):
                raise ValueError(
                    f"expected an attention mask of shape {(self.num_seqs, self.columns + step.query_len)} for "
                    f"{self.columns} cached and {step.query_len} new columns, got {tuple(mask.shape)}"
                )
            new = mask[:, self.columns :]
        before = _extend(self.seen, self.num_seqs, self.columns)
        old = torch.ones_like(before) if mask is None else mask[:, : self.columns]
        if mask_known and step.query_len > 1 and not torch.equal(before, old):
            raise ValueError(
                "the attention mask changes columns that are cached already: their keys were stored under another "
                "mask. Pass the full mask, earlier padding included, or start from an empty cache"
            )
        if new is None or bool(new.all()):
            step.seen, step.stored = self.seen, self.stored
            step.lens = [past + step.query_len for past in self.tables.lens]
            return
        past = torch.tensor(self.tables.lens)
        stored = new if not self.keep_hidden else (new.cumsum(1) > 0) | (past > 0)[:, None]
        step.seen = torch.cat([before, new], 1)
        step.stored = torch.cat([_extend(self.stored, self.num_seqs, self.columns), stored], 1)
        step.mask = new.to(torch.int8)
        if self.sharing and not bool((new.unflatten(0, (-1, self.group)) == new[:: self.group, None]).all()):
            raise ValueError(
                f"the cache was made for {self.group} sequences per prompt, but their attention masks differ"
            )
        step.positions = torch.where(stored, past[:, None] + stored.cumsum(1) - 1, -1).to(torch.int32)
        step.lens = (past + stored.sum(1)).tolist()

    def _plan_on(self, device: torch.device, step: Step) -> None:
        tables = self.devices[device]
        if step.positions is None:
            torch.add(tables.past_lens, step.query_len, out=tables.seq_lens)
        else:
            tables.seq_lens.copy_(torch.tensor(step.lens, dtype=torch.int32))
            step.positions = step.positions.to(device)
        hides = False
        if step.positions is not None and step.mask is not None:
            step.mask = step.mask.to(device)
            hides = bool(((step.positions >= 0) & (step.mask == 0)).any())
        if tables.key_mask is None and hides:
            tables.key_mask = self._fit_key_mask(None, device)
        if tables.key_mask is not None:
            for row, (past, end) in enumerate(zip(self.tables.lens, step.lens, strict=True)):
                seen = None if step.positions is None or step.mask is None else step.mask[row][step.positions[row] >= 0]
                tables.key_mask[row, past:end] = 1 if seen is None else seen

    def _reserve(self, lens: Sequence[int]) -> None:
        if self.max_length is not None and max(lens) > self.max_length:
            if not self.elastic:
                raise self.too_long(max(lens))
            self.stretch()
        missing = self.tables.missing(lens, self._group)
        if missing > self.pool.num_free:
            self.memory.make_room(missing)
        if self.tables.reserve(lens, self._group):
            self.refresh()

    @property
    def _group(self) -> int:
        """Consecutive sequences that share all their blocks at the moment."""
        return self.group if self.sharing else 1

    def _end_sharing(self) -> None:
        """Let the sequences of each group part: the first keeps the partly filled block, the others get copies."""
        self.memory.copy(self._growing(self.tables.make_tails_private))
        self.sharing = False
        self.refresh()

    def _growing(self, plan: Callable[[], list[tuple[int, int]]]) -> list[tuple[int, int]]:
        """Return what plan does; if it lacks blocks and the pool can make room, do it then."""
        try:
            return plan()
        except BlockPoolExhausted as full:
            try:
                self.memory.make_room(self.pool.num_free + full.wanted - full.free)
            except BlockPoolExhausted:
                raise full from None
            return plan()

    @persistent
    def _rows(self, mask: Tensor, index: Sequence[int]) -> Tensor:
        return mask[torch.tensor(index, device=mask.device)]

    def _table(self, width: int) -> Tensor:
        rows = [row + [-1] * (width - len(row)) for row in self.tables.rows]
        return torch.tensor(rows, dtype=torch.int32).view(self.num_seqs, width)

    @persistent
    def _make_tables(self, device: torch.device) -> DeviceTables:
        longest = max(map(len, self.tables.rows), default=0)
        width = (
            self.tables.blocks_for(self.max_length) if self.max_length is not None else -(-max(longest, 1) // 16) * 16
        )
        lens = torch.tensor(self.tables.lens, dtype=torch.int32)
        kept = self.memory.kept_tables.pop((self.num_seqs, width, device), None) if self.reserved else None
        if kept is not None:  # where they lie, a captured step of an earlier cache reads them
            kept.block_table.copy_(self._table(width))
            kept.past_lens.copy_(lens)
            kept.seq_lens.copy_(lens)
            kept.columns.fill_(self.columns)
            self._set_shared_prefixes(kept, device)
            return kept
        tables = DeviceTables(
            self._table(width).to(device),
            lens.to(device),
            lens.clone().to(device),
            torch.tensor(self.columns, dtype=torch.int64, device=device),
        )
        self._set_shared_prefixes(tables, device)
        for tensor in (tables.block_table, tables.past_lens, tables.seq_lens, tables.columns):
            torch._dynamo.mark_static_address(tensor)
        return tables

    @persistent
    def _set_shared_prefixes(self, tables: DeviceTables, device: torch.device) -> None:
        """Write the shared prefixes, into the tensor that there is: a captured step reads it.

        A few outer levels are worth their room: kernels keep partial results for every entry that could be used.
        """
        shared = common_prefixes(self.tables.rows, [n // self.block_size for n in self.tables.lens])
        outer = sum(entry[2] == 0 for entry in shared)
        if shared and (tables.shared_prefixes is None or outer > len(tables.shared_prefixes)):
            room = min(max(1 << (outer - 1).bit_length(), LEAST_SHARED), self.num_seqs - 1)
            tables.shared_prefixes = torch.zeros(room, 4, dtype=torch.int32, device=device)
            torch._dynamo.mark_static_address(tables.shared_prefixes)
        if tables.shared_prefixes is not None:
            room = len(tables.shared_prefixes)
            unused = [[0, 0, 0, 0]] * (room - len(shared))
            entries = torch.tensor((shared + unused)[:room], dtype=torch.int32)
            tables.shared_prefixes.copy_(entries.view(-1, 4))

    @persistent
    def _fit_key_mask(self, old: Tensor | None, device: torch.device) -> Tensor:
        width = self.devices[device].block_table.shape[1] * self.block_size
        mask = torch.ones(self.num_seqs, width, dtype=torch.int8, device=device)
        if old is not None:
            mask[:, : old.shape[1]] = old[:, :width]
        return mask


def _give_back(lock: PoolLock, tables: BlockTables) -> None:
    """Free what a cache held that is gone."""
    rows, tables.rows, tables.lens = tables.rows, [], []
    lock.drop(rows)


def _keep_tables(kept: dict[tuple[int, int, torch.device], DeviceTables], devices: Mapping[Any, DeviceTables]) -> None:
    """Keep the tables of a sized cache that is gone, of the last few sizes, for the next cache on the pool."""
    for device, tables in devices.items():
        tables.key_mask = None
        rows, width = tables.block_table.shape
        kept[rows, width, device] = tables
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


def _extend(mask: Tensor | None, num_seqs: int, columns: int) -> Tensor:
    """Return a host mask over all columns; those behind its end are True."""
    full = torch.ones(num_seqs, columns, dtype=torch.bool)
    if mask is not None:
        full[:, : mask.shape[1]] = mask
    return full

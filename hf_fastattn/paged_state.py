"""What a paged cache knows besides its keys and values: blocks, lengths, columns and padding. No transformers here.

transformers counts columns: every row of a batch has as many, padding included. The blocks hold tokens: a column
that the mask hides is not stored, so rows have lengths of their own. :class:`PagedState` keeps both counts, on the
host (for allocation) and on each device (for the kernels), and moves from one to the next in steps: ``begin`` plans
a forward pass, ``commit`` makes it count. A forward pass that fails between the two leaves the cache as it was.
"""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .block_pool import NO_BLOCK, BlockPoolExhausted, BlockTables, EvenRuns
from .columns import Columns, Step, announced
from .device_tables import DeviceTables, keep_tables
from .kv_pool import KVPool
from .pool_lock import PoolLock, in_forward_pass, locked
from .run_views import RunViews

GROWTH_SLACK = 256
"""Tokens per sequence that an unsized cache makes room for beyond its first forward pass."""

EXPECTED_SLACK = 1024
"""The same where the length that sequences can reach is known, which is then the limit."""

WINDOW_MARGIN = 128
"""Tokens behind a sliding window that are kept, so that crop() can go back by as many (assisted decoding does)."""


LOOK_AHEAD = 4
"""When one sequence needs a block, others that will need one within 1 / LOOK_AHEAD of it get theirs too, so that tables
are written anew once for all of them. Not where room is limited, nor where blocks behind a window are freed."""


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
        self.max_length, self.reserve = max_length, reserve
        self.sized = max_length is not None  # what compiled code may ask: it would depend on the value of max_length
        self.group, self.window = sequences_per_prompt, window
        self.frees = window is not None and not self.reserved  # dense readers of the cache may look anywhere
        self.copies = 1  # rows that each row is to become when the prompt is complete
        self.sharing = self.group > 1
        self.prompt_columns = 0  # columns in which the sequences of a group are the same; at least the first pass
        self.tables = BlockTables(self.pool, self.block_size)
        self.devices: dict[torch.device, DeviceTables] = {}
        self.step: Step | None = None
        self.thread = 0  # that began the step
        self.steady: Step | None = None  # the last forward pass, if a decode step behind it need not be planned
        self.padding = Columns(keep_hidden=keep_hidden)
        self.behind = False  # a compiled step ran: the device's counts are ahead of the host's
        self.unsynced = 0
        self.decoding = False  # the last pass brought one column, which nothing hid: nor, most likely, does the next
        self._runs: EvenRuns | Literal[False] | None = False  # of the tables; False before anybody asked
        self.views = RunViews()  # of the tokens in these runs
        self.elastic = False  # max_length was chosen for the speed of one call, and is no limit
        self.prefix_hits = (0, 0)  # tokens asked of a prefix store, tokens that it had
        self.prefix_root: Any = None  # the store's key for what was asked of it
        self.prefix_columns = 0  # in which it was asked for
        self.reordered = False  # rows are no longer those that were asked for: beams
        self.lock = memory.lock
        with self.lock:
            memory.users.add(self)
        weakref.finalize(self, _give_back, self.lock, self.tables).atexit = False  # others may go on using the pool
        if self.reserved:
            weakref.finalize(self, keep_tables, memory.kept_tables, self.devices).atexit = False

    @property
    def num_seqs(self) -> int:
        """Rows of the batch, 0 before the first forward pass."""
        return len(self.tables.rows)

    @property
    def columns(self) -> int:
        """Columns of complete forward passes, padding included; compiled steps count after :meth:`sync`."""
        return self.padding.count

    def stretch(self) -> None:
        """Forget max_length if nobody asked for it: from now on blocks come as they are needed."""
        if self.elastic:
            self.sync()
            self.max_length, self.elastic, self.sized = None, False, False

    @property
    def reserved(self) -> bool:
        """Whether every sequence has blocks for max_length tokens, so that steps allocate nothing."""
        return self.sized and self.memory.num_blocks is None and not self.memory.offload

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
            own = blocks - query_len // self.block_size
            self.memory.make_room(num_seqs // group * (blocks + (group * self.copies - 1) * own))
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
        self.steady = None
        self.devices[device] = self._make_tables(device)
        if self.step is not None:
            self.devices[device].plan(self.step, self.tables.lens)

    @locked
    def begin(
        self,
        layer_idx: int,
        new: Tensor,
        mask: Tensor | None = None,
        *,
        mask_known: bool = True,
        traced: bool = False,
    ) -> Step:
        """Plan a forward pass: find room for its tokens and set ``seq_lens``.

        Args:
            layer_idx: the layer that attends first.
            new: (num_seqs, num_kv_heads, query_len, head_dim), its new keys.
            mask: (num_seqs, columns so far + query_len), non-zero where a column may be seen; None for all.
            mask_known: False if somebody else masks: all new columns are stored, and earlier ones are not compared.
            traced: the layers are compiled, and must not depend on the numbers of blocks and tokens (Step.runs).

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
        columns = self.columns
        num_seqs, _, query_len, _ = new.shape
        if columns == 0 and num_seqs != self.num_seqs:
            self.release()  # the batch of a first forward pass that failed, or of early initialization
        if self.num_seqs == 0:
            self.add_batch(num_seqs, query_len)
        self.on(new.device)
        self.forget_failed_pass()
        if num_seqs != self.num_seqs:
            raise ValueError(f"the cache holds {self.num_seqs} sequences, the forward pass brings {num_seqs}")
        step = Step(query_len, columns == 0, layer_idx)
        if self.sharing and columns and columns + query_len > self.prompt_columns:
            self._end_sharing()
        self.padding.plan(step, self.tables.lens, mask, mask_known=mask_known, group=self._group)
        step.group = self._group
        self._reserve(step.lens, growing=query_len == 1)
        if not traced and new.is_cpu:
            step.runs = self._find_runs(step)
        if step.runs is None:
            for tables in self.devices.values():
                tables.plan(step, self.tables.lens)
        self.step, self.thread = step, me
        return step

    def repeat(self, layer_idx: int, new: Tensor, num_layers: int) -> Step | None:
        """Begin a decode step whose tokens lie where those of the last forward pass say.

        On a CPU, of sequences of one length without padding: nothing has to be planned, and views of the tokens are
        what any attention expects, whatever its mask.

        Args:
            layer_idx: the layer that attends first.
            new: (num_seqs, num_kv_heads, query_len, head_dim), its new keys.
            num_layers: of the model at the moment.

        Returns:
            The forward pass; None if it may be another kind of pass, so that a mask has to be seen first.
        """
        last = self.steady
        if last is None or self.behind or announced.hidden:
            return None
        if layer_idx != last.first_layer or last.last_layer != num_layers - 1:
            return None
        num_seqs, _, query_len, _ = new.shape
        tokens = self.tables.lens[0] + 1
        if num_seqs != len(last.lens) or query_len != 1 or not new.is_cpu or tokens > self._room():
            return None
        with self.lock:
            self.lock.begin_pass()
            if self.steady is not last:  # the pool grew meanwhile
                return None
            self.unsynced = 0
            lens, last_layer = [tokens] * num_seqs, last.last_layer
            step = Step(1, False, layer_idx, lens=lens, last_layer=last_layer, runs=last.runs, views=True)
            self.step, self.thread = step, threading.get_ident()
        return step

    def _room(self) -> int:
        """Return how many tokens the first sequence has blocks for."""
        blocks = len(self.tables.rows[0]) * self.block_size
        return blocks if self.max_length is None else min(blocks, self.max_length)

    def begin_compiled(self, layer_idx: int, query_len: int) -> Step:
        """Plan a forward pass in a compiled graph: room is reserved, all columns are stored, host counts lag."""
        for tables in self.devices.values():
            tables.seq_lens.copy_(tables.past_lens + query_len)
        self.behind = True
        step = Step(query_len, False, layer_idx)
        self.step = step
        return step

    def commit(self, *, may_repeat: bool = False) -> None:
        """End the forward pass: its tokens count from now on.

        Args:
            may_repeat: every layer stored states of its own, the last one too.
        """
        assert self.step is not None
        if not self.step.lens:  # begun in a compiled graph
            self._advance_devices(self.step)
            self.step = None
        elif torch.compiler.is_dynamo_compiling():
            self._commit_outside()
        else:
            self._commit_planned(may_repeat)

    @torch.compiler.disable
    def _commit_outside(self) -> None:
        """End a forward pass that the host planned in the middle of a compiled graph, which breaks there."""
        self._commit_planned(may_repeat=False)

    @locked
    def _commit_planned(self, may_repeat: bool) -> None:
        """Advance all counts at once: growth in another thread, which reads the host's, must not come between."""
        step = self.step
        assert step is not None
        self._advance_devices(step)
        self.lock.end_pass()
        self.tables.lens = step.lens
        self.padding.advance(step)
        self.decoding = step.query_len == 1 and step.mask is None
        self.steady = step if step.views or (may_repeat and self._is_steady(step)) else None
        if self.sharing and self.reserved:  # a compiled step that follows cannot do it
            self._end_sharing()
        if self.frees and step.attended and self.window is not None:
            reach = self.window - 1 + WINDOW_MARGIN
            if self.tables.free_before([seq_len - reach for seq_len in self.tables.lens]):
                self.refresh()
        self.step = None

    def _is_steady(self, step: Step) -> bool:
        """Return whether decode steps can follow a complete one without being planned, see :meth:`repeat`."""
        unpadded = step.runs is not None and step.lens[0] == self.columns
        return unpadded and self.window is None  # a layer has to say how far it looks back

    def _advance_devices(self, step: Step) -> None:
        for tables in self.devices.values():
            tables.advance(step, self.columns)

    @locked
    def finish(self, finished: Sequence[bool]) -> None:
        """Let go of sequences that have finished: their blocks are freed, and decode steps store nothing of theirs.

        Their columns count as padding, which later masks have to hide; until sequences are chosen or columns removed.
        Nothing happens once all have finished: no step follows.

        Args:
            finished: whether each sequence has finished.
        """
        if self.reserved or not any(finished) or all(finished):
            return
        if len(finished) != self.num_seqs:
            raise ValueError(f"expected to hear about {self.num_seqs} sequences, got {len(finished)}")
        newly = [row for row, done in enumerate(finished) if done and self.tables.lens[row]]
        self.padding.finish(finished, newly)
        if newly:
            self.tables.empty(newly)
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
        self.padding.count = int(tables.columns)
        self.tables.lens = tables.past_lens.tolist()
        self.behind = False

    def forget_failed_pass(self) -> None:
        """Take back the mask of a forward pass that has not come to its end, if it hid what is cached."""
        if self.step is not None and self.step.changes:
            self.step.changes = False
            for tables in self.devices.values():
                tables.show(self.padding.seen, self.padding.stored, self.tables.lens)

    @locked
    def crop(self, tokens: int) -> None:
        """Remove the last columns.

        Raises:
            ValueError: queries from there on would see blocks behind the window that were freed.
        """
        self.sync()
        columns = max(self.columns - tokens, 0)
        lens = self.padding.tokens_in(columns, self.tables.lens)
        if not self.can_go_back(columns):
            raise ValueError(
                f"the cache cannot be cropped from {self.columns} to {columns} columns: the model sees {self.window} "
                f"tokens, and blocks more than {WINDOW_MARGIN} tokens behind them were freed. Crop by at most "
                f"{WINDOW_MARGIN} tokens, or to 0 and compute the prompt again"
            )
        self.forget_failed_pass()
        self.step = None
        self.memory.copy(self._growing(lambda: self.tables.truncate(lens, keep_blocks=self.reserved)))
        self.sharing = False
        self.padding.crop(columns)
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
        lens = self.padding.tokens_in(columns, self.tables.lens)
        needed = (n - self.window + 1 if n else self.columns for n in lens)
        return all(self.tables.num_freed(row) * self.block_size <= max(n, 0) for row, n in enumerate(needed))

    @locked
    def select(self, index: Sequence[int]) -> None:
        """Make the batch sequences index[0], index[1], ...; blocks are shared, only partly filled last ones copied."""
        self.sync()
        self.forget_failed_pass()
        self.step = None
        if not index:
            self.release()
            return
        stay = list(index) == list(range(self.num_seqs))
        if stay and self.padding.finished is None:  # as beams often do
            return
        self.memory.copy(self._growing(lambda: self.tables.select(index)))
        self.sharing = False
        self.padding.select(index)
        for tables in self.devices.values():
            tables.key_mask = tables.selected_key_mask(index)
        self.refresh()

    def expect_copies(self, copies: int) -> int:
        """Take one row for each prompt in the passes to come, with room for its copies; return what a group was."""
        group, self.group, self.copies, self.sharing = self.group, 1, copies, False
        return group

    def make_copies(self, group: int) -> None:
        """Make of each row as many as were expected, which share its blocks; none if there was no complete pass.

        Args:
            group: what :meth:`expect_copies` returned.

        Raises:
            BlockPoolExhausted: no room for the rows' own blocks; the state is empty then.
        """
        copies, self.group, self.copies = self.copies, group, 1
        try:
            self.select([row for row in range(self.num_seqs if self.columns else 0) for _ in range(copies)])
        except BlockPoolExhausted:
            self.release()
            raise

    @locked
    def release(self) -> None:
        """Free all blocks and forget all sequences; the pool stays."""
        self.tables.release()
        for tables in self.devices.values():
            tables.key_mask = None
            tables.columns.zero_()
        self.padding.clear()
        self.step, self.steady, self.behind, self.unsynced, self.decoding = None, None, False, 0, False
        self.sharing, self.reordered = self.group > 1, False
        self.frees = self.window is not None and not self.reserved

    def _find_runs(self, step: Step) -> EvenRuns | None:
        """Return where the tokens lie if sequences of one length can be read and written as one view."""
        lens = step.lens
        if step.positions is not None or step.group > 1 or min(lens) != max(lens):
            return None
        for tables in self.devices.values():
            if not tables.on_host or tables.key_mask is not None:
                return None
        if self._runs is False:
            self._runs = self.tables.even_runs()
        return self._runs or None

    def refresh(self) -> None:
        """Write the host's tables and lengths to every device, in place where the shapes allow."""
        self._runs, self.steady = False, None
        self.views.clear()
        for device, old in list(self.devices.items()):
            if old.fits(self.tables.rows):
                old.write(self.tables.rows, self.tables.lens, self.columns)
            else:
                self.devices[device] = self._make_tables(device)
                if old.key_mask is not None:
                    self.devices[device].widen_key_mask(old.key_mask)
                if self.reserved:  # for the next batch of as many rows: a captured step reads these tables
                    keep_tables(self.memory.kept_tables, {device: old})

    @locked
    def fork(self, index: Sequence[int]) -> "PagedState":
        """Return a state whose sequences are copies of the sequences ``index``; they share the blocks, copy on write.

        Raises:
            BlockPoolExhausted: no room for the partly filled last blocks; nothing was changed.
        """
        self.sync()
        self.forget_failed_pass()
        twin = PagedState(
            self.memory,
            max_length=None if self.elastic else self.max_length,
            keep_hidden=self.padding.keep_hidden,
            reserve=self.reserve,
            window=self.window,
        )
        twin.frees = self.frees
        lens = [self.tables.lens[i] for i in index]
        rows = [self.tables.rows[i][: self.tables.blocks_for(n)] for i, n in zip(index, lens, strict=True)]
        twin.adopt(rows, lens, seen=torch.ones(len(index), self.columns, dtype=torch.bool))
        twin.padding.seen, twin.padding.stored = self.padding.seen, self.padding.stored
        twin.padding.select(index)
        for device, tables in self.devices.items():
            mine = twin.on(device)
            if tables.key_mask is not None:
                mine.widen_key_mask(tables.selected_key_mask(index))
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
        self.sharing = False
        self.padding.count = seen.shape[1]
        self.padding.seen = self.padding.stored = None if bool(seen.all()) else seen
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
        """Follow the pool, whose blocks lie elsewhere: it has grown, or it could not."""
        self.sync()  # compiled steps are counted on the devices, whose tables are written anew
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

    def _reserve(self, lens: Sequence[int], *, growing: bool = False) -> None:
        """Give each sequence blocks for that many tokens; growing: one more each, and so on in the next steps."""
        if self.max_length is not None and max(lens) > self.max_length:
            if not self.elastic:
                raise self.too_long(max(lens))
            self.stretch()
        group = self._group
        missing = self.tables.missing(lens, group)
        if not missing:
            return
        if missing > self.pool.num_free:
            self.memory.make_room(missing)
        unlimited = self.max_length is None and self.memory.num_blocks is None
        if growing and group == 1 and unlimited and not self.frees:
            ahead = self.block_size // LOOK_AHEAD
            soon = [n + ahead if n > past else n for n, past in zip(lens, self.tables.lens, strict=True)]
            if self.tables.missing(soon) <= self.pool.num_free:
                lens = soon
        if self.tables.reserve(lens, group):
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

    def _make_tables(self, device: torch.device) -> DeviceTables:
        rows, lens = self.tables.rows, self.tables.lens
        if self.max_length is not None:
            width = self.tables.blocks_for(self.max_length)
        else:
            width = -(-max([1, *map(len, rows)]) // 16) * 16
        kept = self.memory.kept_tables.pop((self.num_seqs, width, device), None) if self.reserved else None
        if kept is not None:
            kept.write(rows, lens, self.columns)
            return kept
        return DeviceTables(rows, lens, self.columns, width=width, block_size=self.block_size, device=device)


def _give_back(lock: PoolLock, tables: BlockTables) -> None:
    """Free what a cache held that is gone."""
    rows, tables.rows, tables.lens = tables.rows, [], []
    lock.drop(rows)

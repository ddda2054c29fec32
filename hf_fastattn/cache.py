"""PagedCache: transformers' ``Cache`` over blocks.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023. The Cache
protocol comes in here; block tables and lengths go out to the attention function (see :mod:`hf_fastattn.attention`).
The one decision: ``update`` returns handles and the attention function stores the states, because it alone sees the
mask; so padding is never stored and decoding needs no mask. Under another attention implementation, or in a model
that computes with keys and values itself, the same cache stores every column and returns dense tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from . import ops
from .block_pool import BlockPoolExhausted, EvenRuns
from .columns import Step
from .dense_reading import read_dense
from .device_tables import DeviceTables
from .handles import NewStates
from .kv_pool import MEMORY_FULL, KVPool, LayerBlocks
from .model_config import last_caching_layer, layer_types, text_config, window_of_all_layers
from .offload import offloaded_layers
from .own_attention import attends_itself
from .paged_layer import PagedLayer, refuse_export
from .paged_state import PagedState
from .run_views import TokenViews, view_tokens
from .saved_state import restore, save
from .stats import CacheStats, cache_stats

IMPLEMENTATION = "fastattn"
"""Name of the attention implementation. transformers looks for a kernel package when a name contains "flash"."""

CROPS_TO_LENGTH = Version(transformers.__version__) < Version("5.18")
"""Whether crop() takes the length to crop to, as a positive number."""

BLOCK_SIZE = 64
"""Tokens per block where nobody says otherwise."""


class PagedCache(Cache):
    """KV cache in blocks for ``model.generate(..., past_key_values=cache)``.

    Args:
        config: the model's own config object (``model.config``): its attention implementation is looked up there.
        block_size: tokens per block, a power of two from 16 to 256.
        num_blocks: blocks in the pool, allocated once; a full pool raises :class:`BlockPoolExhausted`. None: as needed.
        max_length: most tokens per sequence. Without num_blocks, every sequence gets room for that many at once, which
            lets generate() compile the decode step; with it, it is only a limit.
        reserve: most tokens per sequence that are expected. A pool without num_blocks then has room for the first
            forward pass and 1024 more tokens, but not for more than this. None: for the first pass and 256 more.
        sequences_per_prompt: so many consecutive rows of the batch begin with the same tokens (beams, returned
            sequences): they share the blocks of the first forward pass, which only the first row of each group stores
            (and computes, where generate() runs it). Nothing is compared: rows that differ there are your error.
        offload: keep the blocks in the host's memory (pinned, under CUDA) and only two layers at a time on the device:
            for contexts that the device does not hold. The decode step is not compiled then.
        pool: memory to lie on, which other caches may use too; it brings block_size, num_blocks and offload. None: its
            own.

    Raises:
        ValueError: a bad size, or a model that keeps other state than keys and values (state space, encoder-decoder).

    Tests: tests/test_paged_cache.py, tests/test_cache_machine.py.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        block_size: int = BLOCK_SIZE,
        num_blocks: int | None = None,
        max_length: int | None = None,
        reserve: int | None = None,
        sequences_per_prompt: int = 1,
        offload: bool = False,
        pool: KVPool | None = None,
    ) -> None:
        refuse_export()
        self.config = text_config(config)
        if block_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_size must be 16, 32, 64, 128 or 256 tokens, got {block_size}")
        sizes = {"num_blocks": num_blocks, "max_length": max_length, "reserve": reserve}
        for name, value in (sizes | {"sequences_per_prompt": sequences_per_prompt}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        types = layer_types(self.config)
        sliding = any(kind.startswith("sliding") for kind in types) or getattr(self.config, "sliding_window", None)
        if not isinstance(offload, bool):
            raise TypeError(f"offload must be True or False, got {offload!r}")
        if pool is None:
            count = self.config.num_hidden_layers
            layers = offloaded_layers(count) if offload else [LayerBlocks() for _ in range(count)]
            pool = KVPool(block_size, num_blocks, layers)
        self.state = PagedState(
            pool,
            max_length=max_length,
            keep_hidden=bool(sliding),
            reserve=reserve,
            sequences_per_prompt=sequences_per_prompt,
            window=window_of_all_layers(self.config),
        )
        self.paged_layers = [PagedLayer(self, i, blocks) for i, blocks in enumerate(pool.layers)]
        self.made_dense = self._starts_dense
        super().__init__(layers=list(self.paged_layers))

    @property
    def _starts_dense(self) -> bool:
        """Whether the model needs dense tensors whatever its implementation is called."""
        return "chunked_attention" in layer_types(self.config) or attends_itself(self.config)

    @property
    def uses_handles(self) -> bool:
        """Whether update() returns handles: under fastattn, unless the cache was made to hand out dense tensors."""
        return not self.made_dense and self.config._attn_implementation == IMPLEMENTATION

    def begin_step(self, layer: PagedLayer, new: NewStates, mask: Tensor | None) -> Step:
        """Return the forward pass that a layer attends in, begun if it is the first to attend.

        Args:
            layer: the attending layer.
            new: its new states.
            mask: (num_seqs, columns) int8, non-zero where a column may be seen; None when all may.

        Raises:
            BlockPoolExhausted: no room for the new tokens; the cache is as before the forward pass.
        """
        step = self.state.step
        if step is None or layer.layer_idx <= step.first_layer:
            if torch.compiler.is_dynamo_compiling() and mask is None and self.state.reserved:
                step = self.state.begin_compiled(layer.layer_idx, new.k.shape[2])
            else:
                step = self._begin(layer.layer_idx, new.k, mask)
        return step

    def store(self, layer: PagedLayer, new: NewStates, step: Step, tables: DeviceTables) -> tuple[Tensor, Tensor]:
        """Write a layer's new states into its blocks; return these, (num_blocks, block_size, heads, head_dim) each.

        A compiled decode step writes by index_put_, which the compiler fuses with the rotary embedding before it. So
        does one on a CPU, where finding the slots takes longer than writing to them.
        """
        k_cache, v_cache = layer.blocks.fetch(self.state, step)
        compiled = torch.compiler.is_dynamo_compiling() and not step.lens
        plain = step.positions is None and step.group == 1
        if new.k.shape[2] == 1 and (compiled or (plain and ops.is_direct("store_kv", new.k))):
            for cache, states in zip((k_cache, v_cache), new.detached(), strict=True):
                cache.index_put_(tables.slots(step), states[:, :, 0].to(cache.dtype))
            if not compiled:
                layer.blocks.written(self.state, step)
            return k_cache, v_cache
        positions = None if step.positions is None else step.positions.to(new.k.device)
        k, v = new.detached()
        block_table, past_lens = tables.block_table, tables.past_lens
        if step.group > 1:  # the first of each group stores for all
            k, v, block_table, past_lens = (x[:: step.group] for x in (k, v, block_table, past_lens))
            positions = None if positions is None else positions[:: step.group]
        ops.store_kv(k, v, k_cache, v_cache, block_table, past_lens, positions=positions)
        layer.blocks.written(self.state, step)
        return k_cache, v_cache

    def extend(self, layer: PagedLayer, new_k: Tensor, new_v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Write a layer's new states behind the others where a CPU's blocks lie in even runs.

        Returns:
            Views of all keys and values, (num_seqs, num_kv_heads, tokens, head_dim) each.
        """
        runs = step.runs
        assert runs is not None
        tokens = step.lens[0] - runs.freed * self.state.block_size
        views = self.state.views.find(layer.layer_idx, tokens) if step.query_len == 1 else None
        k, v, k_end, v_end = views or self._view(layer, step, runs, tokens)
        k_end.copy_(new_k)
        v_end.copy_(new_v)
        layer.blocks.written(self.state, step)
        return k, v

    def _view(self, layer: PagedLayer, step: Step, runs: EvenRuns, tokens: int) -> TokenViews:
        """View a layer's tokens, of which the last ones are new; in a decode step also those of the layers behind it.

        Views take a fraction of the time when many are made at a time.
        """
        state = self.state
        if step.query_len > 1 or state.memory.offload:
            return view_tokens(layer.blocks.fetch(state, step), state.num_seqs, runs, [tokens], step.query_len)[0]
        room = (len(state.tables.rows[0]) - runs.freed) * state.block_size
        for behind in self.paged_layers[layer.layer_idx :]:
            if behind.is_initialized:
                caches = behind.blocks.fetch(state, step)
                state.views.make(behind.layer_idx, caches, state.num_seqs, runs, range(tokens, room + 1))
        views = state.views.find(layer.layer_idx, tokens)
        assert views is not None
        return views

    def store_dense(self, new: NewStates, *, commit: bool = True, handles: bool = True) -> tuple[Tensor, Tensor]:
        """Store all new columns and return all keys and values dense; the cache stays dense from now on.

        Gradients flow into the new states only: blocks cut them off.

        Args:
            new: a layer's new states.
            commit: end the forward pass if the layer is the last one that caches.
            handles: the states were handed out as a handle, see :class:`~hf_fastattn.paged_state.Step`.
        """
        layer = new.layer
        assert isinstance(layer, PagedLayer)
        self.made_dense, self.state.frees = True, False
        step = self.state.step
        if step is None or layer.layer_idx <= step.first_layer:
            step = self._begin(layer.layer_idx, new.k, None, mask_known=False)
            step.handles = handles
        tables = self.state.on(new.k.device)
        self.store(layer, new, step, tables)
        dense = read_dense(self.state, layer.blocks, step)
        if torch.is_grad_enabled() and (new.k.requires_grad or new.v.requires_grad):
            past = slice(0, self.state.columns)
            dense = torch.cat([dense[0][:, :, past], new.k], 2), torch.cat([dense[1][:, :, past], new.v], 2)
        if commit and layer.layer_idx == last_caching_layer(self.config):
            self.state.commit()
        return dense

    def columns(self) -> Any:
        """Return the columns of complete forward passes: an int, or a tensor inside a compiled graph."""
        if torch.compiler.is_dynamo_compiling():
            return next(iter(self.state.devices.values())).columns
        self.state.sync()
        return self.state.columns

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Return the columns before the new ones, without waiting for the device: a tensor after compiled steps."""
        if not self.paged_layers[layer_idx].is_initialized:
            return 0
        if not torch.compiler.is_dynamo_compiling() and self.state.behind:
            return next(iter(self.state.devices.values())).columns
        return self.columns()

    def mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what a layer's get_mask_sizes does; also where compiled steps are kept inside the capacity.

        Handles have no offset of keys: there, 1 asks the mask function to look whether the one new column is hidden.
        """
        if not self.uses_handles:
            return self.columns() + query_length, 0
        if torch.compiler.is_dynamo_compiling():  # no graph depends on max_length
            return -1, 0
        state = self.state
        single = query_length == 1  # may be the first compiled step, which is not behind yet
        if (state.behind or single) and state.max_length is not None:
            state.unsynced += query_length
            if state.columns + state.unsynced > state.max_length:
                state.sync()
                state.unsynced = query_length
                longest = max(state.tables.lens) + query_length
                if longest > state.max_length:
                    raise self.exhausted(state.too_long(longest))
        return -(state.max_length or 1), int(single and not state.decoding and not state.behind)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a decode step can be compiled and captured; transformers would ask every layer, at every token."""
        return self.state.reserved and self.uses_handles

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocate every layer before the first forward pass."""
        super().early_initialization(batch_size, num_heads, head_dim, dtype, torch.device(device))

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 before its first use."""
        return self.state.num_seqs or -1

    @property
    def max_cache_len(self) -> int:
        """Most tokens per sequence, -1 without a limit; PEFT asks for it by this name of older versions."""
        return self.paged_layers[0].get_max_length()

    def reset(self) -> None:
        """Forget all tokens; the pool stays allocated."""
        self.state.release()
        self.made_dense = self._starts_dense

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns (0 or negative, as in transformers).

        With transformers 5.17, which still allows it, a positive number is the columns that stay.

        Raises:
            ValueError: a positive number; or more than :data:`~hf_fastattn.paged_state.WINDOW_MARGIN` columns of a
                model whose layers all have a sliding window, after blocks behind it were freed.
        """
        if tokens_to_remove > 0 and CROPS_TO_LENGTH:
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove < 0 and self.state.num_seqs:
            with self.explain_exhaustion():
                self.state.crop(-tokens_to_remove)

    def fork(self, copies: int) -> "PagedCache":
        """Return a new cache in which every sequence of this one occurs ``copies`` times in a row.

        Both caches lie on one pool and share all blocks so far; a block is copied when somebody writes into it (copy on
        write), i.e. the partly filled last one. This cache stays as it is and can be forked again: a system prompt is
        computed once, and forked for each batch of questions.

        Raises:
            ValueError: copies below 1. BlockPoolExhausted: no room for the partly filled last blocks.
        """
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        with self.explain_exhaustion():
            return self._over(self.state.fork([i for i in range(self.state.num_seqs) for _ in range(copies)]))

    @contextmanager
    def one_row_per_prompt(self, copies: int) -> Iterator[None]:
        """Take the first forward passes with one row for each prompt; at the end, each becomes ``copies`` rows.

        Raises:
            BlockPoolExhausted: no room for the rows' own blocks; the cache is empty then.
        """
        group = self.state.expect_copies(copies)
        try:
            yield
        finally:
            with self.explain_exhaustion():
                self.state.make_copies(group)

    def _over(self, state: PagedState) -> "PagedCache":
        """Return a cache of the same model over another state of the same pool."""
        twin = PagedCache(self.config, pool=state.memory)
        twin.state, twin.made_dense = state, self.made_dense
        for layer, own in zip(twin.paged_layers, self.paged_layers, strict=True):
            layer.is_initialized = own.is_initialized
        return twin

    def keep_prefix(self, old_ids: Tensor, new_ids: Tensor) -> int:
        """Cut the cache back to what it shares with new prompts, so that nothing stale is used.

        Args:
            old_ids: (num_seqs, at least the cache's columns) the tokens that it was filled with, padding included.
            new_ids: (num_seqs, columns) the prompts to come, padded alike; at least one of their columns is left to be
                computed.

        Returns:
            The columns kept; 0 if what a sliding window needs there was freed, see :meth:`crop`.

        Raises:
            ValueError: shapes that do not fit the cache.
        """
        columns = self.get_seq_length()
        if old_ids.shape[0] != new_ids.shape[0] or old_ids.shape[1] < columns or old_ids.shape[0] != self.batch_size:
            raise ValueError(
                f"expected the tokens of {self.batch_size} sequences and {columns} columns, and as many new ones, got "
                f"{tuple(old_ids.shape)} and {tuple(new_ids.shape)}"
            )
        shared = max(min(columns, new_ids.shape[1] - 1), 0)
        same = (old_ids[:, :shared] == new_ids[:, :shared].to(old_ids.device)).all(0)
        kept = int(same.cumprod(0).sum())
        if not self.state.can_go_back(kept):
            kept = 0
        self.crop(kept - columns)
        return kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i the old sequence beam_idx[i]: table rows move, keys and values stay (beam search)."""
        self.state.reordered = True
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; the copies share its full blocks."""
        self._select([i for i in range(self.state.num_seqs) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences ``indices`` (integers, or a boolean mask over the batch)."""
        index = indices if indices.dtype != torch.bool else indices.nonzero().flatten()
        self._select(index.tolist())

    def activate_past_recording(self) -> None:
        """Nothing to do: every token is kept, so that :meth:`crop` can always go back."""

    def stats(self) -> CacheStats:
        """Return what the memory is used for: blocks, tokens, bytes, waste, what sharing saves."""
        return cache_stats(self.state)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Yield each layer's keys and values as dense copies, and None, as DynamicCache does."""
        for layer in self.paged_layers:
            yield layer.keys, layer.values, None

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        state = self.state
        used = state.pool.num_used
        return (
            f"PagedCache(block_size={state.block_size}, num_blocks={state.pool.num_blocks}, used={used}, "
            f"sequences={state.num_seqs}, columns={state.columns}, layers={len(self.layers)})"
        )

    def to_dynamic(self) -> DynamicCache:
        """Return a DynamicCache with the same contents; columns never stored or freed are 0, and a mask hides them."""
        with self.state.lock:  # no other thread lets the pool grow meanwhile
            data = [read_dense(self.state, layer.blocks) for layer in self.paged_layers if layer.is_initialized]
        return DynamicCache(data)

    @classmethod
    def from_dynamic(
        cls, cache: DynamicCache, config: PreTrainedConfig, *, attention_mask: Tensor | None = None, **sizes: Any
    ) -> "PagedCache":
        """Make a PagedCache from a DynamicCache whose layers hold all columns.

        Args:
            cache: the source, left as it is.
            config: the model's config.
            attention_mask: (num_seqs, columns), 0 at padding; needed if rows are padded, since their columns differ
            then.
            sizes: block_size, num_blocks, max_length.

        Raises:
            ValueError: layers that dropped columns (a sliding window), or a mask of another shape.
        """
        layers: list[Any] = cache.layers
        lengths = {layer.keys.shape[2] for layer in layers if layer.is_initialized}
        if len(lengths) > 1 or any(getattr(layer, "is_sliding", False) for layer in layers):
            raise ValueError(f"expected layers that hold all columns; these hold {sorted(lengths)}, or drop old ones")
        paged = cls(config, **sizes)
        for layer, old in zip(paged.paged_layers, layers, strict=False):
            if not old.is_initialized:
                continue
            new = NewStates(layer, old.keys, old.values)
            layer.lazy_initialization(old.keys, old.values)
            step = paged.begin_step(layer, new, attention_mask)
            paged.store(layer, new, step, paged.state.on(new.k.device))
        if paged.state.step is not None:
            paged.state.commit()
        return paged

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(self.__getstate__())  # of the model's own config: both follow its attention implementation
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "made_dense": self.made_dense, "state": save(self.state)}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        state = saved["state"]
        self.__init__(saved["config"], **state["sizes"])  # type: ignore[misc]
        self.made_dense = saved["made_dense"]
        restore(self.state, state)
        for layer in self.paged_layers:
            layer.is_initialized = layer.blocks.k_cache is not None

    def _begin(self, layer_idx: int, new: Tensor, mask: Tensor | None, *, mask_known: bool = True) -> Step:
        if torch.compiler.is_dynamo_compiling():
            return self._begin_outside(layer_idx, new, mask, mask_known)
        try:
            return self.state.begin(layer_idx, new, mask, mask_known=mask_known)
        except BlockPoolExhausted as full:
            raise self.exhausted(full) from None

    @torch.compiler.disable
    def _begin_outside(self, layer_idx: int, new: Tensor, mask: Tensor | None, mask_known: bool) -> Step:
        """Begin on the host in the middle of a compiled graph, which breaks there."""
        with self.explain_exhaustion():
            return self.state.begin(layer_idx, new, mask, mask_known=mask_known, traced=True)

    def _select(self, index: list[int]) -> None:
        if not self.state.num_seqs:
            return
        with self.explain_exhaustion():
            self.state.select(index)

    @contextmanager
    def explain_exhaustion(self, states: Tensor | None = None) -> Iterator[None]:
        """Say in tokens and bytes what a full pool lacks, and what to change."""
        try:
            yield
        except BlockPoolExhausted as full:
            raise self.exhausted(full, states) from None

    def exhausted(self, full: BlockPoolExhausted, states: Tensor | None = None) -> BlockPoolExhausted:
        """Return the error for a full pool with its sizes in tokens and bytes."""
        size = self.state.block_size
        per_block = self.state.memory.bytes_per_block
        if not per_block and states is not None:
            heads, head_dim = states.shape[1], states.shape[3]
            per_block = 2 * len(self.layers) * size * heads * head_dim * states.element_size()
        limit = "max_length" if full.detail else "num_blocks"  # the pool is full, or a sequence is at its limit
        advice = "" if full.detail == MEMORY_FULL else f"a larger {limit} to PagedCache, "
        detail = (
            f" ({full.wanted * size} tokens, {full.wanted * per_block / 2**20:.1f} MiB; the pool holds "
            f"{full.total * size} tokens in {full.total * per_block / 2**20:.1f} MiB){full.detail}. The cache is as it "
            f"was before the call. Pass {advice}a smaller batch, or shorter sequences"
        )
        return BlockPoolExhausted(full.wanted, full.free, full.total, detail)

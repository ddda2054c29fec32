"""PagedLayer: one layer of a PagedCache, as transformers' models see it.

A layer has blocks of its own in the pool; all else belongs to the cache. The one decision: ``update`` gives handles to
models that attend through fastattn, and dense tensors to all others. Where a decode step on a CPU is like the one
before it, views serve both.
"""

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .dense_reading import read_dense
from .handles import Handle, NewStates
from .kv_pool import LayerBlocks, persistent
from .model_config import num_layers

if TYPE_CHECKING:
    from .cache import PagedCache


def refuse_export() -> None:
    """Raise if torch.export is tracing."""
    if torch.compiler._is_exporting_flag:  # torch 2.11's compiler takes is_exporting() itself for True
        raise RuntimeError(
            "a PagedCache cannot be exported: its block tables change on the host between forward passes. Export "
            "the model with another cache, or compile it with torch.compile"
        )


def _under_autocast(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's first states as they are stored: under autocast both in its dtype, which later ones follow."""
    if not torch.is_autocast_enabled(k.device.type) or k.dtype == torch.float64:
        return k, v
    dtype = torch.get_autocast_dtype(k.device.type)
    return k.to(dtype), v.to(dtype)


class PagedLayer(CacheLayerMixin):
    """One layer of a :class:`PagedCache`: its part of the block pool."""

    is_croppable = True
    is_sliding = False  # every layer keeps all tokens; a window is applied when attending

    def __init__(self, cache: "PagedCache", layer_idx: int, blocks: LayerBlocks) -> None:
        self._cache = weakref.ref(cache)  # no cycle: a cache that nobody holds gives its blocks back at once
        self.layer_idx, self.blocks = layer_idx, blocks
        self.is_initialized = False

    @property
    def cache(self) -> "PagedCache":
        """The cache that the layer belongs to, which must be alive."""
        cache = self._cache()
        assert cache is not None, "a layer of a PagedCache was used after its cache was gone"
        return cache

    @property
    def k_cache(self) -> Tensor | None:
        """The layer's keys where they are kept, (num_blocks, block_size, num_kv_heads, head_dim); None before use."""
        return self.blocks.k_cache if self.is_initialized else None

    @property
    def v_cache(self) -> Tensor | None:
        """The layer's values, like :attr:`k_cache`."""
        return self.blocks.v_cache if self.is_initialized else None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a decode step over the cache can be compiled and captured."""
        return self.cache.is_compileable

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys as a dense copy, (num_seqs, num_kv_heads, columns, head_dim); columns never stored are 0."""
        with self.cache.state.lock:
            return None if self.k_cache is None else read_dense(self.cache.state, self.blocks)[0]

    @keys.setter
    def keys(self, states: Any) -> None:
        self._refuse(states)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values as a dense copy, like :attr:`keys`."""
        with self.cache.state.lock:
            return None if self.v_cache is None else read_dense(self.cache.state, self.blocks)[1]

    @values.setter
    def values(self, states: Any) -> None:
        self._refuse(states)

    def _refuse(self, states: Any) -> None:
        """Raise unless what is set is nothing, as when a layer is made."""
        if states is not None:
            raise TypeError(
                "keys and values of a PagedCache lie in blocks, and what a layer shows of them are copies: to edit "
                'them, pass cache_implementation="dynamic" to generate(), or a DynamicCache'
            )

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 before its first use."""
        return self.cache.state.num_seqs or -1

    @torch.compiler.disable
    @persistent
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the layer's blocks from the shapes of its first states."""
        state = self.cache.state
        if state.num_seqs == 0:
            state.memory.drop_misfits(self.layer_idx, key_states)
            with self.cache.explain_exhaustion(key_states):
                state.add_batch(key_states.shape[0], key_states.shape[2])
        state.on(key_states.device)
        with self.cache.explain_exhaustion(key_states):
            state.memory.allocate(self.layer_idx, key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take new states; return handles for the attention function, or dense tensors (see the module's docstring)."""
        refuse_export()
        if not self.is_initialized:
            key_states, value_states = _under_autocast(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        k_dtype, v_dtype = self.blocks.dtypes
        if key_states.dtype != k_dtype or value_states.dtype != v_dtype:
            key_states, value_states = key_states.to(k_dtype), value_states.to(v_dtype)
        else:
            views = self._extend(key_states, value_states)
            if views is not None:
                return views
        cache = self.cache
        new, step = NewStates(self, key_states, value_states, cache), cache.state.step
        if (step is not None and step.handles and self.layer_idx > step.first_layer) or cache.uses_handles:
            return Handle(new, 0), Handle(new, 1)
        return cache.store_dense(new, handles=False)

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Store the new states of a decode step like the one before; return views of all, None in any other step."""
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return None
        cache = self.cache
        state = cache.state
        step = state.step
        if step is None:
            step = state.repeat(self.layer_idx, k, num_layers(cache.config) or 0)
        elif not step.views or self.layer_idx <= step.first_layer:
            return None
        if step is None:
            return None
        views = cache.extend(self, k, v, step)
        if self.layer_idx == step.last_layer:
            state.commit()
        return views

    def touch(self, pair: NewStates) -> tuple[Tensor, Tensor]:
        """Serve code that computes with a handle: dense tensors, from now on."""
        if not self.cache.made_dense:
            warnings.warn(
                "a model computes with cached keys or values itself: PagedCache hands out dense copies of them at "
                "every step, which is slower than DynamicCache",
                RuntimeWarning,
                stacklevel=2,
            )
        return self.cache.store_dense(pair)

    def columns_with(self, query_len: int) -> int:
        """Columns of the layer with so many new ones."""
        return self.cache.state.columns + query_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (kv_length, kv_offset); the negative capacity tells our mask function that the cache is paged."""
        return self.cache.mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """Return the columns seen by complete forward passes, padding included."""
        return self.cache.columns() if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Return the most tokens per sequence, -1 without a limit."""
        return -1 if self.cache.state.max_length is None else self.cache.state.max_length

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache.reset()

    def _whole_cache(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("the layers of a PagedCache share their blocks: call this on the cache, not on one layer")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = offload = prefetch = _whole_cache

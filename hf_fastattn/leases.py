"""Pools that outlive their caches, so that each call of generate() need not allocate its blocks anew.

A pool (the blocks of all layers) is leased to one cache. When nobody holds that cache any more, the pool becomes idle
and the model's next cache takes it; a cache that somebody holds is therefore never overwritten. A model has one idle
pool at most, kept outside it, and :func:`release` frees it. The one decision: blocks are compared with the first
states of the next cache, layer by layer, so that a model that changed its dtype or devices gets new ones.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from .cache import PagedCache, PagedLayer


@dataclass(frozen=True)
class _Pool:
    """Keys and values of every layer, (num_blocks, block_size, num_kv_heads, head_dim) each; None without blocks."""

    layers: list[tuple[Tensor, Tensor] | None]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for blocks in self.layers if blocks is not None for t in blocks)


_idle: weakref.WeakKeyDictionary[nn.Module, _Pool] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # reentrant: garbage collection may give a pool back while one is being taken


def lease(cache: "PagedCache", model: nn.Module) -> None:
    """Let a new cache take the model's idle pool, if there is one, and give its blocks back when it is garbage."""
    with _lock:
        pool = _idle.pop(model, None)
    if pool is not None:
        cache.adopt(pool.layers)
    # The state's end, not the cache's: whatever else shares the state still reads the blocks.
    weakref.finalize(cache.state, _give_back, weakref.ref(model), cache.paged_layers).atexit = False


def release(model: nn.Module | None = None) -> int:
    """Free the idle pools of all models, or of one; caches that are in use keep theirs.

    Returns:
        The bytes freed. On a GPU they go back to PyTorch's allocator.
    """
    with _lock:
        pools = list(_idle.values()) if model is None else [pool for pool in [_idle.get(model)] if pool is not None]
        if model is None:
            _idle.clear()
        else:
            _idle.pop(model, None)
    return sum(pool.num_bytes for pool in pools)


def idle_bytes(model: nn.Module) -> int:
    """Return the size of a model's idle pool, 0 without one."""
    with _lock:
        pool = _idle.get(model)
    return 0 if pool is None else pool.num_bytes


def _give_back(model_ref: "weakref.ref[nn.Module]", layers: "Sequence[PagedLayer]") -> None:
    """Keep the pool of a cache that is gone, unless the model is gone too or has a larger one."""
    model = model_ref()
    pool = _Pool([layer.blocks() for layer in layers])
    if model is None or not pool.num_bytes:
        return
    with _lock:
        other = _idle.get(model)
        if other is None or other.num_bytes < pool.num_bytes:
            _idle[model] = pool

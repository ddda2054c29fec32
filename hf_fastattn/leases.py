"""Pools that outlive their caches, so that each call of generate() need not allocate its blocks anew.

A pool (the blocks of all layers) is leased to one cache. When nobody holds that cache any more, the pool becomes idle
and the model's next cache takes it; a cache that somebody holds is therefore never overwritten. A model has one idle
pool at most, kept outside it, and :func:`release` frees it. The one decision: blocks are compared with the first
states of the next cache, layer by layer, so that a model that changed its dtype or devices gets new ones.
"""

import threading
import weakref
from typing import Any

from torch import nn

from .kv_pool import KVPool, LayerBlocks

_idle: weakref.WeakKeyDictionary[nn.Module, KVPool] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # reentrant: garbage collection may give a pool back while one is being taken


def lease(model: nn.Module, block_size: int, num_layers: int) -> KVPool:
    """Return the model's idle pool if it has one, else a new one; it is idle again when nobody uses it any more."""
    with _lock:
        pool = _idle.pop(model, None)
    if pool is None or pool.block_size != block_size or len(pool.layers) != num_layers:
        pool = KVPool(block_size, None, [LayerBlocks() for _ in range(num_layers)])
    # The pool's end, not a cache's: forks of a cache use it too.
    weakref.finalize(pool, _give_back, weakref.ref(model), block_size, pool.layers, pool.kept_tables).atexit = False
    return pool


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
    return sum(map(_num_bytes, pools))


def idle_bytes(model: nn.Module) -> int:
    """Return the size of a model's idle pool, 0 without one."""
    with _lock:
        pool = _idle.get(model)
    return 0 if pool is None else _num_bytes(pool)


def _give_back(
    model_ref: "weakref.ref[nn.Module]", block_size: int, layers: list[LayerBlocks], kept_tables: dict[Any, Any]
) -> None:
    """Keep the blocks of a pool that is gone, unless the model is gone too or has more idle ones."""
    model, pool = model_ref(), KVPool(block_size, None, layers)
    pool.kept_tables = kept_tables
    if model is None or not _num_bytes(pool):
        return
    with _lock:
        other = _idle.get(model)
        if other is None or _num_bytes(other) < _num_bytes(pool):
            _idle[model] = pool


def _num_bytes(pool: KVPool) -> int:
    return sum(t.numel() * t.element_size() for layer in pool.layers for t in layer.tensors)

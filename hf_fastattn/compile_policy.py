"""When generate() compiles the decode step of a model that is paged by default, and what if that fails.

Compiling takes longer than a short call. So the cache that is made for a call is sized, which is what makes generate()
compile, from the second call of a bucket on: as many rows, the same length rounded up, dtype and device. The one
decision: a failure to compile costs a warning and the time it took, never the call: the step runs in eager mode.
"""

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .leases import idle_bytes

LEAST_BUCKET = 256
"""Columns of the shortest bucket."""

_seen: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
_eager: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()
_graphs = 0  # that dynamo had made when garbage was last collected


def bucket_length(columns: int) -> int:
    """Return the length that a sized cache has for so many columns: at most a quarter more, and 256 at least."""
    step = max(LEAST_BUCKET, 1 << max(columns.bit_length() - 3, 0))
    return -(-columns // step) * step


def length_to_size(model: Any, config: Any, rows: int, columns: int) -> int | None:
    """Return the length for which a call's cache is to be sized; None in the first call of a bucket, or without room.

    Args:
        model: which generates.
        config: its text config.
        rows, columns: sequences, and the columns that the call can fill.
    """
    length = bucket_length(columns)
    bucket = (rows, length, model.dtype, model.device)
    with _lock:
        buckets = _seen.setdefault(model, set())
        again = bucket in buckets
        buckets.add(bucket)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if again and not idle_bytes(model):
        _collect_traces()
    needed = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize * rows * length
    return length if again and 2 * needed <= _free_bytes(model) else None


def gave_up(model: nn.Module) -> bool:
    """Return whether a model could not be compiled before."""
    return model in _eager


def forgiving(model: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model's compiled call, as one that runs the model itself where it cannot be compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if model in _eager:
            return model(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except Exception as error:
            if not _is_failure_to_compile(error):
                raise
            _eager.add(model)
            reason = " ".join(str(error).split("\n\n")[0].split())
            warnings.warn(
                f"the decode step of {type(model).__name__} could not be compiled ({type(error).__name__}: {reason}): "
                "generate() runs it in eager mode from now on. Pass disable_compile=True to do so at once",
                RuntimeWarning,
                stacklevel=2,
            )
        return model(*args, **kwargs)

    return call


def _collect_traces() -> None:
    """Let go of the caches that tracing left in reference cycles, so that their pool is the next call's."""
    global _graphs
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    if graphs != _graphs:
        _graphs = graphs
        gc.collect()


def _is_failure_to_compile(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # not while the package is imported
    from torch._inductor.exc import InductorError

    return isinstance(error, (TorchDynamoException, InductorError))


def _free_bytes(model: Any) -> float:
    """Return the memory that blocks may take, the model's idle ones included; only a GPU's is known."""
    if model.device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return free + unused + idle_bytes(model)

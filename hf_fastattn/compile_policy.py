"""When generate() compiles the decode step of a model that is paged by default, and what if that fails.

Compiling takes longer than many short calls. So the cache that is made for a call is sized, which is what makes
generate() compile, when its bucket is likely to decode enough: as many rows, the same length rounded up, dtype and
device. The one decision: a failure to compile costs a warning and the time it took, never the call: the step runs in
eager mode. Where failure is certain, or its results would be wrong, compiling is not tried.
"""

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .leases import idle_bytes
from .ops._library import has_triton
from .ops.shapes import KERNEL_DTYPES, MAX_HEAD_DIM

LEAST_BUCKET = 256
"""Columns of the shortest bucket."""

BREAK_EVEN_STEPS = 250
"""Decode steps of a bucket from which on compiling is expected to pay.

Break-even is the seconds that compiling takes over the seconds that a compiled step saves: 20 s (tracing and generating
code for 32 layers on a slow host) over 20 ms (eager steps are bound by the host) are 1000 steps. Both are estimates, to
be measured on a GPU. A quarter of that, because a bucket that came twice is likely to come again: the second of two
calls of 128 new tokens is compiled; calls of a few tokens are when they have added up.
"""

_seen: weakref.WeakKeyDictionary[nn.Module, dict[Any, "Bucket"]] = weakref.WeakKeyDictionary()
_eager: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_at_once: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()
_graphs = 0  # that dynamo had made when garbage was last collected


def bucket_length(columns: int) -> int:
    """Return the length that a sized cache has for so many columns: at most a quarter more, and 256 at least."""
    step = max(LEAST_BUCKET, 1 << max(columns.bit_length() - 3, 0))
    return -(-columns // step) * step


@dataclass
class Bucket:
    """What is known of a model's calls of one size.

    Attributes:
        calls: there were so far.
        steps: decode steps that they ran.
        compiled: a call was given a sized cache; the next ones replay what it compiled.
    """

    calls: int = 0
    steps: int = 0
    compiled: bool = False

    def pays(self, new_tokens: int) -> bool:
        """Whether a call that may decode so many tokens is to be compiled."""
        return self.compiled or self.steps + new_tokens >= BREAK_EVEN_STEPS


def length_to_size(
    model: Any, config: Any, rows: int, columns: int, new_tokens: int | None = None
) -> tuple[int | None, Bucket]:
    """Return the length for which a call's cache is to be sized, and where the call is to count its decode steps.

    The length is None in the first call of a bucket, where compiling does not pay yet, and without room.

    Args:
        model: which generates.
        config: its text config.
        rows, columns: sequences, and the columns that the call can fill.
        new_tokens: most that the call can add to each; all columns if None.
    """
    length = bucket_length(columns)
    with _lock:
        buckets = _seen.setdefault(model, {})
        bucket = buckets.setdefault((rows, length, model.dtype, model.device), Bucket())
        bucket.calls += 1
        sized = bucket.calls > 1 and (model in _at_once or bucket.pays(columns if new_tokens is None else new_tokens))
    if not sized:
        return None, bucket
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not idle_bytes(model):
        _collect_traces()
    needed = 2 * config.num_hidden_layers * heads * _head_dims(config)[0] * model.dtype.itemsize * rows * length
    if 2 * needed > _free_bytes(model):
        return None, bucket
    bucket.compiled = True
    return length, bucket


@contextmanager
def compiling_at_once(model: nn.Module) -> Iterator[None]:
    """Compile from the second call of a bucket on, however few tokens it asks for: many more calls are expected.

    Args:
        model: which generates, or a PEFT model around it.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    _at_once.add(inner)
    try:
        yield
    finally:
        _at_once.discard(inner)


def stays_eager(model: Any, options: Any) -> bool:
    """Return whether a call's decode step must not be compiled, whatever its cache.

    Args:
        model: which generates.
        options: the call's generation config.
    """
    # Replays of a captured graph write these where the step before had them, and nobody copies them.
    returned = options.output_hidden_states or options.output_attentions
    if options.return_dict_in_generate and returned:
        return True
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:  # hooks break the graph in every layer
        return True
    if not _captures(model.device):
        return False
    # PyTorch keeps its captured graphs in thread-local storage, which only the main thread is sure to have.
    return threading.current_thread() is not threading.main_thread() or not kernels_serve(model)


def kernels_serve(model: Any) -> bool:
    """Return whether the kernels take a model's shapes: what goes to PyTorch's operations instead waits for the GPU."""
    dims = _head_dims(model.config.get_text_config(decoder=True))
    return has_triton() and model.dtype in KERNEL_DTYPES and max(dims) <= MAX_HEAD_DIM


def _head_dims(config: Any) -> list[int]:
    """Return the head sizes that a text config names: that of most layers first."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    others = [getattr(config, name, None) for name in ("global_head_dim", "v_head_dim", "qk_head_dim")]
    parts = [getattr(config, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    return [size for size in (dim, *others, sum(part or 0 for part in parts)) if size]


def _captures(device: torch.device) -> bool:
    """Whether compiled steps become CUDA graphs."""
    return device.type == "cuda"


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

    if isinstance(error, AssertionError):  # of a thread without storage for captured graphs
        return _raised_in(error) == "torch._inductor.cudagraph_trees"
    return isinstance(error, (TorchDynamoException, InductorError))


def _raised_in(error: Exception) -> str | None:
    """Return the name of the module whose code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else trace.tb_frame.f_globals.get("__name__")


def _free_bytes(model: Any) -> float:
    """Return the memory that blocks may take, the model's idle ones included; only a GPU's is known."""
    if model.device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return free + unused + idle_bytes(model)

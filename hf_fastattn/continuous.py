"""Continuous batching: ``model.generate_batch`` and the managers of ``init_continuous_batching``, over the ops.

transformers schedules the requests and owns the blocks. It asks a FlashAttention for two things, which a name with
"flash" in it promises: batches without padding or masks, and decode steps that read blocks by their table. Models that
are paged by default have that name while a manager of theirs is made.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import fastattn_attention
from .cache import IMPLEMENTATION
from .compile_policy import kernels_serve
from .fallback import warn_once
from .packed import is_packed

TAKES_PREFIX = "paged|sdpa" in ALL_ATTENTION_FUNCTIONS.valid_keys()
"""Whether continuous batching wants names that begin with "paged|": transformers 5.17."""

CONTINUOUS = "paged|fastattn_flash" if TAKES_PREFIX else "fastattn_flash"
"""Name of the attention while a manager is made. No digit: a version of flash-attn would be looked for."""

KERNEL_BLOCK_SIZES = (16, 32, 64, 128, 256)

_making = threading.RLock()
"""Held while a model has the other name."""


def continuous_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Compute attention under the other name, as :func:`.attention.fastattn_attention`.

    Raises:
        RuntimeError: a call that no manager makes, with transformers 5.17, which then tells nobody of padding.
    """
    if TAKES_PREFIX and not is_packed(kwargs):
        raise RuntimeError(
            "this model is in continuous batching, and with transformers 5.17 only its manager may call it: stop the "
            f"manager first, or call model.set_attn_implementation({IMPLEMENTATION!r})"
        )
    return fastattn_attention(*args, **kwargs)


class ContinuousBatching:
    """What a model class gains: managers of continuous batching run over the ops."""

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """Return a manager as transformers does, which has its cache already."""
        model: Any = self
        make = super().init_continuous_batching  # type: ignore[misc]
        if model.config._attn_implementation not in (IMPLEMENTATION, CONTINUOUS):
            return make(generation_config, continuous_batching_config, workload_hints)
        if continuous_batching_config is None:  # transformers still looks into the generation config for it
            found = getattr(generation_config or model.generation_config, "continuous_batching_config", None)
            continuous_batching_config = found if isinstance(found, ContinuousBatchingConfig) else None
        config = copy.deepcopy(continuous_batching_config) or ContinuousBatchingConfig()
        blocks = _blocks_per_request(config, workload_hints)
        config.max_blocks_per_request = 0  # else transformers asks which version of flash-attn reads blocks
        compiled, config.decode_compile_config = config.decode_compile_config, None
        if model.device.type == "cuda" and not kernels_serve(model):
            if config.use_cuda_graph:
                warn_once("continuous batching goes without CUDA graphs: the kernels do not take this model's sizes")
            config.use_cuda_graph = False  # PyTorch's operations wait for the GPU
        cached = getattr(model, "_cached_continuous_batching_manager", None)
        device = model.device.index if model.device.type == "cuda" else -1
        with _making, _as_flash(model.config), torch.cuda.device(device):
            manager = make(generation_config, config, workload_hints)
            if manager is not cached:
                resolved = manager.continuous_batching_config
                resolved.max_blocks_per_request, resolved.decode_compile_config = blocks, compiled
                fallback = getattr(model.config.get_text_config(), "compile_config", None)
                initialization.resolve_compile_configs(resolved, fallback, True, blocks > 0)
                with torch.inference_mode(False):
                    manager.batch_processor = manager._create_batch_processor()  # with no memory set aside for masks
        if TAKES_PREFIX:  # it would make a mask over all tokens of a batch, which nobody reads
            _name(model.config, CONTINUOUS)
            manager._original_attn_impl = IMPLEMENTATION  # which comes back when the manager stops
        return manager


@contextmanager
def _as_flash(config: Any) -> Iterator[None]:
    """Name the attention so that continuous batching takes it for a FlashAttention."""
    _name(config, CONTINUOUS)
    try:
        yield
    finally:
        _name(config, IMPLEMENTATION)


def _name(config: Any, name: str) -> None:
    """Set the name in a config and in that of its text decoder, but not in those of other parts."""
    for each in (config, config.get_text_config()):
        each._attn_implementation = {"": name}


def _blocks_per_request(config: Any, hints: Any) -> int:
    """Return the columns of the block table of decode steps: what transformers would take for flash-attn, 0 for none.

    It turns tables off by itself for models with sliding windows, whose blocks are rings.
    """
    size = getattr(config, "page_size", None) or config.block_size  # the latter until 5.17
    if size not in KERNEL_BLOCK_SIZES:
        return 0
    sized = copy.deepcopy(config)
    initialization.resolve_using_hints(sized, hints)
    initialization.resolve_without_hints(sized)
    return int(sized.max_blocks_per_request)

"""Continuous batching: ``model.generate_batch`` and the managers of ``init_continuous_batching``, over the ops.

transformers schedules the requests and owns the blocks. It asks a FlashAttention for two things, which a name with
"flash" in it promises: batches without padding or masks, and decode steps that read blocks by their table. Models that
are paged by default take that name while a manager of theirs runs.
"""

import copy
import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import ops
from .attention import fastattn_attention
from .cache import IMPLEMENTATION
from .compile_policy import kernels_serve
from .fallback import AttentionOptions
from .packed import attend_packed, is_packed

TAKES_PREFIX = "paged|sdpa" in ALL_ATTENTION_FUNCTIONS.valid_keys()
"""Whether continuous batching wants names that begin with "paged|": transformers 5.17."""

CONTINUOUS = "paged|fastattn_flash" if TAKES_PREFIX else "fastattn_flash"
"""Name of the attention in continuous batching. No digit: a version of flash-attn would be looked for."""

KERNEL_BLOCK_SIZES = (16, 32, 64, 128, 256)


class _Step(threading.local):
    """What the layers of one decode step share: lengths, and who reads which keys."""

    layer = -1
    source: Tensor | None = None
    seq_lens: Tensor
    positions: Tensor
    schedules: dict[Hashable, Any]

    def begin(self, cumulative: Tensor, num_seqs: int) -> None:
        """Take the lengths of a step: cumulative (num_seqs + 1,), the new tokens included."""
        self.seq_lens = cumulative[1 : num_seqs + 1] - cumulative[:num_seqs]
        self.positions = self.seq_lens[:, None] - 1  # -1, which is not stored, where transformers pads the batch
        self.schedules = {}


_step = _Step()


def continuous_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for one layer of a model in continuous batching: see :func:`.attention.fastattn_attention`.

    Args:
        query: (1, num_heads, num_tokens, head_dim), the tokens of all requests.
        key, value: their states; where the cache was read for a batch that is not all decoding, everything that the
            requests have.
        kwargs: cu_seq_lens_q, cu_seq_lens_k and others, see :mod:`.packed`; block_table with k_cache and v_cache,
            (num_blocks, block_size, num_kv_heads, head_dim), if every request decodes one token. With transformers 5.17
            cache, read_index and write_index instead, for this function to update the cache.

    Others may call the model while a manager runs, but with transformers 5.17: it would not tell them of padding.

    Raises:
        RuntimeError: a call from elsewhere, with transformers 5.17.
    """
    if not is_packed(kwargs):
        if TAKES_PREFIX:
            raise RuntimeError(
                "this model is in continuous batching, so only its manager may call it: stop the manager first"
            )
        given: dict[str, Any] = {
            "scaling": scaling,
            "sliding_window": sliding_window,
            "softcap": softcap,
            "s_aux": s_aux,
        }
        return fastattn_attention(module, query, key, value, attention_mask, **given, **kwargs)
    options = AttentionOptions(
        softmax_scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        causal=True,
        window=sliding_window or ops.NO_WINDOW,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    if kwargs.get("cache") is not None:
        key, value = _update(module, key, value, kwargs)
    if kwargs.get("block_table") is None:
        return attend_packed(query, key, value, options, kwargs), None
    return _attend_blocks(module, query, key, value, options, kwargs), None


@torch.compiler.disable
def _attend_blocks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, given: dict[str, Any]
) -> Tensor:
    """Store one token of each request in its blocks, and attend to them."""
    block_table, k_cache, v_cache = given["block_table"], given["k_cache"], given["v_cache"]
    if module.layer_idx <= _step.layer or _step.source is not given["cu_seq_lens_q"]:
        _step.begin(given["cu_seq_lens_k"].to(torch.int32), query.shape[2])
    _step.layer, _step.source = module.layer_idx, given["cu_seq_lens_q"]
    query, key, value = (x.permute(2, 1, 0, 3) for x in (query, key, value))  # a sequence per token
    tables: dict[str, Any] = {"block_table": block_table, "seq_lens": _step.seq_lens}
    ops.store_kv(key, value, k_cache, v_cache, block_table, _step.seq_lens, positions=_step.positions)
    kind = (block_table.data_ptr(), *query.shape, value.shape[3], options.window)
    if kind not in _step.schedules:
        _step.schedules[kind] = ops.decode_schedule(query, k_cache, v_cache, window=options.window, **tables)
    out = ops.decode_attention(query, k_cache, v_cache, schedule=_step.schedules[kind], **tables, **options.decode())
    return out.transpose(0, 1)


@torch.compiler.disable
def _update(module: Any, key: Tensor, value: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Do what later versions do before they call the attention function: update the cache, choose the layer's part."""
    cache, block_table = given["cache"], given.get("block_table")
    group, index = cache.layer_index_to_group_indices[module.layer_idx]
    kind = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
    if isinstance(given["cu_seq_lens_k"], dict):
        given["cu_seq_lens_k"] = given["cu_seq_lens_k"][kind]
    if block_table is None:
        states = cache.update(key, value, module.layer_idx, given["read_index"], given["write_index"])
        key, value = (x.transpose(0, 1)[None] for x in states)
    else:
        pages = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        given["block_table"] = block_table[group]
        given["k_cache"], given["v_cache"] = (x[index].view(pages) for x in (cache.key_cache, cache.value_cache))
    return key, value


class ContinuousBatching:
    """What a model class gains: managers of continuous batching run over the ops."""

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """Return a manager as transformers does; the model attends by :data:`CONTINUOUS` until that stops."""
        model: Any = self
        make = super().init_continuous_batching  # type: ignore[misc]
        if model.config._attn_implementation != IMPLEMENTATION:
            return make(generation_config, continuous_batching_config, workload_hints)
        if continuous_batching_config is None:  # transformers still looks into the generation config for it
            continuous_batching_config = getattr(
                generation_config or model.generation_config, "continuous_batching_config", None
            )
        config = copy.deepcopy(continuous_batching_config) or ContinuousBatchingConfig()
        blocks = _blocks_per_request(config, workload_hints)
        config.max_blocks_per_request = 0  # else transformers asks which version of flash-attn reads blocks
        compiled, config.decode_compile_config = config.decode_compile_config, None
        if config.use_cuda_graph is None and not kernels_serve(model):
            config.use_cuda_graph = False  # PyTorch's operations wait for the GPU
        cached = getattr(model, "_cached_continuous_batching_manager", None)
        model.config._attn_implementation = CONTINUOUS
        try:
            manager = make(generation_config, config, workload_hints)
        except BaseException:
            model.config._attn_implementation = IMPLEMENTATION
            raise
        manager._original_attn_impl = IMPLEMENTATION  # which it restores when it stops
        if manager is not cached:
            resolved = manager.continuous_batching_config
            resolved.max_blocks_per_request, resolved.decode_compile_config = blocks, compiled
            fallback = getattr(model.config.get_text_config(), "compile_config", None)
            initialization.resolve_compile_configs(resolved, fallback, True, blocks > 0)
        return manager


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

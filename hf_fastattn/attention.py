"""The attention function that transformers calls under "fastattn": the page to read first.

Over a PagedCache the keys and values are handles: the new states are stored into blocks, then prefill_attention or
decode_attention reads them. Dense keys (no cache, DynamicCache, StaticCache; a PagedCache's own views, where a decode
step on a CPU is like the one before) take the same ops without a block table.
What the ops cannot do (gradients, dropout, additive masks) goes to PyTorch, see :mod:`hf_fastattn.fallback`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .columns import Step
from .dense_reading import column_mask, refuse_freed
from .device_tables import DeviceTables
from .fallback import AttentionOptions, fallback_attention, reason_to_fall_back, warn_once
from .handles import Handle, NewStates
from .model_config import num_layers
from .packed import attend_packed, is_packed
from .paged_layer import PagedLayer


def fastattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for one layer of a transformers model.

    Args:
        module: the attention module; its ``is_causal`` holds unless the argument is given.
        query: (batch_size, num_heads, query_len, head_dim).
        key, value: (batch_size, num_kv_heads, columns, head_dim), or the handles of a PagedCache.
        attention_mask: what :func:`hf_fastattn.masks.fastattn_mask` returned, or a user's own 4-D mask. Not read where
            sequences are packed (see :mod:`.packed`), unless it is additive.
        dropout: probability, non-zero in training only.
        scaling: softmax scale, head_dim ** -0.5 by default.
        sliding_window: tokens a query sees, its own included.
        softcap: cap of the scores (Gemma 2).
        s_aux: (num_heads,) attention sinks (gpt-oss).
        is_causal: overrides the module's.
        position_bias: additive (1 or batch_size, num_heads, query_len, columns) bias (T5).
        kwargs: anything else transformers passes; ignored.

    Returns:
        (batch_size, query_len, num_heads, value's head_dim) and None (attention weights are never computed).
    """
    if kwargs.get("output_attentions"):
        warn_once("fastattn never computes attention weights: output_attentions returns None")
    if "indices" in kwargs or "block_indices" in kwargs or "sinks" in kwargs:
        _refuse_selection(module, kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    packed = is_packed(kwargs) and (attention_mask is None or not attention_mask.is_floating_point())
    if attention_mask is None and isinstance(key, Tensor) and isinstance(value, Tensor) and not packed:
        plain = not (dropout or sliding_window or softcap) and s_aux is position_bias is None
        out = ops.decode_at_once(query, key, value, scale) if plain else None
        if out is not None:
            return out, None
    options = AttentionOptions(
        softmax_scale=scale,
        causal=bool(is_causal if is_causal is not None else getattr(module, "is_causal", True)),
        window=sliding_window or ops.NO_WINDOW,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout=dropout,
        position_bias=position_bias,
    )
    if attention_mask is None and query.shape[2] > 1 and not packed:
        _refuse_packed_cache(module, kwargs.get("position_ids"))
    wanted = query.dtype
    device = "cpu" if query.is_cpu else query.device.type  # asking a device for its type is slow
    if not wanted == key.dtype == value.dtype or torch.is_autocast_enabled(device):
        query, key, value, wanted = _one_dtype(query, key, value)
    if packed:
        if isinstance(key, Handle) or isinstance(value, Handle):
            raise ValueError(
                "sequences packed into one row cannot go into a PagedCache: pass use_cache=False to the model"
            )
        out = attend_packed(module, query, key, value, options, kwargs)
    elif isinstance(key, Handle) and isinstance(value, Handle) and key.new.dense is None:
        out = _paged_attention(module, query, key.new, attention_mask, options)
    else:
        key = key.materialize() if isinstance(key, Handle) else key
        value = value.materialize() if isinstance(value, Handle) else value
        out = _dense_attention(query, key, value, attention_mask, options)
    return out if out.dtype == wanted else out.to(wanted), None


def _refuse_selection(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise where a model selects keys, or gives sinks for each query, by arguments that would be lost here."""
    given = [name for name in ("indices", "block_indices", "sinks") if kwargs.get(name) is not None]
    if given:
        raise ValueError(
            f"{type(module).__name__} says by {', '.join(given)} what its queries attend to, which fastattn does not "
            'do: load the model with attn_implementation="sdpa"'
        )


def _one_dtype(
    query: Tensor, key: Tensor | Handle, value: Tensor | Handle
) -> tuple[Tensor, Tensor | Handle, Tensor | Handle, torch.dtype]:
    """Return the states of one call in one dtype where torch.autocast mixes them, and the dtype of its result.

    Rotary embeddings give queries and keys in float32 under autocast, and projections give values in 16 bits. What a
    cache holds keeps its dtype, of whatever calls filled it: the queries follow.
    """
    device, wanted = query.device.type, query.dtype
    autocast = torch.is_autocast_enabled(device) and wanted != torch.float64
    if autocast:
        wanted = torch.get_autocast_dtype(device)
    if isinstance(key, Handle) or isinstance(value, Handle):
        return (query.to(key.dtype) if key.dtype == value.dtype else query), key, value, wanted
    if autocast:
        query, key, value = query.to(wanted), key.to(wanted), value.to(wanted)
    return query, key, value, wanted


def _paged_attention(
    module: nn.Module, query: Tensor, new: NewStates, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Store a layer's new states and attend to all that it has."""
    layer = new.layer
    assert isinstance(layer, PagedLayer)
    cache, ours = layer.cache, mask is None or mask.dtype == torch.int8
    if mask is not None and ours:
        options = options._replace(causal=True)
    if cache.made_dense or not ours or reason_to_fall_back(query, new.v, options):
        k, v = cache.store_dense(new, commit=False)
        if mask is not None and not ours:
            refuse_freed(cache.state, mask)
        if mask is None:  # one query over blocks needs no mask, but dense keys have columns for padding
            mask = column_mask(cache.state)
            mask = None if mask is None else mask.to(query.device)
        out = _dense_attention(query, k, v, mask, options)
    else:
        step = cache.begin_step(layer, new, None if mask is None else mask[:, 0, 0])
        cache.state.look_back(step, options.window if options.causal else ops.NO_WINDOW)
        if step.runs is not None:
            k, v = cache.extend(layer, *new.detached(), step)
            if step.fresh:  # nothing lies before: attend to the states themselves, which are warm
                k, v = new.k, new.v
            out = _attend_dense(query, k, v, None, options)
        else:
            tables = cache.state.on(query.device)
            k_cache, v_cache = cache.store(layer, new, step, tables)
            if step.fresh:
                key_mask = None if step.mask is None else step.mask.to(query.device)
                out = ops.prefill_attention(query, new.k, new.v, key_mask=key_mask, **options.prefill())
            else:
                out = _attend_blocks(query, k_cache, v_cache, step, tables, options)
    current = cache.state.step
    assert current is not None
    if current.last_layer is None:
        current.last_layer = _last_layer(module, layer)
    # A layer that shares keys comes behind the one that stored them; one that is run again stores under later numbers.
    if max(getattr(module, "layer_idx", 0), layer.layer_idx) == current.last_layer:
        own = layer.layer_idx == current.last_layer  # not keys that it shares with an earlier layer
        cache.state.commit(may_repeat=own and not cache.made_dense)
    return out


def _attend_blocks(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, step: Step, tables: DeviceTables, options: AttentionOptions
) -> Tensor:
    """Attend to blocks: a few queries per sequence by splitting the keys, many by tiling the queries."""
    positions = step.queries
    if positions is not None:  # of the last queries, where a model drops the others in its last layers
        positions = positions[:, positions.shape[1] - query.shape[2] :]
    if positions is None and options.causal and query.shape[2] <= ops.MAX_DECODE_QUERY_LEN:
        given: dict[str, Any] = {
            "block_table": tables.block_table,
            "seq_lens": tables.seq_lens,
            "shared_prefixes": tables.shared_prefixes if tables.key_mask is None else None,
        }
        kind = (query.device, query.dtype, *query.shape[1:], *v_cache.shape[2:], options.window)
        if kind not in step.schedules:  # one for all layers of the kind
            step.schedules[kind] = ops.decode_schedule(query, k_cache, v_cache, window=options.window, **given)
        schedule = step.schedules[kind]
        return ops.decode_attention(
            query, k_cache, v_cache, key_mask=tables.key_mask, schedule=schedule, **given, **options.decode()
        )
    return ops.prefill_attention(
        query,
        k_cache,
        v_cache,
        block_table=tables.block_table,
        seq_lens=tables.seq_lens,
        key_mask=tables.key_mask,
        query_positions=None if positions is None else positions.to(query.device),
        **options.prefill(),
    )


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend to dense keys: (batch_size, num_kv_heads, columns, head_dim)."""
    reason = reason_to_fall_back(query, value, options)
    key_mask = None
    if mask is not None and reason is None:
        if mask.dtype in (torch.int8, torch.uint8):
            key_mask = mask[:, 0, 0]
            options = options._replace(causal=mask.dtype == torch.int8)
        elif mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) and query.shape[2] == 1:
            key_mask = mask[:, 0, 0]  # one query: its row of the mask is key padding, the window included
            options = options._replace(causal=False)
        else:
            reason = f"a {mask.dtype} mask over queries and keys was given".replace("torch.", "")
    if reason is not None:
        warn_once(f"fastattn leaves this to PyTorch's attention, because {reason}")
        return fallback_attention(query, key, value, mask, options)
    if key_mask is not None:
        key_mask = key_mask.expand(query.shape[0], -1)
    return _attend_dense(query, key, value, key_mask, options)


def _attend_dense(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend to dense keys under key padding alone."""
    if query.shape[2] > 1:
        return ops.prefill_attention(query, key, value, key_mask=key_mask, **options.prefill())
    return ops.decode_attention(
        query,
        key,
        value,
        softmax_scale=options.softmax_scale,
        key_mask=key_mask,
        sinks=options.sinks,
        window=options.window if options.causal else ops.NO_WINDOW,
        softcap=options.softcap,
    )


def _last_layer(module: nn.Module, layer: PagedLayer) -> int:
    """Return the layer that a forward pass ends with, as the config says at run time (early exit lowers its number)."""
    layers = num_layers(getattr(module, "config", layer.cache.config))
    return int(layers or layer.cache.config.num_hidden_layers) - 1


def _refuse_packed_cache(module: nn.Module, position_ids: Any) -> None:
    """Raise if several sequences are packed into a row that no mask parts, as they would see each other."""
    if getattr(module, "layer_idx", None) != 0 or torch.compiler.is_dynamo_compiling():
        return
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return
    if bool((position_ids.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids start anew within a row, so several sequences are packed into it, but no mask keeps them "
            "apart: pass use_cache=False to the model, or an attention mask"
        )

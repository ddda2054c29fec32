"""PyTorch attention for what the ops do not do: gradients, dropout, additive masks and any other mask a user brings."""

import functools
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionOptions(NamedTuple):
    """What one layer asks of attention beside its tensors; see :func:`hf_fastattn.ops.prefill_attention`."""

    softmax_scale: float
    causal: bool
    window: int
    softcap: float
    sinks: Tensor | None = None
    dropout: float = 0.0
    position_bias: Tensor | None = None

    def decode(self) -> dict[str, Any]:
        """Keyword arguments for decode_attention."""
        return {
            "softmax_scale": self.softmax_scale,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }

    def prefill(self) -> dict[str, Any]:
        """Keyword arguments for prefill_attention."""
        return {"causal": self.causal, **self.decode()}


def reason_to_fall_back(query: Tensor, value: Tensor, options: AttentionOptions) -> str | None:
    """Return why a call cannot take the ops, or None if it can."""
    if torch.is_grad_enabled() and (query.requires_grad or value.requires_grad):
        return "gradients are needed"
    if options.dropout > 0.0:
        return "attention dropout is on"
    if options.position_bias is not None:
        return "the model adds a position bias to its scores"
    return None


def fallback_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend through PyTorch, differentiably.

    Args:
        query: (batch_size, num_heads, query_len, head_dim). key, value: (batch_size, num_kv_heads, columns, head_dim).
        mask: None, int8 or uint8 key padding (see :mod:`hf_fastattn.masks`), or a 4-D bool or additive float mask,
        which
            is then the whole truth: no causality or window is added to it, as in eager attention.
        options: the layer's options.

    Returns:
        (batch_size, query_len, num_heads, value's head_dim); a query that sees no key gives 0.
    """
    query_len, columns = query.shape[2], key.shape[2]
    plain = mask is None and query_len == columns and options.window >= columns
    if plain and options.causal and options.softcap == 0.0 and options.sinks is None and options.position_bias is None:
        scale = options.softmax_scale
        if not scale > 0:  # is_causal gives NaN with such a factor
            query, scale = query * scale, 1.0
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=options.dropout, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()
    bias = _bias(query, columns, mask, options)
    if options.softcap == 0.0 and options.sinks is None:
        out = F.scaled_dot_product_attention(
            query, key, value, bias, dropout_p=options.dropout, scale=options.softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()
    return _eager(query, key, value, bias, options)


def _bias(query: Tensor, columns: int, mask: Tensor | None, options: AttentionOptions) -> Tensor | None:
    """Return the additive or boolean mask of a call, None if everything may be seen."""
    bias = mask
    if mask is None or mask.dtype in (torch.int8, torch.uint8):
        visible = None if mask is None else mask[..., :columns] != 0
        if options.causal and (mask is None or mask.dtype == torch.int8):
            query_len = query.shape[2]
            rows = torch.arange(columns - query_len, columns, device=query.device)[:, None]
            keys = torch.arange(columns, device=query.device)
            causal = (keys <= rows) & (keys > rows - options.window)
            visible = causal if visible is None else visible & causal
        bias = visible
    if bias is not None and bias.is_floating_point():
        bias = bias.to(query.dtype)
    if options.position_bias is None:
        return bias
    position_bias = options.position_bias.to(query.dtype)
    if bias is None:
        return position_bias
    if bias.is_floating_point():
        return bias + position_bias
    return position_bias.masked_fill(~bias, torch.finfo(query.dtype).min)


def _eager(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    """Attend with the whole score matrix: softcap and sinks have no other differentiable form in PyTorch."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * options.softmax_scale
    if options.softcap > 0.0:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if bias is not None:
        scores = scores + bias if bias.is_floating_point() else scores.masked_fill(~bias, torch.finfo(scores.dtype).min)
    if options.sinks is not None:
        column = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    if bias is not None and not bias.is_floating_point():
        weights = weights.masked_fill(~bias, 0.0)  # a row that is hidden whole
    weights = F.dropout(weights, options.dropout, training=options.dropout > 0.0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


def warn_once(message: str) -> None:
    """Warn the first time a message is given in a process; silent inside a compiled graph."""
    if not torch.compiler.is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)

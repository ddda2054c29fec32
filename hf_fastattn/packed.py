"""Attention for batches without padding: all sequences lie one behind the other in a single row.

transformers says where they begin by the keyword arguments of its FlashAttention (``DataCollatorWithFlattening``,
continuous batching): cu_seq_lens_q and cu_seq_lens_k, (num_seqs + 1,), and the longest lengths, max_length_q and
max_length_k, which transformers 5.17 calls max_seqlen_q and max_seqlen_k in continuous batching.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import ops
from .fallback import AttentionOptions, fallback_attention, reason_to_fall_back, warn_once


def is_packed(given: Mapping[str, Any]) -> bool:
    """Return whether the keyword arguments of an attention call say where sequences begin."""
    return given.get("cu_seq_lens_q") is not None and given.get("cu_seq_lens_k") is not None


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, given: Mapping[str, Any]
) -> Tensor:
    """Attend each sequence to itself.

    Args:
        query: (1, num_heads, num_queries, head_dim). key, value: (1, num_kv_heads, num_keys, head_dim).
        options: the layer's options.
        given: keyword arguments of the call, see :func:`is_packed`.

    Returns:
        (1, num_queries, num_heads, value's head_dim).

    Raises:
        ValueError: more than one row.
    """
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q says where sequences begin that are packed into one row, got {query.shape[0]} rows"
        )
    query_starts, key_starts = (given[f"cu_seq_lens_{side}"].to(torch.int32) for side in "qk")
    reason = reason_to_fall_back(query, value, options)
    if reason is not None:
        warn_once(f"fastattn leaves this to PyTorch's attention, because {reason}")
        visible = _visible(query_starts, key_starts, query.shape[2], key.shape[2], options)
        return fallback_attention(query, key, value, visible[None, None], options)
    longest = given.get("max_length_q")
    longest = given.get("max_seqlen_q") if longest is None else longest
    out = ops.packed_attention(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        query_starts=query_starts,
        key_starts=key_starts,
        max_query_len=query.shape[2] if longest is None else int(longest),
        **options.prefill(),
    )
    return out[None]


def _visible(
    query_starts: Tensor, key_starts: Tensor, num_queries: int, num_keys: int, options: AttentionOptions
) -> Tensor:
    """Return which keys each query sees, (num_queries, num_keys) bool."""
    owners, positions = [], []
    lengths = key_starts.diff()
    for starts, size in ((query_starts, num_queries), (key_starts, num_keys)):
        rows = torch.arange(size, dtype=torch.int32, device=starts.device)
        owner = torch.searchsorted(starts, rows, right=True) - 1
        inside = (owner >= 0) & (owner < len(lengths))
        behind = starts[(owner + 1).clamp(max=len(lengths))] - rows  # from a row to the end of its sequence
        positions.append(lengths[owner.clamp(0, max(len(lengths) - 1, 0))] - behind)
        owners.append(torch.where(inside, owner, -1))
    visible = (owners[0][:, None] == owners[1]) & (owners[0][:, None] >= 0)
    if options.causal:
        distance = positions[0][:, None] - positions[1]
        visible &= (distance >= 0) & (distance < options.window)
    return visible

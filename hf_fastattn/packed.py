"""Attention for batches without padding: all sequences lie one behind the other in a single row.

transformers says where they begin by the keyword arguments of its FlashAttention (``DataCollatorWithFlattening``,
continuous batching): cu_seq_lens_q and cu_seq_lens_k, (num_seqs + 1,), and the longest lengths, max_length_q and
max_length_k, which transformers 5.17 calls max_seqlen_q and max_seqlen_k in continuous batching.

Continuous batching has a cache of its own. It has either been read into the keys and values, or, where every sequence
decodes one token, there are block_table, (num_seqs, max_blocks) int32, and k_cache and v_cache, (num_blocks,
block_size, num_kv_heads, head_dim), to write and read. transformers 5.17 leaves both to the attention function: it
gives the cache, read_index and write_index.
"""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .fallback import AttentionOptions, fallback_attention, reason_to_fall_back, warn_once


def is_packed(given: dict[str, Any]) -> bool:
    """Return whether the keyword arguments of an attention call say where sequences begin."""
    return given.get("cu_seq_lens_q") is not None and given.get("cu_seq_lens_k") is not None


def attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, given: dict[str, Any]
) -> Tensor:
    """Attend each sequence to itself.

    Args:
        module: the attention module.
        query: (1, num_heads, num_queries, head_dim). key, value: (1, num_kv_heads, num_keys, head_dim).
        options: the layer's options.
        given: keyword arguments of the call, see above.

    Returns:
        (1, num_queries, num_heads, value's head_dim).

    Raises:
        ValueError: more than one row.
    """
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q says where sequences begin that are packed into one row, got {query.shape[0]} rows"
        )
    if given["cu_seq_lens_q"].dim() != 1:
        raise ValueError(f"expected cu_seq_lens_q (num_seqs + 1,), got {tuple(given['cu_seq_lens_q'].shape)}")
    if given.get("cache") is not None:
        given = dict(given)
        key, value = _update(module, key, value, given)
    if given.get("block_table") is not None:
        return _attend_blocks(module, query, key, value, options, given)
    return _attend_packed(query, key, value, options, given)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, given: dict[str, Any]
) -> Tensor:
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
        max_query_len=longest if isinstance(longest, int) else query.shape[2],  # no wait for a number on the device
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


# Continuous batching


class _Step(threading.local):
    """What the layers of one decode step share: lengths, and who reads which keys."""

    layer = -1
    source: Callable[[], Tensor | None] = staticmethod(lambda: None)  # weakly, as managers own it
    seq_lens: Tensor
    positions: Tensor
    schedules: dict[Hashable, Any]

    def begin(self, cumulative: Tensor, num_seqs: int) -> None:
        """Take the lengths of a step: cumulative (num_seqs + 1,), the new tokens included."""
        self.seq_lens = cumulative[1 : num_seqs + 1] - cumulative[:num_seqs]
        self.positions = self.seq_lens[:, None] - 1  # -1, which is not stored, where transformers pads the batch
        self.schedules = {}


_step = _Step()


@torch.compiler.disable
def _attend_blocks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, given: dict[str, Any]
) -> Tensor:
    """Store one token of each request in its blocks, and attend to them."""
    block_table, k_cache, v_cache = given["block_table"], given["k_cache"], given["v_cache"]
    if module.layer_idx <= _step.layer or _step.source() is not given["cu_seq_lens_q"]:
        _step.begin(given["cu_seq_lens_k"].to(torch.int32), query.shape[2])
        _step.source = weakref.ref(given["cu_seq_lens_q"])
    _step.layer = module.layer_idx
    query, key, value = (x.permute(2, 1, 0, 3).to(k_cache.dtype) for x in (query, key, value))  # a sequence per token
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

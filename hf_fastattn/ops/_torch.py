"""The attention ops in PyTorch: what a CPU runs, and any device without a Triton kernel.

Built for speed where a CPU spends its time: sequences whose blocks lie in one run are read through a view without a
copy, the query heads of one key head become rows of one tile (so that keys are read once, not once per query head), a
sliding window slices the keys, and a mask is built only for tiles of queries, never for the whole score matrix.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cpu_schedule import CpuSchedule, Part
from ._views import check_lens, even_runs, is_flat, read_blocks, view_runs
from .shapes import NO_WINDOW

QUERY_TILE = 1024
"""Queries attended at once where a mask is needed: bounds the memory of the mask."""

MAX_PACKED = 128
"""Most queries of one key head, over its query heads, that are packed into one tile."""

LEAST_MASKED = 1024
"""Keys of the smallest mask that is kept for few queries."""

REREAD_KEYS = 2**24
"""Bytes of one head's keys, times their dimension, up to which its query heads read them one after the other, from a
processor's cache: 1024 tokens of 64 numbers in float32, 256 of 128, where packing the heads has begun to pay. Not where
products of few rows are fast."""

STREAMED_KEYS = 2**19
"""Elements of a sequence's K from which they are taken to come from memory, not from a processor's cache; there two
plain products beat PyTorch's fused attention, unless products of few rows are fast."""

CPU_INFO = "/proc/cpuinfo"


@functools.cache
def few_rows_are_fast() -> bool:
    """Whether PyTorch multiplies a few rows as fast as it reads the matrix: MKL does on the processors of its maker."""
    try:
        with open(CPU_INFO, encoding="utf-8") as info:
            return "GenuineIntel" in info.read(256) and torch.backends.mkl.is_available()
    except OSError:
        return False


def attend_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_positions: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    *,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    shared_prefixes: Tensor | None = None,
    schedule: CpuSchedule | None = None,
) -> Tensor:
    """Attend over blocks: in as few calls as the batch allows, else sequence by sequence.

    schedule: of a CPU's decode step, made here if there is none.
    """
    num_seqs, num_heads, query_len, _ = q.shape
    if query_len == 1 and query_positions is None and q.is_cpu:
        window = window if causal else NO_WINDOW
        schedule = schedule or make_cpu_schedule(k_cache, v_cache, block_table, seq_lens, shared_prefixes, window)
        out = _attend_scheduled(q, k_cache, v_cache, schedule, key_mask, sinks, softmax_scale, softcap)
        if out is not None:
            return out
    lens = seq_lens.tolist()
    check_lens(lens, block_table, k_cache.shape[1])
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal, "window": window, "softcap": softcap}
    size = k_cache.shape[1]

    def first_seen(position: int) -> int:  # block; those before it may be gone
        return max(position - window + 1, 0) // size if causal else 0

    if query_positions is None and lens and min(lens) == max(lens) > 0:
        first = first_seen(lens[0] - query_len)
        run = even_runs(block_table[:, first:], -(-lens[0] // size) - first)
        if run is not None and is_flat(k_cache) and is_flat(v_cache):
            k, v = (view_runs(cache, num_seqs, lens[0] - first * size, *run) for cache in (k_cache, v_cache))
            mask = None if key_mask is None else key_mask[:, first * size :]
            return attend_dense(q, k, v, mask, sinks, **options)
    out = q.new_zeros(num_seqs, query_len, num_heads, v_cache.shape[3])
    for row, seq_len in enumerate(lens):
        positions, oldest = None, seq_len - query_len
        if query_positions is not None:
            positions = query_positions[row]
            real = (positions >= 0).nonzero().flatten()
            count = real.numel()
            if count == 0:
                continue
            oldest = int(positions[real[0]])
        first = first_seen(oldest)
        blocks = block_table[row, first : -(-seq_len // size)].tolist()
        k, v = (read_blocks(cache, blocks, seq_len - first * size) for cache in (k_cache, v_cache))
        q_row, mask = q[row : row + 1], None if key_mask is None else key_mask[row : row + 1, first * size :]
        if positions is None:
            out[row] = attend_dense(q_row, k, v, mask, sinks, **options)[0]
            continue
        positions = positions - first * size
        last = int(positions[real[-1]]) + 1  # in-order positions without a gap end at `last`
        if causal and last - int(positions[real[0]]) == count:
            k, v = k[:, :, :last], v[:, :, :last]
            out[row, real] = attend_dense(q_row[:, :, real], k, v, mask, sinks, **options)[0]
        else:
            out[row, real] = _attend_tiles(q_row[:, :, real], k, v, mask, sinks, positions[real], **options)[0]
    return out


def make_cpu_schedule(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    shared_prefixes: Tensor | None,
    window: int,
) -> CpuSchedule | None:
    """Return how a CPU reads the blocks of a decode step with one query per sequence; None if there are no tokens."""
    lens = seq_lens.tolist()
    if not any(lens):
        return None
    return CpuSchedule(
        block_table,
        lens,
        () if shared_prefixes is None else shared_prefixes.tolist(),
        block_size=k_cache.shape[1],
        num_blocks=k_cache.shape[0],
        window=window,
        token_bytes=sum(math.prod(cache.shape[2:]) * cache.element_size() for cache in (k_cache, v_cache)),
    )


def _attend_scheduled(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    schedule: CpuSchedule | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    softcap: float,
) -> Tensor | None:
    """Attend one query per sequence; None if that has to be done otherwise.

    What a view reaches behind the end of a sequence gets the weight 0, and changes nothing unless it is NaN or
    infinite: then the result is NaN, and the sequences have to be read one by one.
    """
    if schedule is None:
        return None
    if key_mask is None and sinks is None and softcap == 0.0 and q.shape[3] == v_cache.shape[3]:
        masked = any(part.reading.visible is not None for part in schedule.parts)
        if schedule.disjoint:
            outs = []
            for part in schedule.parts:
                k, v = part.reading.read(k_cache), part.reading.read(v_cache)
                bias = part.reading.bias(q.dtype)
                outs.append(attend_one_query(q[part.first : part.end], k, v, softmax_scale, bias))
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
        else:
            out = _attend_parts(q, k_cache, v_cache, schedule.parts, softmax_scale)
    else:
        reading = schedule.together
        visible = reading.visible
        if key_mask is not None:
            begins = torch.tensor(reading.begins)[:, None]
            shown = key_mask.gather(1, (begins + torch.arange(reading.count)).clamp(max=key_mask.shape[1] - 1)) != 0
            visible = shown if visible is None else visible & shown
        k, v, masked = reading.read(k_cache), reading.read(v_cache), visible is not None
        out = _masked(q, k, v, None if visible is None else visible[:, None], sinks, softmax_scale, softcap)
    return None if masked and math.isnan(float(out.sum())) else out


def _attend_parts(q: Tensor, k_cache: Tensor, v_cache: Tensor, parts: list[Part], softmax_scale: float) -> Tensor:
    """Attend one query per sequence to its parts, and join the results by their logsumexp (FlashDecoding).

    The logsumexp is rounded like the scores that it sums, so joining loses no more than scoring.
    """
    num_seqs, num_heads, _, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    grouped = q.reshape(num_seqs, num_kv_heads, -1, head_dim)
    group = grouped.shape[2]
    acc = torch.zeros(grouped.shape, dtype=torch.float32)
    total = acc.new_full(grouped.shape[:3], torch.finfo(torch.float32).min)
    for part in parts:
        rows, reading = slice(part.first, part.end), part.reading
        k, v, packed = reading.read(k_cache), reading.read(v_cache), grouped[rows]
        if part.shared:
            packed = packed.transpose(0, 1).reshape(1, num_kv_heads, -1, head_dim)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            packed, k, v, attn_mask=reading.bias(q.dtype), scale=softmax_scale
        )
        if part.shared:
            out = out.view(num_kv_heads, -1, group, head_dim).transpose(0, 1)
            lse = lse.view(num_kv_heads, -1, group).transpose(0, 1)
        acc[rows].lerp_(out.float(), torch.sigmoid(lse - total[rows])[..., None])
        total[rows] = torch.logaddexp(total[rows], lse)
    return acc.view(num_seqs, 1, num_heads, head_dim).to(q.dtype)


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    *,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """Attend over dense keys (num_seqs, num_kv_heads, seq_len, head_dim), queries aligned with the last key."""
    (num_seqs, num_heads, query_len, _), seq_len = q.shape, k.shape[2]
    if num_seqs == 0 or query_len == 0 or seq_len == 0:
        return q.new_zeros(num_seqs, query_len, num_heads, v.shape[3])
    if key_mask is not None:
        key_mask = key_mask[:, :seq_len]
        if key_mask.is_cpu and not torch.jit.is_tracing() and bool(key_mask.all()):  # a GPU would have to be waited for
            key_mask = None
    if not softmax_scale > 0:  # is_causal gives NaN with such a factor
        q, softmax_scale = q * softmax_scale, 1.0
    if causal and query_len == 1 and window < seq_len:
        k, v = k[:, :, -window:], v[:, :, -window:]
        key_mask = None if key_mask is None else key_mask[:, -window:]
    plain = key_mask is None and softcap == 0.0 and sinks is None
    if plain and query_len == 1:
        return attend_one_query(q, k, v, softmax_scale)
    if plain and not causal:
        return _sdpa(q, k, v, softmax_scale)
    group = num_heads // k.shape[1]
    if plain and query_len < seq_len and group * query_len <= MAX_PACKED:
        reach = min(seq_len, window + query_len - 1)
        room = max(1 << (reach - 1).bit_length(), LEAST_MASKED)  # the same for many steps
        mask = _last_queries_mask(query_len, room, window, group, q.dtype, q.device)[..., room - reach :]
        return _sdpa(q, k[:, :, -reach:], v[:, :, -reach:], softmax_scale, mask)
    if plain and query_len == seq_len <= window:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()
    positions = torch.arange(seq_len - query_len, seq_len, device=q.device) if query_len > 1 and causal else None
    return _attend_tiles(
        q, k, v, key_mask, sinks, positions, softmax_scale=softmax_scale, causal=causal, window=window, softcap=softcap
    )


@functools.lru_cache(maxsize=2)  # a layer with a window and one without; 64 MiB each at 128k tokens
def _last_queries_mask(
    query_len: int, seq_len: int, window: int, group: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the additive mask of the last queries, (1, 1, group * query_len, seq_len); its end serves shorter ones.

    It holds the query_len rows ``group`` times, for heads packed as :func:`_sdpa` packs them.
    """
    with torch.inference_mode(False):
        columns = torch.arange(seq_len, device=device)
        rows = torch.arange(seq_len - query_len, seq_len, device=device)[:, None]
        hidden = (columns > rows) | (columns <= rows - window)
        mask = torch.zeros(query_len, seq_len, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        return mask.repeat(group, 1)[None, None]


def attend_one_query(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None = None) -> Tensor:
    """Attend one query per head to dense keys, at least one; mask: broadcast over heads."""
    num_seqs, num_heads, _, head_dim = q.shape
    _, num_kv_heads, seq_len, _ = k.shape
    group, fast = num_heads // num_kv_heads, few_rows_are_fast()
    if mask is None and num_kv_heads * seq_len * head_dim >= STREAMED_KEYS and q.dtype == torch.float32 and not fast:
        return _stream_one_query(q, k, v, softmax_scale)
    if group > 1 and (fast or seq_len * head_dim**2 * k.element_size() > REREAD_KEYS):  # query heads become queries
        q = q.reshape(num_seqs, num_kv_heads, group, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=group > 1)
    return out.reshape(num_seqs, 1, num_heads, v.shape[3])


def _stream_one_query(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Attend one fp32 query per head to many keys, by two matrix products.

    With so few rows the time is that of reading keys and values from memory. ``k @ q`` streams them, while PyTorch's
    fused attention waits for each line: 0.55 against 0.74 ms on 2 cores for the 8 MB of 8192 tokens.
    """
    num_seqs, num_heads, _, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q = (q * softmax_scale).view(num_seqs, num_kv_heads, -1, head_dim)
    out = q.new_empty(num_seqs, num_kv_heads, q.shape[2], v.shape[3])
    for q_i, k_i, v_i, out_i in zip(q, k, v, out, strict=True):
        scores = torch.bmm(k_i, q_i.transpose(1, 2)).transpose(1, 2).contiguous()
        torch.bmm(scores.softmax(-1), v_i, out=out_i)
    return out.view(num_seqs, 1, num_heads, v.shape[3])


def _attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    positions: Tensor | None,
    *,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """Attend tile by tile of queries, each on the keys that it can see. positions: (query_len,), rising."""
    outs = []
    for start in range(0, q.shape[2], QUERY_TILE):
        q_tile = q[:, :, start : start + QUERY_TILE]
        if positions is None or not causal:
            first, last, visible = 0, k.shape[2], None
        else:
            rows = positions[start : start + QUERY_TILE].to(torch.int64)
            first = min(max(int(rows[0]) - window + 1, 0), k.shape[2])
            last = max(int(rows[-1]) + 1, 0)
            columns = torch.arange(first, min(last, k.shape[2]), device=q.device)
            visible = (columns <= rows[:, None]) & (columns > rows[:, None] - window)
            visible = visible[None]  # (1, tile, keys)
        if key_mask is not None:
            keys = key_mask[:, None, first:last].bool()
            visible = keys if visible is None else visible & keys
        outs.append(_masked(q_tile, k[:, :, first:last], v[:, :, first:last], visible, sinks, softmax_scale, softcap))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, sinks: Tensor | None, softmax_scale: float, softcap: float
) -> Tensor:
    """Attend under a mask (1 or num_seqs, 1 or query_len, seq_len); a query that sees no key gives 0."""
    num_seqs, num_heads, query_len, _ = q.shape
    num_kv_heads = k.shape[1]
    if k.shape[2] == 0:
        return q.new_zeros(num_seqs, query_len, num_heads, v.shape[3])
    if softcap == 0.0 and sinks is None:
        mask = None if visible is None else visible[:, None]
        return _sdpa(q, k, v, softmax_scale, mask)
    grouped = q.reshape(num_seqs, num_kv_heads, -1, query_len, q.shape[3])
    scores = torch.matmul(grouped, k[:, :, None].transpose(3, 4)).float() * softmax_scale
    if softcap > 0.0:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        logits = sinks.float().view(1, num_kv_heads, -1, 1, 1)
        peak = torch.maximum(peak, logits)
    peak = peak.clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(logits - peak)
    weights = weights / total.clamp(min=torch.finfo(torch.float32).tiny)
    out = torch.matmul(weights.to(v.dtype), v[:, :, None])
    return out.reshape(num_seqs, num_heads, query_len, -1).transpose(1, 2).contiguous()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None = None) -> Tensor:
    """Call PyTorch's attention without causality; few queries are packed by key head so that keys are read once."""
    num_seqs, num_heads, query_len, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    if query_len == 1:
        return attend_one_query(q, k, v, softmax_scale, mask)
    if group > 1 and group * query_len <= MAX_PACKED:
        packed = q.reshape(num_seqs, num_kv_heads, group * query_len, head_dim)
        if mask is not None and mask.shape[2] == query_len:
            mask = mask.repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=softmax_scale)
        out = out.reshape(num_seqs, num_heads, query_len, v.shape[3])
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=group > 1)
    return out.transpose(1, 2).contiguous()

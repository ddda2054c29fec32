"""The inner loop of prefill attention: a tile of queries meets one KV tile after the other."""

import triton
import triton.language as tl

from ._loads import load_ahead
from ._softmax import softmax_step, tanh_from_log2


@triton.jit
def attend_tiles(
    acc,
    m_i,
    l_i,
    q,
    query_pos,
    k_ptr,
    v_ptr,
    table_ptr,
    key_mask_ptr,
    scale,
    cap_log2,
    window,
    max_blocks,
    k_begin,
    k_end,
    first_tile,
    num_tiles,
    gap_at,
    gap,
    stride_k_block,
    stride_k_token,
    stride_v_block,
    stride_v_token,
    stride_table_block,
    stride_mask_token,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    KV_BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Take num_tiles key tiles from first_tile on, skipping ``gap`` tiles at the gap_at-th, into acc, m_i and l_i.

    EDGE: some query of the tile may not see some key of these tiles; keys outside [k_begin, k_end) are not loaded.
    Without EDGE every key is seen by every query, as far as positions go (key_mask applies in both).
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    within = offs_n % KV_BLOCK_SIZE if KV_BLOCK_SIZE > 0 else offs_n
    k_offs = (within * stride_k_token)[:, None] + offs_d[None, :]  # [BLOCK_N, BLOCK_D] int32, inside one block
    v_offs = (within * stride_v_token)[:, None] + offs_dv[None, :]  # [BLOCK_N, BLOCK_DV]
    for t in tl.range(0, num_tiles):
        tile = first_tile + t
        if EDGE:
            tile += tl.where(t >= gap_at, gap, 0)
        start = tile * BLOCK_N
        keys = start + offs_n
        if KV_BLOCK_SIZE == 0:  # dense
            k_ptrs = k_ptr + start.to(tl.int64) * stride_k_token + k_offs
            v_ptrs = v_ptr + start.to(tl.int64) * stride_v_token + v_offs
        elif KV_BLOCK_SIZE >= BLOCK_N:  # one block holds the tile
            entry = tl.minimum(start // KV_BLOCK_SIZE, max_blocks - 1)
            block = tl.maximum(load_ahead(table_ptr + entry * stride_table_block, ASM), 0).to(tl.int64)
            k_ptrs = k_ptr + (block * stride_k_block + start % KV_BLOCK_SIZE * stride_k_token) + k_offs
            v_ptrs = v_ptr + (block * stride_v_block + start % KV_BLOCK_SIZE * stride_v_token) + v_offs
        else:  # several blocks make up the tile
            entry = tl.minimum(keys // KV_BLOCK_SIZE, max_blocks - 1)
            block = tl.maximum(load_ahead(table_ptr + entry * stride_table_block, ASM), 0).to(tl.int64)
            k_ptrs = k_ptr + (block * stride_k_block)[:, None] + k_offs
            v_ptrs = v_ptr + (block * stride_v_block)[:, None] + v_offs

        in_range = tl.full([BLOCK_N], True, tl.int1)
        if EDGE:
            in_range = (keys >= k_begin) & (keys < k_end)
        shown = in_range
        if key_mask_ptr is not None:
            column = tl.maximum(tl.minimum(keys, k_end - 1), 0)
            shown &= load_ahead(key_mask_ptr + column * stride_mask_token, ASM) != 0
        k_mask = in_range[:, None]
        v_mask = shown[:, None]  # 0 * NaN is NaN: no value of a hidden key enters the product
        if HEAD_DIM != BLOCK_D:
            k_mask &= (offs_d < HEAD_DIM)[None, :]
        if V_HEAD_DIM != BLOCK_DV:
            v_mask &= (offs_dv < V_HEAD_DIM)[None, :]

        k = tl.load(k_ptrs, mask=k_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            scores = tanh_from_log2(scores * scale)
        visible = shown[None, :]
        if EDGE and CAUSAL:
            visible &= (keys[None, :] <= query_pos[:, None]) & (keys[None, :] > query_pos[:, None] - window)
        if EDGE or key_mask_ptr is not None:
            scores = tl.where(visible, scores, float("-inf"))

        p, alpha, m_i, l_i = softmax_step(scores, cap_log2 if SOFTCAP else scale, m_i, l_i)
        v = tl.load(v_ptrs, mask=v_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [BLOCK_M, BLOCK_DV]
    return acc, m_i, l_i


@triton.jit
def skip_hidden(key_mask_ptr, stride_mask_token, start, stop, k_end, BLOCK_N: tl.constexpr):
    """Return the first tile in [start, stop) with a key that key_mask shows, or stop."""
    offs_n = tl.arange(0, BLOCK_N)
    tile = start
    hidden = 1
    while (tile < stop) & (hidden > 0):
        keys = tile * BLOCK_N + offs_n
        shown = tl.load(key_mask_ptr + keys * stride_mask_token, mask=keys < k_end, other=0)
        hidden = (tl.max(shown.to(tl.int32), 0) == 0).to(tl.int32)
        tile += hidden
    return tile


@triton.jit
def find_sequence(starts_ptr, tile, num_seqs, BLOCK_M: tl.constexpr):
    """Return the sequence that a tile of packed queries belongs to, and the first tile of that sequence.

    The tiles of all sequences are one list, in which sequence i begins at ``(starts[i] - starts[0]) // BLOCK_M + i``:
    that leaves each at least ``ceil(length / BLOCK_M)`` of them, so that ``num_queries // BLOCK_M + num_seqs`` tiles
    are enough whatever the lengths, and a tile finds its sequence by bisection. A tile more than a sequence needs, and
    those behind the last, have no queries.

    starts: (num_seqs + 1,) int32, not falling; num_seqs at least 1.
    """
    start = tl.load(starts_ptr)
    sequence = tl.full([], 0, tl.int32)  # its first tile is this one or before it
    behind = num_seqs  # its first tile, or the end of the list, is behind this one
    while behind - sequence > 1:
        middle = (sequence + behind) // 2
        is_behind = (tl.load(starts_ptr + middle) - start) // BLOCK_M + middle > tile
        behind = tl.where(is_behind, middle, behind)
        sequence = tl.where(is_behind, sequence, middle)
    first_tile = (tl.load(starts_ptr + sequence) - start) // BLOCK_M + sequence
    return sequence, first_tile

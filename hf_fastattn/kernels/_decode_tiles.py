"""The inner loop of decoding attention: a tile of rows meets one KV tile after the other.

The block id of a tile is read by inline assembly, so that the pipeline keeps as many K/V tiles in flight over blocks as
over contiguous keys. The softmax comes in three kinds; only "online" rescales what it has at every tile.
"""

import triton
import triton.language as tl

from ._loads import load_ahead
from ._softmax import MIN_MAXIMUM, lazy_softmax_step, softmax_step, tanh_from_log2


@triton.jit
def attend(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    mask_ptr,
    first_tile,
    end_tile,
    key_begin,
    key_end,
    position,
    seq,
    scale,
    cap_log2,
    phi_log2,
    window,
    stride_k_block,
    stride_k_slot,
    stride_k_dim,
    stride_v_block,
    stride_v_slot,
    stride_v_dim,
    stride_table_block,
    stride_mask_key,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    KV_BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attend a tile of rows to KV tiles first_tile .. end_tile - 1.

    q: [BLOCK_M, BLOCK_D]; position: [BLOCK_M], of each row's query; keys outside key_begin .. key_end - 1 are neither
    seen nor read. k_ptr, v_ptr: of the kv head; table_ptr: the row of the block table; mask_ptr: of the key mask.

    Returns:
        acc [BLOCK_M, BLOCK_DV], m_i and l_i [BLOCK_M], all fp32; the largest weight of a row's column sums with
        "fixed", which knows no maximum.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if SOFTMAX == "fixed":
        m_i = tl.zeros([BLOCK_M], tl.float32) + phi_log2
    else:
        m_i = tl.full([BLOCK_M], MIN_MAXIMUM, tl.float32)
    if SOFTMAX == "online":
        l_i = tl.zeros([BLOCK_M], tl.float32)
    else:
        l_i = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # sums by column
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (key >= key_begin) & (key < key_end)
        if table_ptr is None:
            block, slot = seq, key.to(tl.int64)
        else:
            # One id for a tile that lies in one block, else one per key.
            known = tile * BLOCK_N if KV_BLOCK_SIZE >= BLOCK_N else key
            known = tl.maximum(tl.minimum(known, key_end - 1), 0)
            id_ptr = table_ptr + known // KV_BLOCK_SIZE * stride_table_block
            block = tl.maximum(load_ahead(id_ptr, ASM), 0).to(tl.int64)
            slot = key % KV_BLOCK_SIZE
        k_ptrs = k_ptr + block * stride_k_block + slot * stride_k_slot  # [BLOCK_N]
        v_ptrs = v_ptr + block * stride_v_block + slot * stride_v_slot
        k_mask = inside[None, :]
        if HEAD_DIM != BLOCK_D:
            k_mask &= (offs_d < HEAD_DIM)[:, None]
        k = tl.load(k_ptrs[None, :] + offs_d[:, None] * stride_k_dim, mask=k_mask, other=0.0)  # [BLOCK_D, BLOCK_N]

        scores = tl.dot(q, k, input_precision="ieee")  # [BLOCK_M, BLOCK_N] fp32
        if HAS_SOFTCAP:
            scores = tanh_from_log2(scores * scale)
        if mask_ptr is not None:
            known = tl.maximum(tl.minimum(key, key_end - 1), 0)
            inside &= load_ahead(mask_ptr + known * stride_mask_key, ASM) != 0
        behind = position[:, None] - key[None, :]
        visible = (behind >= 0) & (behind < window) & inside[None, :]
        scores = tl.where(visible, scores, -float("inf"))
        factor = cap_log2 if HAS_SOFTCAP else scale
        if SOFTMAX == "online":
            p, alpha, m_i, l_i = softmax_step(scores, factor, m_i, l_i)
            acc *= alpha[:, None]
        elif SOFTMAX == "lazy":
            p, m_i, l_i, acc = lazy_softmax_step(scores, factor, m_i, l_i, acc)
        else:
            p = tl.math.exp2(scores * factor - phi_log2)
            l_i += p

        v_mask = inside[:, None]  # a slot that no query sees must not be read: 0 * NaN is NaN
        if V_HEAD_DIM != BLOCK_DV:
            v_mask &= (offs_dv < V_HEAD_DIM)[None, :]
        v = tl.load(v_ptrs[:, None] + offs_dv[None, :] * stride_v_dim, mask=v_mask, other=0.0)  # [BLOCK_N, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    largest = tl.zeros([BLOCK_M], tl.float32)
    if SOFTMAX != "online":
        largest = tl.max(l_i, 1)
        l_i = tl.sum(l_i, 1)
    return acc, m_i, l_i, largest

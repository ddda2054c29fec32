"""The end of a piece of work: partial results, the arrival of the last of them, and their combination.

A partial result is a maximum and a sum, kept apart in fp32 (their logarithm would resolve only 5e-4 at logits of 1e4),
and the weighted values. The last program to arrive at a sequence, kv head and row tile combines its partial results in
the order of their keys, whoever arrives last, so that the result is the same bit by bit.
"""

import triton
import triton.language as tl

from ._decode_list import MAX_PIECES, RANGES_AT, counter_words, needed_words, own_piece, range_of, segment_words
from ._softmax import LOG2_E, MIN_MAXIMUM


@triton.jit
def store_out(
    out_ptr, sinks_ptr, acc, m_i, l_i, seq, row, kv_head, query_len, real, num_kv_heads, GROUP, V_HEAD_DIM, BLOCK_DV
):
    """Write acc / l_i, with the sink's probability in the denominator; 0 for a row without keys.

    acc: [ROWS, BLOCK_DV] fp32; m_i, l_i: [ROWS] fp32; seq, row: [ROWS] or scalar, the sequence and the row within it;
    real: [ROWS], which rows exist.
    """
    head = kv_head * GROUP + row % GROUP
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
        m_all = tl.maximum(m_i, sink)
        scale = tl.math.exp2(m_i - m_all)
        acc *= scale[:, None]
        l_i = l_i * scale + tl.math.exp2(sink - m_all)
    out = acc * (1.0 / tl.where(l_i == 0.0, 1.0, l_i))[:, None]
    offs_dv = tl.arange(0, BLOCK_DV)
    out_row = ((seq * query_len + row // GROUP) * num_kv_heads * GROUP + head).to(tl.int64)
    out_ptrs = out_ptr + out_row[:, None] * V_HEAD_DIM + offs_dv[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=real[:, None] & (offs_dv < V_HEAD_DIM)[None, :])


@triton.jit
def store_partial(acc_ptr, stats_ptr, acc, m_i, l_i, part, real, V_HEAD_DIM, BLOCK_DV):
    """Write a partial result. part: [ROWS], its rows among all partial results."""
    offs_dv = tl.arange(0, BLOCK_DV)
    mask = real[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
    part = part.to(tl.int64)
    tl.store(acc_ptr + part[:, None] * V_HEAD_DIM + offs_dv[None, :], acc, mask=mask)
    tl.store(stats_ptr + part * 2, m_i, mask=real)
    tl.store(stats_ptr + part * 2 + 1, l_i, mask=real)


@triton.jit
def first_row(schedule_ptr, is_shared, segment, unit, piece, member, rows, shared_rows, BLOCK_M, SLOT_ROWS):
    """Return the first row of a sequence's partial result, and the distance to that of the next piece.

    A slot is unit + program, with the units of the segments before: along a list one of both rises from piece to piece,
    so that no two pieces share one. shared_rows: rows of all shared slots, behind which the sequences' own lie.
    """
    slot = tl.load(segment_words(schedule_ptr, segment) + 8) + unit + piece
    members_per_tile = tl.maximum(BLOCK_M // rows, 1)
    in_shared = slot * BLOCK_M + member % members_per_tile * rows
    in_own = shared_rows + slot * SLOT_ROWS
    return tl.where(is_shared, in_shared, in_own), tl.where(is_shared, BLOCK_M, SLOT_ROWS)


@triton.jit
def combine(
    out_ptr,
    sinks_ptr,
    acc_ptr,
    stats_ptr,
    schedule_ptr,
    seq,
    kv_head,
    row_tile,
    rows,
    query_len,
    num_shared,
    num_kv_heads,
    shared_rows,
    GROUP: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SLOT_ROWS: tl.constexpr,
    INVARIANT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Write one row tile of one sequence from its partial results, AT_ONCE at a time: its own, then each parent's.

    Reads past L1 (.cg): other programs wrote them during this launch.
    """
    row_tiles = tl.cdiv(rows, BLOCK_M)
    members_per_tile = tl.maximum(BLOCK_M // rows, 1)
    offs_dv = tl.arange(0, BLOCK_DV)
    i = tl.arange(0, SLOT_ROWS)
    row = row_tile * BLOCK_M + i
    real = row < rows
    m_i = tl.full([SLOT_ROWS], MIN_MAXIMUM, tl.float32)
    l_i = tl.zeros([SLOT_ROWS], tl.float32)
    acc = tl.zeros([SLOT_ROWS, BLOCK_DV], tl.float32)
    segment = num_shared + seq
    while segment >= 0:
        words = segment_words(schedule_ptr, segment)
        num_tiles = tl.load(words + 2)
        member = seq - tl.load(words + 3)
        member_tiles = tl.cdiv(tl.load(words + 4), members_per_tile)
        is_shared = segment < num_shared
        unit = (kv_head * member_tiles + member // members_per_tile) * row_tiles + row_tile
        if INVARIANT:
            first = unit * (MAX_PIECES - 1)
            pieces = tl.cdiv(num_tiles, own_piece(num_tiles))
        else:
            item = tl.load(words) + unit * num_tiles
            total = tl.load(schedule_ptr + tl.where(is_shared, 0, 1))
            ranges = tl.where(is_shared, tl.num_programs(0), tl.load(schedule_ptr + RANGES_AT))
            first = range_of(item, total, ranges)
            pieces = range_of(item + num_tiles - 1, total, ranges) + 1 - first
        begin, step = first_row(
            schedule_ptr, is_shared, segment, unit, first, member, rows, shared_rows, BLOCK_M, SLOT_ROWS
        )
        for start in range(0, pieces, AT_ONCE):
            piece = start + tl.arange(0, AT_ONCE)
            part = (begin + piece[None, :] * step + i[:, None]).to(tl.int64)  # [SLOT_ROWS, AT_ONCE]
            known = real[:, None] & (piece < pieces)[None, :]
            m_part = tl.load(stats_ptr + part * 2, mask=known, other=MIN_MAXIMUM, cache_modifier=".cg")
            l_part = tl.load(stats_ptr + part * 2 + 1, mask=known, other=0.0, cache_modifier=".cg")
            # [SLOT_ROWS, AT_ONCE, BLOCK_DV]: pieces in the middle, where each thread has all of them and sums alone.
            acc_part = tl.load(
                acc_ptr + part[:, :, None] * V_HEAD_DIM + offs_dv[None, None, :],
                mask=known[:, :, None] & (offs_dv < V_HEAD_DIM)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            m_new = tl.maximum(m_i, tl.max(m_part, 1))
            alpha = tl.math.exp2(m_i - m_new)
            weight = tl.math.exp2(m_part - m_new[:, None])
            l_i = l_i * alpha + tl.sum(rounded_product(l_part, weight), 1)
            acc = acc * alpha[:, None] + tl.sum(rounded_product(acc_part, weight[:, :, None]), 1)
            m_i = m_new
        segment = tl.load(words + 7)
    store_out(
        out_ptr,
        sinks_ptr,
        acc,
        m_i,
        l_i,
        seq,
        row,
        kv_head,
        query_len,
        real,
        num_kv_heads,
        GROUP,
        V_HEAD_DIM,
        BLOCK_DV,
    )


@triton.jit
def rounded_product(a, b):
    """Return a * b, which no addition makes an FMA of.

    Where lanes add up products between them, each would take its own product exactly and its neighbour's rounded: they
    would hold different sums, of which any may become the result.
    """
    return tl.math.fma(a, b, 0.0)


@triton.jit
def arrive(
    schedule_ptr,
    first_seq,
    num_members,
    tiles,
    kv_head,
    row_tile,
    row_tiles,
    num_kv_heads,
    MEMBERS: tl.constexpr,
):
    """Count tiles as done for the members of a tile of rows; return which of them [MEMBERS] have all they need.

    Releases the partial result that all threads of this program wrote, acquires those of the others. A counter that is
    complete starts anew for the next layer.
    """
    member = tl.arange(0, MEMBERS)
    known = member < num_members
    seq = first_seq + member
    counter = (seq * num_kv_heads + kv_head) * row_tiles + row_tile
    counter_ptrs = counter_words(schedule_ptr, counter)
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptrs, tiles, mask=known, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    needed = tl.load(needed_words(schedule_ptr, seq), mask=known, other=-1)
    complete = known & (before + tiles == needed)
    tl.store(counter_ptrs, tl.zeros([MEMBERS], tl.int32), mask=complete)
    return complete.to(tl.int32)

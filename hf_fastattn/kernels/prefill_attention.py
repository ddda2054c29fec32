"""prefill_attention and packed_attention in Triton: FlashAttention-2's forward pass over dense keys or over blocks.

Source: Dao, "FlashAttention-2", 2023, section 3.1. One program attends one tile of queries of one head in one pass over
the key tiles it can see. The one decision: the pass is two loops, first the tiles that every query of the tile sees
whole, without position masks, then the tiles on the edges (causal diagonal, window, end of the sequence). Softmax does
not care about the order, so that only the few edge tiles pay for masks.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.ops.shapes import NO_WINDOW

from ._launch import Launch, Unsupported, device_arch, keep, layout, layout_of_blocks
from ._prefill_plan import PrefillConfig, config, is_plain, supports, tile_dim
from ._prefill_tiles import attend_tiles, find_sequence, skip_hidden
from ._softmax import LOG2_E, MIN_MAXIMUM

if TYPE_CHECKING:
    from ._compile import CompileCase

FAR = tl.constexpr(2**30)
"""Larger than any position, and ``position - FAR`` is still an int32: no window, no valid query."""


@triton.jit(
    do_not_specialize=[
        "query_len",
        "seq_len",
        "max_blocks",
        "num_query_tiles",
        "window",
        "stride_table_seq",
        "stride_pos_seq",
        "stride_mask_seq",
        "num_seqs",
    ]
)
def prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    seq_lens_ptr,
    positions_ptr,
    key_mask_ptr,
    sinks_ptr,
    query_starts_ptr,
    key_starts_ptr,
    scale,
    cap_log2,
    window,
    query_len,
    seq_len,
    max_blocks,
    num_query_tiles,
    stride_q_seq,
    stride_q_head,
    stride_q_token,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_out_seq,
    stride_out_token,
    stride_table_seq,
    stride_table_block,
    stride_lens_seq,
    stride_pos_seq,
    stride_pos_token,
    stride_mask_seq,
    stride_mask_token,
    num_seqs,
    NUM_KV_HEADS: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    KV_BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attend BLOCK_M queries of one head; grid (num_query_tiles * num_heads * num_seqs,), packed without num_seqs.

    The query tiles of the heads that share K and V are neighbours, last tile first: they meet in the cache, and when
    causal the programs with the most work start first.

    q (num_seqs, heads, query_len, HEAD_DIM), out (num_seqs, query_len, heads, V_HEAD_DIM). k, v: KV_BLOCK_SIZE 0 is
    dense, (num_seqs, kv heads, seq_len, dim) with stride_k_block the stride of a sequence; otherwise (num_blocks,
    KV_BLOCK_SIZE, kv heads, dim). table, seq_lens, positions, key_mask (uint8) and sinks as in the op, None if absent.
    query_starts, key_starts: the sequences are packed, one behind the other, in q, k, v and out, whose strides of a
    sequence are 0. num_query_tiles are enough for all of them then (find_sequence); query_len and seq_len are not read.

    Loop-carried: acc [BLOCK_M, BLOCK_DV], m_i and l_i [BLOCK_M], fp32, exp2 domain. scale and cap_log2: logits times
    log2(e) are ``scores * scale``, or with SOFTCAP ``tanh(scores * scale / (2 log2(e))) * cap_log2``; both positive.

    The launcher guarantees contiguous head sizes, KV_BLOCK_SIZE a power of two, and at least one key (dense) or one
    column in the table. Every element of out that belongs to a sequence is written.
    """
    pid = tl.program_id(0)
    of_kv_head = pid % (num_query_tiles * QUERIES_PER_KV)
    kv_head = pid // (num_query_tiles * QUERIES_PER_KV) % NUM_KV_HEADS
    seq = (pid // (num_query_tiles * QUERIES_PER_KV) // NUM_KV_HEADS).to(tl.int64)
    head = kv_head * QUERIES_PER_KV + of_kv_head % QUERIES_PER_KV
    tile = num_query_tiles - 1 - of_kv_head // QUERIES_PER_KV
    first_row = tile * BLOCK_M
    if query_starts_ptr is not None:
        sequence, first_tile = find_sequence(query_starts_ptr, tile, num_seqs, BLOCK_M)
        seq = sequence.to(tl.int64)
        first_row = (tile - first_tile) * BLOCK_M

    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    if KV_BLOCK_SIZE == 0:
        k_ptr += seq * stride_k_block
        v_ptr += seq * stride_v_block
    else:
        seq_len = tl.load(seq_lens_ptr + seq * stride_lens_seq)
        table_ptr += seq * stride_table_seq
    if key_mask_ptr is not None:
        key_mask_ptr += seq * stride_mask_seq
    if query_starts_ptr is not None:
        query_start, key_start = tl.load(query_starts_ptr + seq), tl.load(key_starts_ptr + seq)
        query_len = tl.load(query_starts_ptr + seq + 1) - query_start
        seq_len = tl.load(key_starts_ptr + seq + 1) - key_start
        seq_len = tl.where(first_row < query_len, seq_len, 0)  # a tile without queries has no keys to read
        q_ptr += query_start.to(tl.int64) * stride_q_token
        k_ptr += key_start.to(tl.int64) * stride_k_token
        v_ptr += key_start.to(tl.int64) * stride_v_token
        out_ptr += query_start.to(tl.int64) * stride_out_token

    offs_m = tl.arange(0, BLOCK_M)
    row_exists = first_row + offs_m < query_len
    if positions_ptr is not None:
        pos_ptrs = positions_ptr + seq * stride_pos_seq + (first_row + offs_m) * stride_pos_token
        query_pos = tl.load(pos_ptrs, mask=row_exists, other=-1)
        first_pos = tl.min(tl.where(query_pos >= 0, query_pos, FAR), 0)
        last_pos = tl.max(query_pos, 0)
    else:
        first_pos = seq_len - query_len + first_row
        last_pos = seq_len - query_len + tl.minimum(first_row + BLOCK_M, query_len) - 1
        query_pos = first_pos + offs_m

    # Keys [k_begin, k_end) are seen by some query of the tile, [all_begin, all_end) by every one.
    k_begin, k_end, all_begin, all_end = 0, seq_len, 0, seq_len
    if CAUSAL:
        k_begin = tl.maximum(first_pos - window + 1, 0)
        k_end = tl.maximum(tl.minimum(seq_len, last_pos + 1), 0)
        all_begin = tl.maximum(last_pos - window + 1, 0)
        all_end = tl.maximum(tl.minimum(seq_len, first_pos + 1), 0)
    stop = tl.cdiv(k_end, BLOCK_N)
    start = tl.minimum(k_begin // BLOCK_N, stop)
    if key_mask_ptr is not None:
        start = skip_hidden(key_mask_ptr, stride_mask_token, start, stop, k_end, BLOCK_N)
    full_start = tl.minimum(tl.maximum(tl.cdiv(all_begin, BLOCK_N), start), stop)
    full_stop = tl.minimum(tl.maximum(all_end // BLOCK_N, full_start), stop) if SPLIT else full_start

    offs_d = tl.arange(0, BLOCK_D)
    q_rows = seq * stride_q_seq + head.to(tl.int64) * stride_q_head + first_row.to(tl.int64) * stride_q_token
    q_ptrs = q_ptr + q_rows + (offs_m * stride_q_token)[:, None] + offs_d[None, :]
    q_mask = row_exists[:, None] & (offs_d < HEAD_DIM)[None, :] if HEAD_DIM != BLOCK_D else row_exists[:, None]
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], MIN_MAXIMUM, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # a key without a value, seen by every row
        m_i = tl.maximum(m_i, tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E)
        l_i += 1.0
    for EDGE in tl.static_range(1 - SPLIT, 2):
        acc, m_i, l_i = attend_tiles(
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
            first_tile=start if EDGE else full_start,
            num_tiles=stop - start - (full_stop - full_start) if EDGE else full_stop - full_start,
            gap_at=full_start - start,
            gap=full_stop - full_start,
            stride_k_block=stride_k_block,
            stride_k_token=stride_k_token,
            stride_v_block=stride_v_block,
            stride_v_token=stride_v_token,
            stride_table_block=stride_table_block,
            stride_mask_token=stride_mask_token,
            HEAD_DIM=HEAD_DIM,
            V_HEAD_DIM=V_HEAD_DIM,
            KV_BLOCK_SIZE=KV_BLOCK_SIZE,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
            EDGE=EDGE,
            CAUSAL=CAUSAL,
            SOFTCAP=SOFTCAP,
            ASM=ASM,
        )

    out = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]  # a row that saw no key has acc 0
    if positions_ptr is not None:
        out = tl.where((query_pos >= 0)[:, None], out, 0.0)
    offs_dv = tl.arange(0, BLOCK_DV)
    out_rows = seq * stride_out_seq + head * V_HEAD_DIM + first_row.to(tl.int64) * stride_out_token
    out_ptrs = out_ptr + out_rows + (offs_m * stride_out_token)[:, None] + offs_dv[None, :]
    out_mask = row_exists[:, None] & (offs_dv < V_HEAD_DIM)[None, :] if V_HEAD_DIM != BLOCK_DV else row_exists[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=out_mask)


_config = config  # launch has a keyword of this name


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    query_positions: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    *,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Run the kernel: :func:`hf_fastattn.ops.prefill_attention` by position; config replaces the table's choice.

    Raises:
        Unsupported: what :func:`supports` refuses.
    """
    if q.stride(3) != 1:
        q = q.contiguous()
    if block_table is None:
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    tensors = (q, k, v, block_table, seq_lens, query_positions, key_mask)
    options = (softmax_scale, causal, window, softcap, config)
    layout_kv = layout if block_table is None else layout_of_blocks
    others = map(layout, (q, block_table, seq_lens, query_positions, key_mask))
    key = (q.device, layout_kv(k), layout_kv(v), *others, None if sinks is None else sinks.dtype, *options)
    call = _kept.get(key)
    if call is None:
        reason = supports(q, k, v, block_table, softmax_scale)
        if reason is not None:
            raise Unsupported(reason)
        call = keep(_kept, key, prepare(*tensors, *options))
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    if out.numel() == 0:
        return out
    if (k.shape[2] if block_table is None else k.shape[0] * block_table.shape[1]) == 0:
        return out.zero_()
    if key_mask is not None:
        key_mask = key_mask.view(torch.uint8) if key_mask.shape[1] else None  # no column: no sequence has a key
    sinks = None if sinks is None else sinks.contiguous()
    call(q, k, v, out, block_table, seq_lens, query_positions, key_mask, sinks, None, None)
    return out


_kept: dict[Any, Launch] = {}


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    query_positions: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    config: PrefillConfig | None,
    *,
    packed: tuple[int, int] | None = None,
) -> Launch:
    """Return the launch of a call by the layout of its tensors.

    packed: the number of sequences that lie one behind the other in q, k and v of batch size 1, and of rows that they
    lie in, which is at least those of q.
    """
    num_heads, head_dim, v_head_dim = q.shape[1], q.shape[3], v.shape[3]
    num_seqs, query_len = packed or (q.shape[0], q.shape[2])
    if block_table is None:
        num_kv_heads, seq_len, block_size, max_blocks = k.shape[1], k.shape[2], 0, 0
        k_strides, v_strides = k.stride()[:3], v.stride()[:3]
    else:
        num_kv_heads, seq_len, block_size, max_blocks = k.shape[2], 0, k.shape[1], block_table.shape[1]
        k_strides, v_strides = ((x.stride(0), x.stride(2), x.stride(1)) for x in (k, v))
    if config is None:
        plain = is_plain(block_size, causal, key_mask is not None, softcap > 0)
        config = _config(device_arch(q.device), head_dim, v_head_dim, q.dtype, plain=plain)
    num_query_tiles = query_len // config.BLOCK_M + num_seqs if packed else triton.cdiv(query_len, config.BLOCK_M)
    seq_strides = (q.stride(0), k_strides[0], v_strides[0], query_len * num_heads * v_head_dim)
    q_seq, k_seq, v_seq, out_seq = (0, 0, 0, 0) if packed else seq_strides
    scalars = (
        *(*logit_scales(softmax_scale, softcap), min(window, FAR.value)),
        *(query_len, seq_len, max_blocks, num_query_tiles),
        *(q_seq, *q.stride()[1:3], k_seq, *k_strides[1:], v_seq, *v_strides[1:]),
        *(out_seq, num_heads * v_head_dim),
        *((0, 0) if block_table is None else block_table.stride()),
        0 if seq_lens is None else seq_lens.stride(0),
        *((0, 0) if query_positions is None else query_positions.stride()),
        *((0, 0) if key_mask is None else key_mask.stride()),
        num_seqs,
    )
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "QUERIES_PER_KV": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v_head_dim,
        "KV_BLOCK_SIZE": block_size,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": tile_dim(head_dim),
        "BLOCK_DV": tile_dim(v_head_dim),
        "CAUSAL": causal,
        "SOFTCAP": softcap > 0,
        "SPLIT": int(config.split),
        "ASM": not triton.knobs.runtime.interpret and torch.version.hip is None,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (num_query_tiles * num_heads * (1 if packed else num_seqs),)
    return Launch(q.device, prefill_attention_kernel, grid, scalars, constants, options)


def logit_scales(softmax_scale: float, softcap: float) -> tuple[float, float]:
    """Return the kernel's scale and cap_log2: log2(e) folded into both, softcap into the tanh's argument."""
    if softcap > 0:
        return softmax_scale / softcap * 2 * LOG2_E.value, softcap * LOG2_E.value
    return softmax_scale * LOG2_E.value, 0.0


def compile_cases(arch: int) -> "list[CompileCase]":
    """Return the launches whose cost eval/compile_report.py shows for an architecture (80, 86, 90, 100)."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(_case(arch, bf16, size, causal=True) for size in (64, 80, 96, 128, 256)),
        *(_case(arch, bf16, size, block_size=64, causal=True) for size in (64, 80, 96, 128, 256)),
        _case(arch, bf16, 128, block_size=16, causal=True),
        _case(arch, bf16, 128),
        _case(arch, bf16, 128, causal=True, key_mask=True),
        _case(arch, bf16, 256, block_size=64, causal=True, softcap=True),
        _case(arch, bf16, 64, block_size=64, causal=True, sinks=True, key_mask=True, positions=True),
        _case(arch, bf16, 192, v_head_dim=128, causal=True),
        _case(arch, fp16, 128, causal=True),
        *(_case(arch, fp32, size, causal=True) for size in (64, 128)),
        _case(arch, fp32, 256, block_size=64, causal=True, softcap=True, key_mask=True),
    ]


def _case(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    block_size: int = 0,
    causal: bool = False,
    softcap: bool = False,
    key_mask: bool = False,
    sinks: bool = False,
    positions: bool = False,
) -> "CompileCase":
    """Return the case of one call: 32 query heads over 8 kv heads."""
    from ._compile import case_from_call  # no launch needs the compiler's tools

    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    meta = functools.partial(torch.empty, device="meta", dtype=dtype)
    index = functools.partial(torch.empty, device="meta", dtype=torch.int32)
    num_seqs, length = 2, 4096
    q = meta(num_seqs, length, 32, head_dim).transpose(1, 2)
    if block_size:
        k, v = (meta(num_seqs * length // block_size, block_size, 8, size) for size in (head_dim, v_head_dim))
        table, lens = index(num_seqs, length // block_size), index(num_seqs)
    else:
        k, v = (meta(num_seqs, length, 8, size).transpose(1, 2) for size in (head_dim, v_head_dim))
        table, lens = None, None
    query_positions = index(num_seqs, length) if positions else None
    mask = meta(num_seqs, length, dtype=torch.uint8) if key_mask else None
    chosen = config(arch, head_dim, v_head_dim, dtype, plain=is_plain(block_size, causal, key_mask, softcap))
    options = (head_dim**-0.5, causal, NO_WINDOW, 30.0 if softcap else 0.0, chosen)
    call = prepare(q, k, v, table, lens, query_positions, mask, *options)
    tensors = (q, k, v, meta(num_seqs, length, 32, v_head_dim), table, lens, query_positions, mask)
    flags = {"causal": causal, "softcap": softcap, "mask": key_mask, "sinks": sinks, "positions": positions}
    where = f"paged{block_size}" if block_size else "dense"
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    size = f"d{head_dim}" if v_head_dim == head_dim else f"d{head_dim}v{v_head_dim}"
    tile_bytes = chosen.BLOCK_N * (tile_dim(head_dim) + tile_dim(v_head_dim)) * dtype.itemsize
    return case_from_call(
        "-".join([where, name, size, *(flag for flag, on in flags.items() if on)]),
        call,
        (*tensors, meta(32) if sinks else None, None, None),
        {"tile_bytes": tile_bytes, "config": chosen},
    )

"""FlashDecoding in Triton: the keys of a sequence are split over programs, whose partial results are then combined.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023. The one decision: a launch depends on sizes that
the host knows (heads, table width, SMs), never on lengths. Each program reads its sequence's length and takes an equal
share of it, so that one captured launch serves every step and a short sequence uses all of its programs.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.ops.shapes import KERNEL_DTYPES, MAX_HEAD_DIM, NO_WINDOW

from ._launch import Unsupported, device_arch
from ._loads import load_ahead
from ._softmax import LOG2_E, MIN_MAXIMUM, softmax_step, tanh_from_log2

if TYPE_CHECKING:
    from ._compile import CompileCase

MAX_SPLITS = 128
"""Most programs that share the keys of one sequence and head: the combine holds a partial result of each at once."""

_SPLIT_UNSPECIALIZED = ["window", "query_len", "max_len", "stride_mask_seq"]


@triton.jit
def _oldest_key(seq_len, query_len, window):
    """Return the first key that the first query may see. No sum leaves int32: the neutral window is 2**31-1."""
    return tl.maximum(tl.maximum(seq_len - query_len, 0) + 1 - window, 0)


@triton.jit
def _tile_range(split, num_splits, oldest, seq_len, BLOCK_N: tl.constexpr):
    """Return first and end of the KV tiles of a split: whole tiles, equal shares of those that some query may see."""
    low = oldest // BLOCK_N
    count = tl.cdiv(seq_len, BLOCK_N) - low
    return low + split * count // num_splits, low + (split + 1) * count // num_splits


@triton.jit
def _normalize(acc, m_i, l_i, sink_ptr, mask):
    """Return acc / l_i with the sink's probability in the denominator; 0 for a row without keys.

    acc: [ROWS, BLOCK_DV] fp32; m_i, l_i: [ROWS] fp32; sink_ptr: [ROWS] pointers to logits, or None; mask: [ROWS], which
    of them to read.
    """
    if sink_ptr is not None:
        sink = tl.load(sink_ptr, mask=mask, other=0.0).to(tl.float32) * LOG2_E
        m_all = tl.maximum(m_i, sink)
        scale = tl.math.exp2(m_i - m_all)
        acc *= scale[:, None]
        l_i = l_i * scale + tl.math.exp2(sink - m_all)
    return acc * (1.0 / tl.where(l_i == 0.0, 1.0, l_i))[:, None]


@triton.jit(do_not_specialize=_SPLIT_UNSPECIALIZED)
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    acc_ptr,
    stats_ptr,
    block_table_ptr,
    seq_lens_ptr,
    key_mask_ptr,
    sinks_ptr,
    scale_log2,
    cap_log2,
    window,
    query_len,
    max_len,
    num_kv_heads,
    stride_q_seq,
    stride_q_head,
    stride_q_query,
    stride_q_dim,
    stride_k_block,
    stride_k_slot,
    stride_k_head,
    stride_k_dim,
    stride_v_block,
    stride_v_slot,
    stride_v_head,
    stride_v_dim,
    stride_table_seq,
    stride_table_block,
    stride_mask_seq,
    stride_mask_key,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    KV_BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attend one tile of rows to one split of one sequence's keys.

    Grid (num_seqs * num_kv_heads * row tiles, num_splits). Rows are (query, head of the group) pairs of one kv head.
    Pointers: q (num_seqs, heads, query_len, HEAD_DIM); k, v (blocks, slots, kv heads, dim), where a dense sequence is
    one block (block_table_ptr None); without acc_ptr out (num_seqs, query_len, heads, V_HEAD_DIM) is written, else acc
    (rows of out, num_splits, V_HEAD_DIM) and stats (rows of out, num_splits, [m_i, l_i]), both fp32. Carried in fp32:
    m_i, l_i, acc. A split without tiles leaves its partial result unwritten; the combine does not read it.
    """
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row_tiles = tl.cdiv(query_len * GROUP, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    kv_head = tl.program_id(0) // row_tiles % num_kv_heads
    seq = (tl.program_id(0) // row_tiles // num_kv_heads).to(tl.int64)
    seq_len = max_len if seq_lens_ptr is None else tl.minimum(tl.load(seq_lens_ptr + seq), max_len)
    oldest = _oldest_key(seq_len, query_len, window)
    first, last = _tile_range(split, num_splits, oldest, seq_len, BLOCK_N)
    if acc_ptr is not None:  # noqa: SIM102 - this is known when compiling, the rest is not
        if first >= last:
            return

    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    position = seq_len - query_len + query  # [BLOCK_M], negative where the sequence is shorter than its queries
    real = query < query_len
    q_ptrs = q_ptr + seq * stride_q_seq + head.to(tl.int64) * stride_q_head + query * stride_q_query
    q_mask = real[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptrs[:, None] + offs_d[None, :] * stride_q_dim, mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    if block_table_ptr is not None:
        block_table_ptr += seq * stride_table_seq
    if key_mask_ptr is not None:
        key_mask_ptr += seq * stride_mask_seq

    m_i = tl.full([BLOCK_M], MIN_MAXIMUM, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for tile in tl.range(first, last):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (key >= oldest) & (key < seq_len)
        if block_table_ptr is None:
            block, slot = seq, key.to(tl.int64)
        else:
            # One id for a tile that lies in one block, else one per key.
            known = tile * BLOCK_N if KV_BLOCK_SIZE >= BLOCK_N else key
            known = tl.maximum(tl.minimum(known, seq_len - 1), 0)
            id_ptr = block_table_ptr + known // KV_BLOCK_SIZE * stride_table_block
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
            scores = tanh_from_log2(scores * scale_log2)
        if key_mask_ptr is not None:
            known = tl.maximum(tl.minimum(key, seq_len - 1), 0)
            inside &= load_ahead(key_mask_ptr + known * stride_mask_key, ASM) != 0
        behind = position[:, None] - key[None, :]
        visible = (behind >= 0) & (behind < window) & inside[None, :]
        scores = tl.where(visible, scores, -float("inf"))
        p, alpha, m_i, l_i = softmax_step(scores, cap_log2 if HAS_SOFTCAP else scale_log2, m_i, l_i)

        v_mask = inside[:, None]  # a slot that no query sees must not be read: 0 * NaN is NaN
        if V_HEAD_DIM != BLOCK_DV:
            v_mask &= (offs_dv < V_HEAD_DIM)[None, :]
        v = tl.load(v_ptrs[:, None] + offs_dv[None, :] * stride_v_dim, mask=v_mask, other=0.0)  # [BLOCK_N, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")

    row = (seq * query_len + query) * num_kv_heads * GROUP + head  # [BLOCK_M], of out
    out_mask = real[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
    if acc_ptr is None:
        sink_ptr = sinks_ptr + head if sinks_ptr is not None else None
        out = _normalize(acc, m_i, l_i, sink_ptr, real).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * V_HEAD_DIM + offs_dv[None, :], out, mask=out_mask)
    else:
        part = row * num_splits + split
        tl.store(acc_ptr + part[:, None] * V_HEAD_DIM + offs_dv[None, :], acc, mask=out_mask)
        tl.store(stats_ptr + part * 2, m_i, mask=real)
        tl.store(stats_ptr + part * 2 + 1, l_i, mask=real)


@triton.jit(do_not_specialize=["window", "query_len", "max_len", "num_splits"])
def _combine_kernel(
    out_ptr,
    acc_ptr,
    stats_ptr,
    seq_lens_ptr,
    sinks_ptr,
    window,
    query_len,
    max_len,
    num_heads,
    num_splits,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Join the partial results of one row of out, BLOCK_DV of its dimensions.

    Grid (num_seqs * query_len * num_heads, chunks of V_HEAD_DIM). Pointers as in _split_kernel, with the num_splits and
    BLOCK_N of its launch, from which the splits that wrote nothing are known.
    """
    row = tl.program_id(0).to(tl.int64)
    seq = row // (query_len * num_heads)
    seq_len = max_len if seq_lens_ptr is None else tl.minimum(tl.load(seq_lens_ptr + seq), max_len)
    splits = tl.arange(0, BLOCK_SPLITS)
    oldest = _oldest_key(seq_len, query_len, window)
    first, last = _tile_range(splits, num_splits, oldest, seq_len, BLOCK_N)
    written = (splits < num_splits) & (first < last)
    part = row * num_splits + splits
    m_part = tl.load(stats_ptr + part * 2, mask=written, other=MIN_MAXIMUM)  # [BLOCK_SPLITS]
    l_part = tl.load(stats_ptr + part * 2 + 1, mask=written, other=0.0)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    acc_mask = written[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
    acc = tl.load(acc_ptr + part[:, None] * V_HEAD_DIM + offs_dv[None, :], mask=acc_mask, other=0.0)

    m_i = tl.max(m_part, 0)
    weight = tl.math.exp2(m_part - m_i)
    l_i = tl.sum(l_part * weight, 0)
    acc = tl.sum(acc * weight[:, None], 0)[None, :]  # [1, BLOCK_DV]
    lane = tl.arange(0, 1)  # the row as a tile of one
    sink_ptr = sinks_ptr + row % num_heads + lane if sinks_ptr is not None else None
    out = _normalize(acc, m_i + lane, l_i + lane, sink_ptr, lane == 0)
    out_ptrs = out_ptr + row * V_HEAD_DIM + offs_dv[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(offs_dv < V_HEAD_DIM)[None, :])


@dataclass(frozen=True)
class DecodeConfig:
    """Shape of one program of the split kernel.

    Attributes:
        block_m: rows, i.e. (query, head of the group) pairs of one kv head; a power of two.
        block_n: keys per tile; a power of two.
        num_warps: warps per program.
        num_stages: K/V tiles loaded ahead, plus one.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def config(
    arch: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, rows: int, block_size: int | None
) -> DecodeConfig:
    """Return the launch config of a size: tiles of about 32 KiB of K and V, as deep a pipeline as shared memory allows.

    Chosen by compiling (registers, spills, shared memory), not yet by measuring.

    Args:
        arch: 80, 90 or 100, see device_arch.
        head_dim, v_head_dim: of q and k, and of v.
        dtype: of q, k and v.
        rows: queries per sequence times query heads per kv head.
        block_size: of a paged call, None for a dense one.
    """
    dims = _pad(head_dim) + _pad(v_head_dim)
    block_n = min(max(_floor_power_of_2(32768 // (dims * dtype.itemsize)), 16), 128)
    if block_size is not None and block_size >= 64:
        block_n = min(block_n, block_size)  # one block id per tile
    widest = 16 if dtype == torch.float32 else 64  # fp32 has no tensor cores: its operands live in registers
    block_m = min(triton.next_power_of_2(max(rows, 4)), widest)
    num_warps = 8 if block_m == widest else 4
    return DecodeConfig(block_m, block_n, num_warps, num_stages=3 if arch == 80 else 4)


@functools.lru_cache(maxsize=1024)
def choose_num_splits(num_programs: int, max_tiles: int, num_sms: int) -> int:
    """Return the smallest number of splits that fills the GPU nearly as well as any.

    Args:
        num_programs: programs without a split, i.e. sequences times kv heads times row tiles.
        max_tiles: KV tiles of the longest sequence that the block table or the keys have room for.
        num_sms: multiprocessors of the device; two programs run on each at a time.
    """
    slots = 2 * num_sms
    limit = max(min(max_tiles, MAX_SPLITS), 1)
    filled = [num_programs * n / (-(-num_programs * n // slots) * slots) for n in range(1, limit + 1)]
    return next(n for n, share in enumerate(filled, 1) if share >= 0.85 * max(filled))


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    key_mask: Tensor | None = None,
    *_others: object,
) -> str | None:
    """Return why the kernel cannot do a call, whose arguments are launch's, or None if it can."""
    if q.dtype not in KERNEL_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v must share one dtype of float16, bfloat16, float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head sizes go to {MAX_HEAD_DIM}, got {q.shape[3]} for q and k, {v.shape[3]} for v"
    if block_table is not None and (k.shape[1] & (k.shape[1] - 1) or not 16 <= k.shape[1] <= 256):
        return f"block_size must be a power of two from 16 to 256, got {k.shape[1]}"
    if key_mask is not None and key_mask.dtype not in (torch.bool, torch.int8, torch.uint8):
        return f"key_mask must be int8 or bool, got {key_mask.dtype}"
    return None


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window: int,
    softcap: float,
    *,
    config: DecodeConfig | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Run hf_fastattn::decode_attention, whose arguments these are, on the device of q.

    Args:
        config, num_splits: for tests and sweeps, instead of what config and choose_num_splits return.

    Returns:
        (num_seqs, query_len, num_heads, v's head_dim), contiguous.

    Raises:
        Unsupported: see supports.
    """
    reason = supports(q, k, v, block_table, seq_lens, key_mask)
    if reason is not None:
        raise Unsupported(f"decode_attention: {reason}")
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    max_len = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[1]
    if out.numel() == 0 or max_len == 0 or (key_mask is not None and key_mask.shape[1] == 0):
        return out.zero_()
    options = (softmax_scale, window, softcap, config, num_splits)
    seq_lens = None if seq_lens is None else seq_lens.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    with torch.cuda.device_of(q):
        for call in _calls(q, k, v, out, block_table, seq_lens, key_mask, sinks, max_len, *options):
            call.kernel[call.grid](*call.args, **call.constants, num_warps=call.num_warps, num_stages=call.num_stages)
    return out


@dataclass(frozen=True)
class _Call:
    """One launch of one kernel, ready to be made or, on meta tensors, to be compiled only."""

    kernel: Any
    grid: tuple[int, int]
    args: tuple[object, ...]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 1


def _calls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    max_len: int,
    softmax_scale: float,
    window: int,
    softcap: float,
    launch_config: DecodeConfig | None,
    num_splits: int | None,
) -> list[_Call]:
    """Return the launches of a call: the split kernel, and the combine if there is more than one split."""
    num_seqs, num_heads, query_len, head_dim = q.shape
    v_head_dim = v.shape[3]
    block_size = None if block_table is None else k.shape[1]
    if block_table is None:  # as one block per sequence: (block, slot, kv head, dim)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    num_kv_heads = k.shape[2]
    rows = num_heads // num_kv_heads * query_len
    cfg = launch_config or config(device_arch(q.device), head_dim, v_head_dim, q.dtype, rows, block_size)
    num_programs = num_seqs * num_kv_heads * triton.cdiv(rows, cfg.block_m)
    if num_splits is None:
        max_tiles = triton.cdiv(min(max_len, window + query_len + cfg.block_n - 2), cfg.block_n)
        num_splits = choose_num_splits(num_programs, max_tiles, _num_sms(q.device))
    acc = stats = None
    if num_splits > 1:
        acc = q.new_empty(num_seqs * query_len * num_heads, num_splits, v_head_dim, dtype=torch.float32)
        stats = q.new_empty(num_seqs * query_len * num_heads, num_splits, 2, dtype=torch.float32)
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = key_mask.view(torch.int8)
    scale = softmax_scale * LOG2_E.value
    split_args = (
        *(q, k, v, out, acc, stats, block_table, seq_lens, key_mask, sinks),
        *((2.0 * scale / softcap, softcap * LOG2_E.value) if softcap > 0.0 else (scale, 0.0)),
        *(min(window, NO_WINDOW), query_len, max_len, num_kv_heads),
        *(*q.stride(), *k.stride(), *v.stride()),
        *((0, 0) if block_table is None else block_table.stride()),
        *((0, 0) if key_mask is None else key_mask.stride()),
    )
    split_constants = {
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v_head_dim,
        "KV_BLOCK_SIZE": block_size,
        "HAS_SOFTCAP": softcap > 0.0,
        "BLOCK_M": cfg.block_m,
        "BLOCK_N": cfg.block_n,
        "BLOCK_D": _pad(head_dim),
        "BLOCK_DV": _pad(v_head_dim),
        "ASM": not triton.knobs.runtime.interpret and torch.version.hip is None,
    }
    calls = [
        _Call(_split_kernel, (num_programs, num_splits), split_args, split_constants, cfg.num_warps, cfg.num_stages)
    ]
    if num_splits > 1:
        block_splits = triton.next_power_of_2(num_splits)
        block_dv = min(_pad(v_head_dim), max(4096 // block_splits, 16))
        grid = (num_seqs * query_len * num_heads, triton.cdiv(v_head_dim, block_dv))
        args = (out, acc, stats, seq_lens, sinks, min(window, NO_WINDOW), query_len, max_len, num_heads, num_splits)
        tiles = {"BLOCK_N": cfg.block_n, "BLOCK_SPLITS": block_splits, "BLOCK_DV": block_dv}
        calls.append(_Call(_combine_kernel, grid, args, {"V_HEAD_DIM": v_head_dim, **tiles}))
    return calls


def _floor_power_of_2(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def _pad(dim: int) -> int:
    """Return the tile size of a head size: a power of two that tl.dot takes."""
    return max(triton.next_power_of_2(dim), 16)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def compile_cases(arch: int) -> list["CompileCase"]:
    """Return the launches to compile for an architecture, with the arguments that the launcher itself would make.

    32 query heads over 8 kv heads and 1 to 32 queries, so that a kv head has 4 to 128 rows; 7 splits, or one where
    every option is on.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    sizes = [
        *((bf16, head_dim, 4, 64) for head_dim in (64, 80, 96, 128, 256)),
        *((bf16, 128, rows, 64) for rows in (8, 32, 128)),
        *((bf16, 128, 4, block_size) for block_size in (16, None)),
        (bf16, 256, 128, 64),
        (fp16, 128, 4, 64),
        *((fp32, head_dim, 4, 64) for head_dim in (64, 128)),
        (fp32, 128, 32, None),
    ]
    cases = [_compile_cases(arch, *size)[0] for size in sizes]
    return [
        *cases,
        *_compile_cases(arch, bf16, 128, 32, 16, every_option=True),
        *_compile_cases(arch, bf16, 256, 4, 64)[1:],
    ]


def _compile_cases(
    arch: int, dtype: torch.dtype, head_dim: int, rows: int, block_size: int | None, every_option: bool = False
) -> list["CompileCase"]:
    """Return the cases of the kernels of one call. every_option: key mask, sinks, softcap, and no split."""
    from ._compile import case_from_call  # no launch needs the compiler's tools

    meta = functools.partial(torch.empty, device="meta", dtype=dtype)
    query_len, max_blocks = rows // 4, 64
    q, out = meta(2, 32, query_len, head_dim), meta(2, query_len, 32, head_dim)
    k = meta(2, 8, 4096, head_dim) if block_size is None else meta(256, block_size, 8, head_dim)
    table = None if block_size is None else meta(2, max_blocks, dtype=torch.int32)
    lens = None if block_size is None else meta(2, dtype=torch.int32)
    max_len = 4096 if block_size is None else max_blocks * block_size
    key_mask, sinks = (meta(2, max_len, dtype=torch.int8), meta(32)) if every_option else (None, None)
    softcap, num_splits = (30.0, 1) if every_option else (0.0, 7)
    cfg = config(arch, head_dim, head_dim, dtype, rows, block_size)
    options = (max_len, head_dim**-0.5, NO_WINDOW, softcap, cfg, num_splits)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    name = f"{'dense' if block_size is None else f'paged{block_size}'}-{name}-d{head_dim}-rows{rows}"
    info = {"tile_bytes": 2 * cfg.block_n * _pad(head_dim) * dtype.itemsize, "config": cfg}
    return [
        case_from_call(
            f"combine-{name}" if call.kernel is _combine_kernel else f"{name}-all" if every_option else name,
            call.kernel,
            call.args,
            call.constants,
            call.num_warps,
            call.num_stages,
            {} if call.kernel is _combine_kernel else info,
        )
        for call in _calls(q, k, k, out, table, lens, key_mask, sinks, *options)
    ]

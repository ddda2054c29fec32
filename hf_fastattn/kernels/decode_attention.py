"""Decoding attention in Triton: one launch, evenly cut work, blocks, shared prefixes read once, asynchronous softmax.

FlashDecoding (Dao et al., 2023) splits the keys of a sequence, PagedAttention (Kwon et al., 2023) keeps them in blocks,
FlashDecoding++ (Hong et al., 2024) frees the pieces of a softmax from each other. Here a fixed grid of programs walks
over equal ranges of all the KV tiles of a step (kernels/decode_schedule.py), whatever the lengths, and the last program
to arrive at a result combines its pieces (kernels/_decode_combine.py).
"""

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.ops.shapes import NO_WINDOW

from . import decode_schedule
from ._decode_combine import arrive, combine, first_row, store_out, store_partial
from ._decode_list import MAX_PIECES, RANGES_AT, ROWS_AT, own_piece, program_words, range_begin, segment_words
from ._decode_plan import DecodeConfig, Plan, config, make_plan, pad_dim, supports
from ._decode_tiles import attend
from ._launch import Launch, Unsupported, keep, layout, layout_of_blocks
from ._loads import skip_zeros
from ._softmax import LOG2_E

if TYPE_CHECKING:
    from ._compile import CompileCase

_UNSPECIALIZED = ["query_len", "window", "max_len", "num_shared", "shared_rows", "stride_table_seq", "stride_mask_seq"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    acc_ptr,
    stats_ptr,
    schedule_ptr,
    block_table_ptr,
    seq_lens_ptr,
    key_mask_ptr,
    sinks_ptr,
    scale_log2,
    cap_log2,
    phi_log2,
    window,
    query_len,
    max_len,
    num_shared,
    shared_rows,
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
    HAS_SHARED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INVARIANT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LEAST_SUM: tl.constexpr,
    LARGEST_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SLOT_ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Do one program's range of the shared list, then of the sequences' own, piece by piece.

    A piece is a run of KV tiles of one unit: a kv head and a tile of rows, which are (sequence, query, head of the
    group) triples. Grid (num_programs,), the one that the schedule was made for. Pointers: q (num_seqs, heads,
    query_len, HEAD_DIM); k, v (blocks, slots, kv heads, dim), where a dense sequence is one block (block_table_ptr
    None); out (num_seqs, query_len, heads, V_HEAD_DIM); acc (partial rows, V_HEAD_DIM) and stats (partial rows, [m_i,
    l_i]), both fp32. A slot without a piece stays unwritten; the combine does not read it.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    i = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    for work_list in range(0 if HAS_SHARED else 1, 2):
        is_shared = work_list == 0
        index = programs - 1 - program if is_shared else program
        ranges = tl.where(is_shared, programs, tl.load(schedule_ptr + RANGES_AT))
        list_end = range_begin(tl.minimum(index + 1, ranges), tl.load(schedule_ptr + work_list), ranges)
        item = tl.load(program_words(schedule_ptr, program) + work_list * 2)
        segment = tl.load(program_words(schedule_ptr, program) + work_list * 2 + 1)
        while item < list_end:
            rows = tl.load(schedule_ptr + ROWS_AT)  # here, so that nothing made of it lives in registers meanwhile
            row_tiles = tl.cdiv(rows, BLOCK_M)
            members_per_tile = tl.maximum(BLOCK_M // rows, 1)
            words = segment_words(schedule_ptr, segment)
            behind = item - tl.load(words)
            low = tl.load(words + 1)
            num_tiles = tl.load(words + 2)
            first_seq = tl.load(words + 3)
            member_tiles = tl.cdiv(tl.load(words + 4), members_per_tile)
            key_begin = tl.load(words + 5)
            key_end = tl.load(words + 6)
            alone = tl.load(words + 7) < 0
            unit = behind // num_tiles
            first = behind % num_tiles
            if INVARIANT:
                end = tl.minimum(first + own_piece(num_tiles), num_tiles)
            else:
                end = tl.minimum(first + list_end - item, num_tiles)
            row_tile = unit % row_tiles
            member_tile = unit // row_tiles % member_tiles
            kv_head = unit // (row_tiles * member_tiles)

            row = row_tile * BLOCK_M + i % rows
            seq = first_seq + member_tile * members_per_tile + i // rows  # [BLOCK_M]
            members = tl.minimum(tl.load(words + 4) - member_tile * members_per_tile, members_per_tile)
            real = (i // rows < members) & (row < rows)
            seq_len = max_len
            if seq_lens_ptr is not None:
                seq_len = tl.minimum(tl.load(seq_lens_ptr + seq, mask=real, other=0), max_len)
            position = seq_len - query_len + row // GROUP  # negative where a sequence is shorter than its queries
            head = kv_head * GROUP + row % GROUP
            q_rows = seq.to(tl.int64) * stride_q_seq + head.to(tl.int64) * stride_q_head + row // GROUP * stride_q_query
            q = tl.load(
                q_ptr + q_rows[:, None] + offs_d[None, :] * stride_q_dim,
                mask=real[:, None] & (offs_d < HEAD_DIM)[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_D]
            one_seq = first_seq.to(tl.int64)
            head_k_ptr = k_ptr + kv_head.to(tl.int64) * stride_k_head
            head_v_ptr = v_ptr + kv_head.to(tl.int64) * stride_v_head
            table_ptr = None if block_table_ptr is None else block_table_ptr + one_seq * stride_table_seq
            mask_ptr = None if key_mask_ptr is None else key_mask_ptr + one_seq * stride_mask_seq
            first_tile = low + first
            if key_mask_ptr is not None:  # left padding is not read
                first_tile = skip_zeros(mask_ptr, stride_mask_key, first_tile, low + end, key_end, BLOCK_N)
            # fmt: off
            acc, m_i, l_i, largest = attend(
                q, head_k_ptr, head_v_ptr, table_ptr, mask_ptr, first_tile, low + end, key_begin, key_end, position,
                one_seq, scale_log2, cap_log2, phi_log2, window, stride_k_block, stride_k_slot, stride_k_dim,
                stride_v_block, stride_v_slot, stride_v_dim, stride_table_block, stride_mask_key, HEAD_DIM, V_HEAD_DIM,
                KV_BLOCK_SIZE, HAS_SOFTCAP, SOFTMAX, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, None, ASM,
            )
            if SOFTMAX == "fixed":
                fits = (largest <= LARGEST_WEIGHT) & (l_i >= LEAST_SUM)  # false for NaN
                if tl.sum((real & ~fits).to(tl.int32), 0) > 0:
                    acc, m_i, l_i, largest = attend(
                        q, head_k_ptr, head_v_ptr, table_ptr, mask_ptr, first_tile, low + end, key_begin, key_end,
                        position, one_seq, scale_log2, cap_log2, phi_log2, window, stride_k_block, stride_k_slot,
                        stride_k_dim, stride_v_block, stride_v_slot, stride_v_dim, stride_table_block, stride_mask_key,
                        HEAD_DIM, V_HEAD_DIM, KV_BLOCK_SIZE, HAS_SOFTCAP, "online", BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                        1, ASM,
                    )
            # fmt: on

            if alone & (end - first == num_tiles) & (work_list == 1):
                store_out(
                    *(out_ptr, sinks_ptr, acc, m_i, l_i, seq, row, kv_head, query_len, real, num_kv_heads),
                    *(GROUP, V_HEAD_DIM, BLOCK_DV),
                )
            else:
                if INVARIANT:
                    piece = unit * (MAX_PIECES - 1) + first // own_piece(num_tiles)
                else:
                    piece = index
                begin, _ = first_row(
                    schedule_ptr, is_shared, segment, unit, piece, 0, rows, shared_rows, BLOCK_M, SLOT_ROWS
                )
                store_partial(acc_ptr, stats_ptr, acc, m_i, l_i, begin + i, real, V_HEAD_DIM, BLOCK_DV)
                first_seq += member_tile * members_per_tile
                complete = arrive(
                    schedule_ptr, first_seq, members, end - first, kv_head, row_tile, row_tiles, num_kv_heads, MEMBERS
                )
                if tl.max(complete, 0) > 0:
                    for member in range(members):
                        if tl.max(tl.where(tl.arange(0, MEMBERS) == member, complete, 0), 0) > 0:
                            combine(
                                *(out_ptr, sinks_ptr, acc_ptr, stats_ptr, schedule_ptr, first_seq + member, kv_head),
                                *(row_tile, rows, query_len, num_shared, num_kv_heads, shared_rows),
                                *(GROUP, V_HEAD_DIM, BLOCK_M, BLOCK_DV, SLOT_ROWS, INVARIANT, AT_ONCE),
                            )
            item += end - first
            if behind + end - first == num_tiles * num_kv_heads * row_tiles * member_tiles:
                segment += 1


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
    shared_prefixes: Tensor | None = None,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    *,
    config: DecodeConfig | None = None,
    num_programs: int | None = None,
) -> Tensor:
    """Run hf_fastattn::decode_attention, whose arguments these are, on the device of q.

    Args:
        config, num_programs: for tests and sweeps, instead of the config of the sizes and a grid that fills the device.

    Returns:
        (num_seqs, query_len, num_heads, v's head_dim), contiguous.

    Raises:
        Unsupported: see supports.
        ValueError: the schedule was made for other sizes.
    """
    shared = None if shared_prefixes is None else shared_prefixes.shape
    options = (softmax_scale, window, softcap, batch_invariant, config, num_programs)
    layout_kv = layout if block_table is None else layout_of_blocks
    key = (q.device, layout(q), layout_kv(k), layout_kv(v), layout(block_table), layout(key_mask), shared, *options)
    kinds = (seq_lens is None, None if sinks is None else sinks.dtype)
    call = _kept.get((key, kinds))
    if call is None:
        reason = supports(q, k, v, block_table, softmax_scale)
        if reason is not None:
            raise Unsupported(f"decode_attention: {reason}")
        cfg, plan = make_plan(
            q, k, v, block_table, shared_prefixes, batch_invariant, config=config, num_programs=num_programs
        )
        call = _prepare(cfg, plan, q, k, v, block_table, key_mask, softmax_scale, window, softcap)
        keep(_kept, (key, kinds), call)
    cfg, plan = call.config, call.plan
    out = q.new_empty(call.out_shape)
    if call.sees_nothing:
        return out.zero_()
    if schedule is None:
        stream = _stream(q) if block_table is None and seq_lens is None else None
        schedule = _schedules.get((key, stream)) if stream is not None else None
        if schedule is None:
            schedule = decode_schedule.launch(
                *(q, k, v, block_table, seq_lens, shared_prefixes, window, batch_invariant),
                config=cfg,
                num_programs=plan.num_programs,
            )
            if stream is not None:
                keep(_schedules, (key, stream), schedule, MOST_SCHEDULES)
    if schedule.shape != call.schedule_shape:
        raise ValueError(
            f"expected a schedule of shape {call.schedule_shape} for these sizes, got {tuple(schedule.shape)}: "
            "decode_schedule must be given the same shapes, shared_prefixes and batch_invariant"
        )
    if getattr(schedule, "made_for", call.sizes) != call.sizes:
        raise ValueError(
            f"expected a schedule for {plan}, got one for other numbers of heads or queries: {schedule.made_for}"  # type: ignore[attr-defined]
        )
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = key_mask.view(torch.int8)
    acc = q.new_empty(call.partial_rows, v.shape[3], dtype=torch.float32)
    stats = q.new_empty(call.partial_rows, 2, dtype=torch.float32)
    seq_lens = None if seq_lens is None else seq_lens.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    call.launch(q, k, v, out, acc, stats, schedule, block_table, seq_lens, key_mask, sinks)
    return out


@dataclass(frozen=True)
class _Call:
    """What a call is prepared to: everything but its tensors.

    Attributes:
        launch: of the kernel.
        config, plan, sizes: of the call, and the plan's.
        out_shape, schedule_shape, partial_rows: sizes of what it writes to.
        sees_nothing: the result is 0, if there is any.
    """

    launch: Launch
    config: DecodeConfig
    plan: Plan
    sizes: tuple[int, ...]
    out_shape: tuple[int, ...]
    schedule_shape: tuple[int, int]
    partial_rows: int
    sees_nothing: bool


_kept: dict[Any, _Call] = {}

_schedules: dict[Any, Tensor] = {}
"""Schedules of dense calls, which depend on nothing but sizes: the layers of a step take one after the other."""

MOST_SCHEDULES = 4
"""How many are kept: of layers with and without a window, on two streams."""


def _stream(q: Tensor) -> int | None:
    """Return the current stream of a device; None if a graph is being captured, which may outlive what is kept."""
    if not q.is_cuda:
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(q.device).cuda_stream


def _prepare(
    cfg: DecodeConfig,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float,
    window: int,
    softcap: float,
) -> _Call:
    """Prepare a call by the layout of its tensors."""
    num_seqs, num_heads, query_len, head_dim = q.shape
    v_head_dim, num_kv_heads = v.shape[3], plan.num_kv_heads
    out_shape = (num_seqs, query_len, num_heads, v_head_dim)
    max_len = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[1]
    sees_nothing = 0 in (*out_shape, max_len) or (key_mask is not None and key_mask.shape[1] == 0)
    if block_table is None:  # as one block per sequence: (block, slot, kv head, dim)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    scale = softmax_scale * LOG2_E.value
    scalars = (
        *((2.0 * scale / softcap, softcap * LOG2_E.value) if softcap > 0.0 else (scale, 0.0)),
        *(cfg.phi * LOG2_E.value, min(window, NO_WINDOW), query_len, max_len),
        *(plan.num_shared, plan.shared_rows, num_kv_heads),
        *(*q.stride(), *k.stride(), *v.stride()),
        *((0, 0) if block_table is None else block_table.stride()),
        *((0, 0) if key_mask is None else key_mask.stride()),
    )
    fp16 = q.dtype == torch.float16
    constants = {
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v_head_dim,
        "KV_BLOCK_SIZE": None if block_table is None else k.shape[1],
        "HAS_SHARED": plan.num_shared > 0,
        "HAS_SOFTCAP": softcap > 0.0,
        "INVARIANT": plan.batch_invariant,
        "SOFTMAX": cfg.softmax,
        "LEAST_SUM": 1.0 if fp16 else 2.0**-60,
        "LARGEST_WEIGHT": 2.0**15 if fp16 else 2.0**60,
        "BLOCK_M": cfg.block_m,
        "BLOCK_N": cfg.block_n,
        "BLOCK_D": pad_dim(head_dim),
        "BLOCK_DV": pad_dim(v_head_dim),
        "SLOT_ROWS": plan.slot_rows,
        "MEMBERS": triton.next_power_of_2(plan.members_per_tile) if plan.num_shared else 1,
        "AT_ONCE": max(4096 // (plan.slot_rows * pad_dim(v_head_dim)), 1),
        "ASM": not triton.knobs.runtime.interpret and torch.version.hip is None,
    }
    options = {"num_warps": cfg.num_warps, "num_stages": cfg.num_stages}
    if torch.version.hip is None:
        options["maxnreg"] = cfg.maxnreg
    launch = Launch(q.device, _decode_kernel, (plan.num_programs,), scalars, constants, options)
    return _Call(launch, cfg, plan, plan.sizes, out_shape, plan.shape, plan.partial_rows, sees_nothing)


def compile_cases(arch: int) -> list["CompileCase"]:
    """Return the launches to compile for an architecture, with the arguments that the launcher itself would make.

    32 query heads over 8 kv heads and 1 to 32 queries, so that a kv head has 4 to 128 rows.
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
    return [
        *(_compile_case(arch, *size) for size in sizes),
        _compile_case(arch, bf16, 128, 32, 16, every_option=True),
        *(_compile_case(arch, bf16, 128, 4, 64, softmax=softmax) for softmax in ("fixed", "online")),
        *(_compile_case(arch, bf16, head_dim, 4, 64, num_shared=8) for head_dim in (64, 128, 256)),
        _compile_case(arch, bf16, 128, 4, 64, batch_invariant=True),
    ]


def _compile_case(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    rows: int,
    block_size: int | None,
    *,
    every_option: bool = False,
    softmax: str | None = None,
    num_shared: int = 0,
    batch_invariant: bool = False,
    max_blocks: int = 64,
) -> "CompileCase":
    """Return the case of one call. every_option: key mask, sinks and softcap."""
    from ._compile import case_from_call  # no launch needs the compiler's tools

    meta = functools.partial(torch.empty, device="meta", dtype=dtype)
    num_seqs, query_len = 16, rows // 4
    q, out = meta(num_seqs, 32, query_len, head_dim), meta(num_seqs, query_len, 32, head_dim)
    k = meta(num_seqs, 8, 4096, head_dim) if block_size is None else meta(2048, block_size, 8, head_dim)
    table = None if block_size is None else meta(num_seqs, max_blocks, dtype=torch.int32)
    lens = None if block_size is None else meta(num_seqs, dtype=torch.int32)
    shared = meta(num_shared, 4, dtype=torch.int32) if num_shared else None
    max_len = 4096 if block_size is None else max_blocks * block_size
    key_mask, sinks = (meta(num_seqs, max_len, dtype=torch.int8), meta(32)) if every_option else (None, None)
    cfg = config(arch, head_dim, head_dim, dtype, rows, block_size, num_seqs if num_shared else 1)
    cfg = cfg if softmax is None else replace(cfg, softmax=softmax)
    _, plan = make_plan(q, k, k, table, shared, batch_invariant, config=cfg, num_programs=264)
    options = (head_dim**-0.5, NO_WINDOW, 30.0 if every_option else 0.0)
    call = _prepare(cfg, plan, q, k, k, table, key_mask, *options)
    partial, schedule = meta(call.partial_rows, head_dim, dtype=torch.float32), meta(*plan.shape, dtype=torch.int32)
    tensors = (q, k, k, out, partial, partial, schedule, table, lens, key_mask, sinks)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    name = f"{'dense' if block_size is None else f'paged{block_size}'}-{name}-d{head_dim}-rows{rows}"
    name += "-all" * every_option + "-shared" * bool(num_shared) + "-invariant" * batch_invariant
    name += f"-{softmax}" if softmax else ""
    info = {"tile_bytes": 2 * cfg.block_n * pad_dim(head_dim) * dtype.itemsize, "config": cfg}
    return case_from_call(name, call.launch, tensors, info)

"""The schedule of a decode step, made on the device: which tiles each program of the attention kernel reads.

One program writes it once per step, for all layers of a kind; the host reads nothing back and no size depends on a
length, so that a captured launch serves every step. The launch also zeroes the counters of arrival, so that whatever an
aborted step left there is gone. Layout: kernels/_decode_list.py.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.ops.shapes import NO_WINDOW

from ._decode_list import (
    COUNTERS_AT,
    HEADER_WORDS,
    MAX_PIECES,
    NEEDED_AT,
    PROGRAM_WORDS,
    RANGES_AT,
    ROWS_AT,
    SEGMENT_WORDS,
    SEGMENTS_AT,
    counter_words,
    needed_words,
    oldest_key,
    own_piece,
    own_ranges,
    program_words,
    range_begin,
    segment_words,
)
from ._decode_plan import DecodeConfig, Plan, make_plan, supports
from ._launch import Launch, Unsupported, keep, layout, layout_of_blocks

if TYPE_CHECKING:
    from ._compile import CompileCase

_UNSPECIALIZED = [
    "query_len",
    "window",
    "max_len",
    "num_seqs",
    "num_shared",
    "num_kv_heads",
    "num_programs",
    "balance",
    "rows",
]
_UNSPECIALIZED += ["most_units"]

_MAXNREG = 255
"""Registers per thread: one program has plenty, and ptxas would spill to make room for more."""


@triton.jit
def _write_segment(words, first_item, low, num_tiles, first_seq, num_seqs, key_begin, key_end, parent, slot, mask):
    tl.store(words, first_item, mask=mask)
    tl.store(words + 1, low, mask=mask)
    tl.store(words + 2, num_tiles, mask=mask)
    tl.store(words + 3, first_seq, mask=mask)
    tl.store(words + 4, num_seqs, mask=mask)
    tl.store(words + 5, key_begin, mask=mask)
    tl.store(words + 6, key_end, mask=mask)
    tl.store(words + 7, parent, mask=mask)
    tl.store(words + 8, slot, mask=mask)


@triton.jit
def _oldest_of_members(seq_lens_ptr, first, members, query_len, window, max_len, ENTRIES: tl.constexpr):
    """Return the first key that some query of some member of each entry sees; first, members and that: [ENTRIES]."""
    limited = (window < max_len).to(tl.int32)  # else every member sees from the first key on
    oldest = tl.zeros([ENTRIES], tl.int32) + limited * max_len
    for start in range(0, limited * tl.max(members, 0), ENTRIES):
        member = start + tl.arange(0, ENTRIES)
        seq_len = tl.load(  # [entries, members]
            seq_lens_ptr + first[:, None] + member[None, :], mask=member[None, :] < members[:, None], other=max_len
        )
        oldest = tl.minimum(oldest, tl.min(oldest_key(tl.minimum(seq_len, max_len), query_len, window), 1))
    return oldest


@triton.jit
def _list_shared(
    schedule_ptr,
    seq_lens_ptr,
    shared_ptr,
    query_len,
    window,
    max_len,
    num_seqs,
    num_shared,
    num_kv_heads,
    row_tiles,
    members_per_tile,
    most_units,
    BLOCK_N: tl.constexpr,
    KV_BLOCK_SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Write the shared segments that somebody sees, without gaps; return how many there are and their tiles.

    None at all if there is no room for their partial results: without one, those behind it would miss keys.
    """
    count = 0
    total = 0
    first_unit = 0
    for start in range(0, num_shared, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        known = entry < num_shared
        first = tl.load(shared_ptr + entry * 4, mask=known, other=0)
        members = tl.load(shared_ptr + entry * 4 + 1, mask=known, other=0)
        members = tl.minimum(members, num_seqs - first)
        begin = tl.load(shared_ptr + entry * 4 + 2, mask=known, other=0) * KV_BLOCK_SIZE
        end = tl.minimum(tl.load(shared_ptr + entry * 4 + 3, mask=known, other=0) * KV_BLOCK_SIZE, max_len)
        oldest = _oldest_of_members(seq_lens_ptr, first, members, query_len, window, max_len, ENTRIES)
        begin = tl.maximum(begin, oldest)
        low = begin // BLOCK_N
        num_tiles = tl.cdiv(end, BLOCK_N) - low
        seen = (members > 0) & (begin < end)
        listed = seen.to(tl.int32)
        units = listed * num_kv_heads * tl.cdiv(members, members_per_tile) * row_tiles
        tiles = units * num_tiles
        words = segment_words(schedule_ptr, count + tl.cumsum(listed, 0) - listed)
        first_item = total + tl.cumsum(tiles, 0) - tiles
        slot = first_unit + tl.cumsum(units, 0) - units
        no_parent = tl.full([ENTRIES], -1, tl.int32)
        _write_segment(words, first_item, low, num_tiles, first, members, begin, end, no_parent, slot, seen)
        count += tl.sum(listed, 0)
        total += tl.sum(tiles, 0)
        first_unit += tl.sum(units, 0)
    fits = (first_unit <= most_units).to(tl.int32)
    return count * fits, total * fits


@triton.jit
def _parent(schedule_ptr, count, seq, begin, ENTRIES: tl.constexpr):
    """Return the shared segment that ends last, at begin or before, among those of a sequence; its end; tiles of all.

    seq, begin: [BLOCK]; so are the results. Without one the index is -1 and the end 0.
    """
    parent = tl.full(seq.shape, -1, tl.int32)
    parent_end = tl.zeros(seq.shape, tl.int32)
    tiles = tl.zeros(seq.shape, tl.int32)
    for start in range(0, count, ENTRIES):
        shared = start + tl.arange(0, ENTRIES)
        known = shared < count
        words = segment_words(schedule_ptr, shared)
        first = tl.load(words + 3, mask=known, other=0)
        behind = first + tl.load(words + 4, mask=known, other=0)
        end = tl.load(words + 6, mask=known, other=0)
        inside = (seq[:, None] >= first[None, :]) & (seq[:, None] < behind[None, :])  # [BLOCK, entries]
        inside &= end[None, :] <= begin[:, None]
        tiles += tl.sum(tl.where(inside, tl.load(words + 2, mask=known, other=0)[None, :], 0), 1)
        nearest = tl.max(tl.where(inside, end[None, :], 0), 1)
        index = tl.max(tl.where(inside & (end[None, :] == nearest[:, None]), shared[None, :], -1), 1)
        parent = tl.where(nearest > parent_end, index, parent)
        parent_end = tl.maximum(nearest, parent_end)
    return parent, parent_end, tiles


@triton.jit
def _find_starts(
    schedule_ptr,
    list_index,
    first_segment,
    num_segments,
    total,
    ranges,
    num_programs,
    units_per_tile,
    INVARIANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each program's first tile of a list and the segment that it lies in.

    The shared list is dealt out backwards, so that the programs with a tile more in one list have none more in the
    other. A batch-invariant program begins with the first whole piece of its range.
    """
    for start in range(0, num_programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        item = range_begin(tl.minimum(index, ranges), total, ranges)
        segment = tl.zeros([BLOCK], tl.int32)
        step = 1
        while step * 2 <= num_segments:
            step *= 2
        while step > 0:  # the last segment that begins at the item or before
            probe = segment + step
            known = probe < num_segments
            words = segment_words(schedule_ptr, first_segment + probe)
            begin = tl.load(words, mask=known, other=2147483647)
            segment = tl.where(known & (begin <= item), probe, segment)
            step = step // 2
        if INVARIANT:
            words = segment_words(schedule_ptr, first_segment + segment)
            begin = tl.load(words)
            num_tiles = tl.load(words + 2)
            piece = own_piece(num_tiles)
            done = (item - begin) % num_tiles
            rounded = item - done + tl.minimum(tl.cdiv(done, piece) * piece, num_tiles)
            segment += (rounded == begin + num_tiles * units_per_tile).to(tl.int32)
            item = rounded
        program = num_programs - 1 - index if list_index == 0 else index
        words = program_words(schedule_ptr, program) + list_index * 2
        tl.store(words, item, mask=index < num_programs)
        tl.store(words + 1, first_segment + segment, mask=index < num_programs)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _schedule_kernel(
    schedule_ptr,
    seq_lens_ptr,
    shared_ptr,
    query_len,
    window,
    max_len,
    num_seqs,
    num_shared,
    num_kv_heads,
    num_programs,
    balance,
    rows,
    most_units,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KV_BLOCK_SIZE: tl.constexpr,
    INVARIANT: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Write the whole schedule; grid (1,), of which every step is spread over the threads.

    seq_lens_ptr (num_seqs,) or None: all have max_len keys; shared_ptr (num_shared, 4) or None. num_programs is that of
    the attention kernel, most_units what shared segments may have together. What is written is read again behind a
    barrier.
    """
    row_tiles = tl.cdiv(rows, BLOCK_M)
    members_per_tile = tl.maximum(BLOCK_M // rows, 1)
    units = num_kv_heads * row_tiles
    segments = HEADER_WORDS + PROGRAM_WORDS * num_programs
    needed = segments + SEGMENT_WORDS * (num_shared + num_seqs)
    tl.store(schedule_ptr + ROWS_AT, rows)
    tl.store(schedule_ptr + SEGMENTS_AT, segments)
    tl.store(schedule_ptr + NEEDED_AT, needed)
    tl.store(schedule_ptr + COUNTERS_AT, needed + num_seqs)
    tl.debug_barrier()
    for start in range(0, num_seqs * units, BLOCK):
        counter = start + tl.arange(0, BLOCK)
        words = counter_words(schedule_ptr, counter)
        tl.store(words, tl.zeros([BLOCK], tl.int32), mask=counter < num_seqs * units)

    shared_count = 0
    shared_total = 0
    if shared_ptr is not None:
        shared_count, shared_total = _list_shared(
            schedule_ptr,
            seq_lens_ptr,
            shared_ptr,
            query_len,
            window,
            max_len,
            num_seqs,
            num_shared,
            num_kv_heads,
            row_tiles,
            members_per_tile,
            most_units,
            BLOCK_N,
            KV_BLOCK_SIZE,
            ENTRIES,
        )
        tl.debug_barrier()
        for start in range(0, shared_count, BLOCK):
            segment = start + tl.arange(0, BLOCK)
            known = segment < shared_count
            words = segment_words(schedule_ptr, segment)
            first = tl.load(words + 3, mask=known, other=-1)
            begin = tl.load(words + 5, mask=known, other=0)
            parent, _, _ = _parent(schedule_ptr, shared_count, first, begin, ENTRIES)
            tl.store(words + 7, parent, mask=known)

    own_total = 0
    for start in range(0, num_seqs, BLOCK):
        seq = start + tl.arange(0, BLOCK)
        known = seq < num_seqs
        if seq_lens_ptr is None:
            seq_len = tl.zeros([BLOCK], tl.int32) + max_len
        else:
            seq_len = tl.minimum(tl.load(seq_lens_ptr + seq, mask=known, other=0), max_len)
        parent, begin, tiles = _parent(schedule_ptr, shared_count, seq, seq * 0 + 2147483647, ENTRIES)
        begin = tl.maximum(begin, oldest_key(seq_len, query_len, window))
        low = begin // BLOCK_N
        num_tiles = tl.maximum(tl.cdiv(seq_len, BLOCK_N) - low, 1)  # an empty sequence has one: its zeros are written
        items = tl.where(known, num_tiles * units, 0)
        first_item = own_total + tl.cumsum(items, 0) - items
        words = segment_words(schedule_ptr, num_shared + seq)
        slot = seq * units * (MAX_PIECES if INVARIANT else 1)
        _write_segment(words, first_item, low, num_tiles, seq, 1, begin, seq_len, parent, slot, known)
        words = needed_words(schedule_ptr, seq)
        tl.store(words, tiles + num_tiles, mask=known)
        own_total += tl.sum(items, 0)

    tl.store(schedule_ptr, shared_total)
    tl.store(schedule_ptr + 1, own_total)
    tl.store(schedule_ptr + 2, shared_count)
    ranges = own_ranges(own_total, balance, num_programs)
    tl.store(schedule_ptr + RANGES_AT, ranges)
    tl.debug_barrier()
    if shared_ptr is not None:
        _find_starts(schedule_ptr, 0, 0, shared_count, shared_total, num_programs, num_programs, units, False, BLOCK)
    _find_starts(schedule_ptr, 1, num_shared, num_seqs, own_total, ranges, num_programs, units, INVARIANT, BLOCK)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    shared_prefixes: Tensor | None,
    window: int,
    batch_invariant: bool,
    *,
    config: DecodeConfig | None = None,
    num_programs: int | None = None,
    block: int = 256,
) -> Tensor:
    """Run hf_fastattn::decode_schedule, whose arguments these are, on the device of q.

    Args:
        config, num_programs: for tests and sweeps, as in decode_attention's launch.
        block: sequences, segments or programs that are treated at once, and shared prefixes up to 8.

    Returns:
        int32, of the plan's shape.

    Raises:
        Unsupported: see supports; the attention kernel cannot do the call either.
    """
    shared = None if shared_prefixes is None else shared_prefixes.shape
    options = (window, batch_invariant, config, num_programs, block)
    k_layout, v_shape = (layout(k), v.shape) if block_table is None else (layout_of_blocks(k), v.shape[1:])
    key = (q.device, q.dtype, q.shape, k_layout, v.dtype, v_shape, layout(block_table), seq_lens is None, shared)
    call = _kept.get((key, options))
    if call is None:
        reason = supports(q, k, v, block_table)
        if reason is not None:
            raise Unsupported(f"decode_schedule: {reason}")
        _, plan = make_plan(
            q, k, v, block_table, shared_prefixes, batch_invariant, config=config, num_programs=num_programs
        )
        prepared = _prepare(plan, q, k, block_table, window, block)
        call = keep(_kept, (key, options), (plan, plan.sizes, plan.shape, prepared))
    plan, sizes, shape, launch_kernel = call
    schedule: Any = q.new_empty(shape, dtype=torch.int32)
    schedule.made_for = sizes  # its shape does not tell all of them
    if q.numel() == 0:
        return schedule
    launch_kernel(
        schedule,
        None if seq_lens is None else seq_lens.contiguous(),
        shared_prefixes.contiguous() if shared_prefixes is not None and plan.num_shared else None,
    )
    return schedule


_kept: dict[Any, tuple[Plan, tuple[int, ...], tuple[int, int], Launch]] = {}


def _prepare(plan: Plan, q: Tensor, k: Tensor, block_table: Tensor | None, window: int, block: int) -> Launch:
    """Return the launch of a call."""
    max_len = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[1]
    scalars = (
        *(q.shape[2], min(window, NO_WINDOW), max_len),
        *(plan.num_seqs, plan.num_shared, plan.num_kv_heads, plan.num_programs, plan.balance),
        *(plan.rows, plan.shared_units),
    )
    constants = {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "KV_BLOCK_SIZE": None if block_table is None else k.shape[1],
        "INVARIANT": plan.batch_invariant,
        "BLOCK": block,
        "ENTRIES": min(block, 8),
    }
    options = {} if torch.version.hip else {"maxnreg": _MAXNREG}
    return Launch(q.device, _schedule_kernel, (1,), scalars, constants, options)


def compile_cases(arch: int) -> list["CompileCase"]:
    """Return the launches to compile for an architecture: without and with shared prefixes, and batch-invariant."""
    from ._compile import case_from_call  # no launch needs the compiler's tools
    from ._decode_plan import config

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    q, k = meta(64, 32, 1, 128, dtype=torch.bfloat16), meta(4096, 64, 8, 128, dtype=torch.bfloat16)
    table, lens, cases = meta(64, 64), meta(64), []
    for name, shared, invariant in (("own", None, False), ("shared", meta(8, 4), False), ("invariant", None, True)):
        cfg = config(arch, 128, 128, torch.bfloat16, 4, 64, 1 if shared is None else 64)
        _, plan = make_plan(q, k, k, table, shared, invariant, config=cfg, num_programs=264)
        call = _prepare(plan, q, k, table, NO_WINDOW, 256)
        cases.append(case_from_call(name, call, (meta(*plan.shape), lens, shared), {}))
    return cases

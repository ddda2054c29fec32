"""Sizes of a decode launch, from what the host knows; plain Python, so that a fake tensor and a test need no Triton.

The work of a step is two lists of KV tiles: those of the shared prefixes, then those of the sequences themselves. Each
list is cut into equal contiguous ranges, one per program of a fixed grid (after stream-K, Osama et al., 2023). Lengths
stay on the device: kernels/decode_schedule.py writes both lists there, and `work` here repeats it for tests.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fastattn.ops.shapes import KERNEL_DTYPES, MAX_HEAD_DIM, NO_WINDOW

from ._launch import SMALL, device_arch

INVARIANT_MIN_TILES = 8
INVARIANT_MAX_PIECES = 32
"""A batch-invariant sequence is cut by its own length alone: into at most 32 pieces, of at least 8 tiles."""

HEADER_WORDS, PROGRAM_WORDS, SEGMENT_WORDS = 8, 4, 9
"""int32 words of a schedule's parts, see kernels/decode_schedule.py."""

SHARED_LEVELS = 8
"""Shared prefixes behind each other that there is room for the partial results of, see Plan.shared_units."""

MOST_SLOTS = 2**31
"""Elements that the slots of a block span at most: their offsets are 32-bit numbers, those of blocks 64-bit ones."""

SOFTMAXES = ("lazy", "fixed", "online")


@dataclass(frozen=True)
class DecodeConfig:
    """Shape of one program of the decode kernel.

    Attributes:
        block_m: rows, i.e. (sequence, query, head of the group) triples of one kv head; a power of two.
        block_n: keys per tile; a power of two.
        num_warps: warps per program.
        num_stages: K/V tiles loaded ahead, plus one.
        programs_per_sm: programs of the grid per multiprocessor, which share its registers.
        softmax: "lazy": the reference of a row moves only when a tile exceeds it by 2**8; "fixed": one reference for
            all rows and a second pass where it does not fit (FlashDecoding++); "online": the running maximum.
        phi: the reference of "fixed", a logit in natural units.
        maxnreg: registers per thread that are there; without it ptxas spills some for the sake of more programs than
            shared memory has room for.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2
    softmax: str = "lazy"
    phi: float = 0.0
    maxnreg: int | None = None


@dataclass(frozen=True)
class Plan:
    """Sizes of a schedule and of the partial results. Attributes as in `make_plan`, and num_programs of the grid.

    tile_rows: bytes of a KV tile over those of a row of a partial result, see own_ranges; None for a range per program.
    """

    num_seqs: int
    num_shared: int
    num_kv_heads: int
    rows: int
    block_m: int
    block_n: int
    num_programs: int
    batch_invariant: bool
    tile_rows: int | None = None

    @property
    def balance(self) -> int:
        """What `own_ranges` weighs tiles by; 0 for as many ranges as programs."""
        if self.tile_rows is None:
            return 0
        return self.num_seqs * self.num_kv_heads * self.row_tiles * max(self.tile_rows // self.slot_rows, 1)

    @property
    def row_tiles(self) -> int:
        """Tiles that hold the rows of one sequence."""
        return -(-self.rows // self.block_m)

    @property
    def members_per_tile(self) -> int:
        """Sequences whose rows share a tile over a shared prefix."""
        return max(self.block_m // self.rows, 1)

    @property
    def slot_rows(self) -> int:
        """Rows that the partial result of one sequence takes."""
        return min(self.block_m, _ceil_power_of_2(self.rows))

    @property
    def sizes(self) -> tuple[int, ...]:
        """All of them: a schedule serves the calls whose sizes are its own."""
        return tuple(vars(self).values())

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the schedule tensor.

        Its width tells the tile sizes and the cuts, its height the number of shared entries: most schedules that were
        made for other ones do not fit even where nobody noted what they were made for.
        """
        tiles = (self.block_m.bit_length() - 1) * 8 + self.block_n.bit_length() - 1
        width = 64 + 2 * tiles + self.batch_invariant
        words = HEADER_WORDS + PROGRAM_WORDS * self.num_programs + (SEGMENT_WORDS + 1) * self.num_seqs
        words += SEGMENT_WORDS * self.num_shared + self.num_seqs * self.num_kv_heads * self.row_tiles
        return -(-words // width) + self.num_shared, width

    @property
    def shared_units(self) -> int:
        """Most units (row tiles of a kv head) that all shared prefixes may have; with more, nothing is shared.

        Prefixes side by side take at most a tile each besides those of all sequences. Behind each other,
        SHARED_LEVELS of them have room that all sequences share.
        """
        tiles = -(-self.num_seqs // self.members_per_tile)
        most = min(self.num_shared * tiles, self.num_shared + SHARED_LEVELS * tiles)
        return self.num_kv_heads * self.row_tiles * most

    @property
    def shared_rows(self) -> int:
        """Rows of partial results over shared prefixes: a slot for each unit and one more for each program."""
        return (self.shared_units + self.num_programs) * self.block_m if self.num_shared else 0

    @property
    def partial_rows(self) -> int:
        """Rows of all partial results."""
        units = self.num_seqs * self.num_kv_heads * self.row_tiles
        slots = units * INVARIANT_MAX_PIECES if self.batch_invariant else units + self.num_programs
        return self.shared_rows + slots * self.slot_rows


@functools.lru_cache(maxsize=256)
def config(
    arch: int,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    rows: int,
    block_size: int | None,
    members: int = 1,
) -> DecodeConfig:
    """Return the launch config of a size: tiles of about 32 KiB of K and V, as deep a pipeline as shared memory allows.

    Tiles of half the size where there is little shared memory, so that two programs share a multiprocessor. Chosen by
    compiling (registers, spills, shared memory), not yet by measuring.

    Args:
        arch: 80, 86, 90 or 100, see device_arch.
        head_dim, v_head_dim: of q and k, and of v.
        dtype: of q, k and v.
        rows: queries per sequence times query heads per kv head.
        block_size: of a paged call, None for a dense one.
        members: most sequences that may share a prefix; 1 without sharing.
    """
    dims = pad_dim(head_dim) + pad_dim(v_head_dim)
    tile_bytes = 16384 if arch == SMALL else 32768
    block_n = min(max(_floor_power_of_2(tile_bytes // (dims * dtype.itemsize)), 16), 128)
    if block_size is not None and block_size >= 64:
        block_n = min(block_n, block_size)  # one block id per tile
    widest = 64 if dims <= 256 and arch < 100 else 32  # sm_100: Triton 3.6 fails on tcgen05 in a loop in a loop
    widest = 16 if dtype == torch.float32 else widest  # fp32 has no tensor cores: its operands live in registers
    block_m = min(_ceil_power_of_2(max(rows * members, 4)), widest)
    wide = block_m == 64 or (block_m == 32 and (dims > 256 or members > 1))  # by registers
    num_warps = 8 if wide else 4
    maxnreg: int | None = 255
    if dtype == torch.float32:  # as compiled: spills with any other choice
        maxnreg = 192 if arch == 80 and dims == 256 and block_m < 16 else None
    return DecodeConfig(
        block_m,
        block_n,
        num_warps,
        num_stages=4 if arch >= 90 else 3,
        programs_per_sm=1 if num_warps == 8 else 2,
        maxnreg=maxnreg,
    )


def make_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    shared_prefixes: Tensor | None,
    batch_invariant: bool,
    *,
    config: DecodeConfig | None = None,
    num_programs: int | None = None,
) -> tuple[DecodeConfig, Plan]:
    """Return the config and the plan of a call, whose tensors may be fake: only shapes and dtypes are read.

    A symbolic number of sequences stays symbolic, unless prefixes are shared: the tile of rows follows from it then.
    """
    num_seqs, num_heads, query_len, head_dim = q.shape
    num_kv_heads = k.shape[2] if block_table is not None else k.shape[1]
    rows = int(query_len * (num_heads // num_kv_heads))
    num_shared = 0 if shared_prefixes is None or batch_invariant else shared_prefixes.shape[0]
    if config is None:
        block_size = None if block_table is None else int(k.shape[1])
        members = int(num_seqs) if num_shared else 1
        config = _config(device_arch(q.device), int(head_dim), int(v.shape[3]), q.dtype, rows, block_size, members)
    if num_programs is None:
        num_programs = _num_sms(q.device) * config.programs_per_sm
    sizes = (num_seqs, num_shared, num_kv_heads, rows, config.block_m, config.block_n)
    dim, v_dim = int(q.shape[3]), int(v.shape[3])
    tile_rows = config.block_n * (dim + v_dim) * q.dtype.itemsize // max(4 * v_dim, 1)
    return config, Plan(*sizes, num_programs, batch_invariant, None if batch_invariant else tile_rows)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None = None,
    softmax_scale: float = 1.0,
) -> str | None:
    """Return why the kernel cannot do a call, or None if it can."""
    if q.dtype not in KERNEL_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v must share one dtype of float16, bfloat16, float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head sizes go to {MAX_HEAD_DIM}, got {q.shape[3]} for q and k, {v.shape[3]} for v"
    if block_table is not None and (k.shape[1] & (k.shape[1] - 1) or not 16 <= k.shape[1] <= 256):
        return f"block_size must be a power of two from 16 to 256, got {k.shape[1]}"
    if block_table is not None:
        slots = max(x.stride(1) * (x.shape[1] - 1) for x in (k, v))
        if slots >= MOST_SLOTS:
            return f"the slots of a block must lie less than {MOST_SLOTS} elements apart, got {slots}"
    if not softmax_scale > 0:
        return f"softmax_scale must be positive, got {softmax_scale}"
    return None


@dataclass(frozen=True)
class Segment:
    """Keys that the same sequences attend to: a shared prefix, or what one sequence has for itself.

    Attributes:
        first_item: number of its first tile in its list.
        low, num_tiles: its KV tiles, for each of its units.
        first_seq, num_seqs: the sequences whose queries are its rows.
        key_begin, key_end: its keys.
        parent: index of the shared segment that holds the keys before, -1 if none does.
        first_slot: units of the segments before it in its list, with the most pieces of each if that is bounded.
        units: kv heads times row tiles.
    """

    first_item: int
    low: int
    num_tiles: int
    first_seq: int
    num_seqs: int
    key_begin: int
    key_end: int
    parent: int
    first_slot: int
    units: int


def work(
    plan: Plan,
    seq_lens: Sequence[int],
    shared_prefixes: Sequence[tuple[int, int, int, int]] = (),
    *,
    query_len: int = 1,
    window: int = NO_WINDOW,
    block_size: int = 64,
) -> tuple[list[Segment], list[Segment], list[int]]:
    """Repeat the device's schedule in plain Python: the shared segments, the sequences' own, and tiles per program."""

    def oldest(seq: int) -> int:
        return max(max(seq_lens[seq] - query_len, 0) + 1 - window, 0)

    shared: list[Segment] = []
    item = slot = 0
    for first, count, first_block, end_block in shared_prefixes:
        if count <= 0:
            continue
        begin = max(first_block * block_size, min(oldest(seq) for seq in range(first, first + count)))
        end = end_block * block_size
        low, high = begin // plan.block_n, -(-end // plan.block_n)
        if begin >= end:
            continue
        units = plan.num_kv_heads * -(-count // plan.members_per_tile) * plan.row_tiles
        shared.append(Segment(item, low, high - low, first, count, begin, end, -1, slot, units))
        item, slot = item + (high - low) * units, slot + units
    if slot > plan.shared_units:
        shared, item = [], 0
    total_shared = item

    def parent_of(seq: int, begin: int) -> int:
        holding = [i for i, s in enumerate(shared) if s.first_seq <= seq < s.first_seq + s.num_seqs]
        return max((i for i in holding if shared[i].key_end <= begin), key=lambda i: shared[i].key_end, default=-1)

    shared = [Segment(**{**vars(s), "parent": parent_of(s.first_seq, s.key_begin)}) for s in shared]
    own, item, slot = [], 0, 0
    units = plan.num_kv_heads * plan.row_tiles
    for seq, seq_len in enumerate(seq_lens):
        parent = parent_of(seq, NO_WINDOW)
        begin = max(oldest(seq), shared[parent].key_end if parent >= 0 else 0)
        low = begin // plan.block_n
        count = max(-(-seq_len // plan.block_n) - low, 1)
        own.append(Segment(item, low, count, seq, 1, begin, seq_len, parent, slot, units))
        item += count * units
        slot += units * (INVARIANT_MAX_PIECES if plan.batch_invariant else 1)
    ranges = own_ranges(item, plan.balance, plan.num_programs)
    tiles = [
        share(plan.num_programs - 1 - program, total_shared, plan.num_programs)
        + (share(program, item, ranges) if program < ranges else 0)
        for program in range(plan.num_programs)
    ]
    return shared, own, tiles


def own_ranges(total: int, balance: int, num_programs: int) -> int:
    """Return the number of ranges that the sequences' own list is cut into: a power of two, or one per program.

    Who combines a unit reads a partial result of every range in it, alone. With r ranges of a unit of t tiles, reading
    takes t / r tiles and combining r partial results: least for r**2 = t * bytes of a tile / bytes of a partial result.
    It limits the ranges where units are few and have many rows, as one key head has that all query heads share.
    """
    ranges = 1
    while 2 * ranges <= num_programs and 2 * ranges**2 <= total * balance:
        ranges *= 2
    return ranges if balance and 2 * ranges <= num_programs else num_programs


def share(index: int, total: int, parts: int) -> int:
    """Return the size of the index-th of equal parts: the first ones take what is over."""
    return total // parts + (index < total % parts)


def pad_dim(dim: int) -> int:
    """Return the tile size of a head size: a power of two that tl.dot takes."""
    return max(_ceil_power_of_2(dim), 16)


def _ceil_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _floor_power_of_2(number: int) -> int:
    return 1 << (number.bit_length() - 1)


_config = config


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

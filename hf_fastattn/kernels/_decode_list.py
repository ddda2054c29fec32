"""The work list of a decode step as the kernels see it: how it is cut, and where the parts of a schedule lie.

A schedule is int32: a header [tiles of the shared list, of the own list, shared segments, rows of a sequence, where the
segments, the needed tiles and the counters begin, ranges of the own list]; for each program its first tile and segment
in either list; segments of 9 words (first tile in the list, first KV tile, KV tiles, first sequence, sequences, first
key, end of the keys, parent, first slot), the shared ones before one for each sequence; for each sequence the tiles
that its result needs; a counter of those done for each sequence, kv head and row tile.
"""

import triton
import triton.language as tl

from ._decode_plan import HEADER_WORDS as _HEADER_WORDS
from ._decode_plan import INVARIANT_MAX_PIECES as _MAX_PIECES
from ._decode_plan import INVARIANT_MIN_TILES as _MIN_TILES
from ._decode_plan import PROGRAM_WORDS as _PROGRAM_WORDS
from ._decode_plan import SEGMENT_WORDS as _SEGMENT_WORDS

HEADER_WORDS = tl.constexpr(_HEADER_WORDS)
PROGRAM_WORDS = tl.constexpr(_PROGRAM_WORDS)
SEGMENT_WORDS = tl.constexpr(_SEGMENT_WORDS)
MAX_PIECES = tl.constexpr(_MAX_PIECES)
MIN_TILES = tl.constexpr(_MIN_TILES)
ROWS_AT = tl.constexpr(3)
SEGMENTS_AT = tl.constexpr(4)
NEEDED_AT = tl.constexpr(5)
COUNTERS_AT = tl.constexpr(6)
RANGES_AT = tl.constexpr(7)


@triton.jit
def range_begin(index, total, parts):
    """Return the first item of the index-th of equal ranges of a list: the first ranges take what is over."""
    return index * (total // parts) + tl.minimum(index, total % parts)


@triton.jit
def range_of(item, total, parts):
    """Return the range that an item lies in: the inverse of range_begin."""
    size = total // parts
    over = total % parts
    behind = item - over * (size + 1)
    return tl.where(behind < 0, item // (size + 1), over + behind // tl.maximum(size, 1))


@triton.jit
def own_ranges(total, balance, num_programs):
    """Return the number of ranges that the own list is cut into, see _decode_plan."""
    work = total.to(tl.int64) * balance
    ranges = num_programs * 0 + 1
    while (2 * ranges <= num_programs) & (2 * ranges.to(tl.int64) * ranges <= work):
        ranges *= 2
    return tl.where((balance > 0) & (2 * ranges <= num_programs), ranges, num_programs)


@triton.jit
def own_piece(num_tiles):
    """Return the tiles of a piece of a batch-invariant sequence: a function of its own length."""
    return tl.maximum(tl.cdiv(num_tiles, MAX_PIECES), MIN_TILES)


@triton.jit
def oldest_key(seq_len, query_len, window):
    """Return the first key that the first query may see. No sum leaves int32: the neutral window is 2**31-1."""
    return tl.maximum(tl.maximum(seq_len - query_len, 0) + 1 - window, 0)


@triton.jit
def program_words(schedule_ptr, program):
    """Return a pointer to what a program starts with."""
    return schedule_ptr + HEADER_WORDS + PROGRAM_WORDS * program


@triton.jit
def segment_words(schedule_ptr, segment):
    """Return a pointer to a segment. Where they lie is read when it is needed, not kept in registers."""
    return schedule_ptr + tl.load(schedule_ptr + SEGMENTS_AT) + SEGMENT_WORDS * segment


@triton.jit
def needed_words(schedule_ptr, seq):
    """Return a pointer to the number of tiles that a sequence's result needs."""
    return schedule_ptr + tl.load(schedule_ptr + NEEDED_AT) + seq


@triton.jit
def counter_words(schedule_ptr, counter):
    """Return a pointer to the counter of a sequence, kv head and row tile."""
    return schedule_ptr + tl.load(schedule_ptr + COUNTERS_AT) + counter

"""How a linear layer is computed at decode: the heuristic dataflow of FlashDecoding++, as a pure function of sizes.

Source: Hong et al., "FlashDecoding++", 2024, section 5: which of GEMV, flat GEMM and the library's GEMM is fastest
depends on the rows of activations and on the shape of the weight, and is looked up in a table made offline. The one
decision: shapes and GPUs that nobody has measured take a kernel only where arithmetic leaves room for it.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from hf_fastattn.ops.decode_linear import MAX_DECODE_LINEAR_ROWS as MAX_ROWS

from .decode_linear_table import TABLES

MAX_GEMV_ROWS = 4
"""Most rows of the GEMV, whose accumulators are registers of every thread."""

DTYPES = (torch.float16, torch.bfloat16)

ROW_MULTIPLE = 16
"""Rows of the weight must start this many elements apart: Triton loads 16 bytes at a time only from such strides."""

MIN_BYTES = 16 * 2**20
"""Without a measurement, smaller weights are the library's: they are read in about the time that a launch takes."""

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of A100, H100 and H200, B200."""

GEMV_ROWS = {80: 2, 90: 2, 100: 1}
"""Without a measurement, most rows of the GEMV: with more, its sums leave registers for too few loads in flight."""


@dataclass(frozen=True)
class Plan:
    """One way to compute a linear layer.

    Attributes:
        kind: which implementation.
        block_n: rows of the weight per program; a power of two, 16 or more for "flat".
        block_k: columns per step; "gemv" wants 256 per warp, one 16-byte load per thread, so that no data move
            between threads inside the loop.
        num_warps: warps per program.
        num_stages: tiles loaded ahead, plus one ("flat").
        num_splits: programs that share K; with more than one a second launch adds their partial results.
    """

    kind: Literal["gemv", "flat", "library"]
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    num_splits: int = 1


LIBRARY = Plan("library")


@functools.lru_cache(maxsize=4096)
def choose(num_rows: int, n: int, k: int, dtype: torch.dtype, arch: int) -> Plan:
    """Return the plan for num_rows rows of activations and weights of n rows in all, k columns each.

    Takes the nearest measured shape, at most a factor of two away in n and in k, else :func:`by_arithmetic`.

    Args:
        arch: the device's own compute capability, e.g. 90; one without a table takes the library.
    """
    table = TABLES.get(arch)
    if table is None or dtype not in DTYPES or not 1 <= num_rows <= MAX_ROWS or k % ROW_MULTIPLE or n < 1 or k < 1:
        return LIBRARY
    shapes = table["shapes"]
    nearest = min(shapes, key=lambda shape: _distance(shape, n, k), default=None)
    if nearest is None or _distance(nearest, n, k) > 1.0:
        return by_arithmetic(num_rows, n, k, arch)
    return next((Plan(*fields) for largest, fields in shapes[nearest] if num_rows <= largest), LIBRARY)


def by_arithmetic(num_rows: int, n: int, k: int, arch: int) -> Plan:
    """Return the plan for a shape that was not measured.

    Up to 16 rows, tensor cores need less time for a weight than reading it takes (a GPU computes 150 to 300 flops per
    byte that it reads, 16 rows need 16), so time is bytes over bandwidth and what counts is bytes in flight: a
    multiprocessor needs 13 to 38 KB (2 to 8 TB/s x 700 ns / multiprocessors). A program of the flat GEMM has at least
    32 weight rows: with fewer, reading x again from L2 would cost as much as the weights. Where that leaves
    multiprocessors idle, K is split.
    """
    if 2 * n * k < MIN_BYTES:
        return LIBRARY
    sms = MULTIPROCESSORS[arch]
    if num_rows <= GEMV_ROWS[arch]:
        num_warps = 2 if k % 1024 else 4
        return Plan("gemv", 4, 256 * num_warps, num_warps, 1, _splits(4 * sms, n // 4, k // 1024))
    block_n = 64 if n // 64 >= 4 * sms else 32
    block_k = 8192 // block_n
    return Plan("flat", block_n, block_k, block_n // 16, 4, _splits(sms, n // block_n, k // block_k))


def _splits(wanted: int, programs: int, steps: int) -> int:
    """Return how many programs share K: at most as many as are wanted in all, each with at least four steps."""
    return max(1, min(wanted // max(programs, 1), steps // 4, 16))


def _distance(shape: tuple[int, int], n: int, k: int) -> float:
    """Return how far a measured shape is from (n, k), in factors of two along the farther axis."""
    return max(abs(math.log2(n / shape[0])), abs(math.log2(k / shape[1])))

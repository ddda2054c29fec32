"""What the host decides before a prefill launch: whether the kernel takes a call, and with which tiles."""

import dataclasses

import torch
import triton
from torch import Tensor

from hf_fastattn.ops.shapes import KERNEL_DTYPES, MAX_HEAD_DIM

from ._launch import SMALL

MAX_TOKEN_STRIDE = 2**23
"""Offsets inside a tile of up to 128 tokens are int32; those of tiles, blocks and sequences are int64."""


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Launch config of the kernel.

    Attributes:
        BLOCK_M, BLOCK_N: queries and keys per tile.
        num_warps: warps per program.
        num_stages: depth of the K/V pipeline.
        split: a loop without masks for the tiles that every query sees whole; False masks every tile, with fewer
            registers.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    split: bool = True


def config(arch: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, *, plain: bool = True) -> PrefillConfig:
    """Return the launch config for an architecture (80, 86, 90, 100), head sizes and dtype.

    Chosen so that no case of prefill_attention.compile_cases spills registers or exceeds shared memory; not yet tuned
    on a GPU. plain: see :func:`is_plain`; other calls need registers of their own, taken from the tiles.
    """
    size = max(64, tile_dim(max(head_dim, v_head_dim)))
    if dtype == torch.float32:
        return _FLOAT32.get((arch, size), _FLOAT32_REST)
    return _HALF[arch][size] if plain else _HALF_NOT_PLAIN.get((arch, size), _HALF[arch][size])


def is_plain(block_size: int, causal: bool, key_mask: bool, softcap: bool) -> bool:
    """Return whether a call is causal without mask and softcap, on dense keys or blocks of at least 64 tokens."""
    return causal and not key_mask and not softcap and (block_size == 0 or block_size >= 64)


_FLOAT32 = {
    (80, 128): PrefillConfig(64, 16, 8, 2, split=False),
    (80, 256): PrefillConfig(64, 16, 8, 2, split=False),
    (SMALL, 128): PrefillConfig(32, 16, 8, 2, split=False),
    (SMALL, 256): PrefillConfig(16, 16, 4, 2, split=False),
}
_FLOAT32_REST = PrefillConfig(32, 32, 8, 2, split=False)
_HALF = {
    80: {
        64: PrefillConfig(128, 64, 4, 3),
        128: PrefillConfig(128, 32, 8, 4),
        256: PrefillConfig(64, 32, 8, 3),
    },
    SMALL: {
        64: PrefillConfig(128, 64, 8, 3),
        128: PrefillConfig(128, 32, 8, 3),
        256: PrefillConfig(64, 32, 8, 2),
    },
    90: {
        64: PrefillConfig(128, 128, 8, 3),
        128: PrefillConfig(128, 128, 8, 3),
        256: PrefillConfig(128, 64, 8, 2, split=False),
    },
    100: {
        64: PrefillConfig(128, 64, 8, 3),
        128: PrefillConfig(128, 64, 8, 3),
        256: PrefillConfig(128, 32, 8, 3),
    },
}
_HALF_NOT_PLAIN = {
    (90, 128): PrefillConfig(128, 64, 8, 4),
    (90, 256): PrefillConfig(128, 32, 8, 3, split=False),
}


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None = None,
    softmax_scale: float = 1.0,
) -> str | None:
    """Return why the kernel cannot take a call, in one sentence, or None if it can (O(1), no device access)."""
    if q.dtype not in KERNEL_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return (
            f"prefill_attention needs q, k and v of one dtype of {KERNEL_DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"prefill_attention takes head sizes up to {MAX_HEAD_DIM}, got {q.shape[3]} and {v.shape[3]}"
    if not softmax_scale > 0:
        return f"prefill_attention needs a positive softmax_scale, got {softmax_scale}"
    token_axis = 2 if block_table is None else 1
    for x, axis in ((q, 2), (k, token_axis), (v, token_axis)):
        if x.shape[axis] > 1 and x.stride(axis) >= MAX_TOKEN_STRIDE:
            return f"prefill_attention takes tokens less than {MAX_TOKEN_STRIDE} elements apart, got {x.stride(axis)}"
    if block_table is not None:
        block_size = k.shape[1]
        if block_size < 16 or block_size & (block_size - 1):
            return f"prefill_attention takes block sizes that are powers of two from 16, got {block_size}"
        if k.shape[0] and (k.stride(3) != 1 or v.stride(3) != 1):
            return "prefill_attention needs k and v caches with a contiguous head dimension"
    return None


def tile_dim(head_dim: int) -> int:
    """Return the width of a tile that holds a head: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))

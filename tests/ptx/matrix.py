"""Matrix instructions: how their operands lie in registers and in shared memory.

Source: PTX ISA, the chapters on warp level and on asynchronous warpgroup level matrix instructions.

Registers are (registers, threads) uint32, with two 16-bit elements each in A and B and a float32 in C and D.
"""

import functools
from collections.abc import Callable

import numpy as np

Decode = Callable[[np.ndarray], np.ndarray]
"""Bits of an element to float32."""


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the bits (uint32) of float32 values, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint32)


def from_fp16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of float16 bits."""
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def to_fp16(values: np.ndarray) -> np.ndarray:
    """Return the bits (uint32) of float32 values."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)


def _fragment_of_a() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns (4 registers, 2 halves, 32 lanes) of a 16 x 16 operand in a warp's registers."""
    register, half, lane = np.ogrid[:4, :2, :32]
    return lane // 4 + 8 * (register % 2) + 0 * half, lane % 4 * 2 + half + 8 * (register // 2)


def _fragment_of_b() -> tuple[np.ndarray, np.ndarray]:
    """Rows (k) and columns (2 registers, 2 halves, 32 lanes) of a 16 x 8 operand."""
    register, half, lane = np.ogrid[:2, :2, :32]
    return lane % 4 * 2 + half + 8 * register, lane // 4 + 0 * register + 0 * half


def _fragment_of_c(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns (columns / 2 registers, 32 lanes) of a 16 x columns accumulator."""
    register, lane = np.ogrid[: columns // 2, :32]
    return lane // 4 + 8 * (register // 2 % 2), register // 4 * 8 + lane % 4 * 2 + register % 2


_A, _B = _fragment_of_a(), _fragment_of_b()
_C = {columns: _fragment_of_c(columns) for columns in (8, *range(16, 264, 8))}


def _halves(registers: np.ndarray, decode: Decode) -> np.ndarray:
    """Return (warps, registers, 2, 32) values of (registers, threads)."""
    per_warp = registers.reshape(len(registers), -1, 32).transpose(1, 0, 2)
    return decode(np.stack([per_warp & 0xFFFF, per_warp >> 16], axis=2))


def operand_a(registers: np.ndarray, decode: Decode) -> np.ndarray:
    """Return the (warps, 16, 16) operands of 4 registers."""
    values = _halves(registers, decode)
    out = np.empty((len(values), 16, 16), np.float32)
    out[:, _A[0], _A[1]] = values
    return out


def mma_m16n8k16(a: np.ndarray, b: np.ndarray, c: np.ndarray, decode: Decode) -> np.ndarray:
    """Return D's 4 registers (float32) for 4 registers of A, 2 of B and 4 of C, for all warps."""
    left = operand_a(a, decode)
    right = np.empty((len(left), 16, 8), np.float32)
    right[:, _B[0], _B[1]] = _halves(b, decode)
    product = left @ right  # (warps, 16, 8)
    rows, columns = _C[8]
    return c + product[:, rows, columns].transpose(1, 0, 2).reshape(4, -1)


def wgmma(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return D's registers + A @ B: a (groups, 64, 16), b (groups, 16, N), d (N / 2 registers, threads), float32."""
    product = (a @ b).reshape(-1, 16, b.shape[2])  # (warps, 16, N)
    rows, columns = _C[b.shape[2]]
    return d + product[:, rows, columns].transpose(1, 0, 2).reshape(len(d), -1)


@functools.lru_cache(1024)
def described(descriptor: int, rows: int, *, transposed: bool) -> np.ndarray:
    """Return the addresses (rows, 16) of an operand that a wgmma descriptor shows: rows of M or N, by k.

    transposed: M or N lies contiguously in memory instead of k.
    """
    return _swizzled(descriptor, {1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3], rows, transposed)


@functools.lru_cache(1024)
def described_tensor(descriptor: int, rows: int, *, transposed: bool) -> np.ndarray:
    """Return the same of a descriptor of tcgen05."""
    if descriptor >> 46 & 63 != 1:  # a constant, and no base offset
        raise ValueError(f"a descriptor {descriptor:#x} of a kind that is not known")
    return _swizzled(descriptor, {2: 128, 4: 64, 6: 32}[descriptor >> 61 & 7], rows, transposed)


def _swizzled(descriptor: int, pattern: int, rows: int, transposed: bool) -> np.ndarray:
    """Return the addresses of an operand; pattern: bytes of a row whose 16-byte pieces are swizzled."""
    start, lead, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    row, k = np.ogrid[:rows, :16]
    if transposed:
        elements = pattern // 2  # M or N goes on in another panel behind them
        address = row // elements * lead + k // 8 * stride + k % 8 * pattern + row % elements * 2
    else:
        address = row // 8 * stride + row % 8 * pattern + k * 2
    address = start + address
    return address ^ (address >> 7 & (pattern // 16 - 1)) << 4

"""Loads whose latency the software pipeline has to hide."""

import triton
import triton.language as tl


@triton.jit
def load_ahead(ptr, ASM: tl.constexpr):
    """Load int32 or uint8 values, as int32, that other loads of the same loop iteration depend on.

    With a tl.load in that place Triton 3.6 keeps a single K/V tile in flight; it does not look into inline PTX. The
    load has no mask and the pipeline runs it for tiles past the last, so that the caller clamps the address. The
    interpreter takes tl.load.
    """
    if ASM:
        if ptr.dtype.scalar.element_ty == tl.int32:
            value = tl.inline_asm_elementwise(
                "ld.global.nc.b32 $0, [$1];", "=r,l", [ptr], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            value = tl.inline_asm_elementwise(
                "ld.global.nc.u8 $0, [$1];", "=r,l", [ptr], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        value = tl.load(ptr).to(tl.int32)
    return value


@triton.jit
def skip_zeros(ptr, stride, first_tile, end_tile, end, TILE: tl.constexpr):
    """Return the first tile that holds a non-zero byte before end; end_tile if none does. 1024 bytes are one load."""
    position = first_tile * TILE
    none = end_tile * TILE
    found = none
    while (position < tl.minimum(none, end)) & (found == none):
        index = position + tl.arange(0, 1024)
        value = tl.load(ptr + index * stride, mask=index < tl.minimum(none, end), other=0)
        found = tl.min(tl.where(value != 0, index, none), 0)
        position += 1024
    return found // TILE

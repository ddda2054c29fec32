"""Softmax in pieces, in the exp2 domain: the jit primitives that the attention kernels share.

A logit is kept as ``scores * scale``, where scale holds log2(e), so that exp2 takes the place of exp. The running
maximum starts at a finite number instead of -inf: a tile without a visible key then changes nothing, without a test.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

MIN_MAXIMUM = tl.constexpr(-3.0e38)
"""Running maximum of a row that has seen no key: finite, so that ``-inf - MIN_MAXIMUM`` is -inf and not NaN."""


@triton.jit
def softmax_step(scores, scale, m_i, l_i):
    """Take one tile of scores into a row's running maximum and sum.

    Args:
        scores: [M, N] fp32, -inf where a key is hidden.
        scale: fp32 scalar > 0; ``scores * scale`` are the logits times log2(e).
        m_i, l_i: [M] fp32, maximum (exp2 domain, at least MIN_MAXIMUM) and sum of what came before.

    Returns:
        p [M, N], the factor [M] that brings what was accumulated before to the new maximum, and the new m_i and l_i.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


HEADROOM = tl.constexpr(8.0)
"""How far (exp2 domain) a score may exceed its row's reference before lazy_softmax_step moves the reference."""


@triton.jit
def lazy_softmax_step(scores, scale, m_i, l_i, acc):
    """Take one tile of scores into sums that keep their reference while it fits: exact for any scores.

    A reference is at most HEADROOM below the largest score so far and never above it, so that no exp2 overflows (fp16:
    2**8 of 65504) and the largest weight is at least 1. Only the tile's largest excess crosses threads; the sums stay
    apart by column until the end.

    Args:
        scores, scale: as in softmax_step.
        m_i: [M] fp32, the references (exp2 domain, at least MIN_MAXIMUM).
        l_i: [M, N] fp32, sums by column of what came before; acc: [M, D] fp32.

    Returns:
        p [M, N], m_i, l_i, acc.
    """
    excess = tl.max(tl.max(scores * scale - m_i[:, None], 1), 0)
    if excess > HEADROOM:
        m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
        alpha = tl.math.exp2(m_i - m_new)
        l_i *= alpha[:, None]
        acc *= alpha[:, None]
        m_i = m_new
    p = tl.math.exp2(scores * scale - m_i[:, None])
    return p, m_i, l_i + p, acc


@triton.jit
def tanh_from_log2(x):
    """Return tanh(y) for ``x = 2 * log2(e) * y``: no overflow for any x, absolute error about 1e-7."""
    e = tl.math.exp2(-tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)

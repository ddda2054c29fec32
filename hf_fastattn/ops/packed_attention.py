"""packed_attention: exact attention for sequences that lie one behind the other, without padding ("varlen").

Sources: FlashAttention-2's tiles, see :mod:`.prefill_attention`, whose kernel this is too; the layout is that of
flash-attn's varlen functions. The one decision: the tiles of all sequences are one list, as long as so many sequences
of so many rows can need, and each finds its sequence on the device. So the grid follows from shapes alone, and a CUDA
graph can be replayed over any lengths without programs for the longest of all in every sequence.
"""

import itertools
from typing import Any

from torch import Tensor

from ._library import define_op
from ._torch import attend_dense
from .shapes import NO_WINDOW, check_packed, check_window


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_starts: Tensor,
    key_starts: Tensor,
    max_query_len: int,
    softmax_scale: float,
    sinks: Tensor | None = None,
    causal: bool = True,
    window: int = NO_WINDOW,
    softcap: float = 0.0,
) -> Tensor:
    """Attend the queries of each sequence to the keys of the same sequence.

    The queries of a sequence are its last positions (bottom-right alignment), as in :func:`prefill_attention`: when
    causal, query i of n sees the keys at positions in ``(position - window, position]`` with
    ``position = seq_len - n + i``. A query that sees no key gives 0.

    Args:
        q: (num_queries, num_heads, head_dim); any strides with contiguous head_dim.
        k: (num_keys, num_kv_heads, head_dim). v: like k, its head size may differ.
        query_starts: (num_seqs + 1,) int32, not falling: the queries of sequence i are the rows query_starts[i] to
            query_starts[i + 1] - 1 of q, none if the two are equal. Rows of no sequence give 0.
        key_starts: (num_seqs + 1,) int32, the same for k and v.
        max_query_len: most queries of a sequence. Tiles have few rows where it is small; results do not depend on it.
        softmax_scale: factor on q @ k, usually ``head_dim ** -0.5``.
        sinks: (num_heads,) a learned logit per head that takes part in the softmax and has no value (gpt-oss).
        causal: False lets every query see every key of its sequence; window is ignored then.
        window: sliding window in tokens, the query's own included.
        softcap: ``softcap * tanh(score / softcap)`` on the scaled scores (Gemma 2); 0 is off.

    Returns:
        (num_queries, num_heads, v's head_dim), contiguous, dtype and device of q.

    Supported on a GPU: fp16, bf16 and fp32 (IEEE, not TF32), head sizes to 256; larger ones through PyTorch.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not belong together; on a CPU, starts that fall or lie beyond
            the rows.

    Oracle: :func:`hf_fastattn.reference.packed_attention`; tests: tests/test_packed.py,
    tests/interpret/test_packed_attention.py.
    """
    check_packed(q, k, v, query_starts, key_starts, max_query_len, sinks)
    check_window(window)
    return _OP(q, k, v, query_starts, key_starts, sinks, max_query_len, softmax_scale, causal, window, softcap)


def _torch_packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    sinks: Tensor | None,
    _max_query_len: int,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    queries = _ranges(query_starts, q.shape[0], "query_starts")
    keys = _ranges(key_starts, k.shape[0], "key_starts")
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal, "window": window, "softcap": softcap}
    for rows, columns in zip(queries, keys, strict=True):
        if rows.stop > rows.start and columns.stop > columns.start:
            out[rows] = attend_dense(q[:, :, rows], k[:, :, columns], v[:, :, columns], None, sinks, **options)[0]
    return out


def _ranges(starts: Tensor, size: int, name: str) -> list[slice]:
    """Return the rows of each sequence."""
    edges = starts.tolist()
    if edges[0] < 0 or edges[-1] > size or any(a > b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"expected {name} that do not fall, from 0 to {size} at most, got {edges}")
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _fake_packed_attention(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


_OP = define_op(
    "packed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor query_starts, Tensor key_starts, Tensor? sinks, int max_query_len, "
    "float softmax_scale, bool causal, int window, float softcap) -> Tensor",
    _torch_packed_attention,
    _fake_packed_attention,
)

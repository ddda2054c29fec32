"""prefill_attention: FlashAttention-2's tiled exact attention for many queries per sequence.

Source: Dao et al., "FlashAttention", 2022, and Dao, "FlashAttention-2", 2023: one pass over the keys per query tile
with an online softmax, no score matrix in memory. The one decision: keys come either from dense tensors or from
blocks, so that a prompt, a later chunk of it and a second chat turn are the same op.
"""

from torch import Tensor

from ._library import define_op
from ._torch import attend_dense, attend_paged
from .shapes import NO_WINDOW, check_attention, check_window


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    window: int = NO_WINDOW,
    softcap: float = 0.0,
) -> Tensor:
    """Attend every query to the keys of its sequence.

    The queries are the last ``query_len`` positions of the sequence (bottom-right alignment): query i stands at
    position ``seq_len - query_len + i`` and, when causal, sees the keys at positions in ``(position - window,
    position]`` that key_mask does not hide. A query that sees no key gives 0 (with sinks too).

    Args:
        q: (num_seqs, num_heads, query_len, head_dim); any strides with contiguous head_dim.
        k: dense: (num_seqs, num_kv_heads, seq_len, head_dim). Paged: (num_blocks, block_size, num_kv_heads, head_dim).
            num_heads is a multiple of num_kv_heads; query head h reads key head ``h // (num_heads // num_kv_heads)``.
        v: like k, its head size may differ.
        softmax_scale: factor on q @ k, usually ``head_dim ** -0.5``.
        block_table: (num_seqs, max_blocks) int32, -1 padded; makes the call paged.
        seq_lens: (num_seqs,) int32, tokens of each sequence in the blocks, the current queries' own included.
        query_positions: (num_seqs, query_len) int32, paged only: the position of each query in its sequence instead of
            the bottom-right rule; a query at -1 (padding) gives 0.
        key_mask: (num_seqs, at least seq_len) int8 or bool, non-zero where the key may be seen.
        sinks: (num_heads,) a learned logit per head that takes part in the softmax and has no value (gpt-oss).
        causal: False lets every query see every key; window is ignored then.
        window: sliding window in tokens, the query's own included.
        softcap: ``softcap * tanh(score / softcap)`` on the scaled scores (Gemma 2); 0 is off.

    Returns:
        (num_seqs, query_len, num_heads, v's head_dim), contiguous, dtype and device of q.

    Supported on a GPU: fp16, bf16 and fp32 (IEEE, not TF32), head sizes to 256; larger ones through PyTorch.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not belong together.

    Oracle: :func:`hf_fastattn.reference.prefill_attention`; tests: tests/test_ops.py,
    tests/interpret/test_prefill_attention.py.
    """
    check_attention(q, k, v, block_table, seq_lens, key_mask, sinks)
    check_window(window)
    if query_positions is not None and block_table is None:
        raise ValueError("query_positions needs a block_table: dense keys are aligned with the last query")
    if query_positions is not None and query_positions.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"expected query_positions {(q.shape[0], q.shape[2])}, got {tuple(query_positions.shape)}")
    return _OP(q, k, v, block_table, seq_lens, query_positions, key_mask, sinks, softmax_scale, causal, window, softcap)


def _torch_prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    query_positions: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    if block_table is None or seq_lens is None:
        return attend_dense(
            q, k, v, key_mask, sinks, softmax_scale=softmax_scale, causal=causal, window=window, softcap=softcap
        )
    return attend_paged(
        q,
        k,
        v,
        block_table,
        seq_lens,
        query_positions,
        key_mask,
        sinks,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window,
        softcap=softcap,
    )


def _fake_prefill_attention(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


_OP = define_op(
    "prefill_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? block_table, Tensor? seq_lens, Tensor? query_positions, Tensor? key_mask, "
    "Tensor? sinks, float softmax_scale, bool causal, int window, float softcap) -> Tensor",
    _torch_prefill_attention,
    _fake_prefill_attention,
)

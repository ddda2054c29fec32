"""decode_attention: FlashDecoding over a block table, for the last few queries of each sequence.

Sources: Dao et al., "Flash-Decoding for long-context inference", 2023 (split the keys, combine the partial results);
Kwon et al., 2023 (PagedAttention's blocks); Hong et al., 2024 (FlashDecoding++: pieces of a softmax that do not wait
for each other). The one decision: lengths, tables and sharing are read on the device, so that one captured launch
serves every step.
"""

import torch
from torch import Tensor

from ._cpu_schedule import CpuSchedule
from ._library import define_op, is_direct
from ._torch import attend_dense, attend_one_query, attend_paged
from .decode_schedule import decode_schedule
from .shapes import MAX_DECODE_QUERY_LEN, NO_WINDOW, check_attention, check_shared_prefixes, check_window


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    window: int = NO_WINDOW,
    softcap: float = 0.0,
    shared_prefixes: Tensor | None = None,
    schedule: Tensor | CpuSchedule | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Attend the last ``query_len`` (1 to 32) positions of each sequence to its keys, causally.

    Query i stands at position ``seq_len - query_len + i`` and sees the keys at positions in
    ``(position - window, position]`` that key_mask does not hide. A query that sees no key gives 0.

    Args:
        q: (num_seqs, num_heads, query_len, head_dim); any strides with contiguous head_dim.
        k: dense: (num_seqs, num_kv_heads, seq_len, head_dim). Paged: (num_blocks, block_size, num_kv_heads, head_dim),
            block_size a power of two from 16 to 256 on a GPU.
        v: like k, its head size may differ.
        softmax_scale: factor on q @ k, usually ``head_dim ** -0.5``.
        block_table: (num_seqs, max_blocks) int32, -1 padded; makes the call paged.
        seq_lens: (num_seqs,) int32, tokens of each sequence in the blocks, the current queries' own included. Read on
            the device; at most ``max_blocks * block_size``.
        key_mask: (num_seqs, at least seq_len) int8 or bool, non-zero where the key may be seen.
        sinks: (num_heads,) a learned logit per head that takes part in the softmax and has no value (gpt-oss).
        window: sliding window in tokens, the query's own included.
        softcap: ``softcap * tanh(score / softcap)`` on the scaled scores (Gemma 2); 0 is off.
        shared_prefixes: (num_shared, 4) int32, [first_row, num_rows, first_block, end_block]: sequences first_row ..
            first_row + num_rows - 1 have the same block ids in the columns first_block .. end_block - 1 of block_table,
            which are full and lie before the first query of each of them. num_rows 0 marks an unused entry. The ranges
            of a sequence's entries do not overlap; the first begins at column 0 and each begins where one ends. Their
            blocks are read once for all their sequences: a hint that changes no result beyond rounding. Not with
            key_mask.
        schedule: what :func:`decode_schedule` returned for these lengths, sizes, window, shared_prefixes and
            batch_invariant; one serves all layers that are alike, one after the other. None: made for this call.
        batch_invariant: cut a sequence's keys by its own length alone, so that its result is bitwise the same whatever
            it is batched with; shared_prefixes is ignored then. On a CPU it changes nothing.

    Returns:
        (num_seqs, query_len, num_heads, v's head_dim), contiguous, dtype and device of q.

    Supported on a GPU: fp16, bf16 and fp32 (IEEE, not TF32), head sizes to 256; larger ones through PyTorch.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not belong together, or more than 32 queries per sequence.

    Oracle: :func:`hf_fastattn.reference.decode_attention`; tests: tests/test_ops.py,
    tests/interpret/test_decode_attention.py.
    """
    check_attention(q, k, v, block_table, seq_lens, key_mask, sinks)
    check_window(window)
    if shared_prefixes is not None:
        check_shared_prefixes(shared_prefixes, block_table, key_mask)
    if q.shape[2] > MAX_DECODE_QUERY_LEN:
        raise ValueError(
            f"decode_attention takes at most {MAX_DECODE_QUERY_LEN} queries per sequence, got {q.shape[2]}: "
            "use prefill_attention"
        )
    if isinstance(schedule, CpuSchedule) and not is_direct("decode_attention", q):  # whoever sees the op sees tensors
        schedule = None
    if schedule is None and block_table is None and torch.compiler.is_compiling():
        # Else the launcher keeps one for the layers that follow: a graph must not leave memory of its own behind.
        schedule = decode_schedule(q, k, v, window=window, batch_invariant=batch_invariant)
    options = (softmax_scale, window, softcap, shared_prefixes, schedule, batch_invariant)
    return _OP(q, k, v, block_table, seq_lens, key_mask, sinks, *options)


def decode_at_once(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor | None:
    """Attend one query per sequence to all keys of dense tensors on a CPU, past the checks and the dispatcher.

    After a model's weights have gone through the processor's caches, every function on the way costs as much as its
    code takes to come back.

    Returns:
        What :func:`decode_attention` would; None for any other call.
    """
    if not (is_direct("decode_attention", q) and q.dtype == k.dtype == v.dtype and q.shape[2] == 1):
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    return attend_one_query(q, k, v, softmax_scale)


def _torch_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window: int,
    softcap: float,
    shared_prefixes: Tensor | None = None,
    schedule: Tensor | CpuSchedule | None = None,
    _batch_invariant: bool = False,
) -> Tensor:
    if block_table is None or seq_lens is None:
        return attend_dense(
            q, k, v, key_mask, sinks, softmax_scale=softmax_scale, causal=True, window=window, softcap=softcap
        )
    return attend_paged(
        q,
        k,
        v,
        block_table,
        seq_lens,
        None,
        key_mask,
        sinks,
        softmax_scale=softmax_scale,
        causal=True,
        window=window,
        softcap=softcap,
        shared_prefixes=shared_prefixes,
        schedule=schedule if isinstance(schedule, CpuSchedule) else None,
    )


def _fake_decode_attention(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


_OP = define_op(
    "decode_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? block_table, Tensor? seq_lens, Tensor? key_mask, Tensor? sinks, "
    "float softmax_scale, int window, float softcap, Tensor? shared_prefixes=None, Tensor? schedule=None, "
    "bool batch_invariant=False) -> Tensor",
    _torch_decode_attention,
    _fake_decode_attention,
)

"""Plain PyTorch oracles: what each op must compute, written to be read.

Every function here has the name and the signature of the op it checks, computes in the dtype of its inputs (pass
float64 for an oracle), builds the whole score matrix and never calls an op. Tests compare kernels and CPU
implementations with these; nothing else imports this module.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops.shapes import NO_WINDOW


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    *,
    positions: Tensor | None = None,
) -> None:
    """Write new keys and values into their blocks, one token at a time. See :func:`hf_fastattn.ops.store_kv`."""
    num_seqs, _, query_len, _ = k.shape
    block_size = k_cache.shape[1]
    for seq in range(num_seqs):
        for i in range(query_len):
            position = int(past_lens[seq]) + i if positions is None else int(positions[seq, i])
            if position < 0:
                continue
            block = int(block_table[seq, position // block_size])
            k_cache[block, position % block_size] = k[seq, :, i]
            v_cache[block, position % block_size] = v[seq, :, i]


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
    """Attend many queries per sequence. See :func:`hf_fastattn.ops.prefill_attention`."""
    num_seqs, num_heads, query_len, _ = q.shape
    if block_table is None:
        seq_lens = torch.full((num_seqs,), k.shape[2], device=q.device)
        k_rows, v_rows = list(k), list(v)
    else:
        assert seq_lens is not None
        k_rows = [gather_blocks(k, block_table[seq], int(seq_lens[seq])) for seq in range(num_seqs)]
        v_rows = [gather_blocks(v, block_table[seq], int(seq_lens[seq])) for seq in range(num_seqs)]
    outs = []
    for seq in range(num_seqs):
        seq_len = int(seq_lens[seq])
        if query_positions is None:
            rows = seq_len - query_len + torch.arange(query_len, device=q.device)
        else:
            rows = query_positions[seq]
        columns = torch.arange(seq_len, device=q.device)
        visible = (
            (rows >= 0)[:, None] if query_positions is not None else torch.ones_like(rows, dtype=torch.bool)[:, None]
        )
        visible = visible.expand(query_len, seq_len).clone()
        if causal:
            visible &= columns[None, :] <= rows[:, None]
            visible &= columns[None, :] > rows[:, None] - window
        if key_mask is not None:
            visible &= key_mask[seq, :seq_len].bool()[None, :]
        outs.append(attend(q[seq], k_rows[seq], v_rows[seq], visible, softmax_scale, softcap, sinks))
    return torch.stack(outs).transpose(1, 2).contiguous() if outs else q.new_empty(0, query_len, num_heads, v.shape[-1])


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
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Attend the last few queries of each sequence. See :func:`hf_fastattn.ops.decode_attention`."""
    return prefill_attention(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        block_table=block_table,
        seq_lens=seq_lens,
        key_mask=key_mask,
        sinks=sinks,
        window=window,
        softcap=softcap,
    )


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
    """Attend sequences that lie one behind the other. See :func:`hf_fastattn.ops.packed_attention`."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    for seq in range(query_starts.shape[0] - 1):
        rows = slice(int(query_starts[seq]), int(query_starts[seq + 1]))
        columns = slice(int(key_starts[seq]), int(key_starts[seq + 1]))
        one = (x.transpose(0, 1)[None] for x in (q[rows], k[columns], v[columns]))
        out[rows] = prefill_attention(
            *one, softmax_scale=softmax_scale, sinks=sinks, causal=causal, window=window, softcap=softcap
        )[0]
    return out


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer. See :func:`hf_fastattn.ops.decode_linear`."""
    out = x @ weight.transpose(0, 1)
    return out if bias is None else out + bias


def decode_linear_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Apply several linear layers to one input. See :func:`hf_fastattn.ops.decode_linear_group`."""
    return [decode_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def gather_blocks(cache: Tensor, blocks: Tensor, seq_len: int) -> Tensor:
    """Collect one sequence from its blocks: (num_blocks, block_size, heads, dim) -> (heads, seq_len, dim)."""
    block_size = cache.shape[1]
    ids = blocks[: -(-seq_len // block_size)].long()
    return cache[ids].flatten(0, 1)[:seq_len].transpose(0, 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Softmax attention of one sequence; a row that sees no key is 0.

    Args:
        q: (num_heads, query_len, head_dim). k, v: (num_kv_heads, seq_len, head_dim).
        visible: (query_len, seq_len) bool, True where the query may see the key.
        sinks: (num_heads,) extra logits that take probability and give no value.

    Returns:
        (num_heads, query_len, v's head_dim).
    """
    group = q.shape[0] // k.shape[0]
    k = k.repeat_interleave(group, 0)
    v = v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)) * softmax_scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        probs = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    probs = torch.where(visible, probs, torch.zeros_like(probs))
    return probs @ v.masked_fill(~visible.any(0)[None, :, None], 0.0)

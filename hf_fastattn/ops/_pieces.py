"""Decoding over scattered blocks on a CPU, piece by piece: no copy of long runs, shared prefixes read once.

Each sequence is cut where its blocks are not side by side and where it parts from sequences that share its beginning.
A piece is attended by all queries that see it, and the partial results of a query are joined by their logsumexp
(Dao et al., "Flash-Decoding for long-context inference", 2023; the sharing is a cascade as in Juravsky et al.,
"Hydragen", 2024). The logsumexp is rounded like the scores that it sums, so joining loses no more than scoring.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._views import is_flat, read_blocks, stack_blocks

MIN_RUN = 256
"""Tokens that a run must have on average to be attended by itself; shorter runs are gathered first."""


@dataclass
class Piece:
    """Tokens that the sequences ``first`` to ``end - 1`` of the batch see.

    Attributes:
        blocks: where they are; of each sequence in turn if they are stacked, else of all of them.
        tokens: how many a sequence sees.
        stacked: each sequence sees blocks of its own, which are few and gathered together.
    """

    first: int
    end: int
    blocks: list[int]
    tokens: int
    stacked: bool = False


def attend_pieces(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lens: list[int],
    shared_prefixes: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """Attend one query per sequence to all its tokens; the arguments are those of decode_attention.

    Returns:
        (num_seqs, 1, num_heads, v's head_dim); 0 for a sequence without tokens.
    """
    num_seqs, num_heads, _, head_dim = q.shape
    num_kv_heads, v_head_dim = k_cache.shape[2], v_cache.shape[3]
    group = num_heads // num_kv_heads
    grouped = q.reshape(num_seqs, num_kv_heads, group, head_dim)
    acc = q.new_zeros(num_seqs, num_kv_heads, group, v_head_dim, dtype=torch.float32)
    maximum = acc.new_full((num_seqs, num_kv_heads, group, 1), float("-inf"))
    total = torch.zeros_like(maximum)
    shared = [] if shared_prefixes is None else shared_prefixes.tolist()
    flat = is_flat(k_cache) and is_flat(v_cache)
    for piece in cut(block_table.tolist(), lens, shared, k_cache.shape[1], flat):
        rows = slice(piece.first, piece.end)
        if piece.stacked:
            k, v = (
                stack_blocks(cache, piece.blocks, piece.end - piece.first, piece.tokens) for cache in (k_cache, v_cache)
            )
            packed = grouped[rows]
        else:
            k, v = (read_blocks(cache, piece.blocks, piece.tokens) for cache in (k_cache, v_cache))
            packed = grouped[rows].transpose(0, 1).reshape(1, num_kv_heads, -1, head_dim)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(packed, k, v, scale=softmax_scale)
        lse = lse[..., None]
        if not piece.stacked:
            out = out.view(num_kv_heads, -1, group, v_head_dim).transpose(0, 1)
            lse = lse.view(num_kv_heads, -1, group, 1).transpose(0, 1)
        new = torch.maximum(maximum[rows], lse)
        old_weight, weight = torch.exp(maximum[rows] - new), torch.exp(lse - new)
        acc[rows] = acc[rows] * old_weight + out * weight
        total[rows] = total[rows] * old_weight + weight
        maximum[rows] = new
    acc /= total.clamp(min=torch.finfo(torch.float32).tiny)
    return acc.view(num_seqs, 1, num_heads, v_head_dim).to(q.dtype)


def cut(
    table: list[list[int]], lens: list[int], shared: list[list[int]], block_size: int, flat: bool
) -> Iterator[Piece]:
    """Yield the pieces of a batch.

    Args:
        table: blocks of each sequence. lens: its tokens.
        shared: [first sequence, number of sequences, first block, end block], outer levels before inner ones.
        block_size: tokens per block.
        flat: runs of blocks can be viewed; else there is no reason to cut at their ends.
    """
    begin = [0] * len(lens)
    pieces: list[Piece] = []
    own: list[Piece] = []
    for first, count, first_block, end_block in shared:
        if count:
            blocks = table[first][first_block:end_block]
            pieces.append(Piece(first, first + count, blocks, len(blocks) * block_size))
            begin[first : first + count] = [end_block] * count
    for row, (start, seq_len) in enumerate(zip(begin, lens, strict=True)):
        blocks, tokens = table[row][start : -(-seq_len // block_size)], seq_len - start * block_size
        if own and own[-1].tokens == tokens < MIN_RUN and tokens:
            own[-1].end, own[-1].stacked = row + 1, True
            own[-1].blocks += blocks
        else:
            own.append(Piece(row, row + 1, blocks, tokens))
    for piece in [*pieces, *own]:
        if piece.stacked:
            yield piece
            continue
        tokens, runs = piece.tokens, list(_runs(piece.blocks))
        if not flat or len(runs) * MIN_RUN > len(piece.blocks) * block_size:
            runs = [piece.blocks] if piece.blocks else []
        for run in runs:
            yield Piece(piece.first, piece.end, run, min(tokens, len(run) * block_size))
            tokens -= len(run) * block_size


def _runs(blocks: list[int]) -> Iterator[list[int]]:
    """Yield the maximal runs of blocks that lie side by side."""
    start = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield blocks[start:i]
            start = i

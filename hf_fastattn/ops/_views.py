"""Blocks as dense tensors on a CPU: views where the blocks of a sequence are one run, else gathered copies."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def even_runs(block_table: Tensor, num_blocks: int) -> tuple[int, int] | None:
    """Return (first block, distance) if the first blocks of each sequence are one run, evenly spaced; else None."""
    rows = block_table[:, :num_blocks].tolist()
    first = rows[0][0]
    distance = rows[1][0] - first if len(rows) > 1 else 0
    if first < 0 or distance < 0:
        return None
    for i, row in enumerate(rows):
        start = first + i * distance
        if row != list(range(start, start + num_blocks)):
            return None
    return first, distance


def check_lens(lens: Sequence[int], block_table: Tensor, block_size: int) -> None:
    """Raise ValueError if a sequence is longer than the block table."""
    limit = block_table.shape[1] * block_size
    if max(lens, default=0) > limit:
        raise ValueError(f"a sequence of {max(lens)} tokens is longer than its block table, which holds {limit}")


def is_flat(cache: Tensor) -> bool:
    """Whether the slots of consecutive blocks follow each other at one stride."""
    return cache.stride(0) == cache.shape[1] * cache.stride(1)


def view_runs(cache: Tensor, num_seqs: int, seq_len: int, first: int, distance: int) -> Tensor:
    """View sequences whose blocks are evenly spaced runs as (num_seqs, heads, seq_len, dim)."""
    return view_parts(cache, num_seqs, [(0, seq_len)], first, distance)[0]


def view_parts(
    cache: Tensor, num_seqs: int, parts: Iterable[tuple[int, int]], first: int, distance: int
) -> list[Tensor]:
    """View parts of such sequences, (first token, tokens) each, in one PyTorch call per part."""
    _, _, num_heads, head_dim = cache.shape
    block, slot, head, dim = cache.stride()
    start, strides = cache.storage_offset() + first * block, (distance * block, head, slot, dim)
    return [
        cache.as_strided((num_seqs, num_heads, tokens, head_dim), strides, start + begin * slot)
        for begin, tokens in parts
    ]


def read_blocks(cache: Tensor, blocks: list[int], tokens: int) -> Tensor:
    """Return the first tokens of blocks as (1, heads, tokens, dim): a view if the blocks are one run, else a copy."""
    if blocks and blocks[0] >= 0 and blocks == list(range(blocks[0], blocks[0] + len(blocks))) and is_flat(cache):
        return view_runs(cache, 1, tokens, blocks[0], 0)
    index = torch.tensor(blocks, dtype=torch.long, device=cache.device)
    return cache.index_select(0, index).flatten(0, 1)[:tokens].transpose(0, 1)[None]

"""Random inputs of the kernels' cells, and the copies that a measurement rotates through."""

import functools
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fastattn import reference

from . import common
from .roofline import Cell, DecodeCell, PrefillCell, StoreCell, kv_cache_bytes, moved_bytes

SHARPNESS = 3.0
"""Standard deviation of the scores: a few keys matter, so that a lost or a wrong one shows."""
MAX_COPIES = {"cuda": 256, "cpu": 32}


@dataclass
class AttentionInputs:
    """One rotating copy of an attention cell: tensors as the op takes them."""

    cell: DecodeCell | PrefillCell
    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor | None
    seq_lens: Tensor | None

    @property
    def scale(self) -> float:
        """Return the factor on q @ k."""
        return self.q.shape[3] ** -0.5

    def row(self, cache: Tensor, seq: int, heads: slice) -> Tensor:
        """Return the keys or values of one sequence, (heads, seq_len, head_dim)."""
        if self.block_table is None:
            return cache[seq, heads]
        return reference.gather_blocks(cache[:, :, heads], self.block_table[seq], self.cell.lens[seq])

    @functools.cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Contiguous (num_seqs, num_kv_heads, seq_len, head_dim) for implementations that know no blocks."""
        if len(set(self.cell.lens)) > 1:
            raise ValueError("dense keys need sequences of one length")
        if self.block_table is None:
            return self.k, self.v
        wanted = 2 * len(self.cell.lens) * self.cell.lens[0] * self.k[0, 0].numel() * self.k.element_size()
        if wanted > common.free_memory(self.k.device):
            raise MemoryError(f"dense keys and values need {wanted / 2**30:.1f} GiB more")
        k, v = (
            torch.stack([self.row(cache, seq, slice(None)) for seq in range(len(self.cell.lens))])
            for cache in (self.k, self.v)
        )
        return k, v


@dataclass
class StoreInputs:
    """One rotating copy of a store_kv cell."""

    cell: StoreCell
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    past_lens: Tensor


Inputs = AttentionInputs | StoreInputs


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory: a GPU's L2, a CPU's L3 (32 MiB if unknown)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    name = "SC_LEVEL3_CACHE_SIZE"
    return max(os.sysconf(name) if name in os.sysconf_names else 0, 0) or 32 * 2**20


def count_copies(cell: Cell, itemsize: int, device: torch.device) -> int:
    """Return how many copies a cell rotates through to move twice the cache's size, as memory allows."""
    wanted = math.ceil(2 * cache_bytes(device) / moved_bytes(cell, itemsize))
    fitting = common.free_memory(device) // (4 * copy_bytes(cell, itemsize))
    return max(1, min(wanted, MAX_COPIES[device.type], fitting))


def copy_bytes(cell: Cell, itemsize: int) -> int:
    """Return the memory that one copy takes."""
    if isinstance(cell, StoreCell):
        touched = cell.batch * (cell.query_len // cell.block_size + 2) * cell.block_size
        return 2 * (touched + cell.batch * cell.query_len) * cell.num_kv_heads * cell.head_dim * itemsize
    return kv_cache_bytes(cell, itemsize) + 2 * len(cell.lens) * cell.query_len * cell.num_heads * cell.head_dim * (
        itemsize
    )


def make_inputs(cell: Cell, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Build one copy of a cell: random data, blocks in random order."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    num_seqs = len(cell.lens)
    if isinstance(cell, StoreCell):
        first = cell.past_len // cell.block_size  # earlier blocks are never touched: -1 in the table
        last = (cell.lens[0] - 1) // cell.block_size
        table = torch.full((num_seqs, last + 1), -1, dtype=torch.int32, device=device)
        order = torch.randperm(num_seqs * (last + 1 - first), generator=generator, device=device)
        table[:, first:] = order.view(num_seqs, -1)
        k, v = (normal(num_seqs, cell.query_len, cell.num_kv_heads, cell.head_dim).transpose(1, 2) for _ in range(2))
        k_cache, v_cache = (
            torch.zeros(len(order), cell.block_size, cell.num_kv_heads, cell.head_dim, dtype=dtype, device=device)
            for _ in range(2)
        )
        past = torch.full((num_seqs,), cell.past_len, dtype=torch.int32, device=device)
        return StoreInputs(cell, k, v, k_cache, v_cache, table, past)
    q = normal(num_seqs, cell.query_len, cell.num_heads, cell.head_dim).mul_(SHARPNESS).transpose(1, 2)
    if cell.block_size is None:
        k, v = (normal(num_seqs, cell.num_kv_heads, cell.lens[0], cell.head_dim) for _ in range(2))
        return AttentionInputs(cell, q, k, v, None, None)
    shared = cell.shared_prefix // cell.block_size if isinstance(cell, DecodeCell) else 0
    needed = [-(-seq_len // cell.block_size) for seq_len in cell.lens]
    num_blocks = shared + sum(count - shared for count in needed)
    order = torch.randperm(num_blocks, generator=generator, device=device).int()
    table = torch.full((num_seqs, max(needed)), -1, dtype=torch.int32, device=device)
    table[:, :shared] = order[:shared]
    start = shared
    for seq, count in enumerate(needed):
        table[seq, shared:count] = order[start : start + count - shared]
        start += count - shared
    k, v = (normal(num_blocks, cell.block_size, cell.num_kv_heads, cell.head_dim) for _ in range(2))
    return AttentionInputs(cell, q, k, v, table, torch.tensor(cell.lens, dtype=torch.int32, device=device))


def shared_entries(cell: DecodeCell | PrefillCell, device: torch.device) -> Tensor | None:
    """Return the blocks that a cell's sequences share as decode_attention takes them, None if there are none."""
    shared = cell.shared_prefix // (cell.block_size or 1) if isinstance(cell, DecodeCell) else 0
    return torch.tensor([[0, len(cell.lens), 0, shared]], dtype=torch.int32, device=device) if shared else None

"""store_kv: write new keys and values into the blocks of their sequences (PagedAttention's write path).

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
section 4. The one decision: the op finds the slots itself from the block table and the lengths on the device, so
that a captured decode step needs no slot mapping from the host.
"""

import torch
from torch import Tensor

from ._library import define_op


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
    """Write the new keys and values of each sequence behind those it already has.

    Args:
        k: (num_seqs, num_kv_heads, query_len, head_dim), new keys; any strides with contiguous head_dim.
        v: (num_seqs, num_kv_heads, query_len, v_head_dim), new values.
        k_cache: (num_blocks, block_size, num_kv_heads, head_dim), mutated; any strides with contiguous head_dim.
        v_cache: (num_blocks, block_size, num_kv_heads, v_head_dim), mutated.
        block_table: (num_seqs, max_blocks) int32, the blocks of each sequence in order, -1 where there is none.
        past_lens: (num_seqs,) int32, tokens already stored: token i goes to position ``past_lens + i``.
        positions: (num_seqs, query_len) int32, the position of each token in its sequence instead; -1 is not stored.

    A position without a block (beyond the table, or -1 in it) raises IndexError on the CPU and is not stored on a GPU,
    where the host has checked it before the step.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not belong together.
        IndexError: a position without a block (CPU).

    Oracle: :func:`hf_fastattn.reference.store_kv`; tests: tests/test_ops.py, tests/interpret/test_store_kv.py.
    """
    if k.dim() != 4 or v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"expected k and v (num_seqs, heads, query_len, dim), got {tuple(k.shape)}, {tuple(v.shape)}")
    same_blocks = k_cache.shape[:2] == v_cache.shape[:2]
    if not same_blocks or k_cache.shape[2:] != k.shape[1::2] or v_cache.shape[2:] != v.shape[1::2]:
        raise ValueError(
            f"caches (num_blocks, block_size, heads, dim) {tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not take "
            f"k and v {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if block_table.shape[0] != k.shape[0] or past_lens.shape != (k.shape[0],):
        raise ValueError(
            f"expected block_table ({k.shape[0]}, max_blocks) and past_lens ({k.shape[0]},), got "
            f"{tuple(block_table.shape)} and {tuple(past_lens.shape)}"
        )
    if k.dtype != k_cache.dtype or v.dtype != v_cache.dtype:
        raise TypeError(f"caches of {k_cache.dtype} and {v_cache.dtype} do not take {k.dtype} and {v.dtype}")
    if block_table.dtype != torch.int32 or past_lens.dtype != torch.int32:
        raise TypeError(f"block_table and past_lens must be int32, got {block_table.dtype} and {past_lens.dtype}")
    if positions is not None and positions.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"expected positions {(k.shape[0], k.shape[2])}, got {tuple(positions.shape)}")
    _OP(k, v, k_cache, v_cache, block_table, past_lens, positions)


def _torch_store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    positions: Tensor | None,
) -> None:
    num_seqs, _, query_len, _ = k.shape
    if num_seqs == 0 or query_len == 0:
        return
    block_size = k_cache.shape[1]
    if query_len == 1 and positions is None:
        _store_one_each(k, v, k_cache, v_cache, block_table, past_lens.tolist())
        return
    if positions is None:
        positions = past_lens[:, None] + torch.arange(query_len, dtype=torch.int32, device=k.device)
        stored = None
    else:
        stored = positions >= 0
        if bool(stored.all()):
            stored = None
    index = positions.clamp(min=0).div(block_size, rounding_mode="floor")
    if int(index.max()) >= block_table.shape[1]:
        raise _beyond_table(int(positions.max()), block_table, block_size)
    blocks = block_table.gather(1, index.long())
    slots = blocks * block_size + positions % block_size
    new_k, new_v = k.transpose(1, 2), v.transpose(1, 2)
    if stored is not None:
        blocks, slots, new_k, new_v = blocks[stored], slots[stored], new_k[stored], new_v[stored]
    if blocks.numel() and int(blocks.min()) < 0:
        raise IndexError(_NO_BLOCK)
    if slots.dim() == 2:
        slots, new_k, new_v = slots.flatten(), new_k.flatten(0, 1), new_v.flatten(0, 1)
    _write(k_cache, slots.long(), new_k)
    _write(v_cache, slots.long(), new_v)


def _store_one_each(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, past_lens: list[int]
) -> None:
    """Store one token of each sequence (a decode step), with the slots computed by Python: small tensors are slower.

    For up to three sequences, plain assignment is faster still (a third of the time for one).
    """
    block_size = k_cache.shape[1]
    if max(past_lens) >= block_table.shape[1] * block_size:
        raise _beyond_table(max(past_lens), block_table, block_size)
    if len(past_lens) <= 3:
        for seq, past in enumerate(past_lens):
            block = int(block_table[seq, past // block_size])
            if block < 0:
                raise IndexError(_NO_BLOCK)
            k_cache[block, past % block_size] = k[seq, :, 0]
            v_cache[block, past % block_size] = v[seq, :, 0]
        return
    index = torch.tensor([[past // block_size] for past in past_lens], device=block_table.device)
    blocks = block_table.gather(1, index).flatten().tolist()
    if min(blocks) < 0:
        raise IndexError(_NO_BLOCK)
    slots = [block * block_size + past % block_size for block, past in zip(blocks, past_lens, strict=True)]
    target = torch.tensor(slots, device=k_cache.device)
    _write(k_cache, target, k[:, :, 0])
    _write(v_cache, target, v[:, :, 0])


_NO_BLOCK = "a token's position has no block in the block table (-1)"


def _beyond_table(position: int, block_table: Tensor, block_size: int) -> IndexError:
    return IndexError(
        f"token position {position} lies beyond the block table, which holds "
        f"{block_table.shape[1]} blocks of {block_size} tokens"
    )


def _write(cache: Tensor, slots: Tensor, states: Tensor) -> None:
    """Write one (heads, dim) state per slot, through a view with one row per slot where the strides allow one."""
    block_size = cache.shape[1]
    if cache.stride(0) == block_size * cache.stride(1):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, states)
    else:
        cache[slots // block_size, slots % block_size] = states


def _fake_store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    positions: Tensor | None,
) -> None:
    return None


_OP = define_op(
    "store_kv",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, Tensor past_lens, "
    "Tensor? positions) -> ()",
    _torch_store_kv,
    _fake_store_kv,
)

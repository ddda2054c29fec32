"""store_kv in Triton: copy new keys and values into the blocks of their sequences, one launch for both.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023, section
4. The one decision: a program finds the slots of its tokens itself, from the lengths and the block table on the device,
so that a decode step is the same launch whatever the lengths.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, Unsupported, keep, layout, layout_of_blocks

if TYPE_CHECKING:
    from ._compile import CompileCase

BLOCK_ROWS = 16
"""(token, head) pairs that one program copies: a decode step with up to 16 heads is one program per sequence."""

NUM_WARPS = 4


@triton.jit(do_not_specialize=["query_len", "max_blocks", "num_row_tiles", "stride_table_seq", "stride_pos_seq"])
def store_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    past_lens_ptr,
    positions_ptr,
    query_len,
    max_blocks,
    num_row_tiles,
    stride_k_seq,
    stride_k_head,
    stride_k_token,
    stride_v_seq,
    stride_v_head,
    stride_v_token,
    stride_k_cache_block,
    stride_k_cache_token,
    stride_k_cache_head,
    stride_v_cache_block,
    stride_v_cache_token,
    stride_v_cache_head,
    stride_table_seq,
    stride_table_block,
    stride_lens_seq,
    stride_pos_seq,
    stride_pos_token,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    KV_BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Copy BLOCK_ROWS rows, (token, head) pairs of one sequence; grid (num_row_tiles * num_seqs,).

    k, v (num_seqs, heads, query_len, dim); k_cache, v_cache (num_blocks, KV_BLOCK_SIZE, heads, dim); table (num_seqs,
    max_blocks), past_lens (num_seqs,) and positions (num_seqs, query_len) or None, all int32.

    The launcher guarantees contiguous head sizes and at least one column in the table. A row whose position is negative
    or has no block is not stored; neither are the slots that no token is for.
    """
    pid = tl.program_id(0)
    seq = (pid // num_row_tiles).to(tl.int64)
    rows = pid % num_row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = rows // NUM_KV_HEADS
    head = rows % NUM_KV_HEADS
    exists = token < query_len
    if positions_ptr is not None:
        position = tl.load(positions_ptr + seq * stride_pos_seq + token * stride_pos_token, mask=exists, other=-1)
    else:
        position = tl.load(past_lens_ptr + seq * stride_lens_seq) + token
    entry = position // KV_BLOCK_SIZE
    stored = exists & (position >= 0) & (entry < max_blocks)
    block = tl.load(table_ptr + seq * stride_table_seq + entry * stride_table_block, mask=stored, other=-1)
    stored &= block >= 0
    block = block.to(tl.int64)
    slot = (position % KV_BLOCK_SIZE).to(tl.int64)
    token = token.to(tl.int64)
    head = head.to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_from = seq * stride_k_seq + head * stride_k_head + token * stride_k_token  # [BLOCK_ROWS] int64
    v_from = seq * stride_v_seq + head * stride_v_head + token * stride_v_token
    k_to = block * stride_k_cache_block + slot * stride_k_cache_token + head * stride_k_cache_head
    v_to = block * stride_v_cache_block + slot * stride_v_cache_token + head * stride_v_cache_head
    k_mask = stored[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_ROWS, BLOCK_D]
    v_mask = stored[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
    k = tl.load(k_ptr + k_from[:, None] + offs_d[None, :], mask=k_mask)
    v = tl.load(v_ptr + v_from[:, None] + offs_dv[None, :], mask=v_mask)
    tl.store(k_cache_ptr + k_to[:, None] + offs_d[None, :], k.to(k_cache_ptr.dtype.element_ty), mask=k_mask)
    tl.store(v_cache_ptr + v_to[:, None] + offs_dv[None, :], v.to(v_cache_ptr.dtype.element_ty), mask=v_mask)


def launch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    positions: Tensor | None,
) -> None:
    """Run the kernel: :func:`hf_fastattn.ops.store_kv` by position. Allocates nothing, waits for nothing.

    Raises:
        Unsupported: a cache whose head dimension is not contiguous.
    """
    max_blocks = block_table.shape[1]
    if k.numel() + v.numel() == 0 or max_blocks == 0:
        return
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise Unsupported(
            "store_kv needs caches with a contiguous head dimension, got strides "
            f"{k_cache.stride()} and {v_cache.stride()}"
        )
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    tensors = (k, v, k_cache, v_cache, block_table, past_lens, positions)
    caches = (layout_of_blocks(k_cache), layout_of_blocks(v_cache))
    key = (k.device, *caches, *map(layout, (k, v, block_table, past_lens, positions)))
    call = _kept.get(key)
    if call is None:
        call = keep(_kept, key, _prepare(*tensors))
    call(*tensors)


_kept: dict[Any, Launch] = {}


def _prepare(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    positions: Tensor | None,
) -> Launch:
    """Return the launch of a call by the layout of its tensors."""
    num_seqs, num_kv_heads, query_len, head_dim = k.shape
    num_row_tiles = triton.cdiv(query_len * num_kv_heads, BLOCK_ROWS)
    scalars = (
        *(query_len, block_table.shape[1], num_row_tiles),
        *(*k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        *(*block_table.stride(), past_lens.stride(0)),
        *(positions.stride() if positions is not None else (0, 0)),
    )
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v.shape[3],
        "KV_BLOCK_SIZE": k_cache.shape[1],
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_DV": triton.next_power_of_2(v.shape[3]),
    }
    return Launch(k.device, store_kv_kernel, (num_row_tiles * num_seqs,), scalars, constants, {"num_warps": NUM_WARPS})


def compile_cases(arch: int) -> "list[CompileCase]":
    """Return the launches whose cost eval/compile_report.py shows; they are the same for every architecture."""
    return [
        _case("bf16", torch.bfloat16, 128),
        _case("bf16", torch.bfloat16, 128, positions=True),
        _case("bf16", torch.bfloat16, 80),
        _case("fp32", torch.float32, 64),
    ]


def _case(name: str, dtype: torch.dtype, head_dim: int, *, positions: bool = False) -> "CompileCase":
    from ._compile import case_from_call  # no launch needs the compiler's tools

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    states, cache = meta(16, 8, 4, head_dim, dtype=dtype), meta(2048, 64, 8, head_dim, dtype=dtype)
    tensors = (states, states, cache, cache, meta(16, 64), meta(16), meta(16, 4) if positions else None)
    name = "-".join([name, f"d{head_dim}", *(["positions"] if positions else [])])
    return case_from_call(name, _prepare(*tensors), tensors, {})

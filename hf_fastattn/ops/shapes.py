"""Shapes and limits that the ops share: neutral values, supported head sizes, and the checks made before a launch."""

import torch
from torch import Tensor

NO_WINDOW = 2**31 - 1
"""Window of a layer that sees every earlier token: the neutral value, so that kernels need no switch."""

MAX_HEAD_DIM = 256
"""Largest head size of the Triton kernels; a larger one takes the PyTorch implementation."""

MAX_DECODE_QUERY_LEN = 32
"""Longest query that decode_attention takes; more queries per sequence are a prefill."""

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Raise ValueError if the shapes of an attention call do not belong together (O(1), no device access)."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"expected 4-dimensional q, k and v, got {q.dim()}, {k.dim()} and {v.dim()} dimensions")
    paged = block_table is not None
    num_seqs, num_heads, _, head_dim = q.shape
    k_rows, k_1, k_2, k_dim = k.shape
    num_kv_heads = k_2 if paged else k_1
    if (k_rows, k_1, k_2) != v.shape[:3]:
        raise ValueError(f"k and v must agree in all but the head size, got {tuple(k.shape)} and {tuple(v.shape)}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot be shared evenly by {num_kv_heads} key/value heads")
    if head_dim != k_dim:
        raise ValueError(f"q has head size {head_dim}, k has {k_dim}")
    if sinks is not None and tuple(sinks.shape) != (num_heads,):
        raise ValueError(f"sinks must have shape ({num_heads},), got {tuple(sinks.shape)}")
    if paged != (seq_lens is not None):
        raise ValueError("block_table and seq_lens belong together: pass both (paged) or neither (dense)")
    if block_table is not None and seq_lens is not None:
        if block_table.dim() != 2 or block_table.shape[0] != q.shape[0] or seq_lens.shape != block_table.shape[:1]:
            raise ValueError(
                f"expected block_table ({q.shape[0]}, max_blocks) and seq_lens ({q.shape[0]},), "
                f"got {tuple(block_table.shape)} and {tuple(seq_lens.shape)}"
            )
        if block_table.dtype != torch.int32 or seq_lens.dtype != torch.int32:
            raise TypeError(f"block_table and seq_lens must be int32, got {block_table.dtype} and {seq_lens.dtype}")
    elif k_rows != num_seqs:
        raise ValueError(f"q has batch size {num_seqs}, k has {k_rows}")
    if key_mask is not None:
        if key_mask.dtype not in (torch.bool, torch.int8, torch.uint8):
            raise TypeError(f"key_mask must be int8, uint8 or bool, got {key_mask.dtype}")
        keys = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[1]
        if key_mask.dim() != 2 or key_mask.shape[0] != q.shape[0] or (block_table is None and key_mask.shape[1] < keys):
            raise ValueError(f"expected key_mask ({q.shape[0]}, at least {keys} keys), got {tuple(key_mask.shape)}")


def check_window(window: int) -> None:
    """Raise ValueError for a window in which not even the query's own token lies."""
    if window < 1:
        raise ValueError(f"expected a window of at least one token, got {window}: without one it is {NO_WINDOW}")


def check_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_query_len: int,
    sinks: Tensor | None,
) -> None:
    """Raise ValueError or TypeError if the arguments of a packed call do not belong together (no device access)."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"expected packed q, k and v of 3 dimensions, got {q.dim()}, {k.dim()} and {v.dim()}")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    check_attention(q, k, v, None, None, None, sinks)
    if query_starts.dim() != 1 or query_starts.shape != key_starts.shape or query_starts.shape[0] == 0:
        raise ValueError(
            f"expected query_starts and key_starts (num_seqs + 1,), got {tuple(query_starts.shape)} and "
            f"{tuple(key_starts.shape)}"
        )
    if query_starts.dtype != torch.int32 or key_starts.dtype != torch.int32:
        raise TypeError(f"query_starts and key_starts must be int32, got {query_starts.dtype} and {key_starts.dtype}")
    if max_query_len < 0:
        raise ValueError(f"max_query_len is a number of queries, got {max_query_len}")


def check_shared_prefixes(shared_prefixes: Tensor, block_table: Tensor | None, key_mask: Tensor | None) -> None:
    """Raise ValueError or TypeError if shared prefixes do not belong to a call (O(1), no device access)."""
    if block_table is None:
        raise ValueError("shared_prefixes needs a block_table: dense keys share no blocks")
    if key_mask is not None:
        raise ValueError("shared_prefixes and key_mask do not go together: pass one of them")
    if shared_prefixes.dim() != 2 or shared_prefixes.shape[1] != 4:
        raise ValueError(f"expected shared_prefixes (num_shared, 4), got {tuple(shared_prefixes.shape)}")
    if shared_prefixes.dtype != torch.int32:
        raise TypeError(f"shared_prefixes must be int32, got {shared_prefixes.dtype}")

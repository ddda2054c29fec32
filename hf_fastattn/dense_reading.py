"""A paged cache read as dense tensors, one slot per column: for attention that knows nothing of blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_pool import NO_BLOCK
from .columns import Step
from .kv_pool import LayerBlocks
from .paged_state import PagedState


def read_dense(state: PagedState, blocks: LayerBlocks, step: Step | None = None) -> tuple[Tensor, Tensor]:
    """Copy a layer's keys and values out of its blocks, (num_seqs, num_kv_heads, columns, head_dim) each.

    Columns that were never stored, or that a sliding window has left behind and whose blocks were freed, are 0.

    Args:
        state: of the cache.
        blocks: the layer's.
        step: the forward pass whose columns are wanted too; None for those of complete ones.
    """
    k_cache, v_cache = blocks.fetch(state, step)
    slots, stored = _slots(state, k_cache.device, step)
    missing = (~stored | (slots < 0))[:, :, None, None]
    slots = slots.clamp(min=0)
    k, v = (
        cache.flatten(0, 1)[slots].masked_fill(missing, 0).transpose(1, 2).contiguous() for cache in (k_cache, v_cache)
    )
    return k, v


def _slots(state: PagedState, device: torch.device, step: Step | None) -> tuple[Tensor, Tensor]:
    """Return where each column's token is, (num_seqs, columns) int64, negative where it was freed, and a mask.

    The mask, (num_seqs, columns) bool, says which columns were stored at all; slots of others mean nothing.
    """
    if step is None:
        state.sync()
    columns = state.columns + (step.query_len if step is not None else 0)
    stored = torch.ones(state.num_seqs, columns, dtype=torch.bool, device=device)
    known = step.stored if step is not None else state.padding.stored
    if known is not None:
        stored[:, : known.shape[1]] = known.to(device)
    positions = (stored.cumsum(1) - 1).clamp(min=0)
    blocks = state.on(device).block_table.long().gather(1, positions // state.block_size)
    return blocks * state.block_size + positions % state.block_size, stored


def refuse_freed(state: PagedState, mask: Tensor) -> None:
    """Check that a mask over queries and keys shows no freed column of the current forward pass.

    Args:
        state: of the cache.
        mask: (num_seqs or 1, num_heads or 1, query_len, columns) bool, or additive.

    Raises:
        ValueError: it shows columns behind the model's sliding window, whose blocks were freed.
    """
    if not any(row and row[0] == NO_BLOCK for row in state.tables.rows):
        return
    slots, stored = _slots(state, mask.device, state.step)
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if bool((shown & (stored & (slots < 0))[:, None, None]).any()):
        raise ValueError(
            f"the attention mask shows keys that lie behind the model's window of {state.window} tokens and "
            "were freed: start from an empty cache, or pass max_length to PagedCache, which keeps all keys"
        )


def column_mask(state: PagedState) -> Tensor | None:
    """Return which columns the current forward pass may see, (num_seqs, 1, 1, columns) int8; None for all."""
    step = state.step
    if step is None or step.seen is None:
        return None
    later = state.columns + step.query_len - step.seen.shape[1]  # behind the last mask everything is seen
    return F.pad(step.seen.to(torch.int8), (0, later), value=1)[:, None, None]

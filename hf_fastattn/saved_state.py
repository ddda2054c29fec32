"""A cache's state as it is pickled and copied: its bookkeeping, and the blocks that hold tokens and no others."""

from typing import Any

import torch
from torch import Tensor

from .block_pool import NO_BLOCK
from .kv_pool import move_blocks
from .paged_state import PagedState


def save(state: PagedState) -> dict[str, Any]:
    """Return what :func:`restore` needs; the blocks are copies, numbered anew."""
    with state.lock:
        state.sync()
        state.forget_failed_pass()
        tables, layers = state.tables, state.memory.layers
        rows = [row[: tables.blocks_for(n)] for row, n in zip(tables.rows, tables.lens, strict=True)]
        used = list(dict.fromkeys(block for row in rows for block in row if block != NO_BLOCK))
        place = {block: i for i, block in enumerate(used)} | {NO_BLOCK: NO_BLOCK}
        ids = torch.tensor(used, dtype=torch.long)
        return {
            "sizes": {
                "block_size": state.block_size,
                "num_blocks": state.memory.num_blocks,
                "offload": state.memory.offload,
                "max_length": None if state.elastic else state.max_length,
                "reserve": state.reserve,
                "sequences_per_prompt": state.group,
            },
            "sharing": (state.sharing, state.prompt_columns),
            "total": state.pool.num_blocks,
            "rows": [[place[block] for block in row] for row in rows],
            "lens": tables.lens,
            "columns": state.columns,
            "masks": (state.padding.seen, state.padding.stored),
            "key_masks": {device: _copy(on_device.key_mask) for device, on_device in state.devices.items()},
            "caches": [
                tuple(None if c is None else c[ids.to(c.device)] for c in (layer.k_cache, layer.v_cache))
                for layer in layers
            ],
            "layer_devices": [layer.device for layer in layers],
        }


def restore(state: PagedState, saved: dict[str, Any]) -> None:
    """Let a new state become the one that was saved."""
    tables, pool = state.tables, state.pool
    pool.grow(saved["total"])
    tables.rows, tables.lens = [list(row) for row in saved["rows"]], list(saved["lens"])
    count = len({block for row in state.block_rows() for block in row})
    pool.allocate(count)
    owned: set[int] = set()
    for row in tables.rows:
        pool.share(block for block in row if block in owned)
        owned.update(row)
    state.sharing, state.prompt_columns = saved["sharing"]
    if state.reserved and state.max_length is not None:
        tables.reserve([state.max_length] * state.num_seqs, state.group if state.sharing else 1)
    state.padding.count, (state.padding.seen, state.padding.stored) = saved["columns"], saved["masks"]
    ids = torch.arange(count)
    for layer, device, caches in zip(state.memory.layers, saved["layer_devices"], saved["caches"], strict=True):
        layer.device = device
        layer.k_cache, layer.v_cache = (
            None if c is None else move_blocks(c, saved["total"], ids, ids, layer.new_tensor) for c in caches
        )
    for device, key_mask in saved["key_masks"].items():
        state.on(device).key_mask = key_mask


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()

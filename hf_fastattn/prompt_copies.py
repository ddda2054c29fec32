"""Prefill of one row per prompt: beams and samples begin as copies of their prompt, which need not be computed.

generate() repeats each prompt for its beams or returned sequences before the first forward pass; others pass the same
prompt several times (as rollouts for reinforcement learning do). Over an empty PagedCache one row of each is run, and
its neighbours share its blocks and its logits.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .cache import PagedCache

HARMLESS_HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads")
"""What transformers and PEFT put behind the embeddings for gradient checkpointing."""

PER_ROW = {"attention_mask": (2, 4), "position_ids": (2,), "token_type_ids": (2,), "inputs_embeds": (3,)}
"""Arguments of a forward pass that have a row for each sequence, and their dimensions; with others every row is run."""


def prefill_first_copies(
    model: nn.Module,
    prefill: Callable[[Tensor, dict[str, Any]], Any],
    cache: Any,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    """Return what a prefill of all rows does, run for one row of each prompt where that is enough.

    Args:
        model: see :func:`treats_rows_alike`.
        prefill: runs the model over the cache, given input_ids and model_kwargs of some rows.
        cache: that it fills.
        input_ids: (rows, columns).
        generation_config: the call's; states of layers that it asks for are those of every row.
        model_kwargs: what the forward pass gets besides.
    """
    copies = 1
    if input_ids.shape[0] > 1 and treats_rows_alike(model):
        copies = _copies(cache, input_ids, generation_config, model_kwargs)
    if copies == 1:
        return prefill(input_ids, model_kwargs)
    first = {name: x[::copies] if isinstance(x, Tensor) else x for name, x in model_kwargs.items()}
    with cache.one_row_per_prompt(copies):
        outputs = prefill(input_ids[::copies], first)
    outputs.logits = outputs.logits.repeat_interleave(copies, 0)
    return outputs


def treats_rows_alike(model: nn.Module) -> bool:
    """Return whether rows with the same tokens are sure to have the same states: no dropout, and no hook inside.

    A hook may do something else to each row, as PEFT's for ``adapter_names`` does.
    """
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if module is not model and any(getattr(hook, "__name__", "") not in HARMLESS_HOOKS for hook in hooks):
            return False
        if module.training and any(_is_rate(*attribute) for attribute in vars(module).items()):
            return False
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return False
    return True


def _is_rate(name: str, value: Any) -> bool:
    """Return whether an attribute of a module says that something is drawn in training mode."""
    return ("drop" in name or "jitter" in name) and isinstance(value, (int, float)) and value > 0


def _copies(cache: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Return how many consecutive rows of a prefill are the same, of which one will do; 1 if all have to be run."""
    if not isinstance(cache, PagedCache) or not cache.uses_handles or cache.get_seq_length():
        return 1
    known, rows = cache.state.group, input_ids.shape[0]
    if rows % known or generation_config.output_hidden_states or generation_config.output_attentions:
        return 1
    per_row = [input_ids[::known]]
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor):
            if value.dim() not in PER_ROW.get(name, ()) or value.shape[0] != rows:
                return 1
            per_row.append(value[::known])
        elif value is not cache and not isinstance(value, (bool, int, float, str, type(None))):
            return 1
    return known * _equal_neighbours(per_row)


def _equal_neighbours(per_row: list[Tensor]) -> int:
    """Return the largest number of rows such that as many consecutive ones are always the same, in all tensors."""
    rows = per_row[0].shape[0]
    if rows == 1:
        return 1
    same = torch.stack([(x[1:] == x[:-1]).flatten(1).all(1).to(per_row[0].device) for x in per_row]).all(0)
    begins = [0, *(row + 1 for row, equal in enumerate(same.tolist()) if not equal)]
    return math.gcd(rows, *begins)

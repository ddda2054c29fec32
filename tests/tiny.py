"""Tiny models whose attention is sharp, so that a wrong scale, mask or order shows in the logits; caches fed by them.

transformers' own tiny models (weights of std 0.02) attend almost uniformly and would hide such faults.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

import hf_fastattn
from hf_fastattn import kv_pool

VOCAB_SIZE = 61
TOLERANCE = 5e-5
"""Of the largest logit. Computed with sdpa instead of eager attention, the logits move by a twentieth of it."""

_CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}


@dataclass
class Pair:
    """One model twice, with the same weights."""

    fast: PreTrainedModel
    eager: PreTrainedModel

    def cache(self, **sizes: Any) -> hf_fastattn.PagedCache:
        """Return an empty PagedCache for the fast model, of 16-token blocks unless told otherwise."""
        return hf_fastattn.PagedCache(self.fast.config, **({"block_size": 16} | sizes))


def make_pair(kind: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Pair:
    """Build the fast and the eager model of a kind."""
    config_class, model_class = _CLASSES[kind]
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    models = []
    for implementation in (hf_fastattn.IMPLEMENTATION, "eager"):
        config = config_class(**(sizes | overrides), attn_implementation=implementation)
        torch.manual_seed(seed)
        models.append(model_class(config).to(dtype).eval().requires_grad_(False))
    models[1].load_state_dict(models[0].state_dict())
    return Pair(*models)


def tokens(num_seqs: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids, none of them special."""
    return torch.randint(3, VOCAB_SIZE, (num_seqs, length), generator=torch.Generator().manual_seed(seed))


def left_padding(lengths: list[int], columns: int | None = None) -> Tensor:
    """Return a mask (num_seqs, columns) whose rows end with that many ones."""
    columns = max(lengths) if columns is None else columns
    return (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()


def assert_logits(got: Tensor, want: Tensor, visible: Tensor | None = None) -> None:
    """Assert equal logits (num_seqs, columns, vocabulary) at the visible columns (num_seqs, columns)."""
    assert got.shape == want.shape
    if visible is not None:
        got, want = got[visible.bool()], want[visible.bool()]
    if want.numel():
        error = (got - want).abs().max().item()
        assert error <= TOLERANCE * want.abs().max().item(), f"logits are off by {error}"


def holey_mask() -> Tensor:
    """Return a mask (3, 30) with padding on the left, holes, and padding on the right."""
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 7:12] = 0
    mask[1, 17] = 0
    mask[2, 25:] = 0  # right padding
    return mask


def eager(pair: Pair, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the eager model's logits, (num_seqs, columns, vocabulary)."""
    return pair.eager(ids, attention_mask=mask, use_cache=False).logits


def feed(
    model: PreTrainedModel, ids: Tensor, cache: Any, mask: Tensor | None = None, steps: Sequence[int] | None = None
) -> Tensor:
    """Return the logits of ids fed in pieces of those lengths (one token each where none are given)."""
    done, out = cache.get_seq_length(), []
    for length in steps or [1] * ids.shape[1]:
        piece = ids[:, sum(o.shape[1] for o in out) :][:, :length]
        done += length
        out.append(model(piece, past_key_values=cache, attention_mask=None if mask is None else mask[:, :done]).logits)
    return torch.cat(out, 1)


class CopiedBytes(TorchDispatchMode):
    """Count the bytes that index and copy operations write to floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        if any(word in name for word in ("index", "copy", "clone", "cat", "gather", "repeat", "empty", "zeros")):
            tensor = args[2] if "index_put" in name else out
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.count += tensor.numel() * tensor.element_size()
        return out


def used_blocks(cache: hf_fastattn.PagedCache) -> int:
    """Return how many blocks of a cache's pool have an owner."""
    return cache.state.pool.num_used


def picture(cache: hf_fastattn.PagedCache) -> tuple[Any, list[Tensor]]:
    """Everything the host knows, and what the stored tokens are."""
    state = cache.state
    tables = [list(row) for row in state.tables.rows], list(state.tables.lens), state.columns
    return tables, [layer.keys.clone() for layer in cache.layers if layer.is_initialized]


def assert_same(before: tuple[Any, list[Tensor]], after: tuple[Any, list[Tensor]]) -> None:
    """Assert that two pictures show the same."""
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@contextmanager
def failing(model: PreTrainedModel) -> Iterator[None]:
    """Let a forward pass of a model fail between its first layer and its second."""
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            yield
    finally:
        hook.remove()


@contextmanager
def running_out(nth: int) -> Iterator[None]:
    """Let memory run out when a growing pool moves its nth tensor; the error is the caller's to catch."""
    move, calls = kv_pool.move_blocks, []

    def fail(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == nth:
            raise torch.OutOfMemoryError("as planned")
        return move(*args)

    kv_pool.move_blocks = fail
    try:
        yield
    finally:
        kv_pool.move_blocks = move

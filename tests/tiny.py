"""Tiny models whose attention is sharp, so that a wrong scale, mask or order shows in the logits.

transformers' own tiny models (weights of std 0.02) attend almost uniformly and would hide such faults.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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

"""Keys and values as views, where on a CPU the blocks of all sequences lie in even runs: nothing is gathered or copied.

Making a view takes as long as writing a token, and several times that when the rest of the model has driven the code
that makes it out of the processor's caches. So decode steps take theirs from a few that are made at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .block_pool import EvenRuns
from .ops._views import view_parts

STEPS_AHEAD = 8
"""Decode steps that views are made for at a time."""


class TokenViews(NamedTuple):
    """One layer's tokens in a forward pass, (num_seqs, num_kv_heads, tokens, head_dim) each.

    Attributes:
        k, v: all of them, the new ones included.
        k_end, v_end: the new ones.
    """

    k: Tensor
    v: Tensor
    k_end: Tensor
    v_end: Tensor


class RunViews:
    """Views for the next decode steps over tables that do not change meanwhile."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[int, list[TokenViews]]] = {}  # by layer: tokens of the first, and the views

    def clear(self) -> None:
        """Forget all views: the tables, or the memory that they point into, have changed."""
        self._made.clear()

    def find(self, layer_idx: int, tokens: int) -> TokenViews | None:
        """Return a layer's view of so many tokens, of which one is new; None if there is none."""
        first, views = self._made.get(layer_idx, (0, []))
        return views[tokens - first] if 0 <= tokens - first < len(views) else None

    def make(self, layer_idx: int, caches: tuple[Tensor, Tensor], num_seqs: int, runs: EvenRuns, tokens: range) -> None:
        """Make a layer's views of so many tokens, for the first steps of ``tokens``; see :func:`view_tokens`."""
        self._made[layer_idx] = tokens[0], view_tokens(caches, num_seqs, runs, tokens[:STEPS_AHEAD], 1)


def view_tokens(
    caches: tuple[Tensor, Tensor], num_seqs: int, runs: EvenRuns, tokens: Sequence[int], query_len: int
) -> list[TokenViews]:
    """View one layer's tokens, once for each of some numbers of them.

    Args:
        caches: its keys and values, (num_blocks, block_size, num_kv_heads, head_dim) each.
        num_seqs: sequences.
        runs: where their blocks are.
        tokens: tokens of each, from the first block that was not freed.
        query_len: how many of them are new.
    """
    whole, ends = [(0, count) for count in tokens], [(count - query_len, query_len) for count in tokens]
    views = [
        view_parts(cache, num_seqs, parts, runs.first, runs.distance) for parts in (whole, ends) for cache in caches
    ]
    return [TokenViews(*of_one) for of_one in zip(*views, strict=True)]

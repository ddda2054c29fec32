"""Whether an implementation is right: its output on some sequences, heads and queries against float64."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fastattn import reference

from .kernel_inputs import AttentionInputs, StoreInputs, copy_bytes
from .roofline import Cell, DecodeCell, StoreCell

CHECKED_QUERIES = 8
CHECKED_KV_HEADS = 4


@dataclass(frozen=True)
class Check:
    """Whether an output is right: its largest error where it comes nearest to the tolerance there."""

    right: bool
    error: float
    tolerance: float


def attention_checker(x: AttentionInputs) -> Callable[[Any], Check]:
    """Return a function that compares an output with float64 on a few sequences, heads and queries.

    The tolerance is computed for each length of a sequence: the outputs of long ones are smaller.
    """
    cell, lens = x.cell, x.cell.lens
    group = cell.num_heads // cell.num_kv_heads
    seqs = sorted({0, len(lens) // 2, len(lens) - 1, lens.index(max(lens)), lens.index(min(lens))})
    kv_heads = _spread_indices(cell.num_kv_heads, CHECKED_KV_HEADS)
    rows = torch.tensor(_spread_indices(cell.query_len, CHECKED_QUERIES), device=x.q.device)
    samples: list[tuple[int, slice, Tensor]] = []
    allowed: dict[int, list[float]] = {}  # of a length: error of the plain formula, rounding
    for seq, kv_head in itertools.product(seqs, kv_heads):
        heads, seq_len = slice(kv_head * group, (kv_head + 1) * group), lens[seq]
        q = x.q[seq, heads][:, rows]
        k, v = (x.row(cache, seq, slice(kv_head, kv_head + 1)) for cache in (x.k, x.v))
        visible = torch.ones(len(rows), seq_len, dtype=torch.bool, device=q.device)
        if isinstance(cell, DecodeCell) or cell.causal:
            visible = torch.arange(seq_len, device=q.device) <= (seq_len - cell.query_len + rows)[:, None]
        exact = reference.attend(q.double(), k.double(), v.double(), visible, x.scale, 0.0, None)
        plain = reference.attend(q, k, v, visible, x.scale, 0.0, None)
        largest_score = (q.double() @ k[0].double().T).abs().max().item() * x.scale
        # four roundings of the output, one of the float32 scores
        roundings = 4 * torch.finfo(q.dtype).eps + torch.finfo(torch.float32).eps * largest_score
        found = [(plain.double() - exact).abs().max().item(), roundings * exact.abs().max().item()]
        allowed[seq_len] = [max(pair) for pair in zip(found, allowed.get(seq_len, [0.0, 0.0]), strict=True)]
        samples.append((seq, heads, exact.transpose(0, 1)))
    tolerances = {seq_len: 2 * plain_error + rounding for seq_len, (plain_error, rounding) in allowed.items()}

    def check(out: Any) -> Check:
        shape = (len(lens), cell.query_len, cell.num_heads, cell.head_dim)
        if not isinstance(out, Tensor) or out.shape != shape or not bool(out.isfinite().all()):
            return Check(False, math.inf, min(tolerances.values()))
        errors = [
            ((out[seq, rows][:, heads].double() - exact).abs().max().item(), tolerances[lens[seq]])
            for seq, heads, exact in samples
        ]
        error, tolerance = max(errors, key=lambda pair: pair[0] / pair[1])
        return Check(error <= tolerance, error, tolerance)

    return check


def _spread_indices(count: int, most: int) -> list[int]:
    """Return at most so many of the indices below count, evenly spread, the first and the last among them."""
    return sorted({round(i * (count - 1) / max(min(count, most) - 1, 1)) for i in range(min(count, most))})


def store_checker(x: StoreInputs) -> Callable[[Any], Check]:
    """Return a function that looks whether the caches hold what they must, and clears them.

    A few tokens are compared with the oracle exactly; of the rest, as many slots must be written as there are tokens.
    """
    seqs = sorted({0, x.cell.batch // 2, x.cell.batch - 1})
    tokens = _spread_indices(x.cell.query_len, CHECKED_QUERIES)
    positions = torch.tensor([tokens] * len(seqs), dtype=torch.int32, device=x.k.device) + x.cell.past_len

    def check(_: Any) -> Check:
        caches = (x.k_cache, x.v_cache)
        written = [int((cache != 0).any(-1).any(-1).sum()) for cache in caches]
        wanted = x.k_cache.clone(), x.v_cache.clone()
        k, v = (new[seqs][:, :, tokens] for new in (x.k, x.v))
        reference.store_kv(k, v, *wanted, x.block_table[seqs], x.past_lens[seqs], positions=positions)
        error = max((got.double() - want.double()).abs().max().item() for got, want in zip(caches, wanted, strict=True))
        for cache in caches:
            cache.zero_()
        return Check(error == 0 and written == [x.cell.batch * x.cell.query_len] * 2, error, 0.0)

    return check


def needed_bytes(cell: Cell, itemsize: int) -> int:
    """Return the memory that one copy and its check take, about."""
    if isinstance(cell, StoreCell):
        return 2 * copy_bytes(cell, itemsize)
    group = cell.num_heads // cell.num_kv_heads
    return int(1.1 * copy_bytes(cell, itemsize)) + 8 * max(cell.lens) * (
        cell.head_dim * (2 + 3 * group) + 4 * group * min(cell.query_len, CHECKED_QUERIES)
    )

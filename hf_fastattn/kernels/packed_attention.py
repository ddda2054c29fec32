"""packed_attention in Triton: prefill_attention's kernel over sequences that lie one behind the other."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_fastattn.ops.shapes import NO_WINDOW

from . import _prefill_plan as plan
from ._launch import Launch, Unsupported, device_arch, keep
from ._prefill_plan import PrefillConfig
from .prefill_attention import prepare

if TYPE_CHECKING:
    from ._compile import CompileCase

FEW = 16
"""Queries of a sequence up to which tiles of so many are taken: decoding, where reading keys is all that takes time."""

ROWS_STEP = 256
"""The number of rows is rounded up to these, so that most calls find a launch that is kept."""


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    sinks: Tensor | None,
    max_query_len: int,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    *,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Run the kernel: :func:`hf_fastattn.ops.packed_attention` by position; config replaces the table's choice.

    Raises:
        Unsupported: what prefill_attention's kernel does not do.
    """
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    num_seqs = query_starts.shape[0] - 1
    few = max_query_len <= FEW or q.shape[0] <= num_seqs  # graphs of continuous batching are made for any lengths
    num_rows = -(-q.shape[0] // ROWS_STEP) * ROWS_STEP
    layouts = ((x.dtype, x.shape[1:], x.stride()) for x in (q, k, v))
    options = (softmax_scale, causal, window, softcap, config)
    key = (q.device, *layouts, None if sinks is None else sinks.dtype, num_seqs, num_rows, few, *options)
    call = _kept.get(key)
    if call is None:
        call = keep(_kept, key, _prepare(q, k, v, num_seqs, num_rows, few, *options))
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    if out.numel() and k.shape[0] and num_seqs:
        starts = (query_starts.contiguous(), key_starts.contiguous())
        call(q, k, v, out, None, None, None, None, None if sinks is None else sinks.contiguous(), *starts)
    return out


_kept: dict[Any, Launch] = {}


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_seqs: int,
    num_rows: int,
    few: bool,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    config: PrefillConfig | None,
) -> Launch:
    """Return the launch of a call by the layout of its tensors."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    reason = plan.supports(q, k, v, None, softmax_scale)
    if reason is not None:
        raise Unsupported(reason)
    if config is None:
        config = choose(device_arch(q.device), q.shape[3], v.shape[3], q.dtype, causal, softcap, few=few)
    options = (softmax_scale, causal, window, softcap, config)
    return prepare(q, k, v, None, None, None, None, *options, packed=(num_seqs, num_rows))


def choose(
    arch: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, causal: bool, softcap: float, *, few: bool = False
) -> PrefillConfig:
    """Return the launch config of a call: that of a dense prefill, whose widest tiles leave no register for starts.

    few: no sequence has more than :data:`FEW` queries, or most have none or one.
    """
    largest = max(head_dim, v_head_dim)
    if few and dtype == torch.float32:
        return PrefillConfig(FEW, 16, 4, 2, split=False)
    if few:  # as deep as shared memory allows
        return PrefillConfig(FEW, 64 if largest <= 128 else 32, 4, 4 if arch >= 90 else 3, split=False)
    return plan.config(
        arch, head_dim, v_head_dim, dtype, plain=plan.is_plain(0, causal, False, softcap > 0) and largest <= 128
    )


def compile_cases(arch: int) -> "list[CompileCase]":
    """Return the launches whose cost eval/compile_report.py shows for an architecture (80, 86, 90, 100)."""
    return [
        *(_case(arch, torch.bfloat16, size) for size in (64, 128, 256)),
        *(_case(arch, torch.bfloat16, size, few=True) for size in (64, 128)),
        _case(arch, torch.bfloat16, 256, softcap=True, few=True),
        _case(arch, torch.float32, 256, sinks=True, few=True),
        _case(arch, torch.bfloat16, 64, sinks=True),
        _case(arch, torch.bfloat16, 256, softcap=True),
        _case(arch, torch.float32, 128),
    ]


def _case(
    arch: int, dtype: torch.dtype, head_dim: int, *, softcap: bool = False, sinks: bool = False, few: bool = False
) -> "CompileCase":
    """Return the case of one causal call: 32 query heads over 8 kv heads."""
    from ._compile import case_from_call  # no launch needs the compiler's tools

    meta = functools.partial(torch.empty, device="meta", dtype=dtype)
    q, k, v = meta(4096, 32, head_dim), meta(8192, 8, head_dim), meta(8192, 8, head_dim)
    cap = 30.0 if softcap else 0.0
    chosen = choose(arch, head_dim, head_dim, dtype, True, cap, few=few)
    call = _prepare(q, k, v, 4, 4096, few, head_dim**-0.5, True, NO_WINDOW, cap, chosen)
    starts = torch.empty(5, device="meta", dtype=torch.int32)
    tensors = (q, k, v, meta(4096, 32, head_dim), None, None, None, None, meta(32) if sinks else None, starts, starts)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    flags = [flag for flag, on in (("softcap", softcap), ("sinks", sinks), ("few", few)) if on]
    tile_bytes = chosen.BLOCK_N * 2 * plan.tile_dim(head_dim) * dtype.itemsize
    info = {"tile_bytes": tile_bytes, "config": chosen}
    return case_from_call("-".join(["packed", name, f"d{head_dim}", "causal", *flags]), call, tensors, info)

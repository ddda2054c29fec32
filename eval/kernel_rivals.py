"""What is measured for each op: our implementation, variants of it, and what others have."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from hf_fastattn import ops

from . import common
from .kernel_inputs import AttentionInputs, StoreInputs, shared_entries
from .kernel_timing import Prepared
from .roofline import DecodeCell, PrefillCell, StoreCell

OURS = "fastattn"
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

Prepare = Callable[[Any, list[Any]], Prepared]


def ours_attention(cell: DecodeCell | PrefillCell, copies: list[AttentionInputs]) -> Prepared:
    """Call decode_attention, with a schedule made before the clock starts as for the layers of a model, or prefill."""
    if isinstance(cell, DecodeCell):
        return ours_decode("reused", True, cell, copies)

    def call(x: AttentionInputs) -> Tensor:
        tables: dict[str, Any] = {"block_table": x.block_table, "seq_lens": x.seq_lens}
        return ops.prefill_attention(x.q, x.k, x.v, softmax_scale=x.scale, causal=cell.causal, **tables)

    return Prepared([functools.partial(call, x) for x in copies])


def ours_decode(schedule: str, sharing: bool, cell: DecodeCell, copies: list[AttentionInputs]) -> Prepared:
    """Call decode_attention. schedule: "reused", or "each call" makes its own; sharing: of a prefix, where there is."""
    if not sharing and not cell.shared_prefix:
        raise ValueError("the sequences share nothing")

    def bind(x: AttentionInputs) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"block_table": x.block_table, "seq_lens": x.seq_lens}
        options["shared_prefixes"] = shared_entries(cell, x.q.device) if sharing else None
        made = ops.decode_schedule(x.q, x.k, x.v, **options) if schedule == "reused" else None
        return functools.partial(ops.decode_attention, x.q, x.k, x.v, softmax_scale=x.scale, schedule=made, **options)

    return Prepared([bind(x) for x in copies])


def ours_softmax(softmax: str, cell: DecodeCell, copies: list[AttentionInputs]) -> Prepared:
    """Call the decode kernel with one of its kinds of softmax."""
    if not copies[0].q.is_cuda:
        raise ValueError("the kinds of softmax are the GPU kernel's")
    from hf_fastattn.kernels import _decode_plan, decode_attention, decode_schedule

    def bind(x: AttentionInputs) -> Callable[[], Tensor]:
        entries = shared_entries(cell, x.q.device)
        config, _ = _decode_plan.make_plan(x.q, x.k, x.v, x.block_table, entries, False)
        config = replace(config, softmax=softmax)
        made = decode_schedule.launch(x.q, x.k, x.v, x.block_table, x.seq_lens, entries, ops.NO_WINDOW, False)
        args = (x.q, x.k, x.v, x.block_table, x.seq_lens, None, None, x.scale, ops.NO_WINDOW, 0.0, entries, made)
        return functools.partial(decode_attention.launch, *args, config=config)

    return Prepared([bind(x) for x in copies])


def sdpa(backend: SDPBackend, cell: DecodeCell | PrefillCell, copies: list[AttentionInputs]) -> Prepared:
    """Call one backend of scaled_dot_product_attention on contiguous keys.

    The efficient backend takes no grouped heads: single queries are packed by key head, else the keys are repeated
    before the clock starts, which favours it.
    """
    group, query_len, kv_len = cell.num_heads // cell.num_kv_heads, cell.query_len, cell.lens[0]
    causal = query_len > 1 and (isinstance(cell, DecodeCell) or cell.causal)
    square = query_len == kv_len
    fused_bias = backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    efficient = backend == SDPBackend.EFFICIENT_ATTENTION and group > 1
    mask: Any = None
    if causal and not square:
        lower = torch.ones(query_len, kv_len, dtype=torch.bool, device=copies[0].q.device).tril(kv_len - query_len)
        mask = causal_lower_right(query_len, kv_len) if fused_bias and lower.is_cuda else lower
    options: dict[str, Any] = {"is_causal": causal and square, "enable_gqa": group > 1 and not efficient}

    def bind(x: AttentionInputs) -> Callable[[], Tensor]:
        q, (k, v) = x.q, x.dense
        if efficient and query_len == 1:
            q = q.reshape(len(cell.lens), cell.num_kv_heads, group, cell.head_dim)
        elif efficient:
            if 2 * k.nbytes * group > common.free_memory(k.device):
                raise MemoryError("repeating the keys for all query heads needs too much memory")
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

        def call() -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=x.scale, **options)
            return out.reshape(x.q.shape).transpose(1, 2)

        return call

    return Prepared([bind(x) for x in copies], lambda: sdpa_kernel(backend))


def flex(cell: DecodeCell | PrefillCell, copies: list[AttentionInputs]) -> Prepared:
    """Call compiled flex_attention on contiguous keys."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # each cell is compiled for its own shape
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    query_len, kv_len = cell.query_len, cell.lens[0]
    mask = None
    if query_len > 1 and (isinstance(cell, DecodeCell) or cell.causal):
        device = str(copies[0].q.device)
        past = kv_len - query_len
        mask = create_block_mask(lambda b, h, i, j: j <= i + past, None, None, query_len, kv_len, device=device)
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": cell.num_heads != cell.num_kv_heads}

    def bind(x: AttentionInputs) -> Callable[[], Tensor]:
        k, v = x.dense
        return lambda: compiled(x.q, k, v, scale=x.scale, **options).transpose(1, 2)

    return Prepared([bind(x) for x in copies])


def xformers_splitk(cell: DecodeCell, copies: list[AttentionInputs]) -> Prepared:
    """Call xformers' triton_splitk, on the same blocks where there are blocks."""
    from xformers.ops import fmha  # an optional rival, never a dependency

    num_seqs, group = len(cell.lens), cell.num_heads // cell.num_kv_heads
    query_lens, lens = [cell.query_len] * num_seqs, list(cell.lens)

    def bind(x: AttentionInputs) -> Callable[[], Tensor]:
        shape = (1, -1, cell.num_kv_heads, 1, cell.head_dim)
        if x.block_table is None:
            kind = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask
            bias = kind.from_seqlens(q_seqlen=query_lens, kv_padding=lens[0], kv_seqlen=lens)
            k, v = (cache.transpose(1, 2).reshape(shape) for cache in (x.k, x.v))
        else:
            kind = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
            table = x.block_table.clamp(min=0)
            bias = kind.from_seqlens(q_seqlen=query_lens, kv_seqlen=lens, block_tables=table, page_size=cell.block_size)
            k, v = x.k.view(shape), x.v.view(shape)
        k, v = (each.expand(-1, -1, -1, group, -1) for each in (k, v))
        q = x.q.transpose(1, 2).reshape(1, -1, cell.num_kv_heads, group, cell.head_dim)

        def call() -> Tensor:
            out = fmha.memory_efficient_attention_forward(
                q, k, v, attn_bias=bias, scale=x.scale, op=fmha.triton_splitk.FwOp
            )
            return out.reshape(num_seqs, cell.query_len, cell.num_heads, cell.head_dim)

        return call

    return Prepared([bind(x) for x in copies])


def ours_store(cell: StoreCell, copies: list[StoreInputs]) -> Prepared:
    """Call store_kv."""
    return Prepared(
        [functools.partial(ops.store_kv, x.k, x.v, x.k_cache, x.v_cache, x.block_table, x.past_lens) for x in copies]
    )


def index_put(cell: StoreCell, copies: list[StoreInputs]) -> Prepared:
    """Assign to indexed slots that were computed before the clock starts."""
    positions = torch.arange(cell.past_len, cell.lens[0], device=copies[0].k.device)

    def call(x: StoreInputs, blocks: Tensor, offsets: Tensor) -> None:
        x.k_cache[blocks, offsets] = x.k.transpose(1, 2)
        x.v_cache[blocks, offsets] = x.v.transpose(1, 2)

    offsets = (positions % cell.block_size).expand(cell.batch, -1)
    tables = [x.block_table[:, positions // cell.block_size].long() for x in copies]
    return Prepared([functools.partial(call, x, blocks, offsets) for x, blocks in zip(copies, tables, strict=True)])


def candidates(op: str, *, with_flex: bool, with_variants: bool = True) -> dict[str, Prepare]:
    """Return our implementation of an op, its rivals, and variants of ours: with another softmax, say."""
    if op == "store_kv":
        return {OURS: ours_store, "index_put": index_put}
    found: dict[str, Prepare] = {OURS: ours_attention}
    found.update({f"sdpa {name}": functools.partial(sdpa, backend) for name, backend in SDPA_BACKENDS.items()})
    if with_flex:
        found["flex"] = flex
    if op == "decode" and with_variants:
        found[f"{OURS}, schedule each call"] = functools.partial(ours_decode, "each call", True)
        found[f"{OURS}, nothing shared"] = functools.partial(ours_decode, "reused", False)
        for softmax in ("fixed", "online"):  # instead of lazy
            found[f"{OURS}, {softmax} softmax"] = functools.partial(ours_softmax, softmax)
    if op == "decode":
        found["xformers splitk"] = xformers_splitk
    return found

"""How fast are the ops? Prefill, decode and store_kv beside PyTorch's attention, flex_attention and xformers.

    python -m eval.kernels --ops decode prefill --out eval/results/kernels.json

Each implementation is checked before it is timed: on some sequences, heads and queries it may be at most twice as far
from float64 as the plain formula in the timed dtype, plus rounding. One that is further off is reported as WRONG and
not timed; one that does not take a call is reported with its reason. On a GPU a CUDA graph of calls on rotating copies
is replayed, so that nothing comes from the L2 cache; the implementations take turns. The roofline is measured in the
same run: the faster of a large copy and a large sum, and a large matrix product. In a decode cell "fastattn" reuses a
schedule, as the layers of a model do; the rows beside it make one in each call, share nothing, or take another softmax.
"""

import argparse
import functools
import itertools
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

from hf_fastattn import ops, reference

from . import common
from .roofline import (
    Ceilings,
    Cell,
    DecodeCell,
    PrefillCell,
    StoreCell,
    all_cells,
    bound,
    counted_flops,
    kv_cache_bytes,
    moved_bytes,
)

OURS = "fastattn"
OPS = ("decode", "prefill", "store_kv")
SHARPNESS = 3.0
"""Standard deviation of the scores: a few keys matter, so that a lost or a wrong one shows."""
CHECKED_QUERIES = 8
CHECKED_KV_HEADS = 4
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MAX_COPIES = {"cuda": 256, "cpu": 32}
MIN_SAMPLE_S = {"cuda": 2e-3, "cpu": 5e-3}


@dataclass
class AttentionInputs:
    """One rotating copy of an attention cell: tensors as the op takes them."""

    cell: DecodeCell | PrefillCell
    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor | None
    seq_lens: Tensor | None

    @property
    def scale(self) -> float:
        """Return the factor on q @ k."""
        return self.q.shape[3] ** -0.5

    def row(self, cache: Tensor, seq: int, heads: slice) -> Tensor:
        """Return the keys or values of one sequence, (heads, seq_len, head_dim)."""
        if self.block_table is None:
            return cache[seq, heads]
        return reference.gather_blocks(cache[:, :, heads], self.block_table[seq], self.cell.lens[seq])

    @functools.cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Contiguous (num_seqs, num_kv_heads, seq_len, head_dim) for implementations that know no blocks."""
        if len(set(self.cell.lens)) > 1:
            raise ValueError("dense keys need sequences of one length")
        if self.block_table is None:
            return self.k, self.v
        wanted = 2 * len(self.cell.lens) * self.cell.lens[0] * self.k[0, 0].numel() * self.k.element_size()
        if wanted > common.free_memory(self.k.device):
            raise MemoryError(f"dense keys and values need {wanted / 2**30:.1f} GiB more")
        k, v = (
            torch.stack([self.row(cache, seq, slice(None)) for seq in range(len(self.cell.lens))])
            for cache in (self.k, self.v)
        )
        return k, v


@dataclass
class StoreInputs:
    """One rotating copy of a store_kv cell."""

    cell: StoreCell
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    past_lens: Tensor


Inputs = AttentionInputs | StoreInputs


@dataclass
class Prepared:
    """An implementation ready to run: one call per rotating copy, and what must be switched on around the calls."""

    calls: Sequence[Callable[[], Any]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


Prepare = Callable[[Any, list[Any]], Prepared]


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory: a GPU's L2, a CPU's L3 (32 MiB if unknown)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    name = "SC_LEVEL3_CACHE_SIZE"
    return max(os.sysconf(name) if name in os.sysconf_names else 0, 0) or 32 * 2**20


def count_copies(cell: Cell, itemsize: int, device: torch.device) -> int:
    """Return how many copies a cell rotates through to move twice the cache's size, as memory allows."""
    wanted = math.ceil(2 * cache_bytes(device) / moved_bytes(cell, itemsize))
    fitting = common.free_memory(device) // (4 * _copy_bytes(cell, itemsize))
    return max(1, min(wanted, MAX_COPIES[device.type], fitting))


def _copy_bytes(cell: Cell, itemsize: int) -> int:
    if isinstance(cell, StoreCell):
        touched = cell.batch * (cell.query_len // cell.block_size + 2) * cell.block_size
        return 2 * (touched + cell.batch * cell.query_len) * cell.num_kv_heads * cell.head_dim * itemsize
    return kv_cache_bytes(cell, itemsize) + 2 * len(cell.lens) * cell.query_len * cell.num_heads * cell.head_dim * (
        itemsize
    )


def needed_bytes(cell: Cell, itemsize: int) -> int:
    """Return the memory that one copy and its check take, about."""
    if isinstance(cell, StoreCell):
        return 2 * _copy_bytes(cell, itemsize)
    group = cell.num_heads // cell.num_kv_heads
    return int(1.1 * _copy_bytes(cell, itemsize)) + 8 * max(cell.lens) * (
        cell.head_dim * (2 + 3 * group) + 4 * group * min(cell.query_len, CHECKED_QUERIES)
    )


def make_inputs(cell: Cell, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Build one copy of a cell: random data, blocks in random order."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    num_seqs = len(cell.lens)
    if isinstance(cell, StoreCell):
        first = cell.past_len // cell.block_size  # earlier blocks are never touched: -1 in the table
        last = (cell.lens[0] - 1) // cell.block_size
        table = torch.full((num_seqs, last + 1), -1, dtype=torch.int32, device=device)
        order = torch.randperm(num_seqs * (last + 1 - first), generator=generator, device=device)
        table[:, first:] = order.view(num_seqs, -1)
        k, v = (normal(num_seqs, cell.query_len, cell.num_kv_heads, cell.head_dim).transpose(1, 2) for _ in range(2))
        k_cache, v_cache = (
            torch.zeros(len(order), cell.block_size, cell.num_kv_heads, cell.head_dim, dtype=dtype, device=device)
            for _ in range(2)
        )
        past = torch.full((num_seqs,), cell.past_len, dtype=torch.int32, device=device)
        return StoreInputs(cell, k, v, k_cache, v_cache, table, past)
    q = normal(num_seqs, cell.query_len, cell.num_heads, cell.head_dim).mul_(SHARPNESS).transpose(1, 2)
    if cell.block_size is None:
        k, v = (normal(num_seqs, cell.num_kv_heads, cell.lens[0], cell.head_dim) for _ in range(2))
        return AttentionInputs(cell, q, k, v, None, None)
    shared = cell.shared_prefix // cell.block_size if isinstance(cell, DecodeCell) else 0
    needed = [-(-seq_len // cell.block_size) for seq_len in cell.lens]
    num_blocks = shared + sum(count - shared for count in needed)
    order = torch.randperm(num_blocks, generator=generator, device=device).int()
    table = torch.full((num_seqs, max(needed)), -1, dtype=torch.int32, device=device)
    table[:, :shared] = order[:shared]
    start = shared
    for seq, count in enumerate(needed):
        table[seq, shared:count] = order[start : start + count - shared]
        start += count - shared
    k, v = (normal(num_blocks, cell.block_size, cell.num_kv_heads, cell.head_dim) for _ in range(2))
    return AttentionInputs(cell, q, k, v, table, torch.tensor(cell.lens, dtype=torch.int32, device=device))


def shared_entries(cell: DecodeCell | PrefillCell, device: torch.device) -> Tensor | None:
    """Return the blocks that a cell's sequences share as decode_attention takes them, None if there are none."""
    shared = cell.shared_prefix // (cell.block_size or 1) if isinstance(cell, DecodeCell) else 0
    return torch.tensor([[0, len(cell.lens), 0, shared]], dtype=torch.int32, device=device) if shared else None


def ours_attention(cell: DecodeCell | PrefillCell, copies: list[AttentionInputs]) -> Prepared:
    """Call decode_attention, with a schedule made before the clock starts as for the layers of a model, or prefill."""
    if isinstance(cell, DecodeCell):
        return ours_decode("reused", True, cell, copies)

    def call(x: AttentionInputs) -> Tensor:
        tables = {"block_table": x.block_table, "seq_lens": x.seq_lens}
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


def candidates(op: str, *, with_flex: bool) -> dict[str, Prepare]:
    """Return our implementation of an op and its rivals."""
    if op == "store_kv":
        return {OURS: ours_store, "index_put": index_put}
    found: dict[str, Prepare] = {OURS: ours_attention}
    found.update({f"sdpa {name}": functools.partial(sdpa, backend) for name, backend in SDPA_BACKENDS.items()})
    if with_flex:
        found["flex"] = flex
    if op == "decode":
        found[f"{OURS}, schedule each call"] = functools.partial(ours_decode, "each call", True)
        found[f"{OURS}, nothing shared"] = functools.partial(ours_decode, "reused", False)
        for softmax in ("lazy", "fixed", "online"):
            found[f"{OURS}, {softmax} softmax"] = functools.partial(ours_softmax, softmax)
        found["xformers splitk"] = xformers_splitk
    return found


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
        wanted = [cache.clone() for cache in caches]
        k, v = (new[seqs][:, :, tokens] for new in (x.k, x.v))
        reference.store_kv(k, v, *wanted, x.block_table[seqs], x.past_lens[seqs], positions=positions)
        error = max((got.double() - want.double()).abs().max().item() for got, want in zip(caches, wanted, strict=True))
        for cache in caches:
            cache.zero_()
        return Check(error == 0 and written == [x.cell.batch * x.cell.query_len] * 2, error, 0.0)

    return check


def make_timer(prepared: Prepared, device: torch.device) -> tuple[Callable[[], float], str]:
    """Return a function that measures seconds per call over all calls, and how: "graph", "events" or "clock"."""
    how, run = "clock", functools.partial(_run_all, prepared)
    with prepared.context():
        if device.type == "cuda":
            try:
                how, run = "graph", _capture(prepared)
            except Exception as error:  # an implementation that waits for the GPU cannot be captured
                how = f"events, no graph: {_reason(error)}"
                torch.cuda.synchronize()
        run()
        once = common.seconds(run, device)
    repeats = max(1, math.ceil(MIN_SAMPLE_S[device.type] / max(once, 1e-9)))

    def on_cpu() -> float:
        with prepared.context():
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / (repeats * len(prepared.calls))

    def on_cuda() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with prepared.context():
            start.record()
            for _ in range(repeats):
                run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (repeats * len(prepared.calls))

    return on_cuda if device.type == "cuda" else on_cpu, how


def _run_all(prepared: Prepared) -> None:
    for call in prepared.calls:
        call()


def _capture(prepared: Prepared) -> Callable[[], None]:
    """Capture all calls in one CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and touches what must exist before capture
        _run_all(prepared)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run_all(prepared)
    return graph.replay


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure bandwidth and the rate of a matrix product in the timed dtype (float32 on a CPU): the best of 5."""
    on_cuda = device.type == "cuda"
    count = min(2**31 if on_cuda else 2**27, common.free_memory(device) // 4)
    source = torch.ones(count // 4, device=device)
    target = torch.zeros_like(source)
    size = 8192 if on_cuda else 768
    matmul_dtype = dtype if on_cuda else torch.float32
    a, b = (torch.randn(size, size, device=device).to(matmul_dtype) for _ in range(2))
    cases = {"copy": lambda: target.copy_(source), "read": lambda: source.sum(), "matmul": lambda: a @ b}
    timers = {name: make_timer(Prepared([call]), device)[0] for name, call in cases.items()}
    times = common.alternate(timers, 5, label="ceilings")
    rates = {"copy": 2 * source.nbytes / min(times["copy"]), "read": source.nbytes / min(times["read"])}
    best = max(rates, key=lambda name: rates[name])
    name = f"measured on {common.device_name(device)}: {best}, {str(matmul_dtype).removeprefix('torch.')} matmul"
    return Ceilings(name, rates[best], 2 * size**3 / min(times["matmul"]))


def measure_cell(
    cell: Cell,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    rounds: int,
    implementations: dict[str, Prepare],
) -> list[dict[str, Any]]:
    """Check and time every implementation on one cell; one row each."""
    itemsize = dtype.itemsize
    num_copies = count_copies(cell, itemsize, device)
    copies: list[Any] = [make_inputs(cell, dtype, device, seed) for seed in range(num_copies)]
    check = store_checker(copies[0]) if isinstance(cell, StoreCell) else attention_checker(copies[0])
    least, moved, flops = bound(cell, ceilings, itemsize), moved_bytes(cell, itemsize), counted_flops(cell)
    counted = {"MB": moved / 1e6, "GFLOP": flops / 1e9, "bound_us": least.seconds * 1e6, "limited_by": least.limited_by}
    rotation = {"copies": num_copies, "cold": num_copies * moved > cache_bytes(device)}
    rows: dict[str, dict[str, Any]] = {}
    timers = {}
    for name, prepare in implementations.items():
        row = rows[name] = {"op": cell.op, "cell": cell.name, "implementation": name, **counted, **rotation}
        row["shape"] = asdict(cell)
        with warnings.catch_warnings(record=name != OURS) as caught:
            try:
                prepared = prepare(cell, copies)
                with prepared.context():
                    result = check(prepared.calls[0]())
                row.update(status="ok" if result.right else "WRONG", error=result.error, tolerance=result.tolerance)
                if result.right:
                    timers[name], row["timing"] = make_timer(prepared, device)
            except Exception as error:  # a failing implementation is a row, not the end of the run
                row["status"] = f"{'failed' if name == OURS else 'not available'}: {_reason(error, caught)}"
    for name, samples in common.alternate(timers, rounds, label=cell.name).items():
        spread = common.Spread.of(samples)
        rows[name].update(
            us=spread.median * 1e6,
            us_low=spread.low * 1e6,
            us_high=spread.high * 1e6,
            rate=flops / spread.median / 1e12 if cell.op == "prefill" else moved / spread.median / 1e9,
            unit="TFLOP/s" if cell.op == "prefill" else "GB/s",
            fraction=least.seconds / spread.median,
        )
    rivals = [row["us"] for name, row in rows.items() if not name.startswith(OURS) and "us" in row]
    if rivals and "us" in rows.get(OURS, {}):
        rows[OURS]["x_best_rival"] = min(rivals) / rows[OURS]["us"]
    return list(rows.values())


def _reason(error: BaseException, caught: Sequence[warnings.WarningMessage] | None = None) -> str:
    """Return an exception in a line, with the warnings before it: PyTorch says there why a backend refuses."""
    texts = [str(error) or type(error).__name__, *(str(warning.message) for warning in caught or ())]
    lines = [text.strip().splitlines()[0].split(" (Triggered internally")[0][:160] for text in texts if text.strip()]
    return "; ".join(dict.fromkeys(line for line in lines if "not used because" not in line))


def spread_out(cells: Sequence[Cell]) -> list[Cell]:
    """Order cells so that every beginning of the list covers all ops and their whole range."""
    groups = []
    for op in OPS:
        group = [cell for cell in cells if cell.op == op]
        groups.append([group[i] for i in sorted(range(len(group)), key=lambda i: int(f"{i:010b}"[::-1], 2))])
    return [cell for turn in itertools.zip_longest(*groups) for cell in turn if cell is not None]


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device, torch.dtype, list[Cell]]:
    """Read the command line; end with a sentence where it asks for what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m eval.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument(
        "--match", nargs="+", default=None, metavar="TEXT", help="only cells whose name has one of these"
    )
    parser.add_argument("--budget", type=float, default=None, metavar="SECONDS", help="stop starting cells after it")
    parser.add_argument("--rounds", type=int, default=None, help="9 on a GPU, 5 on a CPU")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, default=None, help="CPU-sized cells")
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU only")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    try:
        device = common.pick_device(args.device)
        known = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        known = False
    if not known:
        common.fail(f"no device {args.device!r} here: pass cpu, or cuda on a machine with a GPU")
    dtype = common.pick_dtype(args.dtype, device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        common.fail(f"the ops are measured in float32, bfloat16 or float16, got {args.dtype!r}")
    if (args.rounds is not None and args.rounds < 1) or (args.budget is not None and not args.budget > 0):
        common.fail(f"expected at least one round and a positive budget, got {args.rounds} and {args.budget}")
    if args.threads is not None and args.threads < 1:
        common.fail(f"expected at least one thread, got --threads {args.threads}")
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            common.fail(f"cannot write to {str(args.out)!r}: {error.strerror}")
        if args.out.is_dir():
            common.fail(f"--out names a file, but {str(args.out)!r} is a folder")
    args.rounds = args.rounds or (9 if device.type == "cuda" else 5)
    args.small = device.type == "cpu" if args.small is None else args.small
    args.flex = device.type == "cuda" if args.flex is None else args.flex
    cells = [cell for cell in all_cells(small=args.small) if cell.op in args.ops]
    if args.match is not None:
        cells = [cell for cell in cells if any(text in f"{cell.op} {cell.name}" for text in args.match)]
    if not cells:
        common.fail(f"no cell's name has {' or '.join(map(repr, args.match))}: python -m eval.roofline lists them")
    return args, device, dtype, cells if args.budget is None else spread_out(cells)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if an implementation was wrong or ours failed."""
    args, device, dtype, cells = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    left = [cell.name for cell in cells]
    settings: dict[str, Any] = {**vars(args), "dtype": str(dtype).removeprefix("torch."), "left_out": left}
    try:
        with torch.no_grad(), tqdm(cells, desc="cells", disable=None) as bar:
            ceilings = measure_ceilings(device, dtype)
            settings["ceilings"] = asdict(ceilings)
            for cell in bar:
                if args.budget is not None and rows and time.perf_counter() - start > args.budget:
                    break
                bar.set_postfix_str(f"{cell.op} {cell.name}")
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                wanted = needed_bytes(cell, dtype.itemsize)
                if wanted > common.free_memory(device):
                    status = f"skipped: needs about {wanted / 2**30:.1f} GiB"
                    rows.append({"op": cell.op, "cell": cell.name, "implementation": "-", "status": status})
                else:
                    implementations = candidates(cell.op, with_flex=args.flex)
                    rows += measure_cell(cell, device, dtype, ceilings, args.rounds, implementations)
                left.remove(cell.name)
                if args.out:
                    common.write_result(args.out, "kernels", device, settings, rows)
    except KeyboardInterrupt:
        print("interrupted: what is done is kept")
    if "ceilings" in settings:
        best = settings["ceilings"]
        print(f"{best['name']}: {best['bytes_per_s'] / 1e9:.0f} GB/s, {best['flops_per_s'] / 1e12:.3g} TFLOP/s\n")
    measured = ["us", "rate", "unit", "fraction", "x_best_rival", "MB", "GFLOP", "limited_by"]
    missing = Counter((row["implementation"], row["status"]) for row in rows if "not available" in row["status"])
    shown = [row for row in rows if "not available" not in row["status"]]
    print(common.table(shown, ["op", "cell", "implementation", *measured, "status"]))
    for (implementation, status), count in missing.items():
        print(f"\n{implementation} in {count} cells: {status}")
    if left:
        print(f"\n{len(left)} of {len(cells)} cells were not reached")
    return int(any("WRONG" in row["status"] or "failed" in row["status"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

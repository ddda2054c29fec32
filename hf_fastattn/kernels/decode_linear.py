"""Linear layers at decode in Triton: a GEMV on vector units and a flat GEMM on tensor cores, each weight read once.

Source: Hong et al., "FlashDecoding++: Faster Large Language Model Inference with Asynchronization, Flat GEMM
Optimization, and Heuristics", 2024, sections 4 and 5. The one decision: a program owns whole rows of the weights and
walks along K, its warps sharing K in the GEMV; where there are too few rows to fill a GPU, K is split over programs
too, whose fp32 partial results a second launch adds in order. Nothing is added atomically, so results repeat.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED_ARCH, KNOWN_ARCHS, Launch, keep, layout
from .decode_linear_plan import LIBRARY, MAX_GEMV_ROWS, MAX_ROWS, ROW_MULTIPLE, Plan, choose

if TYPE_CHECKING:
    from ._compile import CompileCase

MAX_WEIGHTS = 3
"""Most weights of one launch: those of queries, keys and values."""

_UNSPECIALIZED = ["num_rows", "n_0", "n_1", "n_2"]


@triton.jit
def _locate(tile, n_0, n_1, NUM_WEIGHTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return index and first tile of the weight that a tile belongs to: the weights' tiles follow each other."""
    index = 0
    first = 0
    if NUM_WEIGHTS > 1:
        tiles_0 = tl.cdiv(n_0, BLOCK_N)
        index += (tile >= tiles_0).to(tl.int32)
        first += tl.where(tile >= tiles_0, tiles_0, 0)
    if NUM_WEIGHTS > 2:
        tiles_1 = tl.cdiv(n_1, BLOCK_N)
        index += (tile >= tiles_0 + tiles_1).to(tl.int32)
        first += tl.where(tile >= tiles_0 + tiles_1, tiles_1, 0)
    return index, first


@triton.jit
def _pick(index, a_0, a_1, a_2, NUM_WEIGHTS: tl.constexpr):
    """Return a_<index>, a number or a pointer; None of Nones."""
    if NUM_WEIGHTS == 1 or a_0 is None:
        picked = a_0
    elif NUM_WEIGHTS == 2:
        picked = tl.where(index == 0, a_0, a_1)
    else:
        picked = tl.where(index == 0, a_0, tl.where(index == 1, a_1, a_2))
    return picked


@triton.jit
def _k_range(size_k, BLOCK_K: tl.constexpr):
    """Return first and end of this program's share of K: whole tiles, equal shares."""
    tiles = tl.cdiv(size_k, BLOCK_K)
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    return split * tiles // num_splits * BLOCK_K, (split + 1) * tiles // num_splits * BLOCK_K


@triton.jit
def _write(acc, row, col, part_col, num_rows, size_n, out_ptr, bias_ptr, part_ptr, part_width):
    """Write a tile to out with its bias or, with part_ptr, to this split's partial result.

    acc: the tile, fp32; row, col, part_col: rows of x, columns of out and of the partial results, broadcast to it.
    """
    if part_ptr is not None:
        part_row = tl.program_id(1) * num_rows + row
        tl.store(part_ptr + part_row.to(tl.int64) * part_width + part_col, acc, mask=row < num_rows)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + col, mask=col < size_n, other=0.0).to(tl.float32)
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row.to(tl.int64) * size_n + col, out, mask=(row < num_rows) & (col < size_n))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _linear_kernel(
    x_ptr,
    w_0_ptr,
    w_1_ptr,
    w_2_ptr,
    bias_0_ptr,
    bias_1_ptr,
    bias_2_ptr,
    out_0_ptr,
    out_1_ptr,
    out_2_ptr,
    part_ptr,
    num_rows,
    size_k,
    n_0,
    n_1,
    n_2,
    stride_x_row,
    stride_x_k,
    stride_w_0_row,
    stride_w_1_row,
    stride_w_2_row,
    NUM_WEIGHTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply BLOCK_N rows of one weight with all rows of x, over one split of K.

    Grid (tiles of all weights, num_splits). Pointers: x (num_rows, size_k); w_i (n_i, size_k) with contiguous rows;
    bias_i (n_i,), all None or none; out_i (num_rows, n_i) contiguous; part (num_splits, num_rows, tiles * BLOCK_N)
    fp32 or None. acc is fp32. DOT: the flat GEMM, whose narrow side is x (BLOCK_M 8 or 16); else the GEMV (BLOCK_M up
    to 4), which adds up in each thread and over threads at the end. Rows past the last are read again in place of
    nothing and not stored; columns past the last of K count as 0.
    """
    tile = tl.program_id(0)
    index, first_tile = _locate(tile, n_0, n_1, NUM_WEIGHTS, BLOCK_N)
    size_n = _pick(index, n_0, n_1, n_2, NUM_WEIGHTS)
    stride_w_row = _pick(index, stride_w_0_row, stride_w_1_row, stride_w_2_row, NUM_WEIGHTS)
    w_ptr = _pick(index, w_0_ptr, w_1_ptr, w_2_ptr, NUM_WEIGHTS)
    out_ptr = _pick(index, out_0_ptr, out_1_ptr, out_2_ptr, NUM_WEIGHTS)
    bias_ptr = _pick(index, bias_0_ptr, bias_1_ptr, bias_2_ptr, NUM_WEIGHTS)
    offs_n = tl.arange(0, BLOCK_N)
    cols = (tile - first_tile) * BLOCK_N + offs_n
    part_cols = tile * BLOCK_N + offs_n
    rows = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    w_rows = tl.minimum(cols, size_n - 1).to(tl.int64) * stride_w_row
    x_rows = tl.minimum(rows, num_rows - 1).to(tl.int64) * stride_x_row
    part_width = tl.num_programs(0) * BLOCK_N
    first, last = _k_range(size_k, BLOCK_K)
    if DOT:
        w_ptrs = w_ptr + w_rows[:, None] + offs_k[None, :]
        x_ptrs = x_ptr + x_rows[None, :] + offs_k[:, None] * stride_x_k
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k in tl.range(first, last, BLOCK_K):
            w_inside = None if EVEN_K else (k + offs_k < size_k)[None, :]
            x_inside = None if EVEN_K else (k + offs_k < size_k)[:, None]
            other = None if EVEN_K else 0.0
            w = tl.load(w_ptrs + k, w_inside, other, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
            x = tl.load(x_ptrs + k * stride_x_k, x_inside, other)  # [BLOCK_K, BLOCK_M]
            acc = tl.dot(w, x, acc, input_precision="ieee")
        row, col, part_col = rows[None, :], cols[:, None], part_cols[:, None]
    else:
        # Three dimensions from the start: loaded as two and broadcast, x would pass through shared memory.
        w_ptrs = w_ptr + w_rows[None, :, None] + offs_k[None, None, :]
        x_ptrs = x_ptr + x_rows[:, None, None] + offs_k[None, None, :] * stride_x_k
        products = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
        for k in tl.range(first, last, BLOCK_K):
            inside = None if EVEN_K else (k + offs_k < size_k)[None, None, :]
            other = None if EVEN_K else 0.0
            w = tl.load(w_ptrs + k, inside, other, eviction_policy="evict_first")  # [1, BLOCK_N, BLOCK_K]
            x = tl.load(x_ptrs + k * stride_x_k, inside, other)  # [BLOCK_M, 1, BLOCK_K]
            products += x.to(tl.float32) * w.to(tl.float32)
        acc = tl.sum(products, 2)  # [BLOCK_M, BLOCK_N]
        row, col, part_col = rows[:, None], cols[None, :], part_cols[None, :]
    _write(acc, row, col, part_col, num_rows, size_n, out_ptr, bias_ptr, part_ptr, part_width)


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "num_splits"])
def _combine_kernel(
    bias_0_ptr,
    bias_1_ptr,
    bias_2_ptr,
    out_0_ptr,
    out_1_ptr,
    out_2_ptr,
    part_ptr,
    num_rows,
    n_0,
    n_1,
    n_2,
    num_splits,
    NUM_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the partial results of one tile, the first split first; grid and pointers as in _linear_kernel."""
    tile = tl.program_id(0)
    index, first_tile = _locate(tile, n_0, n_1, NUM_WEIGHTS, BLOCK_N)
    size_n = _pick(index, n_0, n_1, n_2, NUM_WEIGHTS)
    out_ptr = _pick(index, out_0_ptr, out_1_ptr, out_2_ptr, NUM_WEIGHTS)
    bias_ptr = _pick(index, bias_0_ptr, bias_1_ptr, bias_2_ptr, NUM_WEIGHTS)
    row = tl.arange(0, BLOCK_M)[:, None]
    col = ((tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    part_col = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    part_width = tl.num_programs(0) * BLOCK_N
    part_ptrs = part_ptr + row.to(tl.int64) * part_width + part_col
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in tl.range(num_splits):
        acc += tl.load(part_ptrs, mask=row < num_rows, other=0.0)
        part_ptrs += num_rows.to(tl.int64) * part_width
    _write(acc, row, col, part_col, num_rows, size_n, out_ptr, bias_ptr, None, part_width)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute hf_fastattn::decode_linear, whose arguments these are, as :func:`choose` says.

    Returns:
        (..., N), contiguous.
    """
    return launch_group(x, (weight,), (bias,))[0]


def launch_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Compute hf_fastattn::decode_linear_group: one launch where a kernel is chosen for all of the weights."""
    plan = plan_for(x, weights, biases)
    if plan is not LIBRARY:
        return run(x, weights, biases, plan)
    if len(weights) == 1:
        return [F.linear(x, weights[0], biases[0]).contiguous()]
    return [launch(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def plan_for(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Plan:
    """Return how a call is computed: the library where a kernel could not read the weights 16 bytes at a time."""
    size_k = x.shape[-1]
    arch = table_arch(x.device)
    if arch is None or size_k == 0 or len(weights) > MAX_WEIGHTS or sum(bias is None for bias in biases) % len(weights):
        return LIBRARY
    for tensor in (*weights, *(bias for bias in biases if bias is not None)):
        if tensor.dtype != x.dtype or tensor.stride(-1) != 1:
            return LIBRARY
    for weight in weights:
        if weight.data_ptr() % 16 or weight.stride(0) % ROW_MULTIPLE or weight.shape[0] == 0:
            return LIBRARY
    return choose(x.numel() // size_k, sum(weight.shape[0] for weight in weights), size_k, x.dtype, arch)


@functools.cache
def table_arch(device: torch.device) -> int | None:
    """Return the compute capability of a device that the table knows; None, with one warning, for another."""
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    if torch.version.hip is None and capability in KNOWN_ARCHS:
        return capability
    warnings.warn(
        f"decode_linear has no table for compute capability {major}.{minor}: linear layers run through the library "
        "there (python -m eval.tune_linear makes a table)",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], plan: Plan) -> list[Tensor]:
    """Compute a call by a given plan: what launch, tests and eval/tune_linear.py share.

    Args:
        x: (..., K), at most 16 rows, 4 for a GEMV; any strides.
        weights: 1 to 3 of (N_i, K) with contiguous rows. biases: of (N_i,), all None or none.

    Returns:
        one (..., N_i) per weight, contiguous.
    """
    if plan.kind == "library":
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    rows = x.reshape(-1, x.shape[-1])
    most = MAX_GEMV_ROWS if plan.kind == "gemv" else MAX_ROWS
    if not 1 <= rows.shape[0] <= most:
        raise ValueError(f"expected 1 to {most} rows of activations for {plan.kind}, got {rows.shape[0]}")
    outs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    key = (x.device, plan, layout(rows), *map(layout, weights), *map(layout, biases))
    call = _kept.get(key)
    if call is None:
        call = keep(_kept, key, _prepare(rows, weights, plan))
    call.run(rows, weights, biases, outs)
    return outs


@dataclass(frozen=True)
class _Call:
    """What a call is prepared to: everything but its tensors.

    Attributes:
        launch: of the product.
        part_shape, combine: if K is split, shape of the partial results and the launch of their sum.
    """

    launch: Launch
    part_shape: tuple[int, int, int] | None = None
    combine: Launch | None = None

    def run(
        self, rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], outs: Sequence[Tensor]
    ) -> None:
        """Make the launches."""
        part = None if self.part_shape is None else rows.new_empty(self.part_shape, dtype=torch.float32)
        first, second = self.tensors(rows, weights, biases, outs, part)
        self.launch(*first)
        if self.combine is not None:
            self.combine(*second)

    @staticmethod
    def tensors(
        rows: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        outs: Sequence[Tensor],
        part: Tensor | None,
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Return the tensors of both launches; parameters that a kernel does not look at repeat the first."""
        weights, biases, outs = _filled(weights), _filled(biases), _filled(outs)
        return (rows, *weights, *biases, *outs, part), (*biases, *outs, part)


_kept: dict[Any, _Call] = {}


def _filled(values: Sequence[Any]) -> list[Any]:
    return [*values, *[values[0]] * (MAX_WEIGHTS - len(values))]


def _prepare(rows: Tensor, weights: Sequence[Tensor], plan: Plan) -> _Call:
    """Return the launches of a plan: the product and, if K is split, the sum of its partial results."""
    num_rows, size_k = rows.shape
    tiles = sum(triton.cdiv(weight.shape[0], plan.block_n) for weight in weights)
    sizes = [weight.shape[0] for weight in _filled(weights)]
    block_m = triton.next_power_of_2(num_rows) if plan.kind == "gemv" else 8 if num_rows <= 8 else 16
    kind = {"EVEN_K": size_k % plan.block_k == 0, "DOT": plan.kind == "flat"}
    tile = {"BLOCK_M": block_m, "BLOCK_N": plan.block_n}
    launch = Launch(
        rows.device,
        _linear_kernel,
        (tiles, plan.num_splits),
        (num_rows, size_k, *sizes, *rows.stride(), *(weight.stride(0) for weight in _filled(weights))),
        {"NUM_WEIGHTS": len(weights), **kind, **tile, "BLOCK_K": plan.block_k},
        {"num_warps": plan.num_warps, "num_stages": plan.num_stages},
    )
    if plan.num_splits == 1:
        return _Call(launch)
    scalars, constants = (num_rows, *sizes, plan.num_splits), {"NUM_WEIGHTS": len(weights), **tile}
    combine = Launch(rows.device, _combine_kernel, (tiles,), scalars, constants, {"num_warps": 4, "num_stages": 1})
    return _Call(launch, (plan.num_splits, num_rows, tiles * plan.block_n), combine)


def compile_cases(arch: int) -> list["CompileCase"]:
    """Return the launches to compile for an architecture: Llama-3-8B's layers at batch 1 to 16, and odd sizes."""
    bf16, fp16 = torch.bfloat16, torch.float16
    cases = []
    for num_rows in (1, 2, 8, 16):
        cases += _compile_cases(arch, bf16, num_rows, (4096,), 4096)
        cases += _compile_cases(arch, bf16, num_rows, (4096, 1024, 1024), 4096)
    for num_rows in (1, 8):
        cases += _compile_cases(arch, fp16, num_rows, (14336, 14336), 4096)
        cases += _compile_cases(arch, bf16, num_rows, (128256,), 4096, bias=True)
        cases += _compile_cases(arch, bf16, num_rows, (4096,), 11024)  # columns that fill no tile
        cases += _compile_cases(arch, bf16, num_rows, (1024, 256), 16384)  # split
    return list({case.name: case for case in cases}.values())


def _compile_cases(
    arch: int, dtype: torch.dtype, num_rows: int, sizes: tuple[int, ...], size_k: int, bias: bool = False
) -> list["CompileCase"]:
    from ._compile import case_from_call  # no launch needs the compiler's tools

    plan = choose(num_rows, sum(sizes), size_k, dtype, arch)
    if plan is LIBRARY:
        return []
    meta = functools.partial(torch.empty, device="meta", dtype=dtype)
    weights, outs = [meta(n, size_k) for n in sizes], [meta(num_rows, n) for n in sizes]
    biases = [meta(n) if bias else None for n in sizes]
    name = f"{'bf16' if dtype == torch.bfloat16 else 'fp16'}-m{num_rows}-{'+'.join(map(str, sizes))}x{size_k}"
    rows, call = meta(num_rows, size_k), _prepare(meta(num_rows, size_k), weights, plan)
    part = None if call.part_shape is None else meta(call.part_shape, dtype=torch.float32)
    product, combine = call.tensors(rows, weights, biases, outs, part)
    info: dict[str, object] = {"plan": plan}
    if plan.kind == "flat":
        block_m = call.launch.constants["BLOCK_M"]
        info["tile_bytes"] = (plan.block_n + block_m) * plan.block_k * dtype.itemsize
    cases = [case_from_call(f"{plan.kind}-{name}", call.launch, product, info)]
    if call.combine is not None:
        cases.append(case_from_call(f"combine-{name}", call.combine, combine, {"plan": plan}))
    return cases

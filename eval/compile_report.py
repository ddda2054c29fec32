"""What the kernels cost before they have met a GPU: registers, spills, shared memory and K/V tiles in flight.

    python -m eval.compile_report [--arch 80 90 100] [--kernel decode_attention ...] [--json FILE] [--markdown]

Cross-compiles every default launch config of every kernel; needs Triton, no GPU. Exits with 1 and one line per offender
if a config spills registers, wants more shared memory than a program can have, or if decode_attention has less than two
K/V tiles in flight on sm_80 or sm_90, or fewer over a block table than over contiguous keys.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from tqdm import tqdm

import hf_fastattn.kernels
from hf_fastattn.kernels._compile import CompileCase, CompileResult, compile_case

ARCHS = (80, 90, 100)

CHOSEN_WITH = "3.6."
"""The Triton that the launch configs were chosen with."""

SHARED_PER_PROGRAM = {80: 166912, 90: 232448, 100: 232448}
"""Largest shared memory of one program, in bytes."""

SHARED_PER_SM = {80: 167936, 90: 233472, 100: 233472}
"""Shared memory of one multiprocessor, in bytes; each program takes 1 KiB beside its own."""

LEAST_TILES = {80: 2, 90: 2}
"""K/V tiles that decode_attention must have in flight: one is loaded while another is multiplied."""

REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
PROGRAMS_PER_SM = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report: a case of a kernel, compiled for one architecture."""

    kernel: str
    case: str
    arch: int
    num_warps: int
    num_stages: int
    tile_bytes: int | None
    result: CompileResult


def kernel_names() -> list[str]:
    """Return the modules of hf_fastattn.kernels that list compile cases."""
    names = [module.name for module in pkgutil.iter_modules(hf_fastattn.kernels.__path__)]
    return [name for name in names if not name.startswith("_") and hasattr(_module(name), "compile_cases")]


def kernel_cases(kernel: str, arch: int) -> list[CompileCase]:
    """Return the cases that a kernel's module lists for an architecture."""
    return _module(kernel).compile_cases(arch)


def compile_row(kernel: str, index: int, arch: int) -> Row:
    """Compile the index-th case of a kernel."""
    case = kernel_cases(kernel, arch)[index]
    tile_bytes = case.info.get("tile_bytes")
    assert tile_bytes is None or isinstance(tile_bytes, int)
    return Row(kernel, case.name, arch, case.num_warps, case.num_stages, tile_bytes, compile_case(case, arch))


def offenses(row: Row) -> list[str]:
    """Return what is wrong with a row, one sentence each; nothing for a good one."""
    where = f"{row.kernel} {row.case} on sm_{row.arch}"
    found = []
    if spilling := spills(row.result):
        found.append(f"{where} {spilling}")
    limit = SHARED_PER_PROGRAM[row.arch]
    if row.result.shared_bytes > limit:
        found.append(f"{where} wants {row.result.shared_bytes} bytes of shared memory, a program can have {limit}")
    tiles, least = tiles_in_flight(row), LEAST_TILES.get(row.arch, 0)
    if row.kernel == "decode_attention" and tiles is not None and tiles < least:
        found.append(f"{where} has {tiles} K/V tiles in flight, expected at least {least}")
    return found


def spills(result: CompileResult) -> str:
    """Say how a kernel spills registers; nothing if that costs nothing.

    With the Triton that configs were chosen with none may spill. With others a few spill some bytes between their
    loops, once per program or per piece of work: only spills in innermost loops count there.
    """
    if result.loop_spills:
        return f"spills registers in its inner loops: {result.loop_spills} instructions"
    if triton.__version__.startswith(CHOSEN_WITH) and (result.spill_stores or result.spill_loads):
        return f"spills registers: {result.spill_stores} bytes stored, {result.spill_loads} bytes loaded"
    return ""


def shallower_over_blocks(rows: Sequence[Row]) -> list[str]:
    """Return the paged cases with fewer K/V tiles in flight than their dense twin, one sentence each."""
    dense = {(row.arch, row.case.removeprefix("dense-")): row for row in rows if row.case.startswith("dense-")}
    found = []
    for row in rows:
        twin = dense.get((row.arch, row.case.partition("-")[2])) if row.case.startswith("paged") else None
        if twin is not None and (tiles_in_flight(row) or 0) < (tiles_in_flight(twin) or 0):
            found.append(
                f"{row.kernel} {row.case} on sm_{row.arch} has {tiles_in_flight(row)} K/V tiles in flight, "
                f"{tiles_in_flight(twin)} over contiguous keys"
            )
    return found


def programs_per_sm(row: Row) -> int:
    """Return how many programs a multiprocessor holds at a time, by registers, shared memory and warps."""
    per_warp = -(-row.result.registers * 32 // 256) * 256  # registers are given out in units of 256 per warp
    by_registers = REGISTERS_PER_SM // (per_warp * row.num_warps)
    by_shared = SHARED_PER_SM[row.arch] // (row.result.shared_bytes + 1024)
    return min(by_registers, by_shared, WARPS_PER_SM // row.num_warps, PROGRAMS_PER_SM)


def tiles_in_flight(row: Row) -> int | None:
    """Return how many K/V tile pairs fit the shared memory, at most one per stage; None for a kernel without tiles."""
    if row.tile_bytes is None:
        return None
    return min(row.result.shared_bytes // row.tile_bytes, row.num_stages)


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """Return the rows as text, aligned or as a Markdown table."""
    head = [
        "kernel",
        "case",
        "sm",
        "warps",
        "stages",
        "regs",
        "spills",
        "shared",
        "programs/SM",
        "tiles",
        "KiB in flight",
    ]
    head += ["wgmma", "mma", "tcgen05", "async copies", "16-byte loads"]
    lines = [head]
    for row in rows:
        result, tiles = row.result, tiles_in_flight(row)
        matrix = f"{result.wgmma}!" if result.wgmma_serialized else str(result.wgmma)
        in_flight = ("", "") if tiles is None else (tiles, tiles * (row.tile_bytes or 0) // 1024)
        cells: list[Any] = [row.kernel, row.case, row.arch, row.num_warps, row.num_stages, result.registers]
        cells += [f"{result.spill_stores}/{result.spill_loads}", result.shared_bytes, programs_per_sm(row), *in_flight]
        cells += [matrix, result.mma, result.tcgen05, result.async_copies, result.loads_16]
        lines.append([str(cell) for cell in cells])
    if markdown:
        lines.insert(1, ["---"] * len(head))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def report(rows: Sequence[Row], json_file: Path | None = None, markdown: bool = False) -> int:
    """Print the table and the offenders, write the JSON file, and return the exit code."""
    out = sys.stdout.write
    out(f"triton {triton.__version__}, torch {torch.__version__}; spills: bytes stored/loaded; !: wgmma serialized\n")
    out(table(rows, markdown) + "\n")
    if json_file is not None:
        lines = [
            {
                **dataclasses.asdict(row),
                "programs_per_sm": programs_per_sm(row),
                "tiles_in_flight": tiles_in_flight(row),
            }
            for row in rows
        ]
        json_file.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    found = [offense for row in rows for offense in offenses(row)] + shallower_over_blocks(rows)
    for offense in found:
        out(f"FAILED: {offense}\n")
    return 1 if found else 0


def compile_all(kernels: Sequence[str], archs: Sequence[int]) -> list[Row]:
    """Compile every case of some kernels for some architectures, in two processes, with a progress bar on stderr."""
    jobs = [
        (kernel, index, arch)
        for kernel in kernels
        for arch in archs
        for index in range(len(kernel_cases(kernel, arch)))
    ]
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(compile_row, *zip(*jobs, strict=True)) if jobs else []
        return list(tqdm(compiled, total=len(jobs), unit="kernel", file=sys.stderr))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.compile_report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="default: all")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="modules of hf_fastattn.kernels; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    known = kernel_names()
    unknown = sorted(set(options.kernel or ()) - set(known))
    if unknown:
        parser.error(f"no kernel named {', '.join(unknown)}; there are {', '.join(known)}")
    return report(compile_all(options.kernel or known, options.arch), options.json, options.markdown)


def _module(kernel: str) -> ModuleType:
    return importlib.import_module(f"hf_fastattn.kernels.{kernel}")


if __name__ == "__main__":
    sys.exit(main())

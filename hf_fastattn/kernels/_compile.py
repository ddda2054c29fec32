"""Cross compilation of the kernels without a GPU: what a launch config costs in registers, spills and shared memory.

Each kernel's module lists the launches it makes as ``compile_cases(arch)``, built by the function that its launcher
calls, so that what is compiled here is what runs there. Only eval/compile_report.py and tests/compile use this file; no
launch path imports it.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from . import _sass
from ._launch import ALWAYS, Launch

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}

_DEFAULTS: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "maxnreg": None}
"""Triton's own, where a launch does not say."""


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of one kernel, as its launcher would make it.

    Attributes:
        name: unique within the kernel's module, fit for a test id, e.g. ``paged64-bf16-d128-rows4``.
        kernel: the function that ``@triton.jit`` made.
        signature: Triton type of every parameter that is not a constexpr, e.g. ``{"q_ptr": "*bf16", "window": "i32"}``.
        constexprs: value of every other parameter; also arguments that a launch would turn into constants, None and 1.
        divisible: parameters of the signature that are multiples of 16, pointers included.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        info: what the report shows beside the result. ``tile_bytes``: bytes of one K and V tile pair, whose share of
            the shared memory is the number of tiles in flight (absent: not shown).
        maxnreg: most registers per thread, None for what ptxas chooses.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    info: dict[str, object] = field(default_factory=dict)
    maxnreg: int | None = None


@dataclass(frozen=True)
class CompileResult:
    """What ptxas and the PTX say about a compiled case.

    Attributes:
        registers: registers per thread.
        spill_stores, spill_loads: bytes that a thread writes and reads because registers ran out.
        shared_bytes: shared memory per program.
        wgmma, mma, tcgen05: warpgroup (Hopper), warp (Ampere) and Blackwell matrix instructions in the PTX.
        async_copies: cp.async instructions (bulk ones included): the loads that the pipeline keeps in flight.
        loads_16: global loads of 16 bytes or more per thread that are not asynchronous.
        wgmma_serialized: ptxas gave up overlapping wgmma instructions.
        loop_spills: instructions of innermost loops that spill: those cost time at every tile.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    wgmma: int
    mma: int
    tcgen05: int
    async_copies: int
    loads_16: int
    wgmma_serialized: bool
    loop_spills: int = 0


def case_from_call(
    name: str, launch: Launch, tensors: Sequence[torch.Tensor | None], info: Mapping[str, object]
) -> CompileCase:
    """Return the case that a launch with these tensors compiles, specialised as Triton would.

    Args:
        tensors: may be on the meta device and count as aligned to 16 bytes.
    """
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    divisible: list[str] = []
    for parameter, value in zip(launch.kernel.params, (*tensors, *launch.scalars), strict=False):
        if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[parameter.name] = "fp32"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            divisible.append(parameter.name)
    sizes = {name: launch.options.get(name, default) for name, default in _DEFAULTS.items()}
    return CompileCase(name, launch.kernel, signature, constants, tuple(divisible), info=dict(info), **sizes)


def compiled(case: CompileCase, arch: int) -> Any:
    """Return what Triton makes of a case for sm_<arch>; arguments and errors of :func:`compile_case`."""
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg, **ALWAYS}
    return triton.compile(_source(case), target=GPUTarget("cuda", arch, 32), options=options)


def compile_case(case: CompileCase, arch: int) -> CompileResult:
    """Compile a case for sm_<arch> (80, 86, 89, 90, 100, 120; the feature sets 90a, 100a, 120a) with Triton's ptxas.

    Raises:
        ValueError: a parameter of the kernel has neither a type nor a value, or a name is no parameter.
        RuntimeError: the kernel was defined under TRITON_INTERPRET=1.
    """
    kernel = compiled(case, arch)
    ptx = kernel.asm["ptx"]
    result = read_result(ptx, _assemble(ptx, arch), kernel.metadata.shared)
    spills = result.spill_stores or result.spill_loads
    return replace(result, loop_spills=loop_spills(_sass.disassemble(kernel))) if spills else result


def loop_spills(sass: str) -> int:
    """Count the instructions that touch local memory in the loops of a kernel that hold no other loop."""
    code = _sass.parse(sass)
    rounds = (code.instructions[begin : end + 1] for begin, end in code.inner_loops)
    return sum(bool(re.search(r"\b(?:LDL|STL)\b", instruction)) for each in rounds for instruction in each)


def read_result(ptx: str, log: str, shared_bytes: int) -> CompileResult:
    """Collect a result from a kernel's PTX and the log of ``ptxas -v``."""

    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, log))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return CompileResult(
        registers=max(int(number) for number in re.findall(r"Used (\d+) registers", log)),
        spill_stores=total(r"(\d+) bytes spill stores"),
        spill_loads=total(r"(\d+) bytes spill loads"),
        shared_bytes=shared_bytes,
        wgmma=count(r"\bwgmma\.mma_async"),
        mma=count(r"\bmma\.sync"),
        tcgen05=count(r"\btcgen05\.mma"),
        async_copies=count(r"\bcp\.async\.(?:c[ag]|bulk(?!\.(?:commit|wait)))"),
        loads_16=count(r"\bld\.global[.\w:]*\.(?:v4\.[buf]32|v2\.[buf]64|v8\.[buf]32|v4\.[buf]64)"),
        wgmma_serialized="wgmma.mma_async instructions are serialized" in log,
    )


def _source(case: CompileCase) -> ASTSource:
    if not hasattr(case.kernel, "cache_key"):
        raise RuntimeError(f"{case.name}: the kernel is interpreted; compile in a process without TRITON_INTERPRET=1")
    names: list[str] = list(case.kernel.arg_names)
    given: Mapping[str, object] = {**case.signature, **case.constexprs}
    if set(given) != set(names):
        missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
        raise ValueError(f"{case.name}: parameters without a type or value: {missing}; unknown names: {unknown}")
    return ASTSource(
        fn=case.kernel,
        signature={name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )


def _assemble(ptx: str, arch: int) -> str:
    """Return what ``ptxas -v`` says about a kernel; Triton's own run of it says nothing when its cache answers."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", str(source)]
        done = subprocess.run([*command, "-o", f"{source}.o"], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

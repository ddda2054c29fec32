"""The linear kernels as their launcher would make them: 16-byte loads only, no data moved inside the GEMV's loop, and
enough bytes in flight. Cross-compiled, without a GPU.
"""

import os
import re

import pytest

pytest.importorskip("triton")

from eval.compile_report import ARCHS, compile_row, kernel_cases, offenses, programs_per_sm, tiles_in_flight
from hf_fastattn.kernels import _compile

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.compile

NEEDED_IN_FLIGHT = {80: 13200, 90: 25500, 100: 37800}
"""Bytes per multiprocessor: datasheet bandwidth (A100 2.04, H200 4.8, B200 8 TB/s) x 700 ns / multiprocessors."""

CASES = [
    pytest.param(index, arch, id=f"{case.name}-sm{arch}")
    for arch in ARCHS
    for index, case in enumerate(kernel_cases("decode_linear", arch))
]
PRODUCTS = [each for each in CASES if not each.id.startswith("combine")]


def loop_of(case, arch):
    """Return the PTX of a kernel's only loop."""
    ptx = _compile.compiled(case, arch).asm["ptx"]
    loops = re.findall(r"(\$L__BB0_\d+):(.*)\bbra(?:\.uni)?\s+\1;", ptx, re.DOTALL)
    assert len(loops) == 1
    return loops[0][1]


def test_cases_cover_both_kernels_and_every_kind_of_call():
    for arch in ARCHS:
        names = [case.name for case in kernel_cases("decode_linear", arch)]
        assert sum(name.startswith("gemv-") for name in names) >= 5
        assert sum(name.startswith("flat-") for name in names) >= 5
        assert any(name.startswith("combine-") for name in names)


@pytest.mark.parametrize(("index", "arch"), CASES)
def test_nothing_spills(index, arch):
    row = compile_row("decode_linear", index, arch)
    assert not offenses(row)


@pytest.mark.parametrize(("index", "arch"), PRODUCTS)
def test_every_load_in_the_loop_is_16_bytes(index, arch):
    """A tile of the weight and one of the activations per step: as many 16-byte loads per thread as they hold."""
    case = kernel_cases("decode_linear", arch)[index]
    block_m, block_n, block_k = (case.constexprs[f"BLOCK_{axis}"] for axis in "MNK")
    loop, threads = loop_of(case, arch), 32 * case.num_warps
    weight_loads = block_n * block_k * 2 // 16 // threads
    loads = re.findall(r"\bld\.global\S*", loop)
    copies = re.findall(r"\bcp\.async\.c[ga]\.shared\.global\S*\s[^;]*;", loop)
    if case.constexprs["DOT"]:
        assert loads == []
        assert len(copies) == weight_loads + -(-block_m * block_k * 2 // 16 // threads)
        assert all("0x10" in copy for copy in copies)
        assert len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", loop)) > 0
    else:
        assert len(loads) == weight_loads + block_m * block_k * 2 // 16 // threads
        assert all(".v4.b32" in load for load in loads)
        assert sum("evict_first" in load for load in loads) == weight_loads
        assert "shared" not in loop
        assert "bar.sync" not in loop


@pytest.mark.parametrize(("index", "arch"), PRODUCTS)
def test_enough_bytes_of_weights_are_in_flight(index, arch):
    """The GEMV has a step's loads in flight in every program, the flat GEMM all stages but one."""
    row = compile_row("decode_linear", index, arch)
    case = kernel_cases("decode_linear", arch)[index]
    tile = case.constexprs["BLOCK_N"] * case.constexprs["BLOCK_K"] * 2
    if case.constexprs["DOT"]:
        assert tiles_in_flight(row) >= row.num_stages - 1
        in_flight = tile * (row.num_stages - 1)  # of one program: some layers have no more per multiprocessor
    else:
        in_flight = tile * programs_per_sm(row)
    assert in_flight >= NEEDED_IN_FLIGHT[arch]


def test_several_weights_cost_neither_loads_nor_registers():
    for arch in ARCHS:
        rows = {row.case: row for row in (compile_row("decode_linear", i, arch) for i in range(8))}
        for kind, num_rows in (("gemv", 1), ("flat", 8)):
            one, three = (rows[f"{kind}-bf16-m{num_rows}-{sizes}x4096"] for sizes in ("4096", "4096+1024+1024"))
            assert three.result.loads_16 == one.result.loads_16
            assert three.result.async_copies == one.result.async_copies
            assert programs_per_sm(three) >= programs_per_sm(one)

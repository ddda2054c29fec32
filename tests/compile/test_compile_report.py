"""Every default launch config of every kernel, cross-compiled: no spills, within shared memory, enough tiles in flight.

No GPU and no driver take part, so these run wherever Triton does. Not in an interpreting process (TRITON_INTERPRET=1).
"""

import dataclasses
import json
import os

import pytest

pytest.importorskip("triton")

import triton

from eval.compile_report import (
    ARCHS,
    SHARED_PER_PROGRAM,
    Row,
    compile_row,
    kernel_cases,
    kernel_names,
    main,
    offenses,
    programs_per_sm,
    report,
    shallower_over_blocks,
    table,
    tiles_in_flight,
)
from hf_fastattn.kernels._compile import CompileCase, CompileResult, compile_case, loop_spills, read_result

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.compile

CASES = [
    pytest.param(kernel, index, arch, id=f"{kernel}-{case.name}-sm{arch}")
    for kernel in kernel_names()
    for arch in ARCHS
    for index, case in enumerate(kernel_cases(kernel, arch))
]

GOOD = Row(
    kernel="some_kernel",
    case="paged64-bf16-d128",
    arch=90,
    num_warps=4,
    num_stages=4,
    tile_bytes=32768,
    result=CompileResult(
        registers=128,
        spill_stores=0,
        spill_loads=0,
        shared_bytes=100000,
        wgmma=0,
        mma=32,
        tcgen05=0,
        async_copies=64,
        loads_16=2,
        wgmma_serialized=False,
    ),
)

LOG = """\
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size
"""

PTX = """\
    cp.async.cg.shared.global [%r1], [%rd1], 0x10, %r2;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    cp.async.commit_group;
    cp.async.wait_group 2;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    ld.global.L1::evict_last.v2.b64 {%rd1, %rd2}, [%rd3];
    ld.global.b32 %r1, [%rd1];
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f0}, %rd1, %rd2, %p1, 1, 1, 0, 1;
    wgmma.wait_group.sync.aligned 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0}, {%r0}, {%r1}, {%f1};
"""


SASS = """\
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
.L_x_0:
        /*0020*/              @P0  BRA `(.L_x_3) ;
        /*0030*/                   LDL R2, [R1] ;
.L_x_1:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/              @P1  BRA `(.L_x_1) ;
        {STL}
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   STL.64 [R1+0x8], R2 ;
        /*0080*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   LDL R2, [R1] ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""
"""An inner loop with two jumps back, in a loop that spills."""


def with_result(**changes: object) -> Row:
    return dataclasses.replace(GOOD, result=dataclasses.replace(GOOD.result, **changes))


def row_of(kernel: str, name: str, arch: int) -> Row:
    names = [case.name for case in kernel_cases(kernel, arch)]
    return compile_row(kernel, names.index(name), arch)


@pytest.mark.parametrize(("kernel", "index", "arch"), CASES)
def test_default_config_neither_spills_nor_overflows_shared_memory(kernel, index, arch):
    row = compile_row(kernel, index, arch)
    assert not offenses(row)
    assert row.result.registers > 0
    assert programs_per_sm(row) >= 1


@pytest.mark.parametrize("kernel", kernel_names())
def test_case_names_are_unique(kernel):
    names = [case.name for case in kernel_cases(kernel, 90)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("arch", [80, 90])
def test_decode_keeps_as_many_tiles_in_flight_over_blocks_as_over_dense_keys(arch):
    paged = row_of("decode_attention", "paged64-bf16-d128-rows4", arch)
    gathered = row_of("decode_attention", "paged16-bf16-d128-rows4", arch)
    dense = row_of("decode_attention", "dense-bf16-d128-rows4", arch)
    assert tiles_in_flight(dense) >= 2
    assert tiles_in_flight(paged) >= tiles_in_flight(dense)
    assert tiles_in_flight(gathered) >= tiles_in_flight(dense)
    assert paged.result.async_copies >= dense.result.async_copies > 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("softmax", ["", "-fixed", "-online", "-shared", "-invariant"])
def test_every_kind_of_decode_has_two_tiles_in_flight(arch, softmax):
    row = row_of("decode_attention", f"paged64-bf16-d128-rows4{softmax}", arch)
    assert tiles_in_flight(row) >= 2
    assert not offenses(row)


def test_a_key_mask_keeps_the_pipeline():
    row = row_of("decode_attention", "paged16-bf16-d128-rows32-all", 90)
    assert tiles_in_flight(row) >= 2


def test_a_block_id_loaded_as_data_would_stop_the_pipeline():
    """The reason for the inline assembly; when this fails, Triton has learned to do it and the assembly can go."""
    case = next(case for case in kernel_cases("decode_attention", 90) if case.name == "paged64-bf16-d128-rows4")
    plain = dataclasses.replace(case, constexprs={**case.constexprs, "ASM": False})
    result = compile_case(plain, 90)
    assert tiles_in_flight(dataclasses.replace(GOOD, result=result)) < 2


def test_a_good_row_offends_nothing():
    assert offenses(GOOD) == []


@pytest.mark.parametrize("changes", [{"spill_stores": 4}, {"spill_loads": 4}])
@pytest.mark.parametrize(("version", "found"), [("3.6.0", 1), ("3.8.0", 0)])
def test_a_spill_is_reported_with_its_case_and_architecture(changes, version, found, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    lines = offenses(with_result(**changes))
    assert len(lines) == found
    assert all("some_kernel paged64-bf16-d128 on sm_90 spills registers: " in line for line in lines)
    (line,) = offenses(with_result(**changes, loop_spills=2))
    assert "some_kernel paged64-bf16-d128 on sm_90 spills registers in its inner loops: 2 instructions" in line


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_is_checked_to_the_byte(arch):
    limit = SHARED_PER_PROGRAM[arch]
    assert offenses(dataclasses.replace(with_result(shared_bytes=limit), arch=arch)) == []
    (line,) = offenses(dataclasses.replace(with_result(shared_bytes=limit + 1), arch=arch))
    assert f"a program can have {limit}" in line


def test_a_bad_row_fails_the_report_with_one_line_each(capsys, tmp_path):
    file = tmp_path / "rows.json"
    bad = with_result(spill_stores=8, loop_spills=1, shared_bytes=300000)
    assert report([GOOD, bad], json_file=file) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("FAILED: ")]) == 2
    assert [row["result"]["spill_stores"] for row in json.loads(file.read_text(encoding="utf-8"))] == [0, 8]


@pytest.mark.parametrize(
    ("kernel", "arch", "found"), [("decode_attention", 90, 1), ("decode_attention", 100, 0), ("x", 90, 0)]
)
def test_a_shallow_decode_pipeline_is_reported(kernel, arch, found):
    lines = offenses(dataclasses.replace(with_result(shared_bytes=40000), kernel=kernel, arch=arch))
    assert len(lines) == found
    assert all("has 1 K/V tiles in flight, expected at least 2" in line for line in lines)


def test_blocks_that_cost_depth_are_reported(capsys):
    dense = dataclasses.replace(GOOD, case="dense-bf16-d128")
    shallow = with_result(shared_bytes=70000)
    assert shallower_over_blocks([GOOD, dense, dataclasses.replace(shallow, case="paged64-bf16-d64")]) == []
    assert shallower_over_blocks([dataclasses.replace(shallow, arch=80), dense]) == []
    assert report([shallow, dense]) == 1
    assert "has 2 K/V tiles in flight, 3 over contiguous keys" in capsys.readouterr().out


def test_good_rows_pass_the_report(capsys):
    assert report([GOOD, GOOD]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_programs_per_sm_takes_the_scarcest_resource():
    assert programs_per_sm(GOOD) == 2  # 233472 // (100000 + 1024)
    assert programs_per_sm(with_result(shared_bytes=0)) == 4  # 65536 // (128 * 32 * 4)
    assert programs_per_sm(with_result(shared_bytes=0, registers=129)) == 3  # 136 registers are allocated
    assert programs_per_sm(with_result(shared_bytes=0, registers=16)) == 16  # 64 warps
    assert programs_per_sm(dataclasses.replace(with_result(shared_bytes=0, registers=16), num_warps=1)) == 32


def test_tiles_in_flight_are_held_in_shared_memory():
    assert tiles_in_flight(GOOD) == 3
    assert tiles_in_flight(with_result(shared_bytes=32767)) == 0
    assert tiles_in_flight(with_result(shared_bytes=10**6)) == 4
    assert tiles_in_flight(dataclasses.replace(GOOD, tile_bytes=None)) is None


def test_markdown_table_has_one_line_per_row():
    lines = table([GOOD, GOOD], markdown=True).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


@pytest.mark.parametrize(
    ("line", "found"), [("", 0), ("/*0058*/ STL.64 [R1], R2 ;", 1), ("/*0058*/ @P2 LDL R2, [R1] ;", 1)]
)
def test_spills_count_where_they_are_repeated_most(line, found):
    assert loop_spills(SASS.replace("{STL}", line)) == found


def test_machine_code_is_read_where_registers_spill():
    """The prefill kernel, told to do with fewer registers than its loop needs."""
    case = next(case for case in kernel_cases("prefill_attention", 80) if case.name == "dense-bf16-d64-causal")
    result = compile_case(dataclasses.replace(case, maxnreg=96), 80)
    assert result.spill_stores > 0
    assert result.loop_spills > 0


def test_results_are_read_from_ptx_and_log():
    result = read_result(PTX, LOG, 1234)
    assert (result.registers, result.spill_stores, result.spill_loads, result.shared_bytes) == (168, 12, 20, 1234)
    assert (result.wgmma, result.mma, result.async_copies, result.loads_16) == (1, 1, 2, 2)
    assert not result.wgmma_serialized


def test_an_incomplete_case_names_the_missing_parameter():
    case = kernel_cases("decode_attention", 90)[0]
    signature = {name: kind for name, kind in case.signature.items() if name != "window"}
    with pytest.raises(ValueError, match=r"without a type or value: \['window'\]"):
        compile_case(CompileCase("x", case.kernel, signature, case.constexprs, (), 4, 1), 90)


def test_an_unknown_kernel_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--kernel", "no_such_kernel"])
    assert "decode_attention" in capsys.readouterr().err

"""The count of a loop's instructions, on machine code written by hand and on a kernel's own."""

import os

import pytest

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET=1", allow_module_level=True)

from eval.compile_report import kernel_cases
from eval.hot_loop import hot_loop
from hf_fastattn.kernels._compile import compiled
from hf_fastattn.kernels._sass import disassemble

pytestmark = pytest.mark.compile

SASS = """\
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
        /*0030*/                   FMUL R3, R3, R4 ;
        /*0040*/                   FMUL R3, R3, R5 ;
.L_x_2:
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_the_smallest_loop_without_what_is_jumped_over():
    loop = hot_loop(SASS)
    assert loop.rare == 2
    assert [text.split()[0] for text in loop.common] == ["HMMA.16816.F32.BF16", "@!P1", "MUFU.EX2", "@P0"]


def test_no_loop_is_said():
    with pytest.raises(ValueError, match="expected a loop with matrix instructions"):
        hot_loop(SASS.replace("HMMA", "FFMA"))


def test_the_default_softmax_needs_fewer_barriers_than_the_running_maximum():
    loops = {
        case.name.removeprefix("paged64-bf16-d128-rows4"): hot_loop(disassemble(compiled(case, 90)))
        for case in kernel_cases("decode_attention", 90)
        if case.name in ("paged64-bf16-d128-rows4", "paged64-bf16-d128-rows4-online")
    }
    barriers = {name: sum("BAR.SYNC" in text for text in loop.common) for name, loop in loops.items()}
    assert barriers[""] < barriers["-online"]
    assert loops["-online"].rare == 0 < loops[""].rare

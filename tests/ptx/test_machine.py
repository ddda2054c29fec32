"""The machine that runs PTX: its arithmetic against numpy's, and that it notices what programs must not do."""

import random
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hf_fastattn import ops
from tests.interpret.decode_call import Call

from . import launches
from .machine import Machine
from .memory import GlobalMemory
from .operands import Stopped
from .program import parse
from .traffic import Traffic

pytestmark = pytest.mark.ptx

THREADS = 64


def run(body, *tensors, grid=1, shared_bytes=1024, seed=0, traffic=None):
    """Run programs of 64 threads; their parameters a0, a1, ... are the addresses of the tensors, in %rd0, %rd1, ..."""
    names = [f"k_param_{i}" for i in range(len(tensors))]
    text = "\n".join(
        [
            *(f".param .u64 .ptr .global .align 1 {name}" for name in names),
            f".reqntid {THREADS}",
            "{",
            *(
                f".reg .{kind} %{file}<64>;"
                for kind, file in (("pred", "p"), ("b16", "rs"), ("b32", "r"), ("b64", "rd"))
            ),
            *(f"ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names)),
            "mov.u32 %r0, %tid.x;",
            "mov.u32 %r1, %ctaid.x;",
            *(line.strip() for line in re.split(r"(?<=;)|\n", body)),
            "ret;",
            "}",
        ]
    )
    arguments = {name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)}
    machine = Machine(parse(text), shared_bytes)
    machine.launch((grid, 1, 1), arguments, GlobalMemory(list(tensors), traffic), traffic)
    with np.errstate(all="ignore"):
        launches.take_turns(machine, grid, random.Random(seed))


def each(operation, *inputs, out=torch.int32):
    """Return what an instruction computes, thread by thread: operands %r10 (the result), %r11, %r12, ..."""
    result = torch.zeros(THREADS, dtype=out)
    loads = "".join(
        f"mad.wide.s32 %rd1{i}, %r0, 4, %rd{i + 1}; ld.global.b32 {{ %r1{i + 1} }}, [ %rd1{i} + 0 ];\n"
        for i in range(len(inputs))
    )
    run(
        f"{loads} {operation}\n mad.wide.s32 %rd20, %r0, 4, %rd0; st.global.b32 [ %rd20 + 0 ], {{ %r10 }};",
        result,
        *inputs,
    )
    return result


def name_of(value):
    return value if isinstance(value, str) else "torch"


def unsigned(x):
    return x.long() % 2**32


INTEGERS = torch.randint(-(2**31), 2**31, (2, THREADS), generator=torch.Generator().manual_seed(0)).int()
FLOATS = torch.randn(3, THREADS, generator=torch.Generator().manual_seed(1))
TO_BF16, FROM_BF16 = "cvt.rn.bf16x2.f32 %r10, %r12, %r13;", "cvt.f32.bf16 %r10, %rs1;"
TO_FP16, FROM_FP16 = "cvt.rn.f16x2.f32 %r10, %r12, %r13;", "cvt.f32.f16 %r10, %rs1;"
FLOATS[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e30])


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        ("add.s32 %r10, %r11, %r12;", lambda a, b: a + b),
        ("mul.lo.s32 %r10, %r11, %r12;", lambda a, b: a * b),
        ("mul.hi.s32 %r10, %r11, %r12;", lambda a, b: (a.long() * b.long() >> 32).int()),
        ("div.s32 %r10, %r11, %r12;", lambda a, b: torch.div(a, b, rounding_mode="trunc")),
        ("rem.s32 %r10, %r11, %r12;", torch.fmod),
        ("min.relu.s32 %r10, %r11, %r12;", lambda a, b: torch.minimum(a, b).clamp(min=0)),
        ("shr.s32 %r10, %r11, 5;", lambda a, b: a >> 5),
        ("shr.u32 %r10, %r11, 5;", lambda a, b: (unsigned(a) >> 5).int()),
        ("bfe.u32 %r10, %r11, 3, 4;", lambda a, b: a >> 3 & 15),
        ("bfe.s32 %r10, %r11, 3, 4;", lambda a, b: ((a >> 3 & 15) + 8) % 16 - 8),
        ("popc.b32 %r10, %r11;", lambda a, b: torch.tensor([(x % 2**32).bit_count() for x in a.tolist()])),
        ("setp.lt.s32 %p1, %r11, %r12; selp.b32 %r10, 7, -1, %p1;", lambda a, b: torch.where(a < b, 7, -1)),
        ("setp.lt.u32 %p1, %r11, %r12; selp.b32 %r10, 1, 0, %p1;", lambda a, b: unsigned(a) < unsigned(b)),
        ("cvt.s64.s32 %rd30, %r11; shr.s64 %rd30, %rd30, 40; cvt.u32.u64 %r10, %rd30;", lambda a, b: a >> 31),
        ("shfl.sync.bfly.b32 %r10, %r11, 5, 31, -1;", lambda a, b: a[torch.arange(THREADS) ^ 5]),
        ("shfl.sync.up.b32 %r10, %r11, 4, 0, -1;", lambda a, b: torch.cat([a[:4], a[:28], a[32:36], a[32:60]])),
        ("shfl.sync.idx.b32 %r10, %r11, 3, 31, -1;", lambda a, b: a[[3, 35]].repeat_interleave(32)),
        ("redux.sync.max.s32 %r10, %r11, -1;", lambda a, b: a.view(2, 32).amax(1).repeat_interleave(32)),
    ],
    ids=name_of,
)  # fmt: skip
def test_integers(operation, wanted):
    assert torch.equal(each(operation, *INTEGERS), wanted(*INTEGERS).int())


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        ("add.f32 %r10, %r11, %r12;", lambda a, b, c: a + b),
        ("mul.f32 %r10, %r11, 0f3F000000;", lambda a, b, c: a * 0.5),
        ("fma.rn.f32 %r10, %r11, %r12, %r13;", lambda a, b, c: (a.double() * b.double() + c.double()).float()),
        ("max.f32 %r10, %r11, %r12;", lambda a, b, c: torch.fmax(a, b)),
        ("max.f32 %r10, %r11, %r12, %r13;", lambda a, b, c: torch.fmax(torch.fmax(a, b), c)),
        ("ex2.approx.ftz.f32 %r10, %r11;", lambda a, b, c: torch.exp2(a)),
        (f"{TO_BF16} mov.b32 {{_, %rs1}}, %r10; {FROM_BF16}", lambda a, b, c: b.bfloat16().float()),
        (f"{TO_BF16} mov.b32 {{%rs1, _}}, %r10; {FROM_BF16}", lambda a, b, c: c.bfloat16().float()),
        (f"{TO_FP16} mov.b32 {{_, %rs1}}, %r10; {FROM_FP16}", lambda a, b, c: b.half().float()),
        ("setp.leu.f32 %p1, %r11, %r12; selp.f32 %r10, %r13, %r11, %p1;", lambda a, b, c: torch.where(a > b, a, c)),
        ("setp.ne.f32 %p1, %r11, %r11; selp.f32 %r10, %r13, 0f00000000, %p1;", lambda a, b, c: 0 * c),
        ("mov.b64 %rd40, {%r12, %r13}; add.f32x2 %rd40, %rd40, %rd40; mov.b64 {_, %r10}, %rd40;", lambda *x: 2 * x[2]),
    ],
    ids=name_of,
)  # fmt: skip
def test_floats(operation, wanted):
    got = each(operation, *FLOATS, out=torch.float32)
    rounding = 2**-22 if "approx" in operation else 0  # two units in the last place, as on a GPU
    torch.testing.assert_close(got, wanted(*FLOATS), rtol=rounding, atol=0, equal_nan=True)


def test_what_it_does_not_know_it_refuses():
    with pytest.raises(Stopped, match=r"does not know the instruction sqrt\.rn\.f32"):
        run("sqrt.rn.f32 %r2, %r3;")
    with pytest.raises(ValueError, match=r"line .* of the PTX is not understood"):
        run("call.uni something")


ADDRESS = "mad.wide.s32 %rd10, %r0, 4, %rd0;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 { %r2 }, [ %rd10 + 4 ];", "1 threads access 4 bytes outside of all tensors, the first 256"),
        ("ld.global.b32 { %r2 }, [ %rd10 + 2 ];", "not a multiple of the access's 4 bytes"),
        ("st.global.b32 [ %rd0 + 0 ], { %r0 };", "two threads write different values to one address"),
        ("setp.lt.s32 %p1, %r0, 9; @%p1 bra $L; st.shared.b32 [%r2], %r0;\n$L:", "not all threads go through"),
        ("cp.async.cg.shared.global [ %r40 + 0 ], [ %rd0 + 0 ], 0x10, %r41;", "ends before its asynchronous copies"),
    ],
    ids=["outside", "misaligned", "conflict", "divergence", "unfinished"],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(Stopped, match=message):
        run(f"{ADDRESS}\n shl.b32 %r40, %r0, 4; mov.b32 %r41, 16; {body}", torch.zeros(THREADS, dtype=torch.int32))


def test_threads_that_skip_a_branch_keep_their_registers():
    """As where one warp issues the matrix products of all; it meets the others behind it."""
    memory = torch.zeros(THREADS, dtype=torch.int32)
    run(
        f"""{ADDRESS} mov.b32 %r2, 5; setp.ge.u32 %p1, %r0, 32;
        @%p1 bra $L;
        add.s32 %r2, %r2, 1;
        elect.sync %r3|%p2, -1;
        setp.lt.u32 %p3, %r0, 40;
        selp.b32 %r2, 9, %r2, %p2;
        @%p3 bra $M;
        mov.b32 %r2, 100;
        $M:
        add.s32 %r2, %r2, 1;
        $L:
        st.global.b32 [ %rd10 + 0 ], {{ %r2 }};""",
        memory,
    )
    assert memory.tolist() == [10, *[7] * 31, *[5] * 32]


TENSOR = """
    setp.lt.u32 %p1, %r0, 32;
    setp.eq.u32 %p2, %r0, 0;
    mov.pred %p3, -1;
    mov.b32 %r9, 512;
    ALLOC: @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9], 64;
    bar.sync 0;
    ld.shared.b32 %r8, [%r9];
    shr.u32 %r7, %r0, 5;
    shl.b32 %r7, %r7, 21;
    add.s32 %r8, %r8, %r7;
    add.s32 %r2, %r0, 1000;
    STORE: tcgen05.st.sync.aligned.32x32b.x2.b32 [%r8 + 3], {%r0, %r2};
    WAIT: tcgen05.wait::st.sync.aligned;
    bar.sync 0;
    LOAD: tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r3}, [%r8 + 3], 1;
    tcgen05.wait::ld.sync.aligned;
    bar.sync 0;
    DEALLOC: @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r8, 64;
    mad.wide.s32 %rd10, %r0, 4, %rd0;
    st.global.b32 [ %rd10 + 0 ], { %r3 };
"""
"""Two warps store two words a thread to their lanes, and load the first 16 lanes of each: one word a thread."""


def tensor(name="", line=""):
    """Run it, with another line in the place of one that has a name; return what was loaded."""
    memory = torch.zeros(THREADS, dtype=torch.int32)
    body = re.sub(rf"\b{name}: .*", line, TENSOR) if name else TENSOR
    run(re.sub(r"[A-Z]+: ", "", body), memory)
    return memory


def test_tensor_memory():
    lane, warp = torch.arange(THREADS) % 32, torch.arange(THREADS) // 32 * 32
    assert torch.equal(tensor(), torch.where(lane < 16, lane + warp, lane - 16 + warp + 1000).int())


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("WAIT", "", "tensor memory is loaded while a store to it is under way"),
        ("DEALLOC", "", "keeps tensor memory"),
        ("ALLOC", "@%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9], 64;", "1 threads allocate"),
        ("STORE", "tcgen05.st.sync.aligned.32x32b.x2.b32 [%r8 + 63], {%r0, %r2};", "column 64 of tensor memory"),
        ("STORE", "tcgen05.st.sync.aligned.32x32b.x2.b32 [%r9 + 3], {%r0, %r2};", "lanes of tensor memory that are"),
        ("STORE", "tcgen05.st.sync.aligned.32x32b.x2.b32 [%r0 + 3], {%r0, %r2};", "name different addresses"),
        ("LOAD", "tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r3}, [%r8 + 3];", "does not know the instruction"),
        ("WAIT", "@%p2 mbarrier.init.shared::cta.b64 [%r9], 1;\n{\nwaitLoop:\nmbarrier.try_wait.parity.shared.b64 "
         "complete, [%r9], 0;\n@!complete bra.uni waitLoop;\n}", "a barrier that nothing will end"),
    ],
)  # fmt: skip
def test_faults_in_tensor_memory(name, line, message):
    with pytest.raises(Stopped, match=message):
        tensor(name, line)


def test_lanes_that_a_predicate_leaves_out_touch_nothing():
    memory = torch.zeros(THREADS, dtype=torch.int32)
    run(f"{ADDRESS}\n setp.lt.s32 %p1, %r0, 63; @%p1 st.global.b32 [ %rd10 + 4 ], {{ %r0 }};", memory)
    assert memory.tolist() == [0, *range(63)]


EXCHANGE = """
    shl.b32 %r2, %r0, 2;
    xor.b32 %r3, %r2, 128;
    st.shared.b32 [%r2], %r0;
    BARRIER
    ld.shared.b32 %r4, [%r3];
    BARRIER
    st.shared.b32 [%r2], %r4;
    mad.wide.s32 %rd10, %r0, 4, %rd0;
    st.global.b32 [ %rd10 + 0 ], { %r4 };
"""
"""Two warps exchange a word per thread through shared memory."""


def test_shared_memory_between_warps_needs_barriers():
    memory = torch.zeros(THREADS, dtype=torch.int32)
    run(EXCHANGE.replace("BARRIER", "bar.sync 0;"), memory)
    assert torch.equal(memory, torch.arange(THREADS) ^ 32)
    with pytest.raises(Stopped, match="read after another warp wrote, without a barrier"):
        run(EXCHANGE.replace("BARRIER", "", 1).replace("BARRIER", "bar.sync 0;"), memory)
    with pytest.raises(Stopped, match="written after another warp read, without a barrier"):
        run(EXCHANGE.replace("BARRIER", "bar.sync 0;", 1).replace("BARRIER", ""), memory)


def test_global_memory_between_warps_needs_barriers():
    body = f"{ADDRESS} xor.b32 %r2, %r0, 32; mad.wide.s32 %rd11, %r2, 4, %rd0; st.global.b32 [ %rd10 + 0 ], {{ %r0 }};"
    load = "ld.global.b32 { %r3 }, [ %rd11 + 0 ];"
    memory = torch.zeros(THREADS, dtype=torch.int32)
    run(f"{body} bar.sync 0; {load}", memory)
    with pytest.raises(Stopped, match=r"warp . of program 0 reads what warp . of program 0 wrote, without"):
        run(body + load, memory)


@pytest.mark.parametrize(("stride", "sectors", "wavefronts"), [(4, 8, 2), (8, 16, 4), (64, 64, 32), (128, 64, 64)])
def test_traffic(stride, sectors, wavefronts):
    """Two warps access a word per thread, so many bytes apart: one pass a warp at best, all in one bank at worst."""
    body = f"""
        mad.wide.s32 %rd10, %r0, {stride}, %rd0;
        ld.global.b32 {{ %r2 }}, [ %rd10 + 0 ];
        mul.lo.s32 %r3, %r0, {stride};
        st.shared.b32 [%r3], %r2;
    """
    traffic = Traffic()
    run(body, torch.zeros(32 * THREADS, dtype=torch.int32), shared_bytes=128 * THREADS, traffic=traffic)
    assert (traffic.sectors, traffic.fewest_sectors) == (sectors, 8)
    assert (traffic.wavefronts, traffic.fewest_wavefronts) == (wavefronts, 2)


COPY = """
    shl.b32 %r2, %r0, 4;
    mad.wide.s32 %rd10, %r0, 16, %rd0;
    mov.b32 %r3, 16;
    cp.async.cg.shared.global [ %r2 + 0 ], [ %rd10 + 0 ], 0x10, %r3;
    cp.async.commit_group;
    WAIT
    ld.shared.b32 %r4, [%r2];
    cp.async.wait_group 0;
    mad.wide.s32 %rd11, %r0, 4, %rd1;
    st.global.b32 [ %rd11 + 0 ], { %r4 };
"""


def test_asynchronous_copies_must_be_waited_for():
    source, out = torch.arange(4 * THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    run(COPY.replace("WAIT", "cp.async.wait_group 0;"), source, out)
    assert torch.equal(out, source[::4])
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(Stopped, match="read while an asynchronous copy to it is under way"):
            run(COPY.replace("WAIT", wait), source, out)


COUNT = """
    mad.wide.s32 %rd10, %r1, 256, %rd0;
    mad.wide.s32 %rd11, %r0, 4, %rd10;
    mov.b32 %r2, 1;
    st.global.b32 [ %rd11 + 0 ], { %r2 };
    BARRIER
    setp.eq.s32 %p1, %r0, 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r3, [ %rd1 + 0 ], %r2;
    @%p1 st.shared.b32 [global_smem], %r3;
    bar.sync 0;
    ld.shared.b32 %r4, [global_smem];
    setp.ne.s32 %p2, %r4, 2;
    @%p2 bra $END;
    mad.wide.s32 %rd12, %r0, 4, %rd0;
    LOAD { %r5 }, [ %rd12 + 0 ];
    LOAD { %r6 }, [ %rd12 + 256 ];
    LOAD { %r7 }, [ %rd12 + 512 ];
    add.s32 %r5, %r5, %r6;
    add.s32 %r5, %r5, %r7;
    mad.wide.s32 %rd13, %r0, 4, %rd2;
    st.global.b32 [ %rd13 + 0 ], { %r5 };
    $END:
"""
"""Three programs write 64 words each; the last to arrive at a counter adds them up."""


@pytest.mark.parametrize("seed", range(5))
def test_what_other_programs_wrote_is_read_behind_an_atomic_and_a_barrier(seed):
    def count(barrier="bar.sync 0;", load="ld.global.cg.b32"):
        parts, counter, out = (torch.zeros(size, dtype=torch.int32) for size in (192, 1, THREADS))
        run(COUNT.replace("BARRIER", barrier).replace("LOAD", load), parts, counter, out, grid=3, seed=seed)
        assert (out == 3).all()

    count()
    with pytest.raises(Stopped, match=r"reads what warp 1 of program . wrote, without having waited"):
        count(barrier="")
    with pytest.raises(Stopped, match="wrote, through the cache of constants"):
        count(load="ld.global.nc.b32")


def test_what_an_atomic_has_seen_is_known_to_its_warp_alone_until_a_barrier():
    """The second program reads what the first one wrote, in those orders in which the first one is through by then."""
    body = """
        mad.wide.s32 %rd10, %r1, 256, %rd0;
        mad.wide.s32 %rd11, %r0, 4, %rd10;
        mov.b32 %r2, 1;
        st.global.b32 [ %rd11 + 0 ], { %r2 };
        bar.sync 0;
        setp.eq.s32 %p1, %r0, 0;
        @%p1 atom.global.gpu.acq_rel.add.u32 %r3, [ %rd1 + 0 ], %r2;
        BARRIER
        setp.eq.s32 %p2, %r1, 0;
        @%p2 bra $END;
        ld.global.b32 { %r4 }, [ %rd11 + -256 ];
        $END:
    """

    def works(barrier, seed):
        try:
            parts, counter = (torch.zeros(size, dtype=torch.int32) for size in (2 * THREADS, 1))
            run(body.replace("BARRIER", barrier), parts, counter, grid=2, seed=seed)
        except Stopped as error:
            assert "warp 1 of program 1 reads what warp" in str(error) or barrier  # noqa: PT017
            return False
        return True

    good = [seed for seed in range(10) if works("bar.sync 0;", seed)]
    assert good
    assert len([seed for seed in good if works("", seed)]) < len(good)


ROWS_OF_B = "mad.lo.s32 %r11, %r10, 16, 512;"
C, D = "{%r40, %r40, %r40, %r40}", "{%r36, %r37, %r38, %r39}"
COLUMNS_OF_B = """
    and.b32 %r11, %r10, 7;
    shl.b32 %r11, %r11, 5;
    and.b32 %r13, %r10, 8;
    shl.b32 %r13, %r13, 1;
    add.s32 %r11, %r11, %r13;
    add.s32 %r11, %r11, 512;
"""


def test_matrix_products():
    """A and B from shared memory by ldmatrix, B once stored by columns and once, transposed on the way, by rows."""
    random_ = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=random_).to(torch.bfloat16) for n in (16, 8))
    lanes = np.arange(32)
    for stored, transposed in ((b.T.contiguous(), ""), (b, "trans.")):
        out = torch.zeros(32 * 4)
        rows = ROWS_OF_B if transposed else COLUMNS_OF_B
        run(
            f"""
            and.b32 %r10, %r0, 31;
            mad.wide.s32 %rd10, %r0, 8, %rd0;
            ld.global.v2.b32 {{ %r20, %r21 }}, [ %rd10 + 0 ];
            shl.b32 %r12, %r0, 3;
            st.shared.v2.b32 [%r12], {{ %r20, %r21 }};
            mad.wide.s32 %rd11, %r0, 4, %rd1;
            ld.global.b32 {{ %r22 }}, [ %rd11 + 0 ];
            mad.lo.s32 %r14, %r0, 4, 512;
            st.shared.b32 [%r14], %r22;
            bar.sync 0;
            and.b32 %r15, %r10, 15;
            shl.b32 %r15, %r15, 5;
            and.b32 %r16, %r10, 16;
            add.s32 %r15, %r15, %r16;
            ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r30, %r31, %r32, %r33}}, [%r15];
            and.b32 %r10, %r10, 15;
            {rows}
            ldmatrix.sync.aligned.m8n8.x2.{transposed}shared.b16 {{%r34, %r35}}, [%r11];
            mov.b32 %r40, 0;
            mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {D}, {{%r30, %r31, %r32, %r33}}, {{%r34, %r35}}, {C};
            and.b32 %r17, %r0, 31;
            mad.wide.s32 %rd12, %r17, 16, %rd2;
            st.global.v4.b32 [ %rd12 + 0 ], {D};
            """,
            *(a, stored, out),
        )
        got = torch.empty(16, 8)
        got[lanes // 4, lanes % 4 * 2], got[lanes // 4, lanes % 4 * 2 + 1] = out[0::4], out[1::4]
        got[lanes // 4 + 8, lanes % 4 * 2], got[lanes // 4 + 8, lanes % 4 * 2 + 1] = out[2::4], out[3::4]
        torch.testing.assert_close(got, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def left_out(arch, kernel, pattern, call):
    """Leave each occurrence of a pattern out of a kernel's PTX in turn; return how many there are, and were noticed."""
    with launches.emulated(arch):
        whole = call()
    seen = noticed = 0
    while True:
        removed = []

        def leave_out(name, ptx, *, number=seen, removed=removed):
            found = list(re.finditer(pattern, ptx)) if name == kernel else []
            if number >= len(found):
                return ptx
            removed.append(number)
            return ptx[: found[number].start()] + ptx[found[number].end() :]

        try:
            with launches.emulated(arch, edit=leave_out):
                wrong = not torch.equal(call(), whole)
        except Stopped:
            wrong = True
        if not removed:
            return seen, noticed
        seen += 1
        noticed += wrong


@pytest.mark.parametrize("arch", [80, 90])
def test_it_notices_what_is_left_out_of_a_kernel(arch):
    """The barriers and waits of the decode kernel's own PTX, one after the other, left out of it.

    Some may be missing: two barriers in a row, or one behind which other memory is used.
    """
    call = Call((137, 330), heads=8, kv_heads=2, dim=128, block_size=64, dtype=torch.bfloat16)
    seen, noticed = left_out(arch, "_decode_kernel", r"cp\.async\.wait_group\s+\d+;", lambda: call.run(3))
    assert noticed == seen > 0
    seen, noticed = left_out(arch, "_decode_kernel", r"bar\.sync\s+0;", lambda: call.run(3))
    assert noticed > seen / 2


@pytest.mark.parametrize(
    ("pattern", "least"),
    [
        (r"mbarrier\.try_wait[^;]*;", 0.7),  # that for a product is one for all before it, too
        (r"tcgen05\.wait::st\.sync\.aligned;", 0.4),  # likewise
        (r"@%p\d+ tcgen05\.commit[^;]*;", 1),
        (r"@%p\d+ tcgen05\.dealloc[^;]*;", 1),
    ],
    ids=["waits for products", "waits for stores", "commits", "dealloc"],
)
def test_it_notices_what_is_left_out_of_a_kernel_with_tensor_memory(pattern, least):
    """Of prefill as compiled for sm_100, with enough tiles that both of its loops run."""
    call = Call((460,), heads=1, kv_heads=1, query_len=130, dim=64, dtype=torch.bfloat16)
    where = {"block_table": call.block_table, "seq_lens": call.seq_lens, "softmax_scale": 0.125}

    def attend():
        with launches.on_the_way_of_a_gpu():
            return ops.prefill_attention(call.q, call.k, call.v, **where)

    seen, noticed = left_out(100, "prefill_attention_kernel", pattern, attend)
    assert seen and least * seen <= noticed <= seen

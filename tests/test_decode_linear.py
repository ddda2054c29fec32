"""decode_linear on the CPU against the oracle, its registration, and the plan of a call as a pure function."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from hf_fastattn import ops, reference
from hf_fastattn.kernels.decode_linear_plan import LIBRARY, Plan, by_arithmetic, choose
from hf_fastattn.kernels.decode_linear_table import TABLES
from hf_fastattn.ops.decode_linear import kernel_takes

BF16 = torch.bfloat16


def tensors(shape=(2, 3, 48), sizes=(20, 8), dtype=torch.float32, bias=True):
    random = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64).to(dtype)

    return normal(*shape), [normal(n, shape[-1]) for n in sizes], [normal(n) if bias else None for n in sizes]


# The op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16, torch.float64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (16, 48), (2, 3, 48), (100, 48), (0, 48)])
def test_op_against_the_oracle(dtype, bias, shape):
    x, weights, biases = tensors(shape, dtype=dtype, bias=bias)
    wide = [None if b is None else b.double() for b in biases]
    exacts = reference.decode_linear_group(x.double(), [w.double() for w in weights], wide)
    plains = reference.decode_linear_group(x, weights, biases)
    outs = ops.decode_linear_group(x, weights, biases)
    for out, exact, plain, weight, b in zip(outs, exacts, plains, weights, biases, strict=True):
        assert torch.equal(out, ops.decode_linear(x, weight, b))
        assert out.shape == exact.shape
        assert out.dtype == dtype
        if out.numel():
            own, rounding = (plain.double() - exact).abs().max(), torch.finfo(dtype).eps * exact.abs().max()
            assert (out.double() - exact).abs().max() <= 2 * own + 4 * rounding


def test_op_is_registered_soundly():
    x, weights, biases = tensors()
    for activations in (x, x.transpose(0, 1), x[:, 0]):
        torch.library.opcheck(torch.ops.hf_fastattn.decode_linear.default, (activations, weights[0], biases[0]))
        torch.library.opcheck(torch.ops.hf_fastattn.decode_linear.default, (activations, weights[0], None))
        arguments = (activations, weights, [biases[0], None])
        torch.library.opcheck(torch.ops.hf_fastattn.decode_linear_group.default, arguments)


def test_one_graph_serves_any_number_of_rows():
    _, weights, biases = tensors()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def both(x):
        return ops.decode_linear(x, weights[0], biases[0]), *ops.decode_linear_group(x, weights, biases)

    for rows in (64, 2, 16, 17, 5, 300):
        x = torch.randn(rows, 48)
        torch._dynamo.mark_dynamic(x, 0)
        outs = both(x)
        assert torch.equal(outs[0], F.linear(x, weights[0], biases[0]))
        assert torch.equal(outs[2], F.linear(x, weights[1], biases[1]))
    assert counter.frame_count == 1
    assert "hf_fastattn.decode_linear_group" in counter.graphs[0].code


def test_gradients_flow_as_through_a_linear_layer():
    x, weights, biases = tensors()
    for tensor in (x, *weights, *biases):
        tensor.requires_grad_(True)
    sum(out.square().sum() for out in ops.decode_linear_group(x, weights, biases)).backward()
    ops.decode_linear(x, weights[0], biases[0]).square().sum().backward()
    got = [tensor.grad.clone() for tensor in (x, *weights, *biases)]
    for tensor in (x, *weights, *biases):
        tensor.grad = None
    wanted = [F.linear(x, weights[i], biases[i]).square().sum() for i in (0, 1, 0)]
    sum(wanted).backward()
    for gradient, tensor in zip(got, (x, *weights, *biases), strict=True):
        torch.testing.assert_close(gradient, tensor.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 7), torch.zeros(4, 8)), r"\(2, 7\) and \(4, 8\)"),
        ((torch.zeros(8), torch.zeros(8)), r"weight \(N, K\)"),
        ((torch.zeros(()), torch.zeros(4, 8)), r"x \(\.\.\., K\)"),
        ((torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(8)), r"expected a bias \(4,\)"),
    ],
)
def test_shapes_that_do_not_belong_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.decode_linear(*arguments)


def test_group_wants_a_bias_entry_per_weight():
    with pytest.raises(ValueError, match="got 1 for 2 weights"):
        ops.decode_linear_group(torch.zeros(2, 8), [torch.zeros(4, 8)] * 2, [None])
    with pytest.raises(ValueError, match="got 0 for 0 weights"):
        ops.decode_linear_group(torch.zeros(2, 8), [], [])


# The plan

LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("n", "k"), LLAMA)
def test_plans_of_llama(arch, n, k):
    kinds = [choose(rows, n, k, BF16, arch).kind for rows in range(1, 19)]
    vector = 1 if arch == 100 else 2
    assert kinds == ["gemv"] * vector + ["flat"] * (16 - vector) + ["library"] * 2
    for rows in range(1, 17):
        plan = choose(rows, n, k, torch.float16, arch)
        sms = {80: 108, 90: 132, 100: 148}[arch]
        assert -(-n // plan.block_n) * plan.num_splits >= 0.85 * sms
        assert plan.num_splits == 1 or k // plan.block_k >= 4 * plan.num_splits
        if plan.kind == "gemv":
            assert plan.block_k == 256 * plan.num_warps
        else:
            assert plan.block_n == 16 * plan.num_warps


@pytest.mark.parametrize(
    "call",
    [
        (0, 4096, 4096, BF16, 90),
        (17, 4096, 4096, BF16, 90),
        (1, 4096, 4096, torch.float32, 90),
        (1, 4096, 4104, BF16, 90),  # rows that are not 16 elements apart
        (1, 1024, 4096, BF16, 90),  # 8 MiB
        (1, 0, 4096, BF16, 90),
        (1, 4096, 4096, BF16, 86),
        (1, 4096, 4096, BF16, 120),
        (1, 4096, 4096, BF16, 75),
    ],
)
def test_the_library_takes_the_rest(call):
    assert choose(*call) == LIBRARY


def test_few_weight_rows_split_k():
    plan = by_arithmetic(8, 1024, 16384, 90)
    assert plan.num_splits == 132 // 32
    assert by_arithmetic(8, 4096, 4096, 90).num_splits == 1
    assert by_arithmetic(1, 256, 2**16, 90).num_splits == 8  # 4 * 132 // 64


@pytest.fixture
def measured(monkeypatch):
    """A table with two measured shapes of sm_90."""
    shapes = {
        (4096, 4096): ((1, ("gemv", 8, 512, 2, 1, 1)), (8, ("flat", 64, 128, 4, 4, 2))),
        (512, 65536): ((16, ("flat", 16, 512, 1, 3, 8)),),
    }
    monkeypatch.setitem(TABLES, 90, {"device": "made up", "date": "", "command": "", "shapes": shapes})
    choose.cache_clear()
    yield
    choose.cache_clear()


def test_measured_shapes_come_first(measured):
    assert choose(1, 4096, 4096, BF16, 90) == Plan("gemv", 8, 512, 2, 1, 1)
    assert choose(2, 4096, 4096, BF16, 90) == choose(8, 4096, 4096, BF16, 90) == Plan("flat", 64, 128, 4, 4, 2)
    assert choose(9, 4096, 4096, BF16, 90) == LIBRARY
    assert choose(1, 6144, 2048, BF16, 90) == Plan("gemv", 8, 512, 2, 1, 1)  # at most a factor of two away
    assert choose(16, 700, 40000, BF16, 90) == Plan("flat", 16, 512, 1, 3, 8)
    assert choose(1, 128256, 4096, BF16, 90) == by_arithmetic(1, 128256, 4096, 90)
    assert choose(1, 4096, 8208, BF16, 90) == by_arithmetic(1, 4096, 8208, 90)
    assert choose(1, 4096, 4096, BF16, 80) == by_arithmetic(1, 4096, 4096, 80)


def test_committed_table_says_where_its_numbers_are_from():
    for arch, table in TABLES.items():
        known = [table["device"], table["date"], table["command"]]
        assert all(known) if table["shapes"] else not any(known), arch
        for steps in table["shapes"].values():
            assert [largest for largest, _ in steps] == sorted({largest for largest, _ in steps})
            assert all(Plan(*fields).kind in ("gemv", "flat", "library") for _, fields in steps)


def test_no_kernel_is_thought_of_on_a_cpu():
    assert not kernel_takes(4096, 4096, BF16, torch.device("cpu"))


def test_neither_a_cpu_nor_the_plan_needs_the_kernels():
    program = """
import sys, torch
from hf_fastattn import ops, linear
layer = linear.optimize_linears(torch.nn.Sequential(torch.nn.Linear(8, 8))).eval()
with torch.no_grad():
    layer(torch.zeros(1, 8)); ops.decode_linear(torch.zeros(1, 8), torch.zeros(4, 8))
from hf_fastattn.kernels import decode_linear_plan
assert not {f"hf_fastattn.kernels.decode_linear{end}" for end in ("", "_group")} & set(sys.modules)
"""
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, timeout=120)

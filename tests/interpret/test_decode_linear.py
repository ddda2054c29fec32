"""The linear kernels in Triton's interpreter, against the float64 oracle. bf16, which is wrong there, runs on GPUs."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn import ops, reference
from hf_fastattn.kernels import decode_linear as kernel
from hf_fastattn.kernels import decode_linear_group as group_kernel
from hf_fastattn.kernels.decode_linear_plan import LIBRARY, Plan

from . import runs_kernels

pytestmark = runs_kernels

GEMV = Plan("gemv", 4, 64, 1, 1)
FLAT = Plan("flat", 16, 32, 1, 3)
NAN = float("nan")


class Call:
    """Activations, weights and biases of one call; columns and rows beside the weights' own are NaN."""

    def __init__(self, num_rows, sizes, size_k, *, bias=True, dtype=torch.float32, lead=None, seed=0):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        self.x = normal(*(lead or (num_rows,)), size_k)
        self.weights = []
        for i, n in enumerate(sizes):
            memory = torch.full((n + 3, size_k + 16 * (i + 1)), NAN, dtype=dtype)
            memory[:n, :size_k] = normal(n, size_k)
            self.weights.append(memory[:n, :size_k])
        self.biases = [normal(n) if bias else None for n in sizes]

    def expected(self, dtype):
        x, weights = self.x.to(dtype), [weight.to(dtype) for weight in self.weights]
        return reference.decode_linear_group(x, weights, [None if b is None else b.to(dtype) for b in self.biases])

    def check(self, outs):
        """The largest error against float64 may be twice the plain formula's, and four roundings of the output."""
        exacts, plains = self.expected(torch.float64), self.expected(self.x.dtype)
        assert len(outs) == len(exacts)
        for out, exact, plain in zip(outs, exacts, plains, strict=True):
            assert out.shape == exact.shape
            assert out.dtype == self.x.dtype
            assert out.is_contiguous()
            own = (plain.double() - exact).abs().max().item()
            rounding = 4 * torch.finfo(out.dtype).eps * exact.abs().max().item()
            error = (out.double() - exact).abs().max().item()
            assert error <= 2 * own + rounding  # false for NaN

    def run(self, plan):
        outs = kernel.run(self.x, self.weights, self.biases, plan)
        self.check(outs)
        return outs


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Fill what new_empty returns with NaN: an output or a partial result that was never written shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        return new_empty(self, *args, **kwargs).fill_(NAN)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("num_rows", range(1, 17))
@pytest.mark.parametrize("num_splits", [1, 3])
def test_flat_takes_1_to_16_rows(num_rows, num_splits):
    Call(num_rows, (37,), 160).run(Plan("flat", 16, 32, 1, 3, num_splits))


@pytest.mark.parametrize("num_rows", range(1, 5))
@pytest.mark.parametrize("num_splits", [1, 3])
def test_gemv_takes_1_to_4_rows(num_rows, num_splits):
    Call(num_rows, (13,), 320).run(Plan("gemv", 4, 64, 1, 1, num_splits))


@pytest.mark.parametrize(("plan", "num_rows"), [(GEMV, 5), (FLAT, 17), (FLAT, 0)])
def test_other_numbers_of_rows_are_refused(plan, num_rows):
    with pytest.raises(ValueError, match=f"got {num_rows}"):
        kernel.run(torch.zeros(num_rows, 64), [torch.zeros(16, 64)], [None], plan)


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 64), (7, 31), (16, 64), (33, 65), (50, 127), (5, 200)])
def test_odd_sizes(plan, bias, n, k):
    """A row and a column past the end are NaN in memory: none may be used."""
    Call(3, (n,), k, bias=bias).run(plan)


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("sizes", [(32, 16, 16), (33, 5, 17), (1, 1, 1), (48, 20), (3, 40)])
def test_several_weights_in_one_launch(plan, bias, num_splits, sizes):
    wanted = Plan(plan.kind, plan.block_n, plan.block_k, 1, plan.num_stages, num_splits)
    outs = Call(3, sizes, 100, bias=bias).run(wanted)
    assert len({out.untyped_storage().data_ptr() for out in outs}) == len(sizes)


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
def test_more_splits_than_steps(plan):
    Call(2, (19, 6), 70).run(Plan(plan.kind, plan.block_n, plan.block_k, 1, 2, 7))


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
def test_strided_activations(plan):
    call = Call(3, (21,), 80)
    for memory in (torch.full((3, 200), NAN)[:, 7:167:2], torch.full((160, 6), NAN)[::2, 1::2].T):
        memory.copy_(call.x)
        call.x = memory
        call.run(plan)


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
@pytest.mark.parametrize("lead", [(1, 3), (3, 1), (1, 1, 3)])
def test_leading_dimensions(plan, lead):
    (out,) = Call(3, (21,), 80, lead=lead).run(plan)
    assert out.shape == (*lead, 21)


def test_a_vector():
    call = Call(1, (21,), 80)
    call.x = call.x[0]
    (out,) = call.run(GEMV)
    assert out.shape == (21,)


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_half_precision_sums_in_float32(plan, num_splits):
    """Sums that leave fp16's range on the way and come back: only the result is rounded."""
    call = Call(2, (18,), 256, dtype=torch.float16)
    call.run(Plan(plan.kind, plan.block_n, plan.block_k, 1, 2, num_splits))
    x = torch.full((1, 512), 200.0, dtype=torch.float16)
    weight = torch.full((18, 512), 200.0, dtype=torch.float16)
    weight[:, 256:] = -200.0
    weight[:, 0] = 201.0
    (out,) = kernel.run(x, [weight], [None], Plan(plan.kind, plan.block_n, plan.block_k, 1, 2, num_splits))
    assert (out == 200.0).all()


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
def test_nan_and_inf_of_real_values_are_kept(plan):
    call = Call(2, (18,), 64)
    call.x[0, 3], call.weights[0][5, 7] = NAN, float("inf")
    (out,) = kernel.run(call.x, call.weights, call.biases, plan)
    assert out[0].isnan().all()
    assert out[1, 5].isinf()
    assert out[1, [*range(5), *range(6, 18)]].isfinite().all()


def test_results_repeat_to_the_bit():
    call, plan = Call(4, (40,), 640), Plan("flat", 16, 32, 1, 3, 5)
    first = kernel.run(call.x, call.weights, call.biases, plan)[0]
    assert all(torch.equal(first, kernel.run(call.x, call.weights, call.biases, plan)[0]) for _ in range(3))


@pytest.fixture
def watched(monkeypatch):
    """Return a function that makes the interpreter refuse loads outside of a call's tensors."""
    from triton.runtime import interpreter

    load = interpreter._interpreter.load

    def watch(call):
        tensors = [call.x, *call.weights, *call.biases]
        strides = [[(n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)] for t in tensors]
        ranges = [(t.data_ptr(), t.data_ptr() + sum(s) * t.itemsize) for t, s in zip(tensors, strides, strict=True)]

        def checked(pointers, mask, *others):
            taken = pointers[mask]
            known = sum((taken >= first) & (taken <= last) for first, last in ranges)
            assert (known > 0).all(), "a load outside of x, weights and biases"
            return load(pointers, mask, *others)

        monkeypatch.setattr(interpreter._interpreter, "load", checked)

    return watch


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
@pytest.mark.parametrize("sizes", [(21,), (21, 3, 18)])
def test_nothing_is_read_outside_of_the_tensors(plan, sizes, watched):
    call = Call(3, sizes, 70)
    watched(call)
    call.run(plan)


@pytest.mark.parametrize("plan", [GEMV, FLAT], ids=["gemv", "flat"])
def test_row_offsets_of_more_than_32_bits(plan, watched):
    """Rows 2**27 elements apart, of memory that is never touched in between."""
    call = Call(2, (18,), 32, dtype=torch.float16)
    weight = torch.empty_strided((18, 32), (2**27, 1), dtype=torch.float16)
    weight.copy_(call.weights[0])
    call.weights = [weight]
    watched(call)
    call.run(plan)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["gemv", "flat"]),
    num_rows=st.integers(1, 16),
    sizes=st.lists(st.integers(1, 45), min_size=1, max_size=3),
    k=st.integers(1, 150),
    num_splits=st.integers(1, 4),
    bias=st.booleans(),
)
def test_any_sizes(kind, num_rows, sizes, k, num_splits, bias):
    num_rows = min(num_rows, 4) if kind == "gemv" else num_rows
    plan = GEMV if kind == "gemv" else FLAT
    wanted = Plan(kind, plan.block_n, plan.block_k, 1, 2, num_splits)
    Call(num_rows, sizes, k, bias=bias, seed=k).run(wanted)


# The launcher: which plan a call gets


@pytest.fixture
def plans(monkeypatch):
    """Choose a small plan for every call that a kernel could do; return the plans that were run."""
    used = []

    def choose(num_rows, n, k, dtype, arch):
        return FLAT if 1 <= num_rows <= 16 else LIBRARY

    def run(x, weights, biases, plan, *, _run=kernel.run):
        used.append((plan.kind, len(weights)))
        return _run(x, weights, biases, plan)

    monkeypatch.setattr(kernel, "choose", choose)
    monkeypatch.setattr(kernel, "run", run)
    return used


def test_launch_follows_the_plan(plans):
    call = Call(5, (21,), 80, dtype=torch.float16)
    call.check([kernel.launch(call.x, call.weights[0], call.biases[0])])
    call = Call(17, (21,), 80, dtype=torch.float16)
    call.check([kernel.launch(call.x, call.weights[0], call.biases[0])])
    assert plans == [("flat", 1)]


def test_group_is_one_launch(plans):
    for bias in (True, False):
        call = Call(5, (21, 8, 9), 80, dtype=torch.float16, bias=bias)
        call.check(group_kernel.launch(call.x, call.weights, call.biases))
    assert plans == [("flat", 3)] * 2


def test_group_with_other_biases_or_too_many_weights_is_several_launches(plans):
    call = Call(5, (21, 8), 80, dtype=torch.float16)
    call.biases[0] = None
    exact = [
        weight.double() @ call.x.double().T + (0.0 if bias is None else bias.double()[:, None])
        for weight, bias in zip(call.weights, call.biases, strict=True)
    ]
    for out, wanted in zip(group_kernel.launch(call.x, call.weights, call.biases), exact, strict=True):
        assert (out.T.double() - wanted).abs().max() <= 2 * torch.finfo(torch.float16).eps * wanted.abs().max()
    call = Call(2, (5, 6, 7, 8), 80, dtype=torch.float16)
    call.check(group_kernel.launch(call.x, call.weights, call.biases))
    assert plans == [("flat", 1)] * 6


@pytest.mark.parametrize("kind", ["strided rows", "odd row stride", "odd start"])
def test_weights_without_16_byte_loads_go_to_the_library(plans, kind):
    call = Call(3, (24,), 80, dtype=torch.float16)
    memory = torch.zeros(24 * 200, dtype=torch.float16)
    view = {
        "strided rows": memory[: 24 * 160].view(24, 160)[:, ::2],
        "odd row stride": memory[: 24 * 88].view(24, 88)[:, :80],
        "odd start": memory[1 : 1 + 24 * 80].view(24, 80),
    }[kind]
    view.copy_(call.weights[0])
    call.weights = [view]
    call.check([kernel.launch(call.x, view, call.biases[0])])
    assert plans == []


def test_untuned_sizes_go_through_the_op_to_the_library(plans, monkeypatch):
    monkeypatch.undo()
    call = Call(3, (24,), 80, dtype=torch.float16)
    call.check([kernel.launch(call.x, call.weights[0], call.biases[0])])
    call.check([ops.decode_linear(call.x, call.weights[0], call.biases[0])])

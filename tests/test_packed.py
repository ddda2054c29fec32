"""packed_attention in PyTorch against the float64 oracle, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn import ops, reference
from hf_fastattn.ops import NO_WINDOW
from tests.op_calls import DTYPES, NAN


class Packed:
    """The arguments of a call: (queries, keys) of each sequence; rows of no sequence lie before, between and behind."""

    def __init__(
        self, lens, *, heads=4, kv_heads=2, dim=32, v_dim=None, dtype=torch.float32, sharpness=3.0, gap=2, seed=0
    ):
        random = torch.Generator().manual_seed(seed)
        queries, keys = zip(*lens, strict=True) if lens else ((), ())
        self.starts = [torch.tensor([gap, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
        self.num_rows = [int(starts[-1]) + gap for starts in self.starts]

        def rows(size, num_heads, head_dim, first, last):
            x = torch.full((size, num_heads + 1, head_dim), NAN, dtype=dtype)[:, :num_heads]  # strides of its own
            x[first:last] = torch.randn(last - first, num_heads, head_dim, generator=random).to(dtype)
            return x

        (q_rows, k_rows), ends = self.num_rows, [int(starts[-1]) for starts in self.starts]
        self.q = rows(q_rows, heads, dim, gap, ends[0]) * sharpness
        self.k = rows(k_rows, kv_heads, dim, gap, ends[1])
        self.v = rows(k_rows, kv_heads, v_dim or dim, gap, ends[1])
        self.options = {"softmax_scale": dim**-0.5, "max_query_len": max(queries, default=0)}

    def run(self, function, dtype=None):
        dtype = dtype or self.q.dtype
        options = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in self.options.items()}
        tensors = (x.to(dtype) for x in (self.q, self.k, self.v))
        return function(*tensors, query_starts=self.starts[0], key_starts=self.starts[1], **options)

    def check(self, function=ops.packed_attention):
        """Compare with the oracle: error at most twice that of its formula in this dtype, plus rounding."""
        exact = self.run(reference.packed_attention, torch.float64)
        plain = (self.run(reference.packed_attention).double() - exact).abs()
        out = self.run(function)
        assert out.shape == exact.shape
        assert out.dtype == self.q.dtype
        assert out.is_contiguous()
        assert torch.isfinite(out).all()
        assert (out[exact == 0] == 0).all()
        if out.numel():
            rounding = 4 * torch.finfo(self.q.dtype).eps * exact.abs().max()
            error = (out.double() - exact).abs().max()
            assert error <= 2 * plain.max() + rounding
        return out


RAGGED = ((1, 37), (0, 5), (20, 20), (3, 3), (0, 0), (7, 30), (4, 0), (5, 2))
"""(queries, keys): decoding, only keys, a prompt, a chunk behind others; no keys, and fewer than queries."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged(dtype):
    Packed(RAGGED, dtype=dtype).check()


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize("dims", [(32, 32), (80, 48)])
def test_heads(heads, dims):
    Packed(RAGGED, heads=heads[0], kv_heads=heads[1], dim=dims[0], v_dim=dims[1]).check()


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 1},
        {"window": 6},
        {"softcap": 2.0},
        {"sinks": torch.tensor([-30.0, 0.0, 2.0, 60.0])},
        {"window": 6, "softcap": 2.0, "sinks": torch.tensor([1.0, 0.0, 2.0, 3.0])},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(options):
    call = Packed(RAGGED)
    call.options |= options
    call.check()


def test_one_sequence_is_prefill_attention():
    call = Packed([(12, 30)], gap=0)
    q, k, v = (x.transpose(0, 1)[None] for x in (call.q, call.k, call.v))
    assert torch.equal(call.check(), ops.prefill_attention(q, k, v, softmax_scale=32**-0.5)[0])


@pytest.mark.parametrize("lens", [(), ((0, 0),), ((0, 4), (0, 0)), ((3, 0),)], ids=str)
def test_nothing_to_attend(lens):
    assert not Packed(lens).check().any()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    lens=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), max_size=6),
    window=st.one_of(st.just(NO_WINDOW), st.integers(1, 50)),
    causal=st.booleans(),
    gap=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_lengths(lens, window, causal, gap, seed):
    call = Packed(lens, gap=gap, seed=seed)
    call.options |= {"window": window, "causal": causal}
    call.check()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda c: setattr(c, "q", c.q[None]),
            ValueError,
            "expected packed q, k and v of 3 dimensions, got 4, 3 and 3",
        ),
        (lambda c: setattr(c, "k", c.k[1:]), ValueError, "k and v must agree"),
        (lambda c: setattr(c, "q", c.q[:, :3]), ValueError, "3 query heads cannot be shared evenly by 2"),
        (lambda c: c.starts.__setitem__(1, c.starts[1][1:]), ValueError, r"expected query_starts and key_starts"),
        (lambda c: c.starts.__setitem__(0, c.starts[0].long()), TypeError, "must be int32, got torch.int64"),
        (lambda c: c.options.update(max_query_len=-1), ValueError, "max_query_len is a number of queries, got -1"),
        (lambda c: c.starts[0].__setitem__(1, 99), ValueError, "expected query_starts that do not fall, from 0 to 44"),
        (lambda c: c.starts[1].__setitem__(-1, 500), ValueError, "expected key_starts that do not fall, from 0 to 101"),
        (lambda c: c.starts[0].__setitem__(0, -1), ValueError, "got \\[-1, 3"),
    ],
)
def test_arguments_that_do_not_belong_together(spoil, error, message):
    call = Packed(RAGGED)
    spoil(call)
    with pytest.raises(error, match=message):
        call.run(ops.packed_attention)


def test_it_is_well_registered():
    call = Packed(RAGGED, gap=0)
    args = (call.q.contiguous(), call.k, call.v, *call.starts, torch.zeros(4), 20, 0.3, True, 9, 2.0)
    torch.library.opcheck(torch.ops.hf_fastattn.packed_attention.default, args)

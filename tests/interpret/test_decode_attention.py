"""The decode kernel in Triton's interpreter: its options and their edges, every result against the float64 oracle.

bf16, which is wrong in the interpreter: tests/ptx, tests/gpu. The algorithm itself: test_decode_algorithm.py.
"""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn.kernels import _decode_plan
from hf_fastattn.ops.shapes import NO_WINDOW

from . import runs_kernels
from .decode_call import NAN, Call, poisoned_new_empty

pytestmark = runs_kernels


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty(torch.Tensor.new_empty))


@pytest.mark.parametrize("num_programs", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("lens", [(0, 1, 15, 16, 17), (33, 64, 100)], ids=str)
def test_ragged_lengths(lens, num_programs):
    Call(lens).check(num_programs)


@pytest.mark.parametrize(("query_len", "num_programs"), [(2, 1), (3, 2), (5, 3), (8, 7)])
def test_several_queries_are_causal(query_len, num_programs):
    Call((0, 3, 20, 47), query_len=query_len).check(num_programs)


@pytest.mark.parametrize(("query_len", "seq_len"), [(17, 40), (32, 40), (32, 9)])
def test_many_queries(query_len, seq_len):
    Call((seq_len,), heads=1, query_len=query_len).check(2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (4, 1), (12, 1)])
@pytest.mark.parametrize("query_len", [1, 3])
def test_heads_share_keys(heads, kv_heads, query_len):
    """12 x 3 rows are three row tiles."""
    Call((21, 5), heads=heads, kv_heads=kv_heads, query_len=query_len).check(2)


@pytest.mark.parametrize(("dim", "v_dim"), [(32, 32), (80, 80), (24, 16), (16, 40), (8, 8)])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_head_sizes(dim, v_dim, num_programs):
    Call((35, 4), dim=dim, v_dim=v_dim, kv_heads=2, query_len=2).check(num_programs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("num_programs", [1, 4])
def test_dtypes(dtype, num_programs):
    Call((50, 9), dtype=dtype, heads=4, kv_heads=2, query_len=2, sharpness=3.0).check(num_programs)


@pytest.mark.parametrize(
    ("block_size", "block_n"), [(16, 32), (32, 64), (16, 64), (32, 16), (64, 32), (128, 64), (256, 16)]
)
@pytest.mark.parametrize("num_programs", [1, 3])
def test_block_sizes_smaller_and_larger_than_a_tile(block_size, block_n, num_programs):
    Call((block_size - 1, 2 * block_size + 3, 1), block_size=block_size).check(num_programs, block_n)


@pytest.mark.parametrize("seq_len", [1, 16, 50])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_dense(seq_len, num_programs):
    Call((seq_len, seq_len), block_size=None, heads=4, kv_heads=2, query_len=3).check(num_programs)


@pytest.mark.parametrize("block_size", [16, 64, None])
def test_default_config_and_grid(block_size):
    Call((70, 70), block_size=block_size, heads=4, kv_heads=2).check(default_config=True)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 1000])
@pytest.mark.parametrize(("query_len", "num_programs"), [(1, 1), (4, 3)])
def test_window(window, query_len, num_programs):
    call = Call((64, 41, 2), query_len=query_len)
    call.options["window"] = window
    call.check(num_programs)


@pytest.mark.parametrize("block_n", [16, 64])
def test_blocks_before_the_window_may_be_gone(block_n):
    call = Call((70,), query_len=2)
    call.options["window"] = 20  # keys 49 and later: block 3 and later
    call.k[call.block_table[0, :3].long()] = NAN
    call.v[call.block_table[0, :3].long()] = NAN
    kept = call.check(2, block_n)
    call.block_table[0, :3] = -1
    assert torch.equal(call.run(2, call.config(block_n)), kept)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_softcap(softcap, num_programs):
    call = Call((45, 7), query_len=2, sharpness=8.0)
    call.options["softcap"] = softcap
    call.check(num_programs)


@pytest.mark.parametrize("num_programs", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinks_are_added_once(num_programs, dtype):
    call = Call((40, 3, 0), heads=4, kv_heads=2, query_len=5)
    call.sinks = torch.tensor([-30.0, 0.0, 2.0, 60.0], dtype=dtype).repeat_interleave(2)[::2]  # not contiguous
    out = call.check(num_programs)
    assert not out[1, :2].any()  # queries before the sequence's start see nothing, sink or not
    assert not out[2].any()


@pytest.mark.parametrize("kind", ["left padding", "holes", "one sequence hidden"])
@pytest.mark.parametrize("block_size", [16, None])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_key_mask(kind, block_size, num_programs):
    call = Call((50, 50), block_size=block_size, heads=4, kv_heads=2, query_len=3)
    mask = torch.ones(2, 55, dtype=torch.bool)
    if kind == "left padding":
        mask[0, :20] = False
    elif kind == "holes":
        mask[:, ::3] = False
    else:
        mask[1] = False
    call.key_mask = mask if num_programs == 1 else mask.to(torch.int8)
    out = call.check(num_programs)
    assert bool(out[1].any()) == (kind != "one sequence hidden")


@pytest.mark.parametrize("num_programs", [1, 3])
def test_nan_in_hidden_keys_reaches_no_output(num_programs):
    call = Call((50,), block_size=None)
    call.key_mask = torch.ones(1, 50, dtype=torch.int8)
    call.key_mask[0, :20] = 0
    call.k[:, :, :20], call.v[:, :, :20] = NAN, float("inf")
    assert call.check(num_programs).isfinite().all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_logits_far_from_zero(offset, num_programs):
    call = Call((40, 18), dim=32)
    call.k[..., 0] = offset  # the same for every key: large logits with ordinary differences
    call.q[..., 0] = 1.0
    call.options["softmax_scale"] = 1.0
    call.check(num_programs, largest_logit=1e4)


@pytest.mark.parametrize("num_programs", [1, 3])
def test_logits_that_differ_by_thousands(num_programs):
    call = Call((40, 18), dim=32)
    call.options["softmax_scale"] = 2000.0
    call.check(num_programs)


def test_every_stride_is_honoured():
    call = Call((37, 20), heads=4, kv_heads=2, query_len=3)
    expected = call.run(num_programs=2)
    call.q = call.q.transpose(1, 2).contiguous().transpose(1, 2)
    call.k = call.k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((*call.v.shape[:3], 48), NAN)
    wide[..., 5:37:2] = call.v
    call.v = wide[..., 5:37:2]
    call.block_table = call.block_table.repeat_interleave(2, 1)[:, ::2]
    call.seq_lens = call.seq_lens.repeat_interleave(2)[::2]
    assert torch.equal(call.run(num_programs=2), expected)


def test_dense_views_and_masks_with_strides():
    call = Call((37, 37), block_size=None, heads=4, kv_heads=2)
    call.key_mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = call.check(2)
    call.k = call.k.transpose(1, 2).contiguous().transpose(1, 2)
    call.key_mask = call.key_mask.repeat_interleave(3, 1)[:, ::3]
    assert torch.equal(call.check(2), expected)


def test_a_length_beyond_the_table_reads_nothing_outside_it():
    call = Call((33,))
    call.block_table = call.block_table[:, :2].contiguous()
    too_long = call.run(num_programs=2)
    call.seq_lens = torch.tensor([32], dtype=torch.int32)
    assert torch.equal(too_long, call.run(num_programs=2))


@pytest.mark.parametrize("shape", ["no sequence", "no query", "no block"])
def test_empty_calls(shape):
    call = Call((5, 3))
    if shape == "no sequence":
        call.q, call.block_table, call.seq_lens = call.q[:0], call.block_table[:0], call.seq_lens[:0]
    elif shape == "no query":
        call.q = call.q[:, :, :0]
    else:
        call.block_table, call.seq_lens = call.block_table[:, :0], torch.zeros_like(call.seq_lens)
    out = call.run()
    assert out.shape == (call.q.shape[0], call.q.shape[2], 2, 16)
    assert not out.any()


def far_slots(cache):
    """Return the layout of a cache whose slots lie so far apart that the last one's offset needs more than 31 bits."""
    return torch.empty_strided(cache.shape, (1, 2**31 // 15 + 1, 1, 1), dtype=cache.dtype, device="meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: setattr(call, "q", call.q.double()), "must share one dtype"),
        (lambda call: setattr(call, "k", call.k[:, :12]), "block_size must be a power of two from 16 to 256, got 12"),
        (lambda call: setattr(call, "k", call.k[:, :8]), "block_size must be a power of two from 16 to 256, got 8"),
        (lambda call: setattr(call, "v", call.v.repeat(1, 1, 1, 17)), "head sizes go to 256, got 16 for q and k, 272"),
        (lambda call: setattr(call, "k", far_slots(call.k)), "slots of a block must lie less than 2147483648 elements"),
        (lambda call: call.options.update(softmax_scale=0.0), "softmax_scale must be positive, got 0.0"),
        (lambda call: call.options.update(softmax_scale=-0.5), "softmax_scale must be positive, got -0.5"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change, message):
    call = Call()
    assert _decode_plan.supports(call.q, call.k, call.v, call.block_table) is None
    change(call)
    with pytest.raises(ValueError, match=message):
        call.run()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    query_len=st.integers(1, 6),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    window=st.sampled_from([NO_WINDOW, 1, 7, 20]),
    sinks=st.booleans(),
    hidden=st.sampled_from([0.0, 0.3, 1.0]),
    num_programs=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_small_call(lens, query_len, heads, window, sinks, hidden, num_programs, seed):
    call = Call(tuple(lens), heads=heads[0], kv_heads=heads[1], query_len=query_len, sharpness=4.0, seed=seed)
    random = torch.Generator().manual_seed(seed)
    call.options["window"] = window
    call.sinks = torch.randn(heads[0], generator=random) if sinks else None
    call.key_mask = torch.rand(len(lens), 40, generator=random) >= hidden if hidden else None
    call.check(num_programs)

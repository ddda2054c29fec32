"""The PyTorch implementation of each op against the float64 oracle, under the tolerance of tests/op_calls.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn import ops
from hf_fastattn.ops import NO_WINDOW, _library
from tests.op_calls import DTYPES, NAN, Call, Store
from tests.tiny import CopiedBytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_len", [1, 2, 8, 16, 17, 21, 32, 33])
def test_query_lengths(query_len, dtype):
    Call((47, 3, 0, 33), query_len=query_len, dtype=dtype).check_both()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "v_dim"), [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 48)])
@pytest.mark.parametrize("query_len", [1, 5])
def test_head_sizes(dim, v_dim, query_len, dtype):
    Call((35, 4), dim=dim, v_dim=v_dim, query_len=query_len, dtype=dtype).check_both()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (4, 1), (12, 1)])
@pytest.mark.parametrize("query_len", [1, 3, 40])
@pytest.mark.parametrize("block_size", [16, None])
def test_heads_share_keys(heads, kv_heads, query_len, block_size):
    Call((45, 45), heads=heads, kv_heads=kv_heads, query_len=query_len, block_size=block_size).check_both()


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("blocks", ["permuted", "runs"])
@pytest.mark.parametrize("query_len", [1, 6])
def test_block_sizes(block_size, blocks, query_len):
    lens = (block_size - 1, block_size, block_size + 1, 2 * block_size + 3, 1)
    Call(lens, block_size=block_size, blocks=blocks, query_len=query_len).check_both()


@pytest.mark.parametrize("lens", [(33, 33, 33), (0, 0), (16, 16), (1,), (0, 17)], ids=str)
@pytest.mark.parametrize("blocks", ["permuted", "runs"])
@pytest.mark.parametrize("query_len", [1, 4])
def test_batches_in_runs_are_read_without_a_copy(lens, blocks, query_len):
    call = Call(lens, blocks=blocks, query_len=query_len)
    call.v = call.v.contiguous()
    call.check_both()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_len", [1, 9, 40])
@pytest.mark.parametrize("seq_len", [1, 9, 40])
def test_dense(seq_len, query_len, dtype):
    """More queries than keys too: the first ones then stand before the sequence and see nothing."""
    out = Call((seq_len, seq_len), block_size=None, query_len=query_len, dtype=dtype).check_both()
    assert not out[:, : max(query_len - seq_len, 0)].any()


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 1000])
@pytest.mark.parametrize("query_len", [1, 4, 40])
@pytest.mark.parametrize("block_size", [16, None])
def test_window(window, query_len, block_size):
    call = Call((64, 64) if block_size is None else (64, 41, 2), query_len=query_len, block_size=block_size)
    call.options["window"] = window
    call.check_both()


@pytest.mark.parametrize("query_len", [1, 4, 40])
@pytest.mark.parametrize("block_size", [16, None])
def test_everything_is_seen_when_not_causal(query_len, block_size):
    call = Call((40, 40) if block_size is None else (40, 7, 0), query_len=query_len, block_size=block_size)
    call.causal = False
    out = call.check()
    call.options["window"] = 3
    assert torch.equal(call.run(ops, "prefill_attention"), out)


@pytest.mark.parametrize("reread", [0, 2**24])
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_one_query_with_its_heads_packed_or_apart(heads, reread, monkeypatch):
    monkeypatch.setattr("hf_fastattn.ops._torch.REREAD_KEYS", reread)
    Call((40, 40), heads=heads, kv_heads=2, block_size=None).check_both()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seq_len", [1, 40, 2100])
def test_decoding_at_once_is_decoding(seq_len, dtype):
    q, k, v = (torch.randn(2, heads, n, 64).to(dtype) for heads, n in ((8, 1), (4, seq_len), (4, seq_len)))
    with torch.no_grad():
        out = ops.decode_at_once(q, k, v, 0.1)
    assert torch.equal(out, ops.decode_attention(q, k, v, softmax_scale=0.1))


def test_what_is_not_decoded_at_once():
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 5, 16)
    assert ops.decode_at_once(q, k, k, 0.25) is None, "gradients"
    with torch.no_grad():
        assert ops.decode_at_once(q, k, k, 0.25) is not None
        assert ops.decode_at_once(q.expand(1, 2, 3, 16), k, k, 0.25) is None, "several queries"
        assert ops.decode_at_once(q.half(), k, k, 0.25) is None, "dtypes that differ"
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.decode_at_once(q, k, k, 0.25) is None, "autocast"
        with CopiedBytes():
            assert ops.decode_at_once(q, k, k, 0.25) is None, "a dispatch mode, which is to see the op"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(_library.DIRECT["decode_attention"], "cpu", lambda *args: None)
            assert ops.decode_at_once(q, k, k, 0.25) is None, "another implementation, as eval.fake_gpu puts in"
        fakes = [torch.empty_like(x, device="meta") for x in (q, k)]
        assert ops.decode_at_once(*fakes, fakes[1], 0.25) is None, "another device"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 1000.0])
@pytest.mark.parametrize("query_len", [1, 5])
def test_softcap(softcap, query_len, dtype):
    call = Call((45, 7), query_len=query_len, sharpness=8.0, dtype=dtype)
    call.options["softcap"] = softcap
    call.check_both()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_sinks_take_probability_and_give_nothing(query_len, softcap, dtype):
    call = Call((40, 3, 0), query_len=query_len, dtype=dtype)
    call.sinks = torch.tensor([-30.0, 0.0, 2.0, 60.0], dtype=dtype)
    call.options["softcap"] = softcap
    out = call.check_both()
    assert not out[2].any()
    assert out[0, :, 3].abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["left padding", "holes", "one sequence hidden", "nothing hidden"])
@pytest.mark.parametrize("block_size", [16, None])
@pytest.mark.parametrize(("query_len", "window"), [(1, NO_WINDOW), (1, 12), (3, NO_WINDOW), (3, 12)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_key_mask(kind, block_size, query_len, window, softcap):
    call = Call((50, 50), block_size=block_size, query_len=query_len)
    call.options |= {"window": window, "softcap": softcap}
    mask = torch.ones(2, 55, dtype=torch.bool)
    if kind == "left padding":
        mask[0, :45] = False
    elif kind == "holes":
        mask[:, ::3] = False
    elif kind == "one sequence hidden":
        mask[1] = False
    call.key_mask = mask if query_len == 1 else mask.to(torch.int8)
    out = call.check_both()
    assert bool(out[1].any()) == (kind != "one sequence hidden")


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("window", [NO_WINDOW, 7])
@pytest.mark.parametrize("hidden", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_queries_with_positions_of_their_own(gaps, window, hidden, seed):
    call = Call((50, 12, 0, 21), query_len=17, seed=seed)
    call.place_queries(gaps)
    call.options["window"] = window
    if hidden:
        call.hide_keys(hidden)
    out = call.check()
    assert not out[call.query_positions < 0].any()


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.parametrize("softcap", [0.0, 3e4])
def test_logits_far_from_zero(offset, query_len, softcap):
    call = Call((40, 18), query_len=query_len)
    call.k[..., 0] = offset
    call.q[..., 0] = 1.0
    call.options |= {"softmax_scale": 1.0, "softcap": softcap}
    call.check_both()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_differ_by_thousands(dtype):
    call = Call((40, 18), query_len=3, dtype=dtype)
    call.options["softmax_scale"] = 2000.0
    call.check_both()


def test_rows_without_a_key_give_zero_with_every_feature():
    for softcap in (0.0, 5.0):
        for sinks in (None, torch.zeros(4)):
            call = Call((6, 0), query_len=9)
            call.sinks, call.options["softcap"] = sinks, softcap
            call.key_mask = torch.zeros(2, 6, dtype=torch.int8)
            assert not call.check_both().any()


def test_more_queries_than_one_tile():
    call = Call((1500,), query_len=1100, heads=2, kv_heads=1, dim=16, block_size=64)
    call.options["window"] = 70
    call.check()


def test_every_stride_is_honoured():
    call = Call((37, 20), query_len=3)
    expected = call.run(ops, "decode_attention")
    wide = torch.full((*call.v.shape[:3], 40), NAN)
    wide[..., 5:37] = call.v
    call.v = wide[..., 5:37]
    call.k = torch.cat([torch.full_like(call.k, NAN), call.k])[call.k.shape[0] :]  # a storage offset
    call.q = call.q.contiguous()
    call.block_table = call.block_table.repeat_interleave(2, 1)[:, ::2]
    call.seq_lens = call.seq_lens.repeat_interleave(2)[::2]
    torch.testing.assert_close(call.run(ops, "decode_attention"), expected)


@pytest.mark.parametrize("shape", ["no sequence", "no query", "no block"])
@pytest.mark.parametrize("name", ["prefill_attention", "decode_attention"])
def test_empty_calls(shape, name):
    call = Call((5, 3))
    if shape == "no sequence":
        call.q, call.block_table, call.seq_lens = call.q[:0], call.block_table[:0], call.seq_lens[:0]
    elif shape == "no query":
        call.q = call.q[:, :, :0]
    else:
        call.block_table, call.seq_lens = call.block_table[:, :0], torch.zeros_like(call.seq_lens)
    out = call.run(ops, name)
    assert out.shape == (call.q.shape[0], call.q.shape[2], 4, 32)
    assert not out.any()


@pytest.mark.parametrize("query_len", [1, 3])
def test_decode_with_shared_prefixes_and_a_schedule(query_len):
    call = Call((50, 37, 20), query_len=query_len)
    call.block_table[1, :2] = call.block_table[0, :2]
    call.options["shared_prefixes"] = torch.tensor([[0, 2, 0, 2], [0, 0, 0, 0]], dtype=torch.int32)
    paged = {"block_table": call.block_table, "seq_lens": call.seq_lens}
    schedule = ops.decode_schedule(call.q, call.k, call.v, shared_prefixes=call.options["shared_prefixes"], **paged)
    call.options |= {"schedule": schedule, "batch_invariant": query_len == 3}
    call.check("decode_attention")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("block_size", [None, 16])
def test_any_scale(scale, block_size):
    """Of as many queries as keys: PyTorch's causal attention gives NaN for a scale that is not positive."""
    call = Call((7, 7), query_len=7, block_size=block_size)
    call.options["softmax_scale"] = scale
    call.check_both()


calls = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
        "dim": st.sampled_from([(8, 8), (32, 32), (80, 80), (16, 24)]),
        "dtype": st.sampled_from(DTYPES),
        "query_len": st.sampled_from([1, 1, 2, 5, 9, 33, 40]),
        "window": st.sampled_from([NO_WINDOW, NO_WINDOW, 1, 3, 17]),
        "softcap": st.sampled_from([0.0, 0.0, 5.0]),
        "scale": st.sampled_from([1.0, 1.0, 1.0, -0.5, 0.0]),
        "sinks": st.booleans(),
        "hidden": st.sampled_from([0.0, 0.0, 0.3, 0.9]),
        "causal": st.sampled_from([True, True, True, False]),
        "seed": st.integers(0, 10**6),
    }
)


def any_call(options, lens, **layout):
    (heads, kv_heads), (dim, v_dim) = options["heads"], options["dim"]
    sizes = {name: options[name] for name in ("dtype", "query_len", "seed")}
    call = Call(tuple(lens), heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim, **sizes, **layout)
    call.options |= {"window": options["window"], "softcap": options["softcap"]}
    call.options["softmax_scale"] *= options["scale"]
    call.causal = options["causal"]
    if options["sinks"]:
        call.sinks = 2 * call.normal(heads)
    if options["hidden"]:
        call.hide_keys(options["hidden"])
    return call


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    options=calls,
    lens=st.lists(st.integers(0, 60), min_size=1, max_size=3)
    | st.builds(lambda n, c: [n] * c, st.integers(0, 60), st.integers(1, 3)),
    block_size=st.sampled_from([16, 32]),
    blocks=st.sampled_from(["permuted", "runs"]),
    positions=st.sampled_from([None, None, "last", "gaps"]),
)
def test_any_paged_call(options, lens, block_size, blocks, positions):
    call = any_call(options, lens, block_size=block_size, blocks=blocks)
    if blocks == "runs":
        call.v = call.v.contiguous()
    if positions:
        call.place_queries(gaps=positions == "gaps")
    call.check_both()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(options=calls, num_seqs=st.integers(1, 3), seq_len=st.integers(1, 50))
def test_any_dense_call(options, num_seqs, seq_len):
    any_call(options, [seq_len] * num_seqs, block_size=None).check_both()


@pytest.mark.parametrize("query_len", [0, 1, 3, 40])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("layout", ["token", "head"])
def test_store(query_len, block_size, layout):
    Store(query_len=query_len, block_size=block_size, v_dim=12, layout=layout).check()


@pytest.mark.parametrize("layout", ["token", "head"])
def test_store_at_positions(layout):
    store = Store((0, 5, 30), 4, layout=layout)
    store.positions = torch.tensor([[-1, -1, 0, 1], [5, 6, 7, 8], [-1, -1, -1, -1]], dtype=torch.int32)
    store.check()
    store.positions = torch.full((3, 4), -1, dtype=torch.int32)
    store.check()
    assert all(cache.isnan().all() for cache in store.run(ops))


def test_store_of_no_sequences():
    store = Store()
    store.k, store.v = store.k[:0], store.v[:0]
    store.block_table, store.past_lens = store.block_table[:0], store.past_lens[:0]
    store.check()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    past_lens=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    query_len=st.integers(0, 20),
    padded=st.booleans(),
    layout=st.sampled_from(["token", "head"]),
    seed=st.integers(0, 1000),
)
def test_any_store(past_lens, query_len, padded, layout, seed):
    store = Store(tuple(past_lens), query_len, layout=layout, seed=seed)
    if padded:
        stored = torch.rand(len(past_lens), query_len, generator=torch.Generator().manual_seed(seed)) < 0.6
        store.positions = torch.where(stored, store.past_lens[:, None] + stored.cumsum(1) - 1, -1).int()
    store.check()

"""The PyTorch implementation of each op against the float64 oracle in hf_fastattn.reference.

The tolerance is computed: at most twice the error that the oracle's formula makes in the call's own dtype, plus four
roundings of the output and one of the float32 scores (a score off by x changes a probability by the factor exp(x)).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn import ops, reference
from hf_fastattn.ops import NO_WINDOW

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Call:
    """The arguments of an attention call, over blocks (block_size) or dense; NaN in every slot that nobody owns."""

    def __init__(
        self,
        lens=(37, 16),
        *,
        heads=4,
        kv_heads=2,
        query_len=1,
        dim=32,
        v_dim=None,
        block_size=16,
        dtype=torch.float32,
        sharpness=3.0,
        blocks="permuted",
        seed=0,
    ):
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.block_size = dtype, block_size
        v_dim = dim if v_dim is None else v_dim
        self.q = self.normal(len(lens), query_len, heads, dim).transpose(1, 2)
        self.options = {"softmax_scale": sharpness * dim**-0.5, "window": NO_WINDOW, "softcap": 0.0}
        self.causal = True
        self.key_mask = self.sinks = self.block_table = self.seq_lens = self.query_positions = None
        if block_size is None:
            assert len(set(lens)) == 1
            self.k = self.normal(len(lens), kv_heads, lens[0], dim)
            self.v = self.normal(len(lens), lens[0], kv_heads, v_dim).transpose(1, 2)
            return
        self.seq_lens = torch.tensor(lens, dtype=torch.int32)
        width = max(-(-max(lens, default=0) // block_size), 1) + 1
        num_blocks = len(lens) * width + 3
        order = torch.arange(num_blocks) if blocks == "runs" else torch.randperm(num_blocks, generator=self.random)
        self.block_table = torch.full((len(lens), width), -1, dtype=torch.int32)
        self.k = self.cache(num_blocks, kv_heads, dim)
        self.v = self.cache(num_blocks, kv_heads, v_dim).transpose(1, 2).contiguous().transpose(1, 2)
        for seq, seq_len in enumerate(lens):
            for i, start in enumerate(range(0, seq_len, block_size)):
                block, count = order[seq * width + i], min(block_size, seq_len - start)
                self.block_table[seq, i] = block
                self.k[block, :count] = self.normal(count, kv_heads, dim)
                self.v[block, :count] = self.normal(count, kv_heads, v_dim)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def cache(self, num_blocks, kv_heads, dim):
        return torch.full((num_blocks, self.block_size, kv_heads, dim), NAN, dtype=self.dtype)

    def hide_keys(self, share):
        columns = self.k.shape[2] if self.block_table is None else self.block_table.shape[1] * self.block_size
        self.key_mask = (torch.rand(self.q.shape[0], columns, generator=self.random) >= share).to(torch.int8)

    def place_queries(self, gaps=False):
        """Give the queries positions of their own: rising, some padding, the last tokens or (gaps) any tokens."""
        num_seqs, _, query_len, _ = self.q.shape
        self.query_positions = torch.full((num_seqs, query_len), -1, dtype=torch.int32)
        for seq, seq_len in enumerate(self.seq_lens.tolist()):
            count = int(torch.randint(0, min(query_len, seq_len) + 1, (), generator=self.random))
            places = torch.randperm(query_len, generator=self.random)[:count].sort().values
            positions = torch.arange(seq_len - count, seq_len)
            if gaps:
                positions = torch.randperm(seq_len, generator=self.random)[:count].sort().values
            self.query_positions[seq, places] = positions.int()

    def largest_score(self):
        """Return a bound of the scaled scores."""
        longest = [t.double().nan_to_num().norm(dim=-1).max().item() for t in (self.q, self.k)]
        return longest[0] * longest[1] * self.options["softmax_scale"]

    def run(self, module, name, dtype=None):
        q, k, v = ((t if dtype is None else t.to(dtype)) for t in (self.q, self.k, self.v))
        sinks = self.sinks if dtype is None or self.sinks is None else self.sinks.to(dtype)
        given = {"block_table": self.block_table, "seq_lens": self.seq_lens, "key_mask": self.key_mask, "sinks": sinks}
        if name == "prefill_attention":
            given |= {"causal": self.causal, "query_positions": self.query_positions}
        return getattr(module, name)(q, k, v, **given, **self.options)

    def check(self, name="prefill_attention"):
        out, exact = self.run(ops, name), self.run(reference, name, torch.float64)
        assert out.shape == exact.shape
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        assert not exact.isnan().any()
        if out.numel():
            roundings = 4 * torch.finfo(self.dtype).eps + torch.finfo(torch.float32).eps * self.largest_score()
            rounding = roundings * exact.abs().max().item()
            plain = (self.run(reference, name).double() - exact).abs().max().item()
            error = (out.double() - exact).abs().max().item()
            assert error <= 2 * plain + rounding  # false for NaN
        return out

    def check_both(self):
        """Check the op that fits; decode_attention too if it takes the call."""
        out = self.check()
        if self.causal and self.query_positions is None and self.q.shape[2] <= ops.MAX_DECODE_QUERY_LEN:
            assert torch.equal(self.check("decode_attention"), out)
        return out


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


calls = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
        "dim": st.sampled_from([(8, 8), (32, 32), (80, 80), (16, 24)]),
        "dtype": st.sampled_from(DTYPES),
        "query_len": st.sampled_from([1, 1, 2, 5, 9, 33, 40]),
        "window": st.sampled_from([NO_WINDOW, NO_WINDOW, 1, 3, 17]),
        "softcap": st.sampled_from([0.0, 0.0, 5.0]),
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


class Store:
    """The arguments of store_kv: sequences of past_lens tokens get query_len new ones; the caches are NaN."""

    def __init__(self, past_lens=(0, 5, 30), query_len=3, *, block_size=16, dim=8, v_dim=8, layout="token", seed=0):
        random = torch.Generator().manual_seed(seed)
        num_seqs = len(past_lens)
        self.k = torch.randn(num_seqs, query_len, 2, dim, generator=random).transpose(1, 2)
        self.v = torch.randn(num_seqs, 2, query_len, v_dim, generator=random)
        width = -(-(max(past_lens) + query_len) // block_size)
        order = torch.randperm(num_seqs * width + 2, generator=random)
        self.block_table = order[: num_seqs * width].view(num_seqs, width).int()
        self.past_lens = torch.tensor(past_lens, dtype=torch.int32)
        self.positions = None
        self.caches = [torch.full((len(order), block_size, 2, d), NAN) for d in (dim, v_dim)]
        if layout == "head":
            self.caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in self.caches]

    def run(self, module):
        caches = [torch.empty_strided(c.shape, c.stride(), dtype=c.dtype).copy_(c) for c in self.caches]
        module.store_kv(self.k, self.v, *caches, self.block_table, self.past_lens, positions=self.positions)
        return caches

    def check(self):
        for got, want in zip(self.run(ops), self.run(reference), strict=True):
            assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7))


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


@pytest.mark.parametrize(
    ("past_len", "table", "message"),
    [
        (31, [[3, 1]], r"position 32 lies beyond the block table, which holds 2 blocks of 16"),
        (15, [[3, -1]], r"no block in the block table \(-1\)"),
    ],
)
def test_a_token_without_a_block_is_an_error_and_nothing_is_written(past_len, table, message):
    k = v = torch.ones(1, 2, 2, 8)
    k_cache, v_cache = torch.zeros(4, 16, 2, 8), torch.zeros(4, 16, 2, 8)
    with pytest.raises(IndexError, match=message):
        ops.store_kv(k, v, k_cache, v_cache, torch.tensor(table).int(), torch.tensor([past_len]).int())
    assert not k_cache.any()
    assert not v_cache.any()


@pytest.mark.parametrize("name", ["prefill_attention", "decode_attention"])
def test_a_length_beyond_the_block_table_is_an_error(name):
    call = Call((33, 4))
    call.block_table = call.block_table[:, :2].contiguous()
    with pytest.raises(ValueError, match=r"33 tokens is longer than its block table, which holds 32"):
        call.run(ops, name)


@pytest.mark.parametrize("name", ["prefill_attention", "decode_attention"])
def test_a_hole_in_the_block_table_is_an_error(name):
    call = Call((33, 4))
    call.block_table[0, 1] = -1
    with pytest.raises((IndexError, RuntimeError)):
        call.run(ops, name)


def change(**tensors):
    """Return a function that replaces attributes of a call by what the given functions make of them."""

    def apply(call):
        for name, make in tensors.items():
            setattr(call, name, make(getattr(call, name)))

    return apply


@pytest.mark.parametrize("name", ["prefill_attention", "decode_attention"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (change(q=lambda q: q[0]), ValueError, "expected 4-dimensional q, k and v, got 3, 4 and 4"),
        (change(v=lambda v: v[:, :8]), ValueError, r"k and v must agree .* got \(11, 16, 2, 32\) and \(11, 8, 2, 32\)"),
        (change(q=lambda q: q[:, :3]), ValueError, "3 query heads cannot be shared evenly by 2 key/value heads"),
        (change(q=lambda q: q[..., :16]), ValueError, "q has head size 16, k has 32"),
        (change(sinks=lambda _: torch.zeros(3)), ValueError, r"sinks must have shape \(4,\), got \(3,\)"),
        (change(seq_lens=lambda _: None), ValueError, "block_table and seq_lens belong together"),
        (
            change(block_table=lambda _: None, k=lambda k: k[:3], v=lambda v: v[:3]),
            ValueError,
            "belong together|shared",
        ),
        (
            change(seq_lens=lambda n: n[:1]),
            ValueError,
            r"expected block_table \(2, max_blocks\) .* got \(2, 4\) and \(1,\)",
        ),
        (change(block_table=lambda t: t[:1]), ValueError, r"expected block_table \(2, max_blocks\) .* got \(1, 4\)"),
        (change(block_table=lambda t: t.long()), TypeError, "must be int32, got torch.int64 and torch.int32"),
        (change(seq_lens=lambda n: n.long()), TypeError, "must be int32, got torch.int32 and torch.int64"),
        (
            change(key_mask=lambda _: torch.ones(1, 64, dtype=torch.int8)),
            ValueError,
            r"expected key_mask \(2, at least 64 keys\), got \(1, 64\)",
        ),
    ],
)
def test_attention_arguments_that_do_not_belong_together(name, spoil, error, message):
    call = Call()
    spoil(call)
    with pytest.raises(error, match=message):
        call.run(ops, name)


def test_dense_batches_must_agree():
    call = Call((5, 5), block_size=None)
    call.q = call.q[:1]
    with pytest.raises(ValueError, match="q has batch size 1, k has 2"):
        call.run(ops, "prefill_attention")


def test_decode_takes_few_queries():
    with pytest.raises(ValueError, match="at most 32 queries per sequence, got 33: use prefill_attention"):
        Call(query_len=33).run(ops, "decode_attention")


def test_a_key_mask_covers_all_dense_keys():
    call = Call((5, 5), block_size=None)
    call.key_mask = torch.ones(2, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"expected key_mask \(2, at least 5 keys\), got \(2, 4\)"):
        call.run(ops, "decode_attention")


def test_every_query_has_a_position():
    call = Call((5, 5))
    call.query_positions = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected query_positions \(2, 1\), got \(2, 3\)"):
        call.run(ops, "prefill_attention")


def test_query_positions_are_for_blocks():
    call = Call((5, 5), block_size=None)
    call.query_positions = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="query_positions needs a block_table"):
        call.run(ops, "prefill_attention")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(k=lambda k: k[0]), r"expected k and v .* got \(2, 3, 8\)"),
        (change(v=lambda v: v[:, :1]), r"expected k and v .* got \(3, 2, 3, 8\), \(3, 1, 3, 8\)"),
        (change(caches=lambda c: [c[0][..., :4], c[1]]), r"caches .* do not take k and v \(3, 2, 3, 8\)"),
        (change(caches=lambda c: [c[0], c[1][:, :, :1]]), "caches .* do not take k and v"),
        (change(block_table=lambda t: t[:2]), r"expected block_table \(3, max_blocks\) .* got \(2, 3\)"),
        (change(past_lens=lambda n: n[:2]), r"expected block_table .* and past_lens \(3,\), got .* \(2,\)"),
        (change(positions=lambda _: torch.zeros(3, 2)), r"expected positions \(3, 3\), got \(3, 2\)"),
    ],
)
def test_store_arguments_that_do_not_belong_together(spoil, message):
    store = Store()
    spoil(store)
    with pytest.raises(ValueError, match=message):
        store.run(ops)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("name", ["prefill_attention", "decode_attention"])
def test_attention_ops_are_well_registered(name, paged):
    call = Call((20, 20), block_size=16 if paged else None, query_len=2)
    call.hide_keys(0.2)
    tables = [call.block_table, call.seq_lens]
    tail = [call.options["softmax_scale"], 9, 2.0]
    args = [call.q, call.k.nan_to_num(), call.v.nan_to_num(), *tables]
    if name == "prefill_attention":
        args.append(None)
        tail.insert(1, True)
    torch.library.opcheck(getattr(torch.ops.hf_fastattn, name).default, (*args, call.key_mask, torch.zeros(4), *tail))


def test_decode_is_well_registered_with_all_its_arguments():
    call = Call((40, 37), query_len=2)
    call.block_table[1, :2] = call.block_table[0, :2]
    entries = torch.tensor([[0, 2, 0, 2]], dtype=torch.int32)
    args = [call.q, call.k.nan_to_num(), call.v.nan_to_num(), call.block_table, call.seq_lens, None, None, 0.3, 99, 0.0]
    schedule = torch.empty(0, 0, dtype=torch.int32)
    torch.library.opcheck(torch.ops.hf_fastattn.decode_attention.default, (*args, entries, schedule, True))


@pytest.mark.parametrize("query_len", [1, 3])
def test_decode_with_shared_prefixes_and_a_schedule(query_len):
    call = Call((50, 37, 20), query_len=query_len)
    call.block_table[1, :2] = call.block_table[0, :2]
    call.options["shared_prefixes"] = torch.tensor([[0, 2, 0, 2], [0, 0, 0, 0]], dtype=torch.int32)
    paged = {"block_table": call.block_table, "seq_lens": call.seq_lens}
    schedule = ops.decode_schedule(call.q, call.k, call.v, shared_prefixes=call.options["shared_prefixes"], **paged)
    call.options |= {"schedule": schedule, "batch_invariant": query_len == 3}
    call.check("decode_attention")


def test_store_is_well_registered():
    store = Store()
    caches = [cache.zero_() for cache in store.caches]
    args = (store.k, store.v, *caches, store.block_table, store.past_lens, None)
    torch.library.opcheck(torch.ops.hf_fastattn.store_kv.default, args)


def attention_step(q, k, v, k_cache, v_cache, block_table, past_lens):
    """A layer's work: store, then attend over the blocks; and once over the new states alone."""
    ops.store_kv(k, v, k_cache, v_cache, block_table, past_lens)
    paged = {"block_table": block_table, "seq_lens": past_lens + k.shape[2], "softmax_scale": 0.3}
    first = ops.decode_attention(q * 2, k_cache, v_cache, window=20, **paged)
    second = ops.prefill_attention(q, k_cache, v_cache, softcap=5.0, **paged)
    return first + second + ops.prefill_attention(q, k, v, softmax_scale=0.3)


def step_arguments(past_lens=(3, 17), query_len=2):
    call, store = Call(query_len=query_len), Store(past_lens, query_len, dim=32, v_dim=32)
    caches = [torch.randn(cache.shape, generator=call.random) for cache in store.caches]
    return [call.q, store.k, store.v, *caches, store.block_table, store.past_lens]


def test_a_function_of_all_ops_compiles_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(attention_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for query_len in (2, 2, 5):
            given, again = step_arguments(query_len=query_len), step_arguments(query_len=query_len)
            torch.testing.assert_close(compiled(*given), attention_step(*again))
            assert torch.equal(given[3], again[3])
            assert torch.equal(given[4], again[4])


def test_compiled_code_does_not_copy_the_caches():
    torch._dynamo.reset()
    given, again = step_arguments(), step_arguments()
    with torch.no_grad():
        compiled = torch.compile(attention_step, fullgraph=True)
        out, (code,) = torch._inductor.utils.run_and_get_code(compiled, *given)
        torch.testing.assert_close(out, attention_step(*again))
    assert torch.equal(given[3], again[3])
    shape = ", ".join(map(str, given[3].shape))
    assert "hf_fastattn.store_kv" in code
    assert [line for line in code.splitlines() if "empty_strided" in line and f"(({shape})" in line] == []

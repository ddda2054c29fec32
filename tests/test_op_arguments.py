"""Arguments that the ops refuse, and what they say then."""

import pytest
import torch

from hf_fastattn import ops
from tests.op_calls import Call, Store


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


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("name", ["prefill_attention", "decode_attention"])
def test_a_length_beyond_the_block_table_is_an_error(name, query_len):
    call = Call((33, 4), query_len=query_len)
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
        (
            change(key_mask=lambda _: torch.ones(2, 64, dtype=torch.int64)),
            TypeError,
            "key_mask must be int8, uint8 or bool, got torch.int64",
        ),
        (change(options=lambda o: o | {"window": 0}), ValueError, "a window of at least one token, got 0"),
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
        (change(caches=lambda c: [c[0], c[1][:, ::2]]), "caches .* do not take k and v"),
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            change(caches=lambda c: [c[0], c[1].half()]),
            "caches of torch.float32 and torch.float16 do not take torch.float32",
        ),
        (change(block_table=lambda t: t.long()), "must be int32, got torch.int64 and torch.int32"),
        (change(past_lens=lambda n: n.long()), "must be int32, got torch.int32 and torch.int64"),
    ],
)
def test_store_takes_one_dtype_of_each(spoil, message):
    store = Store()
    spoil(store)
    with pytest.raises(TypeError, match=message):
        store.run(ops)

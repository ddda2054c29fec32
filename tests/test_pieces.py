"""Decoding over scattered blocks on a CPU: how a batch is cut, and that the joined pieces are the whole."""

import pytest
import torch

from hf_fastattn import reference
from hf_fastattn.ops import _pieces, _torch
from hf_fastattn.ops._pieces import attend_pieces, cut
from tests.test_ops import DTYPES, Call

NAN = float("nan")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Runs of 32 tokens count as long."""
    monkeypatch.setattr(_pieces, "MIN_RUN", 32)


def pieces(*args, **kwargs):
    return [(p.first, p.end, p.blocks, p.tokens) for p in cut(*args, **kwargs)]


def test_a_sequence_is_cut_where_its_blocks_are_not_side_by_side():
    table = [[4, 5, 6, 9, 10, 11, -1]]
    assert pieces(table, [90], [], 16, True) == [(0, 1, [4, 5, 6], 48), (0, 1, [9, 10, 11], 42)]


def test_short_runs_are_gathered_at_once():
    table = [[4, 6, 7, 1, 9]]
    assert pieces(table, [65], [], 16, True) == [(0, 1, [4, 6, 7, 1, 9], 65)]


def test_blocks_that_cannot_be_viewed_are_not_cut():
    assert pieces([[4, 5, 8, 9]], [64], [], 16, False) == [(0, 1, [4, 5, 8, 9], 64)]


def test_shared_blocks_are_one_piece_for_all_who_share_them():
    table = [[0, 1, 2, 3], [0, 1, 2, 7], [0, 1, 5, -1], [8, 9, -1, -1]]
    shared = [[0, 3, 0, 2], [0, 2, 2, 3], [0, 0, 0, 0]]  # two levels and an unused entry
    assert pieces(table, [50, 64, 33, 32], shared, 16, True) == [
        (0, 3, [0, 1], 32),
        (0, 2, [2], 16),
        (0, 1, [3], 2),
        (1, 2, [7], 16),
        (2, 3, [5], 1),
        (3, 4, [8, 9], 32),
    ]


def test_sequences_that_end_with_what_they_share_have_no_piece_of_their_own():
    assert pieces([[0, 1], [0, 1]], [32, 32], [[0, 2, 0, 2]], 16, True) == [(0, 2, [0, 1], 32)]
    assert pieces([[-1, -1]], [0], [], 16, True) == []


def test_short_ends_of_equal_length_are_stacked():
    table = [[0, 1, 5], [0, 1, 9], [0, 1, 3], [7, 2, -1]]
    assert pieces(table, [40, 40, 40, 20], [[0, 3, 0, 2]], 16, True) == [
        (0, 3, [0, 1], 32),
        (0, 3, [5, 9, 3], 8),
        (3, 4, [7, 2], 20),
    ]
    (_, stack, _) = cut(table, [40, 40, 40, 20], [[0, 3, 0, 2]], 16, True)
    assert stack.stacked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stacked_ends_are_joined_with_what_is_shared(dtype):
    call = Call((100, 100, 100, 100, 90), heads=6, kv_heads=2, dtype=dtype)
    check(call, [share(call, 0, 4, 0, 5)])
    check(Call((20, 20, 20), dtype=dtype))


def share(call, first, count, first_block, end_block):
    """Make sequences of a call share blocks of the first of them."""
    call.block_table[first + 1 : first + count, first_block:end_block] = call.block_table[first, first_block:end_block]
    return [first, count, first_block, end_block]


def check(call, shared=None):
    """Compare the pieces with the oracle, under the tolerance of tests/test_ops.py."""
    out = attend_pieces(
        call.q,
        call.k,
        call.v,
        call.block_table,
        call.seq_lens.tolist(),
        None if shared is None else torch.tensor(shared, dtype=torch.int32),
        call.options["softmax_scale"],
    )
    exact = call.run(reference, "decode_attention", torch.float64)
    plain = (call.run(reference, "decode_attention").double() - exact).abs().max().item()
    eps = 4 * torch.finfo(call.dtype).eps + torch.finfo(torch.float32).eps * call.largest_score()
    assert out.dtype == call.dtype
    assert (out.double() - exact).abs().max().item() <= 2 * plain + eps * exact.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [0.5, 3.0, 300.0])
def test_joined_runs_are_the_whole_sequence(dtype, sharpness):
    call = Call((150, 97, 1, 0, 64), dtype=dtype, blocks="runs", sharpness=sharpness)
    width = call.block_table.shape[1]
    table = call.block_table.clone()
    half = call.k.shape[0] // 2  # swap two halves of the first sequence: two runs
    order = torch.arange(call.k.shape[0])
    order[0:4], order[half : half + 4] = torch.arange(half, half + 4), torch.arange(0, 4)
    call.k, call.v = call.k[order], call.v[order]
    moved = {**{b: b + half for b in range(4)}, **{b + half: b for b in range(4)}}
    call.block_table = torch.tensor([[moved.get(b, b) for b in row] for row in table.tolist()], dtype=torch.int32)
    assert call.block_table.shape[1] == width
    runs = [p for p in cut(call.block_table.tolist(), call.seq_lens.tolist(), [], 16, True) if p.first == 0]
    assert len(runs) == 2
    check(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (8, 1)])
def test_shared_prefixes_of_two_levels(dtype, heads, kv_heads):
    call = Call((100, 128, 81, 80, 40, 0), heads=heads, kv_heads=kv_heads, dtype=dtype)
    shared = [share(call, 0, 4, 0, 3), share(call, 0, 2, 3, 5), share(call, 2, 2, 3, 5), [0, 0, 0, 0]]
    check(call, shared)
    check(call)


def test_a_prefix_is_read_once(monkeypatch):
    call = Call((100, 128, 81))
    shared = [share(call, 0, 3, 0, 4)]
    reads = []
    monkeypatch.setattr(
        _pieces, "read_blocks", lambda c, blocks, n, f=_pieces.read_blocks: (reads.append(n), f(c, blocks, n))[1]
    )
    check(call, shared)
    assert sorted(reads) == sorted([64, 36, 64, 17] * 2)


def test_extreme_scores_and_poison():
    call = Call((96, 64), sharpness=1e4)
    check(call, [share(call, 0, 2, 0, 3)])


@pytest.mark.parametrize("num_seqs", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_long_sequences_stream_their_keys(monkeypatch, num_seqs, kv_heads):
    called = []
    stream = _torch._stream_one_query
    monkeypatch.setattr(_torch, "STREAMED_KEYS", 0)
    monkeypatch.setattr(_torch, "_stream_one_query", lambda *args: (called.append(1), stream(*args))[1])
    Call((50,) * num_seqs, heads=4, kv_heads=kv_heads, block_size=None).check("decode_attention")
    Call((50,) * num_seqs, heads=4, kv_heads=kv_heads, blocks="runs").check("decode_attention")
    Call((50,) * num_seqs, kv_heads=kv_heads, block_size=None, sharpness=1e4).check("decode_attention")
    window = Call((50,) * num_seqs, heads=4, kv_heads=kv_heads, block_size=None)
    window.options["window"] = 7
    window.check("decode_attention")
    assert len(called) == (4 if kv_heads == 1 else 3)  # with more heads, the blocks of V cannot be viewed

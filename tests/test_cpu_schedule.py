"""How a CPU reads the blocks of a decode step: what is read in which calls, and that their results are the whole."""

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fastattn import ops
from hf_fastattn.ops import NO_WINDOW, _cpu_schedule, _torch
from hf_fastattn.ops._cpu_schedule import CpuSchedule, Reading
from tests.op_calls import DTYPES, NAN, Call

GARBAGE = 1e4
LONG = 2**30
"""Bytes of a token so large that calls cost next to nothing."""


def reading(rows, begins, ends, num_blocks=40):
    return Reading(rows, begins, ends, 16, num_blocks)


def schedule(rows, lens, shared=(), *, token_bytes=LONG, window=NO_WINDOW, num_blocks=40):
    width = max(map(len, rows))
    table = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int32).view(len(rows), width)
    sizes = {"block_size": 16, "num_blocks": num_blocks, "window": window, "token_bytes": token_bytes}
    return CpuSchedule(table, lens, shared, **sizes)


def parts(*args, **kwargs):
    """Return [first sequence, end, shared, begins, ends] of each part."""
    found = schedule(*args, **kwargs).parts
    return [(p.first, p.end, p.shared, list(p.reading.begins), list(p.reading.ends)) for p in found]


def one_call(*args, **kwargs):
    return [(first, end) for first, end, *_ in parts(*args, **kwargs)] == [(0, len(args[0]))]


@pytest.mark.parametrize(
    ("rows", "begins", "ends", "even", "count"),
    [
        ([[3, 4], [3 + 7, 4 + 7]], [0, 0], [20, 20], (48, 112), 20),
        ([[3, 4], [10]], [0, 0], [20, 5], (48, 112), 20),
        ([[3, 4], [], [17]], [0, 0, 0], [20, 0, 5], (48, 112), 20),
        ([[], [], [17]], [0, 0, 0], [0, 0, 5], (17 * 16, 0), 5),
        ([[5, 6], [5, 6]], [0, 0], [32, 30], (80, 0), 32),
        ([[-1, 4], [-1, 11]], [18, 18], [20, 30], (48 + 18, 112), 12),
        ([[-1, 4], [10, 11]], [18, 10], [20, 30], (48 + 18, 104), 20),
        (
            [[-1, 4], [10, 11], [17, 18]],
            [18, 10, 12],
            [20, 30, 25],
            (58, 112),
            20,
        ),  # from the first token that any sees
        ([[3, 4], [10, 12]], [0, 0], [20, 20], None, 20),
        ([[3, 4], [10, 12]], [0, 0], [20, 16], (48, 112), 20),  # the block behind the end is not read
        ([[3], [10], [18]], [0] * 3, [9] * 3, None, 9),
        ([[10], [3]], [0, 0], [9, 9], None, 9),
        ([[3], [], [], [10]], [0] * 4, [9, 0, 0, 16], None, 16),  # a third of a slot too much
        ([[36, 37, 38], [39]], [0, 0], [40, 9], None, 40),  # a view would reach beyond the cache
        ([[], [2], [9]], [0, 0, 0], [0, 9, 9], None, 9),  # and here begin before it
    ],
)
def test_what_can_be_viewed(rows, begins, ends, even, count):
    found = reading(rows, begins, ends)
    assert (found.even, found.count) == (even, count)


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize(
    ("rows", "begins", "ends"),
    [
        ([[3, 4], [10], []], [0, 0, 0], [20, 5, 0]),
        ([[3, 9], [7], []], [0, 3, 0], [20, 5, 0]),
        ([[-1, 4], [10, 11]], [18, 10], [20, 30]),
        ([[-1, 4], [10, 11], [17, 18]], [18, 10, 12], [20, 30, 25]),
        ([[-1, 4, 2], [10, 11, 1]], [18, 30], [40, 48]),
    ],
)
def test_what_is_read(rows, begins, ends, head_major):
    cache = torch.arange(40 * 16.0)[:, None, None] + torch.zeros(1, 2, 4)
    cache = cache.view(40, 16, 2, 4)
    cache = cache.transpose(1, 2).contiguous().transpose(1, 2) if head_major else cache
    found = reading(rows, begins, ends)
    read = found.read(cache)
    assert read.shape == (len(rows), 2, found.count, 4)
    visible = torch.ones(len(rows), found.count, dtype=torch.bool) if found.visible is None else found.visible
    for i, (row, begin, end) in enumerate(zip(rows, begins, ends, strict=True)):
        wanted = [row[place // 16] * 16 + place % 16 for place in range(begin, end)]
        assert read[i, 1, visible[i], 3].tolist() == wanted
    bias = found.bias(torch.float16)
    assert (bias is None) == (found.visible is None)
    if bias is not None:
        assert torch.equal(bias[:, 0, 0] == 0, visible)
        assert torch.equal(bias[:, 0, 0] == -inf, ~visible)


def test_windows_that_begin_far_apart_are_copied():
    rows = [list(range(10)), list(range(10, 20)), [*[-1] * 8, 28, 29]]
    assert reading(rows, [0, 0, 140], [16, 16, 156]).even is None
    assert reading(rows, [130, 130, 140], [146, 146, 156]).even == (130, 10 * 16)


def test_a_batch_is_one_call_where_a_call_costs_more_than_what_it_reads_in_vain():
    ragged, scattered = [[0, 1, 2, 3], [8]], [[0, 5, 2, 9], [8]]
    for rows in (ragged, scattered):
        assert one_call(rows, [64, 3], token_bytes=1024)
        assert parts(rows, [64, 3], token_bytes=2**16)[-1] == (1, 2, False, [0], [3])
    assert one_call([[0, 1, 2, 3], [8, 9, 10, 11]], [64, 63], token_bytes=2**16)
    assert one_call([[0, 5, 2, 9]], [64], token_bytes=1024)
    assert one_call([[0, 5], [9, 2]], [32, 32], token_bytes=10000), "one by one they would be copied too"


def test_a_sequence_is_cut_where_its_blocks_are_not_side_by_side():
    rows = [[4, 5, 6, 9, 10, 11]]
    assert parts(rows, [90]) == [(0, 1, False, [0], [48]), (0, 1, False, [48], [90])]
    assert one_call(rows, [90], token_bytes=1024), "short runs are copied together"
    shared = [[0, 5, 2, 9, last] for last in (20, 30, 40, 50)]
    assert parts(shared, [70] * 4, [[0, 4, 0, 4]], token_bytes=4096)[0] == (0, 4, True, [0], [64])
    assert parts(rows, [90], window=60) == [(0, 1, False, [30], [48]), (0, 1, False, [48], [90])]


def test_shared_blocks_are_read_once_for_all_who_share_them():
    rows = [[0, 1, 2, 3], [0, 1, 2, 7], [0, 1, 5], [8, 9]]
    lens, shared = [50, 64, 33, 32], [[0, 3, 0, 2], [0, 2, 2, 3], [0, 0, 0, 0]]  # two levels and an unused entry
    assert parts(rows, lens, shared) == [
        (0, 3, True, [0], [32]),
        (0, 2, True, [32], [48]),
        (0, 1, False, [48], [50]),
        (1, 2, False, [48], [64]),
        (2, 3, False, [32], [33]),
        (3, 4, False, [0], [32]),
    ]
    assert one_call(rows, lens, shared, token_bytes=1024), "not worth a call"
    assert parts(rows, lens, shared, window=40)[0][2] is False, "not with windows, which begin where they like"


def test_a_level_that_is_not_worth_a_call_is_read_with_the_next_one():
    rows = [[0, 1, 2, 3, 4, 10], [0, 1, 2, 3, 4, 20], [0, 30]]
    shared = [[0, 3, 0, 1], [0, 2, 1, 5]]
    size = 2 * _cpu_schedule.CALL_BYTES // 40  # too little for 2 * 16 tokens saved, enough for 80
    assert parts(rows, [90, 90, 30], shared, token_bytes=size)[0] == (0, 2, True, [0], [80])


def test_sequences_that_end_with_what_they_share_read_nothing_else():
    assert parts([[0, 1], [0, 1]], [32, 32], [[0, 2, 0, 2]]) == [(0, 2, True, [0], [32])]


def test_a_sequence_longer_than_its_table_is_an_error():
    with pytest.raises(ValueError, match="a sequence of 33 tokens is longer than its block table, which holds 32"):
        schedule([[0, 1]], [33])


def flat(call):
    """Give both caches of a call a layout that can be viewed."""
    call.k, call.v = call.k.contiguous(), call.v.contiguous()
    return call


def attend(call, shared=None):
    """Run decode_attention and compare it with the oracle, under the tolerance of tests/op_calls.py."""
    prefixes = None if shared is None else torch.tensor(shared, dtype=torch.int32)
    given = {"block_table": call.block_table, "seq_lens": call.seq_lens, "key_mask": call.key_mask}
    options = {**given, "sinks": call.sinks, **call.options, "shared_prefixes": prefixes}
    out = ops.decode_attention(call.q, call.k, call.v, **options)
    made = {name: options[name] for name in ("block_table", "seq_lens", "window", "shared_prefixes")}
    once = ops.decode_schedule(call.q, call.k, call.v, **made)
    assert isinstance(once, CpuSchedule)
    for _ in range(2):  # it serves all layers
        assert torch.equal(ops.decode_attention(call.q, call.k, call.v, schedule=once, **options), out)
    return call.compare(out)


def share(call, first, count, first_block, end_block):
    """Make sequences of a call share blocks of the first of them."""
    call.block_table[first + 1 : first + count, first_block:end_block] = call.block_table[first, first_block:end_block]
    return [first, count, first_block, end_block]


@pytest.fixture
def one_by_one(monkeypatch):
    """The lengths of sequences that were read one by one."""
    reads = []
    read = _torch.read_blocks
    monkeypatch.setattr(_torch, "read_blocks", lambda *args: (reads.append(args[2]), read(*args))[1])
    return reads


KINDS = {
    "plain": lambda call: None,
    "window": lambda call: call.options.update(window=19),
    "softcap": lambda call: call.options.update(softcap=5.0),
    "sinks": lambda call: setattr(call, "sinks", call.normal(call.q.shape[1])),
    "holes": lambda call: call.hide_keys(0.3),
    "all": lambda call: [KINDS[name](call) for name in ("window", "softcap", "sinks", "holes")],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", ["runs", "permuted"])
def test_sequences_of_any_lengths_are_one_call(blocks, kind, dtype, one_by_one):
    call = flat(Call((40, 64, 1, 33, 0), dtype=dtype, heads=6, blocks=blocks, unowned=GARBAGE))
    KINDS[kind](call)
    out = attend(call)
    assert not out[4].any() or kind in ("sinks", "all")
    assert one_by_one == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [NAN, inf, -inf])
def test_what_lies_behind_a_sequence_is_never_seen(kind, garbage, one_by_one):
    call = flat(Call((40, 50, 44, 41), blocks="runs", unowned=garbage))
    KINDS[kind](call)
    attend(call)
    assert one_by_one[:2] == ([40, 40] if kind not in ("window", "all") else [24, 24]), "from the block that 19 reach"


def test_a_result_that_is_nan_stays_with_its_sequence():
    call = flat(Call((40, 64, 1, 33), blocks="runs", unowned=GARBAGE))
    call.q[1, 0] = NAN
    out = call.run(ops, "decode_attention")
    assert out[1, :, 0].isnan().all()
    assert not out[1, :, 1:].isnan().any()
    assert not out[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [0.5, 3.0, 300.0])
def test_joined_runs_are_the_whole_sequence(monkeypatch, dtype, sharpness):
    monkeypatch.setattr(_cpu_schedule, "CALL_BYTES", 64)
    call = flat(Call((150, 97, 1, 0, 64), dtype=dtype, blocks="runs", sharpness=sharpness))
    half = call.k.shape[0] // 2  # swap two halves of the first sequence: two runs
    order = torch.arange(call.k.shape[0])
    order[0:4], order[half : half + 4] = torch.arange(half, half + 4), torch.arange(0, 4)
    call.k, call.v = call.k[order], call.v[order]
    moved = {**{b: b + half for b in range(4)}, **{b + half: b for b in range(4)}}
    call.block_table = torch.tensor(
        [[moved.get(b, b) for b in row] for row in call.block_table.tolist()], dtype=torch.int32
    )
    out = attend(call)
    assert not out[3].any()


@pytest.mark.parametrize("call_bytes", [16, 2**11, 2**18])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (8, 1)])
def test_shared_prefixes_of_two_levels(monkeypatch, dtype, heads, kv_heads, call_bytes):
    monkeypatch.setattr(_cpu_schedule, "CALL_BYTES", call_bytes)
    call = flat(Call((100, 128, 81, 82, 40, 0), heads=heads, kv_heads=kv_heads, dtype=dtype, unowned=GARBAGE))
    shared = [share(call, 0, 4, 0, 3), share(call, 0, 2, 3, 5), share(call, 2, 2, 3, 5), [0, 0, 0, 0]]
    attend(call, shared)
    attend(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_of_different_lengths_are_one_call_behind_what_is_shared(monkeypatch, dtype):
    call = flat(Call((100, 104, 98, 128), dtype=dtype, unowned=GARBAGE))
    monkeypatch.setattr(_cpu_schedule, "CALL_BYTES", 80 * call.k[0, 0].numel() * call.k.element_size())
    shared = [share(call, 0, 4, 0, 6)]
    attend(call, shared)
    made = {"block_table": call.block_table, "seq_lens": call.seq_lens}
    once = ops.decode_schedule(call.q, call.k, call.v, shared_prefixes=torch.tensor(shared).int(), **made)
    assert [(part.shared, part.reading.visible is None) for part in once.parts] == [(True, True), (False, False)]


def test_a_prefix_is_read_once(monkeypatch):
    monkeypatch.setattr(_cpu_schedule, "CALL_BYTES", 64)
    call = flat(Call((100, 128, 81), blocks="runs"))
    shared = [share(call, 0, 3, 0, 4)]
    counts = []
    read = Reading.read
    monkeypatch.setattr(Reading, "read", lambda self, c: (counts.append(self.count * len(self.rows)), read(self, c))[1])
    out = call.compare(
        ops.decode_attention(
            call.q,
            call.k,
            call.v,
            block_table=call.block_table,
            seq_lens=call.seq_lens,
            shared_prefixes=torch.tensor(shared, dtype=torch.int32),
            **call.options,
        )
    )
    assert out.shape == (3, 1, 4, 32)
    assert counts == [64, 64, 36, 36, 64, 64, 17, 17]


def test_extreme_scores(monkeypatch):
    monkeypatch.setattr(_cpu_schedule, "CALL_BYTES", 64)
    call = flat(Call((96, 64), sharpness=1e4))
    attend(call, [share(call, 0, 2, 0, 3)])


def test_no_schedule_where_somebody_looks_at_the_op():
    call = Call((30, 20))
    given = {"block_table": call.block_table, "seq_lens": call.seq_lens}
    once = ops.decode_schedule(call.q, call.k, call.v, **given)
    assert isinstance(once, CpuSchedule)
    with Seen() as seen:
        assert isinstance(ops.decode_schedule(call.q, call.k, call.v, **given), torch.Tensor)
        out = ops.decode_attention(call.q, call.k, call.v, schedule=once, **given, **call.options)
    call.compare(out)
    assert seen.names == ["hf_fastattn::decode_schedule", "hf_fastattn::decode_attention"]


class Seen(TorchDispatchMode):
    """The names of the ops of this package that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hf_fastattn":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_batch(data):
    """Any lengths, places, sharing and costs give what the oracle gives."""
    lens = tuple(data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=5)))
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (4, 2), (6, 1)]))
    call = Call(
        lens,
        heads=heads,
        kv_heads=kv_heads,
        dim=16,
        blocks=data.draw(st.sampled_from(["runs", "permuted"])),
        unowned=data.draw(st.sampled_from([NAN, GARBAGE])),
        seed=data.draw(st.integers(0, 99)),
    )
    call = flat(call) if data.draw(st.booleans()) else call
    shared = None
    if data.draw(st.booleans()):
        first = data.draw(st.integers(0, len(lens) - 1))
        count = data.draw(st.integers(1, len(lens) - first))
        full = min((n - 1) // 16 for n in lens[first : first + count])
        if full > 0:
            shared = [share(call, first, count, 0, data.draw(st.integers(1, full)))]
    if shared is None:
        KINDS[data.draw(st.sampled_from(sorted(KINDS)))](call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu_schedule, "CALL_BYTES", data.draw(st.sampled_from([1, 2**10, 2**14, 2**18])))
        if any(lens):
            attend(call, shared)
        else:
            assert not call.run(ops, "decode_attention").any()


@pytest.fixture
def slow_few_rows(monkeypatch):
    """A processor that multiplies few rows slowly, whichever this one is."""
    monkeypatch.setattr(_torch, "few_rows_are_fast", lambda: False)


@pytest.mark.parametrize("num_seqs", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_long_sequences_stream_their_keys(monkeypatch, num_seqs, kv_heads, slow_few_rows):
    called = []
    stream = _torch._stream_one_query
    monkeypatch.setattr(_torch, "STREAMED_KEYS", 0)
    monkeypatch.setattr(_torch, "_stream_one_query", lambda *args: (called.append(1), stream(*args))[1])
    Call((50,) * num_seqs, heads=4, kv_heads=kv_heads, block_size=None).check("decode_attention")
    flat(Call((50,) * num_seqs, heads=4, kv_heads=kv_heads, blocks="runs")).check("decode_attention")
    Call((50,) * num_seqs, kv_heads=kv_heads, block_size=None, sharpness=1e4).check("decode_attention")
    window = Call((50,) * num_seqs, heads=4, kv_heads=kv_heads, block_size=None)
    window.options["window"] = 7
    window.check("decode_attention")
    assert len(called) == 4


@pytest.mark.parametrize("fast", [False, True])
def test_where_few_rows_are_fast_heads_are_packed(monkeypatch, fast):
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(_torch, "few_rows_are_fast", lambda: fast)
    monkeypatch.setattr(
        _torch.F, "scaled_dot_product_attention", lambda q, *a, **kw: (calls.append(q.shape), attention(q, *a, **kw))[1]
    )
    Call((50, 50), heads=4, kv_heads=2, block_size=None).check("decode_attention")
    assert calls == [(2, 2, 2, 32) if fast else (2, 4, 1, 32)]


@pytest.mark.parametrize(
    ("text", "fast"),
    [("processor: 0\nvendor_id: GenuineIntel\n", True), ("vendor_id: AuthenticAMD\n", False), (None, False)],
)
def test_the_maker_of_the_processor_decides(monkeypatch, tmp_path, text, fast):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(_torch, "CPU_INFO", str(tmp_path / "cpuinfo"))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert _torch.few_rows_are_fast.__wrapped__() is fast
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not _torch.few_rows_are_fast.__wrapped__()

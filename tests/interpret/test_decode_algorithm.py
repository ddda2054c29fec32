"""The decoding algorithm in Triton's interpreter: even cuts, arrival, shared prefixes, softmax kinds, batch invariance.

Every result is compared with float64, see decode_call.py; memory that nobody wrote is NaN or no sensible number.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn.kernels import decode_attention, decode_schedule
from hf_fastattn.kernels._loads import skip_zeros
from hf_fastattn.ops.shapes import NO_WINDOW

from . import interpreter_only, runs_kernels
from .decode_call import Call, poisoned_new_empty

pytestmark = runs_kernels

SOFTMAXES = ["lazy", "fixed", "online"]

TREE = ([0, 5, 0, 2], [0, 0, 0, 0], [0, 2, 2, 4], [3, 2, 2, 3], [7, 0, 0, 1])
"""Five sequences share 2 blocks, of them the first two 2 more and the last two 1 more; two entries are unused."""


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty(torch.Tensor.new_empty))


@pytest.fixture
def order(monkeypatch):
    """Return a function that makes the programs of a grid run in another order."""
    builder = triton.runtime.interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def use(places):
        def permuted(x, y, z):
            set_grid_idx(places[x] if builder.grid_dim[0] == len(places) else x, y, z)

        monkeypatch.setattr(builder, "set_grid_idx", permuted)

    return use


def tree(query_len=1, kv_heads=1, seed=0, **options):
    call = Call((70, 81, 49, 90, 64), kv_heads=kv_heads, heads=2 * kv_heads, query_len=query_len, seed=seed, **options)
    return call.share(*TREE)


def counters(schedule, call):
    """Return the counters of arrival."""
    begin, count = int(schedule.flatten()[6]), call.q.shape[0] * call.k.shape[2]
    return schedule.flatten()[begin : begin + count]


@pytest.mark.parametrize("num_programs", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_ranges_cut_sequences_and_heads_anywhere(num_programs, softmax):
    Call((33, 0, 1, 64, 100), heads=4, kv_heads=2, query_len=2).check(num_programs, softmax=softmax)


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("num_programs", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("logits", [500.0, 1e4])
def test_logits_of_any_size(softmax, num_programs, dtype, logits):
    """Spread over +-logits: OPT's lie between -497 and 364."""
    call = Call((60, 17), dim=16, dtype=dtype)
    call.k[..., 1:], call.q[..., 1:] = 0.0, 0.0
    call.q[..., 0] = 1.0
    call.k[..., 0] = torch.linspace(-1.0, 1.0, call.k[..., 0].numel()).view(call.k[..., 0].shape).flip(1)
    call.options["softmax_scale"] = logits
    call.check(num_programs, softmax=softmax, largest_logit=logits)


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("shape", ["rising", "falling", "low first tile", "high last key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_references_that_do_not_fit(softmax, shape, dtype):
    """Every tile exceeds the one before; only the first counts; the first would underflow every later weight."""
    call = Call((64, 40), dim=16, dtype=dtype, query_len=2)
    logit = torch.arange(64.0) if shape == "rising" else -torch.arange(64.0)
    if shape == "low first tile":
        logit = torch.where(torch.arange(64) < 16, -200.0, 3.0)
    elif shape == "high last key":
        logit = torch.where(torch.arange(64) == 39, 200.0, -3.0)
    call.q[..., 0] = 1.0
    for seq, blocks in enumerate(call.block_table[:, :4].tolist()):
        for i, block in enumerate(blocks):
            if block >= 0 and 16 * i < call.seq_lens[seq]:
                call.k[block, :, 0, 0] = (4.0 * logit[16 * i : 16 * i + 16]).to(dtype)
    call.check(2, softmax=softmax, largest_logit=800.0)


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_hidden_first_tiles(softmax):
    call = Call((50, 50), query_len=3, dtype=torch.float16)
    call.key_mask = torch.ones(2, 50, dtype=torch.int8)
    call.key_mask[0, :33] = 0
    call.key_mask[1, :47] = 0
    call.check(2, softmax=softmax)


@pytest.mark.parametrize("phi", [-300.0, 20.0, 300.0])
def test_a_fixed_reference_that_is_wrong_for_the_model(phi):
    Call((60, 0, 17), query_len=2).check(3, softmax="fixed", phi=phi)


@pytest.mark.parametrize(
    ("query_len", "num_programs"), [(1, 1), (1, 16), (2, 3), (2, 7), (5, 1), (5, 16), (8, 3), (8, 7)]
)
def test_shared_prefixes_of_two_levels(query_len, num_programs):
    call = tree(query_len)
    call.block_table[1:5, :2] = -1  # a shared block is found in its first sequence's row
    call.block_table[1, 2:4] = -1
    call.block_table[4, 2] = -1
    out = call.run(num_programs, call.config())
    call.share(*TREE)
    assert torch.equal(call.check(num_programs), out)


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize(("block_n", "block_m"), [(32, 16), (64, 16), (16, 32), (16, 4)])
def test_shared_prefixes_at_other_tile_sizes(softmax, block_n, block_m):
    """A prefix may end within a tile; 4 x 2 rows need two tiles each; 32 rows hold five sequences and more."""
    tree(4, kv_heads=2).check(5, block_n, block_m=block_m, softmax=softmax)


@pytest.mark.parametrize(("query_len", "num_programs"), [(1, 5), (3, 1), (3, 40)])
def test_many_shared_prefixes_side_by_side(query_len, num_programs):
    """Seven pairs and a group of four behind a prefix of all: every group has partial results of its own."""
    entries = [[0, 18, 0, 1], *([2 * i, 2, 1, 3] for i in range(7)), [14, 4, 1, 2]]
    call = Call(range(52, 70), heads=4, kv_heads=2, query_len=query_len).share(*entries)
    call.check(num_programs, block_m=8)


@pytest.mark.parametrize("levels", [8, 20])
def test_prefixes_behind_each_other(levels):
    """Of 8 there are partial results, of 20 not: then each sequence reads all its keys."""
    call = Call([16 * levels + 3 + seq for seq in range(5)], heads=2, kv_heads=1)
    call.share(*([0, 5, level, level + 1] for level in range(levels))).check(6, block_m=4)


@pytest.mark.parametrize("window", [1, 17, 40, 60, 1000])
@pytest.mark.parametrize("num_programs", [1, 6])
def test_shared_prefixes_under_a_window(window, num_programs):
    """Members stand at different positions: what one still sees is hidden from another."""
    call = tree(2)
    call.options["window"] = window
    call.check(num_programs)


def test_a_member_that_is_shorter_than_the_prefix_sees_its_own_keys_only():
    call = Call((70, 20, 0, 90)).share([0, 4, 0, 3])
    call.check(4)


def test_unused_entries_change_nothing():
    call = Call((33, 50))
    alone = call.run(3, call.config(block_m=16))
    call.shared_prefixes = torch.tensor([[0, 0, 0, 2], [5, -1, 3, 1], [0, 2, 1, 1]], dtype=torch.int32)
    assert torch.equal(call.run(3, call.config(block_m=16)), alone)


def test_sinks_are_added_once_with_shared_prefixes():
    call = tree(2)
    call.sinks = torch.tensor([1.0, 3.0])
    call.check(5)


@interpreter_only
@pytest.mark.parametrize("make", [tree, lambda: Call((100, 0, 33, 64), heads=4, kv_heads=2, query_len=2)])
def test_results_do_not_depend_on_who_arrives_last(make, order):
    call = make()
    first = call.run(4, call.config())
    for places in itertools.islice(itertools.permutations(range(4)), 1, 24, 5):
        order(places)
        assert torch.equal(call.run(4, call.config()), first)


def test_one_schedule_serves_many_layers():
    """Counters are back at zero after each launch: 3 layers, then one more whose queries differ."""
    call = tree(2, kv_heads=2)
    config = call.config()
    schedule = call.schedule(6, config)
    first = call.run(6, config)
    for _ in range(3):
        assert torch.equal(call.run(6, config, schedule), first)
        assert not counters(schedule, call).any()
    call.q = call.q.roll(1, 0)
    assert torch.equal(call.run(6, config, schedule), call.run(6, config))


def test_dense_layers_take_one_schedule_after_the_other(monkeypatch):
    """Layers with and without a window by turns, then longer keys: one schedule for each, results as with their own."""
    make, made = decode_schedule.launch, []
    monkeypatch.setattr(decode_attention, "_schedules", {})
    monkeypatch.setattr(decode_schedule, "launch", lambda *a, **kw: (made.append(make(*a, **kw)), made[-1])[1])
    for length in (50, 51):
        calls = [Call((length, length), block_size=None, heads=4, kv_heads=2, seed=seed) for seed in range(3)]
        calls[1].options["window"] = 20
        config = calls[0].config()
        own = [call.run(3, config, call.schedule(3, config)) for call in calls]
        made.clear()
        for _ in range(2):
            assert all(torch.equal(call.run(3, config), want) for call, want in zip(calls, own, strict=True))
        assert len(made) == 2


def test_what_is_kept_of_dense_schedules_is_bounded(monkeypatch):
    monkeypatch.setattr(decode_attention, "_schedules", {})
    for length in range(20, 20 + 2 * decode_attention.MOST_SCHEDULES + 1):
        call = Call((length,), block_size=None, heads=2, kv_heads=2)
        call.run(2, call.config())
        assert 0 < len(decode_attention._schedules) <= decode_attention.MOST_SCHEDULES


@interpreter_only
def test_an_aborted_launch_leaves_nothing_behind(order):
    """Programs that never ran leave counters behind; the next step's schedule begins at zero, in any memory."""
    call = tree(2, kv_heads=2)
    config = call.config()
    first = call.run(6, config)
    schedule = call.schedule(6, config)
    order([0, 1, 2, 2, 2, 2])  # programs 3 to 5 do not run
    call.run(6, config, schedule)
    assert counters(schedule, call).any()
    order(range(6))
    again = call.schedule(6, config)  # poisoned_scratch gives it counters of 1,000,003
    assert not counters(again, call).any()
    assert torch.equal(call.run(6, config, again), first)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 2)])
def test_a_schedule_for_other_heads_is_refused(heads, kv_heads):
    """As layers of one model may have them, though the shape of the schedule is the same."""
    made, other = Call((70, 33), heads=4, kv_heads=1), Call((70, 33), heads=heads, kv_heads=kv_heads)
    schedule = made.schedule(4, made.config(block_m=16))
    assert schedule.shape == other.schedule(4, other.config(block_m=16)).shape
    with pytest.raises(ValueError, match=r"expected a schedule for Plan\(.*, got one for other numbers of heads"):
        other.run(4, other.config(block_m=16), schedule)


def test_a_schedule_for_other_sizes_is_refused():
    call = tree()
    config = call.config()
    schedule = call.schedule(4, config)
    for other in (call.config(block_n=32), call.config(block_m=8)):
        with pytest.raises(ValueError, match="expected a schedule of shape"):
            call.run(4, other, schedule)
    call.shared_prefixes = call.shared_prefixes[:4]
    with pytest.raises(
        ValueError, match=r"expected a schedule of shape \(\d+, \d+\) for these sizes, got \(\d+, \d+\)"
    ):
        call.run(4, config, schedule)


@pytest.mark.parametrize(("seq_len", "query_len"), [(5, 1), (5, 3), (129, 3), (700, 1)])
def test_batch_invariance(seq_len, query_len):
    """Alone, beside others, first or last, on any number of programs: bit by bit the same."""
    call = Call((40, seq_len, 0, 150), heads=2, query_len=query_len, sharpness=4.0)
    call.batch_invariant = True
    scores = torch.einsum("nhqd,bskd->nhqbsk", call.q, call.k.nan_to_num()) * call.options["softmax_scale"]
    wanted = call.check(4, largest_logit=scores.abs().max().item())[1]
    for rows, num_programs in (([1], 1), ([1], 7), ([3, 1], 3), ([1, 0, 2], 5), ([0, 1, 2, 3], 20)):
        other = Call((1,), query_len=query_len)
        other.batch_invariant, other.options, other.k, other.v = True, call.options, call.k, call.v
        other.q, other.block_table, other.seq_lens = call.q[rows], call.block_table[rows], call.seq_lens[rows]
        assert torch.equal(other.run(num_programs, other.config())[rows.index(1)], wanted)


def test_batch_invariance_ignores_sharing():
    call = tree()
    call.batch_invariant = True
    config = call.config()
    with_entries = call.run(3, config)
    call.shared_prefixes = None
    assert torch.equal(with_entries, call.run(3, config))


@interpreter_only
@pytest.mark.parametrize("hidden", [0, 1, 15, 16, 40, 1500, 2900, 3000])
@pytest.mark.parametrize(("first", "end"), [(0, 188), (3, 188), (100, 150)])
def test_leading_padded_tiles_are_skipped(hidden, first, end):
    mask = torch.ones(3000, 2, dtype=torch.int8)[:, 0]
    mask[:hidden] = 0
    found = torch.zeros(1, dtype=torch.int32)
    _skip_zeros_kernel[(1,)](mask, mask.stride(0), found, first, end, 3000)
    expected = next((tile for tile in range(first, end) if mask[16 * tile : 16 * tile + 16].any()), end)
    assert found.item() == expected


@triton.jit
def _skip_zeros_kernel(ptr, stride, found_ptr, first, end, length):
    tl.store(found_ptr, skip_zeros(ptr, stride, first, end, length, 16))


@interpreter_only
def test_padded_tiles_are_not_multiplied(monkeypatch):
    """The key block that is read for a tile is counted: with 64 of 80 keys hidden, one of five is left."""
    call = Call((80,), block_size=None)
    call.key_mask = torch.ones(1, 80, dtype=torch.int8)
    call.key_mask[0, :64] = 0
    dots = []
    builder = triton.runtime.interpreter.InterpreterBuilder
    create_dot = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *args: dots.append(1) or create_dot(*args))
    call.check(1)
    assert len(dots) == 2


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.integers(33, 90), min_size=2, max_size=5),
    query_len=st.integers(1, 4),
    kv_heads=st.integers(1, 2),
    window=st.sampled_from([NO_WINDOW, 20, 50]),
    softmax=st.sampled_from(SOFTMAXES),
    block=st.sampled_from([(16, 16), (32, 8), (16, 32)]),
    num_programs=st.integers(1, 9),
    data=st.data(),
)
def test_any_small_tree(lens, query_len, kv_heads, window, softmax, block, num_programs, data):
    """One prefix of all or some sequences, and a second one behind it of some of those."""
    call = Call(tuple(lens), heads=2 * kv_heads, kv_heads=kv_heads, query_len=query_len, sharpness=4.0)
    first = data.draw(st.integers(0, len(lens) - 1))
    count = data.draw(st.integers(1, len(lens) - first))
    room = [(n - query_len) // 16 for n in lens]
    depth = data.draw(st.integers(0, min(room[first : first + count])))
    inner = data.draw(st.integers(first, first + count - 1))
    inner_count = data.draw(st.integers(1, first + count - inner))
    inner_depth = data.draw(st.integers(depth, min(room[inner : inner + inner_count])))
    entries = [[first, count, 0, depth], [inner, inner_count, depth, inner_depth]]
    call.share(*(entries if data.draw(st.booleans()) else entries[::-1]))
    call.options["window"] = window
    call.check(num_programs, block[0], block_m=block[1], softmax=softmax)

"""The work list of a decode step in plain Python: every tile once, and evenly, for the benchmark's raggedest batches.

That the device writes this list: tests/interpret/test_decode_schedule.py.
"""

import heapq
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from eval.roofline import decode_cells
from hf_fastattn import ops
from hf_fastattn.kernels import _decode_plan
from hf_fastattn.kernels._decode_plan import DecodeConfig, Plan, config, make_plan, own_ranges, share, work

H200_PROGRAMS = 132


def plan_of(cell, programs_per_sm=None):
    """Return the plan of a benchmark cell on an H200, and its shared entries."""
    query_len, shared = cell.query_len, cell.shared_prefix // (cell.block_size or 64)
    entries = [(0, len(cell.lens), 0, shared)] if shared else []
    rows = cell.num_heads // cell.num_kv_heads * query_len
    members = len(cell.lens) if shared else 1
    cfg = config(90, cell.head_dim, cell.head_dim, torch.bfloat16, rows, cell.block_size, members)
    programs = H200_PROGRAMS * (programs_per_sm or cfg.programs_per_sm)
    block_size = cell.block_size or 64

    def meta(*shape):
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    q, k = (
        meta(len(cell.lens), cell.num_heads, query_len, cell.head_dim),
        meta(1, block_size, cell.num_kv_heads, cell.head_dim),
    )
    table, listed = meta(len(cell.lens), 1), meta(len(entries), 4) if entries else None
    return make_plan(q, k, k, table, listed, False, config=cfg, num_programs=programs)[1], entries


def fixed_split(cell, plan, splits):
    """Return the tiles of the busiest program place when every sequence and head is cut into so many pieces.

    FlashDecoding's grid of sequences x heads x splits: each goes to the place that is free first, and reads at least
    one tile's worth of time.
    """
    busy = [0] * plan.num_programs
    for seq_len in cell.lens:
        count = -(-seq_len // plan.block_n)
        pieces = [(i + 1) * count // splits - i * count // splits for i in range(splits)]
        for piece in pieces * plan.num_kv_heads * plan.row_tiles:
            heapq.heapreplace(busy, busy[0] + max(piece, 1))
    return max(busy)


def splits_by_fill(cell, plan):
    """Return the number of splits that one chooses without lengths: the smallest that fills the places nearly best."""
    units = len(cell.lens) * plan.num_kv_heads * plan.row_tiles
    filled = [units * n / (-(-units * n // plan.num_programs) * plan.num_programs) for n in range(1, 129)]
    return next(n for n, share in enumerate(filled, 1) if share >= 0.85 * max(filled))


CELLS = {cell.name: cell for cell in decode_cells()}
RAGGED = [name for name in CELLS if any(word in name for word in ("ragged", "zipf", "uniform", "shared", "17x", "1x"))]


@pytest.mark.parametrize("name", RAGGED)
def test_the_busiest_program_has_hardly_more_than_the_mean(name):
    """The figures of both, and of a fixed split beside them, are printed: pytest -s."""
    cell = CELLS[name]
    plan, entries = plan_of(cell)
    _, _, tiles = work(plan, cell.lens, entries, query_len=cell.query_len, block_size=cell.block_size or 64)
    mean = sum(tiles) / len(tiles)
    splits = splits_by_fill(cell, plan)
    chosen, best = fixed_split(cell, plan, splits), min(fixed_split(cell, plan, 2**n) for n in range(8))
    sys.stdout.write(
        f"{name}: busiest {max(tiles)} tiles, mean {mean:.1f}; fixed split {chosen} ({splits} splits, chosen without "
        f"lengths), {best} at best\n"
    )
    if cell.num_kv_heads > 1:  # else see the next test
        assert max(tiles) <= 1.05 * mean + 1
        assert max(tiles) <= chosen


def test_only_what_many_rows_share_is_cut_into_fewer_ranges():
    """One key head of all query heads: else the last program would read as many partial results as there are others."""
    ranges = {}
    for name, cell in CELLS.items():
        plan, entries = plan_of(cell)
        if cell.num_kv_heads > 1 and not entries:
            total = sum(segment.num_tiles * segment.units for segment in work(plan, cell.lens)[1])
            found = own_ranges(total, plan.balance, plan.num_programs)
            assert found == plan.num_programs or found >= total
        elif not entries:
            tiles = work(plan, cell.lens)[2]
            ranges[name] = (sum(map(bool, tiles)), max(tiles), sum(tiles))
    assert ranges == {
        "1x32k h8/1 d128 block 64": (64, 8, 512),  # 512 tiles of 32 KiB, partial results of 4 KiB
        "1x8k h8/1 d256 block 64": (32, 8, 256),  # 8 KiB
    }


@given(total=st.integers(0, 10**6), balance=st.integers(0, 10**6), num_programs=st.integers(1, 300))
def test_ranges_are_near_the_best_number(total, balance, num_programs):
    found = own_ranges(total, balance, num_programs)
    assert 1 <= found <= num_programs
    if found < num_programs:
        assert found.bit_count() == 1
        assert balance and total * balance < 2 * found**2
        assert found == 1 or found**2 <= 2 * total * balance


def test_ragged_work_is_far_more_even_than_a_fixed_split():
    cell = CELLS[next(name for name in RAGGED if "ragged" in name)]
    plan, _ = plan_of(cell)
    _, _, tiles = work(plan, cell.lens)
    assert fixed_split(cell, plan, splits_by_fill(cell, plan)) >= 4 * max(tiles)
    assert min(fixed_split(cell, plan, 2**n) for n in range(8)) >= 1.2 * max(tiles)


def test_a_shared_prefix_is_listed_once_for_each_tile_of_rows():
    cell = CELLS[next(name for name in RAGGED if "64x(32k+256)" in name)]
    plan, entries = plan_of(cell)
    shared, own, tiles = work(plan, cell.lens, entries)
    assert plan.members_per_tile == 16  # 64 rows of 4 query heads
    assert shared[0].units == 8 * 4
    assert (shared[0].low, shared[0].num_tiles) == (0, 512)
    assert {(segment.low, segment.num_tiles, segment.parent) for segment in own} == {(512, 4, 0)}
    assert sum(tiles) == 8 * (4 * 512 + 64 * 4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    num_programs=st.integers(1, 40),
    rows=st.sampled_from([1, 3, 4, 20, 70]),
    kv_heads=st.integers(1, 3),
    window=st.sampled_from([1, 30, 2**31 - 1]),
    count=st.integers(0, 8),
    blocks=st.integers(0, 10),
)
def test_every_visible_tile_is_listed(lens, num_programs, rows, kv_heads, window, count, blocks):
    count = min(count, len(lens))
    entries = [(0, count, 0, min([blocks, *(n // 16 for n in lens[:count])]))] if count else []
    plan = Plan(len(lens), len(entries), kv_heads, rows, 16, 32, num_programs, False)
    shared, own, tiles = work(plan, lens, entries, window=window, block_size=16)
    for seq, seq_len in enumerate(lens):
        keys = set(range(own[seq].key_begin, own[seq].key_end))
        covered = range(32 * own[seq].low, 32 * (own[seq].low + own[seq].num_tiles))
        assert keys <= set(covered)
        if own[seq].parent >= 0:
            parent = shared[own[seq].parent]
            assert not keys & set(range(parent.key_begin, parent.key_end))
            keys |= set(range(parent.key_begin, parent.key_end))
        assert keys >= set(range(max(seq_len - window, 0), seq_len))
    total = sum(segment.num_tiles * segment.units for segment in shared + own)
    assert sum(tiles) == total
    assert max(tiles) - min(tiles) <= 2
    assert max(tiles) == -(-total // num_programs)


def test_what_is_over_goes_to_different_programs():
    """A tile more of one list falls to the programs with none more of the other, as far as there are such."""
    for first, second, parts in ((5, 2, 4), (9, 11, 4), (0, 3, 5), (7, 0, 3)):
        both = [share(parts - 1 - i, first, parts) + share(i, second, parts) for i in range(parts)]
        assert sum(both) == first + second
        assert max(both) == -(-(first + second) // parts)


def tensors(device="cpu"):
    q, k = torch.zeros(2, 4, 1, 32, device=device), torch.zeros(8, 16, 2, 32, device=device)
    table = torch.full((2, 3), -1, dtype=torch.int32, device=device)
    return q, k, table, torch.zeros(2, dtype=torch.int32, device=device)


def test_a_cpu_needs_no_schedule():
    q, k, table, lens = tensors()
    schedule = ops.decode_schedule(q, k, k, block_table=table, seq_lens=lens)
    assert schedule.shape == (0, 0)
    assert schedule.dtype == torch.int32


def test_every_choice_of_tiles_cuts_and_sharing_has_a_shape_of_its_own():
    """A schedule that was made for another call does not fit, so that a launch can refuse it."""
    q, k, table, _ = tensors()
    configs = [DecodeConfig(m, n, 4, 3) for m in (4, 8, 16, 32, 64) for n in (16, 32, 64, 128)]
    entries = [None, *(torch.zeros(n, 4, dtype=torch.int32) for n in (1, 2, 3))]
    plans = [make_plan(q, k, k, table, e, False, config=c)[1] for c in configs for e in entries]
    plans += [make_plan(q, k, k, table, None, True, config=c)[1] for c in configs]
    assert len({plan.shape for plan in plans}) == len(plans)
    for plan in plans:
        words = 8 + 4 * plan.num_programs + 9 * (2 + plan.num_shared) + 2 + 2 * 2 * plan.row_tiles
        assert plan.shape[0] * plan.shape[1] >= words


def test_traced_for_a_gpu_the_shape_follows_from_shapes(monkeypatch):
    monkeypatch.setattr(_decode_plan, "_num_sms", lambda device: 132)
    monkeypatch.setattr(_decode_plan, "device_arch", lambda device: 90)
    with FakeTensorMode():
        q, k, table, lens = tensors(device="cuda")
        entries = torch.zeros(3, 4, dtype=torch.int32, device="cuda")
        schedule = ops.decode_schedule(q, k, k, block_table=table, seq_lens=lens, shared_prefixes=entries)
        _, plan = make_plan(q, k, k, table, entries, False)
        assert plan.num_programs == 264
        assert schedule.shape == plan.shape
        assert schedule.device == q.device
        wide = [torch.empty(2, 4, 1, 320, device="cuda"), torch.empty(8, 16, 2, 320, device="cuda")]
        unsupported = ops.decode_schedule(wide[0], wide[1], wide[1], block_table=table, seq_lens=lens)
        assert unsupported.shape == (0, 0)  # as the launcher's refusal leaves it to PyTorch


def test_a_symbolic_number_of_sequences_stays_symbolic():
    """A compiled step serves another batch size without compiling anew."""

    def schedule(q, k, table):
        return q.new_empty(make_plan(q, k, k, table, None, False)[1].shape)

    q, k, table, _ = tensors()
    traced = make_fx(schedule, tracing_mode="symbolic")(q, k, table)
    more = [torch.zeros(9, 4, 1, 32), k, torch.zeros(9, 3, dtype=torch.int32)]
    assert traced(*more).shape == schedule(*more).shape != schedule(q, k, table).shape


def test_the_op_is_well_registered():
    q, k, table, lens = tensors()
    for entries in (None, torch.zeros(2, 4, dtype=torch.int32)):
        torch.library.opcheck(
            torch.ops.hf_fastattn.decode_schedule.default, (q, k, k, table, lens, entries, 5, entries is None)
        )
    torch.library.opcheck(torch.ops.hf_fastattn.decode_schedule.default, (q, k[:2], k[:2], None, None, None, 5, False))


def test_a_step_with_a_schedule_compiles_to_one_graph():
    def step(q, k, table, lens, entries):
        paged = {"block_table": table, "seq_lens": lens, "shared_prefixes": entries}
        schedule = ops.decode_schedule(q, k, k, **paged)
        first = ops.decode_attention(q, k, k, softmax_scale=0.3, schedule=schedule, **paged)
        return first + ops.decode_attention(q * 2, k, k, softmax_scale=0.3, schedule=schedule, **paged)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, k, table, lens = tensors()
    q, k = torch.randn_like(q), torch.randn_like(k)
    table[:, :2] = torch.tensor([[3, 1], [3, 6]])
    lens += torch.tensor([30, 25], dtype=torch.int32)
    entries = torch.tensor([[0, 2, 0, 1]], dtype=torch.int32)
    torch.testing.assert_close(compiled(q, k, table, lens, entries), step(q, k, table, lens, entries))


@pytest.mark.parametrize(
    ("entries", "options", "error", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.int32),
            {},
            ValueError,
            r"expected shared_prefixes \(num_shared, 4\), got \(2, 3\)",
        ),
        (torch.zeros(2, 4), {}, TypeError, "shared_prefixes must be int32, got torch.float32"),
        (
            torch.zeros(1, 4, dtype=torch.int32),
            {"key_mask": torch.ones(2, 48, dtype=torch.int8)},
            ValueError,
            "shared_prefixes and key_mask do not go together",
        ),
        (
            torch.zeros(1, 4, dtype=torch.int32),
            {"block_table": None, "seq_lens": None},
            ValueError,
            "shared_prefixes needs a block_table",
        ),
    ],
)
def test_shared_prefixes_that_do_not_belong_to_a_call(entries, options, error, message):
    q, k, table, lens = tensors()
    k = k[:2].transpose(1, 2) if "block_table" in options else k
    given = {"block_table": table, "seq_lens": lens, "shared_prefixes": entries} | options
    with pytest.raises(error, match=message):
        ops.decode_attention(q, k, k, softmax_scale=1.0, **given)

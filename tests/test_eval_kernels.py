"""eval.kernels and eval.roofline: counts by hand, an honest clock, and wrong implementations that are never timed."""

import json
import time
from pathlib import Path

import pytest
import torch

from eval import attempts, kernel_inputs, kernels, roofline
from eval.kernel_rivals import OURS, candidates, index_put, ours_attention, ours_store
from eval.kernel_timing import Prepared, make_timer
from eval.kernels import measure_cell
from eval.roofline import Ceilings, DecodeCell, PrefillCell, StoreCell
from hf_fastattn import ops

CPU = torch.device("cpu")
CEILINGS = Ceilings("made up", 10e9, 1e12)
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def measure(cell, implementations, dtype=torch.float32):
    rows = measure_cell(cell, CPU, dtype, CEILINGS, 1, implementations)
    return {row["implementation"]: row for row in rows}


def altered(change):
    """Our implementation with its output changed, and a list of the calls made of it."""
    seen = []

    def prepare(cell, copies):
        def wrap(call):
            def wrapped():
                seen.append(1)
                return change(call())

            return wrapped

        return Prepared([wrap(call) for call in ours_attention(cell, copies).calls])

    return prepare, seen


def without_key(index):
    """An attention that loses one key of every sequence (of one length)."""

    def prepare(cell, copies):
        def bind(x):
            k, v = (torch.cat([t[:, :, :index], t[:, :, index:][:, :, 1:]], 2) for t in x.dense)
            return lambda: ops.prefill_attention(x.q, k, v, softmax_scale=x.scale, causal=False)

        return Prepared([bind(x) for x in copies])

    return prepare


# 8 + 3 tokens in blocks of 4; a token has 2 x 2 x 16 elements, queries and outputs 2 x 4 x 16 elements each;
# tables 2 + 1 entries, two lengths.
DECODE = DecodeCell((8, 3), **SMALL, block_size=4)


@pytest.mark.parametrize(
    ("cell", "moved", "flops"),
    [
        (DECODE, 11 * 64 * 2 + 2 * 128 * 2 + 5 * 4, 4 * 16 * 4 * 11),
        # two queries: the first sees one key less
        (DecodeCell((8, 3), **SMALL, block_size=4, query_len=2), 1408 + 1024 + 20, 4 * 16 * 4 * (7 + 8 + 2 + 3)),
        (DecodeCell((8, 8), **SMALL, block_size=None), 16 * 64 * 2 + 2 * 128 * 2, 4 * 16 * 4 * 16),
        # four of the eight tokens are the same in both sequences, but every query still meets eight keys
        (DecodeCell((8, 8), **SMALL, block_size=4, shared_prefix=4), 12 * 64 * 2 + 512 + 24, 4 * 16 * 4 * 16),
        (PrefillCell(2, 3, 3, **SMALL), 6 * 64 * 2 + 2 * 6 * 64 * 2, 2 * 4 * 16 * 4 * (1 + 2 + 3)),
        (PrefillCell(2, 3, 3, **SMALL, causal=False), 6 * 64 * 2 + 2 * 6 * 64 * 2, 2 * 4 * 16 * 4 * 9),
        (PrefillCell(1, 2, 7, **SMALL, block_size=4), 7 * 64 * 2 + 2 * 2 * 64 * 2 + 12, 4 * 16 * 4 * (6 + 7)),
        # three tokens at 3, 4 and 5 touch two blocks of four; read once, written once
        (StoreCell(2, 3, 3, num_kv_heads=2, head_dim=16, block_size=4), 2 * (2 * 3 * 64 * 2 + 2 * 4 + 4), 0),
    ],
)
def test_counts(cell, moved, flops):
    assert roofline.moved_bytes(cell, 2) == moved
    assert roofline.counted_flops(cell) == flops


def test_bound_is_the_slower_of_memory_and_compute():
    moved, flops = roofline.moved_bytes(DECODE, 2), roofline.counted_flops(DECODE)
    assert roofline.bound(DECODE, Ceilings("", 1.0, 1e30), 2) == roofline.Bound(moved, "memory")
    assert roofline.bound(DECODE, Ceilings("", 1e30, 1.0), 2) == roofline.Bound(flops, "compute")


def test_decode_bounds_of_the_design():
    # 4096 bytes of keys and values a token; 128k tokens take 125 us at 4.3 TB/s
    cell = DecodeCell((131072,))
    assert roofline.kv_cache_bytes(cell, 2) == 4096 * 131072
    assert roofline.bound(cell, Ceilings("", 4.3e12, 790e12), 2).seconds == pytest.approx(125e-6, rel=0.01)


@pytest.mark.parametrize("small", [False, True])
def test_cells_have_names_of_their_own_and_fit_40_gb(small):
    cells = roofline.all_cells(small=small)
    assert len({(cell.op, cell.name) for cell in cells}) == len(cells) == len(set(cells))
    assert max(roofline.kv_cache_bytes(cell, 2) for cell in cells) <= 40e9
    assert {cell.op for cell in cells} == set(kernels.OPS)


def test_a_beginning_of_the_spread_list_covers_all_ops_and_lengths():
    cells = roofline.all_cells()
    spread = kernels.spread_out(cells)
    assert sorted(map(repr, spread)) == sorted(map(repr, cells))
    assert {cell.op for cell in spread[:3]} == set(kernels.OPS)
    decode = [cell for cell in spread if isinstance(cell, DecodeCell)][:8]
    assert min(len(cell.lens) for cell in decode) == 1
    assert max(len(cell.lens) for cell in decode) >= 32


def test_roofline_command_line(capsys):
    assert roofline.main(["--gpu", "H100-SXM", "--small"]) == 0
    assert "3350 GB/s" in capsys.readouterr().out
    assert roofline.main(["--bandwidth", "4300", "--tflops", "790"]) == 0
    assert "| decode | 1x128k h32/8 d128 block 64 | 537 | 2.15 | 4 | 125 | memory |" in capsys.readouterr().out


def test_a_sleep_is_measured_right():
    entered = []

    class Context:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *_):
            pass

    timer, how = make_timer(Prepared([lambda: time.sleep(0.01), lambda: time.sleep(0.03)], Context), CPU)
    before = len(entered)
    assert 0.02 <= min(timer() for _ in range(5)) <= 0.025  # a sleep never ends early
    assert how == "clock"
    assert len(entered) == before + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", [DecodeCell((48, 48), **SMALL, block_size=16), PrefillCell(2, 48, 48, **SMALL)])
def test_wrong_implementations_are_flagged_and_not_timed(cell, dtype):
    damage = {
        "scaled": altered(lambda out: out * 1.05),
        "one row NaN": altered(lambda out: out.index_fill(1, torch.tensor([0]), float("nan"))),
        "other layout": altered(lambda out: out.transpose(1, 2)),
        "heads swapped": altered(lambda out: out.flip(2)),
        "sequences swapped": altered(lambda out: out.flip(0)),
        "nothing": altered(lambda out: None),
    }
    rows = measure(cell, {OURS: ours_attention, **{name: pair[0] for name, pair in damage.items()}}, dtype)
    assert rows[OURS]["status"] == "ok"
    assert rows[OURS]["us"] > 0
    for name, (_, seen) in damage.items():
        assert rows[name]["status"] == "WRONG", name
        assert "us" not in rows[name]
        assert len(seen) == 1
    assert "x_best_rival" not in rows[OURS]  # no right rival


@pytest.mark.parametrize("index", [0, 31, 47])
def test_one_lost_key_is_wrong(index):
    cell = DecodeCell((48, 48), **SMALL, block_size=16)
    assert measure(cell, {"loses a key": without_key(index)})["loses a key"]["status"] == "WRONG"


@pytest.mark.parametrize("query_len", [1, 5])
def test_wrong_stores_are_flagged(query_len):
    def misses_values(cell, copies):
        def call(x):
            ops.store_kv(x.k, 0 * x.v, x.k_cache, x.v_cache, x.block_table, x.past_lens)

        return Prepared([lambda x=x: call(x) for x in copies])

    def writes_elsewhere_too(cell, copies):
        def call(x):
            ops.store_kv(x.k, x.v, x.k_cache, x.v_cache, x.block_table, x.past_lens)
            x.k_cache[0, 15] = 1.0

        return Prepared([lambda x=x: call(x) for x in copies])

    cell = StoreCell(3, query_len, 17, num_kv_heads=2, head_dim=16, block_size=16)
    implementations = {
        "misses values": misses_values,
        "writes elsewhere too": writes_elsewhere_too,
        OURS: ours_store,
        "index_put": index_put,
    }
    rows = measure(cell, implementations)
    assert [row["status"] for row in rows.values()] == ["WRONG", "WRONG", "ok", "ok"]
    assert rows[OURS]["x_best_rival"] == pytest.approx(rows["index_put"]["us"] / rows[OURS]["us"])


@pytest.mark.parametrize(
    "cell",
    [
        DecodeCell((40, 40), **SMALL, block_size=16, query_len=3),
        DecodeCell((40, 7, 100), **SMALL, block_size=16),
        DecodeCell((40, 40), **SMALL, block_size=16, shared_prefix=32),
        DecodeCell((40, 40), **SMALL, block_size=None),
        PrefillCell(2, 33, 33, **SMALL, causal=False),
        PrefillCell(1, 8, 40, **SMALL, block_size=16),
    ],
    ids=lambda cell: cell.name,
)
def test_all_that_runs_here_is_right(cell):
    rows = measure(cell, candidates(cell.op, with_flex=False))
    assert rows[OURS]["status"] == "ok"
    assert not any("WRONG" in row["status"] for row in rows.values())
    if len(set(cell.lens)) == 1:
        assert rows["sdpa flash"]["status"] == rows["sdpa math"]["status"] == "ok"
        assert rows[OURS]["x_best_rival"] > 0
    else:
        assert rows["sdpa flash"]["status"] == "not available: dense keys need sequences of one length"


def test_a_shared_prefix_lies_in_the_same_blocks():
    cell = DecodeCell((40, 40, 50), **SMALL, block_size=16, shared_prefix=32)
    table = kernel_inputs.make_inputs(cell, torch.float32, CPU, 0).block_table.tolist()
    assert table[0][:2] == table[1][:2] == table[2][:2]
    own = [block for row in table for block in row[2:] if block >= 0]
    assert sorted(own + table[0][:2]) == list(range(6))


def test_decode_is_measured_with_and_without_what_it_shares():
    cell = DecodeCell((40, 40), **SMALL, block_size=16, shared_prefix=32)
    assert kernel_inputs.shared_entries(cell, CPU).tolist() == [[0, 2, 0, 2]]
    rows = measure(cell, candidates("decode", with_flex=False))
    assert rows[f"{OURS}, nothing shared"]["status"] == rows[f"{OURS}, schedule each call"]["status"] == "ok"
    assert "kernel's" in rows[f"{OURS}, online softmax"]["status"]
    assert rows[OURS]["x_best_rival"] <= rows["sdpa math"]["us"] / rows[OURS]["us"]  # our own rows are no rivals
    assert set(rows) - set(candidates("decode", with_flex=False, with_variants=False)) == {
        f"{OURS}, {variant}" for variant in ("nothing shared", "schedule each call", "online softmax", "fixed softmax")
    }
    alone = measure(DECODE, candidates("decode", with_flex=False))
    assert alone[f"{OURS}, nothing shared"]["status"] == "not available: the sequences share nothing"


def test_a_rival_that_raises_is_a_row():
    def raises(cell, copies):
        raise RuntimeError("does not like\nthis")

    def raises_when_called(cell, copies):
        return Prepared([lambda: torch.zeros(2) + torch.zeros(3)])

    rows = measure(DECODE, {"a": raises, "b": raises_when_called, OURS: ours_attention})
    assert rows["a"]["status"] == "not available: does not like"
    assert rows["b"]["status"].startswith("not available: The size of tensor a (2)")
    assert rows[OURS]["status"] == "ok"
    assert measure(DECODE, {OURS: raises})[OURS]["status"] == "failed: does not like"


@pytest.fixture
def two_cells(monkeypatch):
    cells = [DECODE, StoreCell(2, 1, 5, num_kv_heads=2, head_dim=16, block_size=16)]
    monkeypatch.setattr(kernels, "all_cells", lambda small: cells)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device, dtype: CEILINGS)
    return cells


def test_command_line_writes_what_it_measured(tmp_path: Path, capsys, monkeypatch):
    cells = [DECODE, PrefillCell(1, 16, 16, **SMALL)]
    monkeypatch.setattr(kernels, "all_cells", lambda small: cells)
    out = tmp_path / "new" / "kernels.json"
    assert kernels.main(["--device", "cpu", "--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["kind"] == "kernels"
    assert result["versions"]["torch"] == torch.__version__
    assert result["device"] and result["commit"] and result["command"] and result["date"]
    ceilings = result["settings"]["ceilings"]
    assert 1e8 < ceilings["bytes_per_s"] < 1e12
    assert 1e8 < ceilings["flops_per_s"] < 1e14
    assert result["settings"]["left_out"] == []
    for cell in cells:
        row = next(row for row in result["rows"] if row["cell"] == cell.name and row["implementation"] == OURS)
        assert row["status"] == "ok"
        least = max(row["MB"] * 1e6 / ceilings["bytes_per_s"], row["GFLOP"] * 1e9 / ceilings["flops_per_s"])
        assert row["fraction"] == pytest.approx(least / row["us"] * 1e6)
        tera, giga = row["GFLOP"] / 1e3 / (row["us"] / 1e6), row["MB"] / 1e3 / (row["us"] / 1e6)
        assert row["rate"] == pytest.approx(tera if row["unit"] == "TFLOP/s" else giga)
    assert "xformers splitk" in capsys.readouterr().out


def test_an_interrupt_keeps_finished_cells(two_cells, tmp_path: Path, capsys, monkeypatch):
    measured = []

    def interrupted(cell, *args):
        measured.append(cell)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure_cell(cell, *args)

    monkeypatch.setattr(kernels, "measure_cell", interrupted)
    out = tmp_path / "kernels.json"
    kernels.main(["--device", "cpu", "--rounds", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {row["cell"] for row in result["rows"]} == {DECODE.name}
    assert result["settings"]["left_out"] == [two_cells[1].name]
    assert "interrupted" in capsys.readouterr().out


def test_a_lost_gpu_is_a_row_and_the_rest_can_be_resumed(two_cells, tmp_path: Path, monkeypatch):
    out, native, done = tmp_path / "kernels.json", kernels.measure_cell, []

    def losing(cell, *args):
        done.append(cell.name)
        if len(done) == 1:
            raise attempts.DeviceLost("the GPU was lost")
        return native(cell, *args)

    def lost(*args):
        raise attempts.DeviceLost("the GPU was lost")

    monkeypatch.setattr(kernels, "measure_cell", losing)
    monkeypatch.setattr(attempts, "ensure_device", lost)
    argv = ["--device", "cpu", "--out", str(out), "--resume", "--rounds", "1"]
    assert kernels.main(argv) == attempts.LOST
    [row] = json.loads(out.read_text())["rows"]
    assert row["cell"] == done[0] and "the GPU was lost" in row["status"]
    monkeypatch.setattr(attempts, "ensure_device", lambda reason: None)
    kernels.main(argv)
    assert len(done) == len(set(done)) == 2
    rows = json.loads(out.read_text())["rows"]
    assert rows[0] == row and {row["cell"] for row in rows} == set(done)


def test_a_spent_budget_leaves_cells_out_and_says_so(two_cells, capsys):
    assert kernels.main(["--device", "cpu", "--rounds", "1", "--budget", "1e-9"]) == 0
    assert "1 of 2 cells were not reached" in capsys.readouterr().out


def test_wrong_gives_exit_code_1(two_cells, monkeypatch):
    monkeypatch.setattr(kernels, "candidates", lambda op, **options: {"bad": lambda *_: Prepared([lambda: None])})
    assert kernels.main(["--device", "cpu", "--ops", "decode", "--rounds", "1"]) == 1


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--device", "tpu9"], "no device 'tpu9' here"),
        (["--device", "meta"], "no device 'meta' here"),
        (["--device", "cpu", "--dtype", "float64"], "float32, bfloat16 or float16"),
        (["--device", "cpu", "--dtype", "int8"], "no floating-point dtype"),
        (["--device", "cpu", "--rounds", "0"], "at least one round"),
        (["--device", "cpu", "--budget", "-1"], "positive budget"),
        (["--device", "cpu", "--budget", "nan"], "positive budget"),
        (["--device", "cpu", "--match", "no such cell"], "no cell's name has 'no such cell'"),
        (["--device", "cpu", "--out", "."], "is a folder"),
        (["--device", "cpu", "--threads", "0"], "at least one thread"),
    ],
)
def test_bad_input_ends_with_a_sentence(argv, sentence):
    with pytest.raises(SystemExit) as stop:
        kernels.main(argv)
    assert str(stop.value.code).startswith("error: ")
    assert sentence in str(stop.value.code)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--gpu", "V100"], "pass one of A100-80GB, H100-SXM, H200, B200"),
        (["--bandwidth", "100"], "pass both"),
        (["--bandwidth", "-1", "--tflops", "1"], "positive"),
        (["--itemsize", "3"], "2, 4 or 8 bytes"),
    ],
)
def test_bad_roofline_input_ends_with_a_sentence(argv, sentence):
    with pytest.raises(SystemExit) as stop:
        roofline.main(argv)
    assert sentence in str(stop.value.code)

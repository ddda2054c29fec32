"""eval.tune_linear and eval.linears on the CPU: what they decide and write, with clocks that are made up."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval import linears, tune_linear
from eval.roofline import Ceilings
from eval.tune_linear import candidates, check_output, fields_of, tune_shape, write_table
from hf_fastattn.kernels import decode_linear_plan, decode_linear_table
from hf_fastattn.kernels.decode_linear_plan import LIBRARY, Plan

CPU = torch.device("cpu")
ARCHS = (80, 90, 100)


def clock_of(times, default=1.0):
    """A clock that takes what times says for (kind, rows), and a list of what it was asked."""
    asked = []

    def clock(plan, num_rows):
        asked.append((plan, num_rows))
        return times.get((plan.kind, num_rows), default)

    return clock, asked


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize(("n", "k"), [*tune_linear.SHAPES, (1024, 4096), (256, 16384), (512, 512)])
def test_candidates_can_be_launched(arch, num_rows, n, k):
    plans = candidates(num_rows, n, k, arch)
    assert len(plans) == len(set(plans)) <= 400
    kinds = {plan.kind for plan in plans}
    assert "gemv" not in kinds if num_rows > 4 else kinds <= {"gemv", "flat"}
    for plan in plans:
        assert plan.block_n & (plan.block_n - 1) == 0
        assert plan.block_k & (plan.block_k - 1) == 0
        assert plan.kind == "flat" or plan.block_k == 256 * plan.num_warps <= k
        assert plan.kind == "gemv" or plan.block_n >= 16 * min(plan.num_warps, 4)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("n", "k"), tune_linear.SHAPES)
def test_candidates_hold_the_arithmetic_choice_and_more(arch, n, k):
    for num_rows in tune_linear.ROWS:
        plans = candidates(num_rows, n, k, arch)
        assert decode_linear_plan.by_arithmetic(num_rows, n, k, arch) in plans
        assert len(plans) >= 20


def test_the_fastest_plan_is_kept_where_it_wins():
    times = {("gemv", 1): 0.5, ("gemv", 2): 0.7, ("flat", 4): 0.6, ("flat", 8): 0.8, ("library", 16): 0.9}
    clock, _ = clock_of(times)
    steps = tune_shape(4096, 4096, 90, clock)
    assert [(largest, fields[0]) for largest, fields in steps] == [(2, "gemv"), (8, "flat")]


def test_the_very_plan_that_is_fastest_is_written():
    wanted = {1: Plan("gemv", 8, 512, 2, 1, 2), 16: Plan("flat", 64, 128, 4, 5, 2)}
    assert all(plan in candidates(num_rows, 4096, 4096, 90) for num_rows, plan in wanted.items())
    steps = tune_shape(
        4096, 4096, 90, lambda plan, num_rows: 0.5 if plan == wanted[num_rows] else 0.9 + plan.num_warps, rows=(1, 16)
    )
    assert steps == tuple((num_rows, fields_of(plan)) for num_rows, plan in wanted.items())
    assert [Plan(*fields) for _, fields in steps] == list(wanted.values())


def test_a_kernel_must_win_by_the_margin():
    for ratio, kept in ((1.0, False), (1.01, False), (1.03, True)):
        clock, _ = clock_of({("library", 1): ratio})
        assert bool(tune_shape(4096, 4096, 90, clock, rows=(1,))) == kept


def test_the_library_between_kernels_is_a_step():
    clock, _ = clock_of({("gemv", 1): 0.5, ("flat", 4): 0.5})
    steps = tune_shape(4096, 4096, 90, clock, rows=(1, 2, 4))
    assert [(largest, fields[0]) for largest, fields in steps] == [(1, "gemv"), (2, "library"), (4, "flat")]
    assert Plan(*steps[1][1]) == LIBRARY


def test_a_lucky_first_reading_does_not_decide():
    """The finalists are timed again, in turn with the library, and the median counts."""
    seen = set()

    def clock(plan, num_rows):
        if plan == LIBRARY:
            return 1.0
        first = plan not in seen
        seen.add(plan)
        return 0.1 if first else 1.5

    assert tune_shape(4096, 4096, 90, clock, rows=(1,)) == ()


def test_plans_that_fail_are_not_finalists():
    clock, asked = clock_of({("gemv", 1): math.inf, ("flat", 1): math.inf})
    assert tune_shape(4096, 4096, 90, clock, rows=(1,), rounds=3) == ()
    assert [plan for plan, _ in asked[-3:]] == [LIBRARY] * 3
    assert sum(plan != LIBRARY for plan, _ in asked) == len(candidates(1, 4096, 4096, 90))


def read(path):
    spec = importlib.util.spec_from_file_location("written_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TABLES


def test_the_table_is_written_as_it_is_read_and_formatted(tmp_path):
    clock, _ = clock_of({("gemv", 1): 0.5, ("flat", 8): 0.5})
    entry = {"device": "GPU X", "date": "2026-01-01", "command": "python -m eval.tune_linear --shapes 64x64"}
    tables = {
        **decode_linear_table.TABLES,
        90: {**entry, "shapes": {(4096, 4096): tune_shape(4096, 4096, 90, clock), (64, 64): ()}},
    }
    path = tmp_path / "table.py"
    write_table(path, tables)
    assert read(path) == tables
    assert len(tables[90]["shapes"][4096, 4096]) == 4 - 1  # gemv, library, flat
    done = subprocess.run([sys.executable, "-m", "ruff", "format", "--line-length", "120", "--diff", str(path)])
    assert done.returncode == 0
    write_table(path, decode_linear_table.TABLES)
    assert path.read_text() == Path(decode_linear_table.__file__).read_text()


def test_a_wrong_output_is_not_timed():
    x, weight, columns = torch.randn(3, 64), torch.randn(40, 64), torch.arange(0, 40, 3)
    check_output(x @ weight.T, x, weight, columns)
    wrong = x @ weight.T
    wrong[1, 39] += 0.01
    with pytest.raises(ValueError, match="wrong: expected an error of at most"):
        check_output(wrong, x, weight, columns)
    wrong[1, 39] = float("nan")
    with pytest.raises(ValueError, match="got nan"):
        check_output(wrong, x, weight, columns)


def test_the_clock_leaves_out_what_cannot_run(capsys):
    """On a CPU no kernel runs: each is left out with its reason, and the library is timed."""
    pytest.importorskip("triton")
    clock = tune_linear.GpuClock(64, 64, torch.float32, CPU)
    assert 0 < clock(LIBRARY, 4) < 1
    assert clock(Plan("gemv", 4, 256, 1), 1) == math.inf
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "12"], "a shape is NxK"),
        (["--shapes", "64x100"], "multiple of 16; got '64x100'"),
        (["--rounds", "0"], "at least one round"),
    ],
)
def test_bad_arguments_end_with_a_sentence(arguments, message):
    with pytest.raises(SystemExit, match=message):
        tune_linear.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_tune():
    with pytest.raises(SystemExit, match="no GPU here"):
        tune_linear.main([])


# eval.linears


def test_counts_of_a_cell():
    cell = linears.LinearCell((6, 2), 10, 3)
    assert cell.moved_bytes(2) == 2 * (8 * 10 + 3 * 10 + 3 * 8)
    assert cell.bound(Ceilings("", 1e3, 1e9), 2).limited_by == "memory"
    assert cell.bound(Ceilings("", 1e9, 1e3), 2).seconds == pytest.approx(2 * 3 * 8 * 10 / 1e3)


def test_cells_are_those_of_the_anchors():
    cells = linears.all_cells(small=False)
    single = {(cell.sizes[0], cell.k, cell.num_rows) for cell in cells if len(cell.sizes) == 1}
    assert single == {(n, k, rows) for n, k in tune_linear.SHAPES for rows in (1, 2, 4, 8, 16, 32, 64, 128)}


def test_a_cell_has_a_row_for_each_layer_and_their_ratio():
    cell = linears.LinearCell((32, 8, 8), 16, 2)
    rows = linears.measure_cell(cell, CPU, torch.float32, Ceilings("", 1e10, 1e10), 3)
    assert [row["layer"] for row in rows] == ["nn.Linear", "DecodeLinear"]
    assert all(row["status"] == "ok" and row["us"] > 0 and 0 < row["fraction"] < 10 for row in rows)
    assert rows[1]["x_baseline"] == pytest.approx(rows[0]["us"] / rows[1]["us"])
    found = linears.summary(rows)
    assert found["minimum"] == pytest.approx(found["geomean_up_to_16_rows"]) == pytest.approx(rows[1]["x_baseline"])


def test_wrong_layers_are_not_timed(monkeypatch):
    monkeypatch.setattr(linears.DecodeLinear, "forward", lambda self, x: x @ self.weight.T * 1.01)
    rows = linears.measure_cell(linears.LinearCell((32,), 16, 2), CPU, torch.float32, Ceilings("", 1e10, 1e10), 1)
    assert rows[0]["status"] == "ok"
    assert rows[1]["status"].startswith("WRONG")
    assert "us" not in rows[1]


def test_summary_takes_up_to_16_rows_for_the_mean_and_all_for_the_minimum():
    rows = [{"shape": {"num_rows": m}, "x_baseline": ratio} for m, ratio in ((1, 4.0), (16, 1.0), (128, 0.5))]
    assert linears.summary(rows) == {"geomean_up_to_16_rows": pytest.approx(2.0), "minimum": 0.5}
    assert linears.summary([{"shape": {"num_rows": 1}}]) == {}


def test_command_writes_a_result_file(tmp_path, capsys):
    out = tmp_path / "linears.json"
    assert linears.main(["--match", "512x512 m1", "--rounds", "1", "--device", "cpu", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["kind"] == "linears"
    assert {row["layer"] for row in content["rows"]} == {"nn.Linear", "DecodeLinear"}
    assert "| DecodeLinear |" in capsys.readouterr().out


def test_end_to_end_puts_layers_in_and_out():
    rows = linears.measure_end_to_end("tiny", [1], CPU, torch.float32, 1, 4)
    assert [row["layer"] for row in rows] == ["nn.Linear", "DecodeLinear"]
    assert rows[1]["x_baseline"] > 0

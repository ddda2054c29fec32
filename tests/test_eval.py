"""The measurements measure: known times, wrong implementations found, every token counted once."""

import copy
import importlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

import hf_fastattn
from eval import attempts, common, compiled_steps, kernels, memory, perplexity, report, speculative, throughput
from hf_fastattn.attention import fastattn_attention
from tests.tiny import make_pair

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models():
    """A model and the same one in float64."""
    pair = make_pair(vocab_size=64, max_position_embeddings=256)
    return pair.fast, pair.eager.double()


def measure(models, combos, cell, rounds=1, checker=throughput.Checker, **options):
    """Check and time combinations on a cell."""
    rows = throughput.check_cell(*models, combos, cell, checker=checker)
    return throughput.measure_cell(models[0], cell, rows, rounds, **options)


def test_a_sleep_is_measured_right():
    assert common.seconds(lambda: time.sleep(0.05), CPU) == pytest.approx(0.05, abs=0.02)


def test_cases_alternate_and_warm_up_is_left_out():
    calls = []
    results = common.alternate(
        {"a": lambda: calls.append("a") or len(calls), "b": lambda: calls.append("b") or len(calls)}, rounds=2, warmup=1
    )
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [4, 5], "b": [3, 6]}


@pytest.mark.parametrize("padding", [0.0, 0.3])
def test_right_combinations_pass_the_check_and_are_timed(models, padding):
    cell = throughput.Cell(2, 12, 4, padding=padding)
    combos = [name for name in throughput.COMBOS if name != "flex/dynamic"]
    rows = measure(models, combos, cell, rounds=1)
    assert [row["status"] for row in rows] == ["ok"] * len(combos)
    assert all(0 <= row["regret"] <= 2 * row["allowed_error"] for row in rows)
    assert all(row["decode_tokens_per_s"] > 0 and row["first_difference"] is None for row in rows)


def test_beams_are_timed_over_the_cache_that_generate_would_make(models):
    cell = throughput.Cell(2, 12, 4, beams=3)
    rows = measure(models, ["sdpa/dynamic", "fastattn/paged"], cell, rounds=1)
    assert [(row["status"], row["first_difference"]) for row in rows] == [("ok", None)] * 2
    assert throughput.make_cache(models[0], "paged", cell).state.group == 3


def test_samples_are_drawn_alike_and_all_count(models):
    cell = throughput.Cell(2, 12, 4, samples=3)
    assert cell.name == "2x12+4 3 samples"
    rows = measure(models, ["sdpa/dynamic", "fastattn/paged"], cell, rounds=1)
    assert [(row["status"], row["first_difference"]) for row in rows] == [("ok", None)] * 2
    inputs = throughput.make_inputs(models[0], cell)
    tokens = throughput.generate_once(models[0], "fastattn/paged", cell, inputs, throughput.Caches())["tokens"]
    assert tokens.shape == (6, 4)
    assert not torch.equal(tokens[0], tokens[1])
    assert throughput.make_cache(models[0], "paged", cell).state.group == 3


def test_ratios_are_taken_round_by_round(models):
    combos = ["fastattn/dynamic", "sdpa/dynamic"]
    rows = measure(models, combos, throughput.Cell(1, 12, 4), rounds=3)
    assert rows[0]["decode_vs_sdpa"]["count"] == 3
    assert rows[1]["decode_vs_sdpa"] == rows[1]["prefill_vs_sdpa"] == asdict(common.Spread(1.0, 1.0, 1.0, 3))
    slow, fast = ([{"first": s * t, "steps": [t, s * t]} for t in (1.0, 8.0, 2.0)] for s in (3.0, 1.0))
    ratios = throughput.versus(slow, fast)
    assert ratios["prefill_vs_sdpa"]["low"] == ratios["prefill_vs_sdpa"]["high"] == 3.0
    assert ratios["decode_vs_sdpa"]["median"] == 2.0


def test_a_wrong_implementation_is_flagged_and_not_timed(models, monkeypatch):
    def scaled_wrong(module, query, *args, scaling=None, **kwargs):
        return fastattn_attention(module, query, *args, scaling=scaling * 1.03, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "fastattn", scaled_wrong)
    rows = measure(models, ["sdpa/dynamic", "fastattn/paged"], throughput.Cell(1, 12, 4), rounds=1)
    assert [row["status"] for row in rows] == ["ok", "WRONG"]
    assert "decode_tokens_per_s" not in rows[1]


def test_a_failing_combination_is_a_row(models):
    def fails(*args):
        raise RuntimeError("no such kernel")

    [row] = measure(models, ["sdpa/dynamic"], throughput.Cell(1, 8, 3), rounds=1, checker=fails)
    assert row["status"] == "failed: RuntimeError: no such kernel"
    assert "decode_tokens_per_s" not in row


def test_memory_that_runs_out_in_one_combination_is_a_row(models, monkeypatch):
    """In the second timed call: the other combinations go on."""
    native, calls = throughput.generate_once, []

    def full(model, combo, *args):
        calls.append(combo)
        if combo == "sdpa/static" and calls.count(combo) == 4:
            raise torch.OutOfMemoryError("full")
        return native(model, combo, *args)

    monkeypatch.setattr(throughput, "generate_once", full)
    combos = ["sdpa/dynamic", "sdpa/static", "fastattn/paged"]
    rows = measure(models, combos, throughput.Cell(1, 8, 3), rounds=3)
    assert [row["status"] for row in rows] == ["ok", "failed: OutOfMemoryError: full", "ok"]
    assert "decode_tokens_per_s" not in rows[1]
    assert rows[0]["decode_tokens_per_s"] > 0 and rows[2]["decode_tokens_per_s"] > 0
    assert [calls.count(combo) for combo in combos] == [5, 4, 5]


def test_a_baseline_that_fails_leaves_speeds_without_a_comparison(models, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(throughput, "expected_tokens", full)
    [row] = measure(models, ["fastattn/paged"], throughput.Cell(1, 8, 3), rounds=1)
    assert row["status"] == "ok" and row["decode_tokens_per_s"] > 0
    assert row["tokens"] == "not compared, the baseline failed: OutOfMemoryError: full"


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """Events on its stream: the host neither waits for a step nor counts in it."""
    waits, now = [], iter([1.0, 251.0, 255.0, 263.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.ms = next(now)

        def elapsed_time(self, other):
            assert waits  # else it may not have come yet
            return other.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(common, "synchronize", waits.append)
    clock = throughput.Clock(torch.device("cuda", 0))
    for _ in range(3):
        assert not clock(torch.ones(2, 3, dtype=torch.long), None).any()
    assert not waits
    assert clock.seconds() == pytest.approx([0.25, 0.004, 0.008])


def test_our_loop_is_timed_without_a_clock(models, monkeypatch):
    """With one in the call it would wait for each step: decoding is what a call takes longer than one of a token."""
    native, calls = models[0].generate, []

    def watched(*args, **kwargs):
        calls.append((kwargs.get("custom_generate"), kwargs["max_new_tokens"], "stopping_criteria" in kwargs))
        time.sleep(0.01 * kwargs["max_new_tokens"])
        return native(*args, **kwargs)

    monkeypatch.setattr(models[0], "generate", watched, raising=False)
    cell = throughput.Cell(1, 8, 6)
    found = throughput.generate_once(
        models[0], "fastattn/default+loop", cell, throughput.make_inputs(models[0], cell), throughput.Caches()
    )
    assert calls == [(hf_fastattn.generate, 1, False), (hf_fastattn.generate, 6, False)]
    assert len(found["steps"]) == 5
    assert 0.05 <= sum(found["steps"]) < 0.5


def test_caches_of_a_fixed_size_reserve_what_is_asked_for(models):
    cell = throughput.Cell(1, 8, 4, reserved=100)
    assert cell.name == "1x8+4 of 100 reserved"
    assert throughput.make_cache(models[0], "static", cell).layers[0].max_cache_len == 100
    assert throughput.make_cache(models[0], "static", throughput.Cell(1, 8, 4)).layers[0].max_cache_len == 12
    sizes = {}
    for reserved in (0, 100):
        caches, cell = throughput.Caches(), throughput.Cell(1, 8, 4, reserved=reserved)
        inputs = throughput.make_inputs(models[0], cell)
        throughput.generate_once(models[0], "fastattn/paged+compile", cell, inputs, caches)
        sizes[reserved] = memory.storage_bytes(memory.cache_tensors(*caches.kept.values()))
    assert sizes[100] >= common.kv_bytes(models[0].config, 100, torch.float32) > sizes[0]


def test_tokens_that_the_model_does_not_prefer_are_wrong_in_any_dtype(models, monkeypatch):
    """As compiled steps would give that read a cache which is not theirs: only their tokens are ever seen."""
    model = copy.deepcopy(models[0]).to(torch.bfloat16)
    reference = copy.deepcopy(models[0]).float()
    native = throughput.generate_once

    def stale(model, combo, *args):
        found = native(model, combo, *args)
        if combo == "fastattn/paged":
            found["tokens"][-1, 2] = (found["tokens"][-1, 2] + 2) % 64
        return found

    monkeypatch.setattr(throughput, "generate_once", stale)
    combos = ["sdpa/dynamic", "fastattn/paged", "fastattn/default"]
    rows = measure((model, reference), combos, throughput.Cell(2, 12, 4))
    assert [row["status"] for row in rows] == ["ok", "WRONG tokens", "ok"]
    assert rows[1]["regret"] > 2 * rows[1]["allowed_error"]


def test_a_spent_budget_leaves_combinations_out(models):
    rows = measure(models, ["sdpa/dynamic", "fastattn/paged"], throughput.Cell(1, 8, 3), budget_s=-1.0)
    assert [row["status"] for row in rows] == ["not reached"] * 2


def test_a_combination_without_room_is_left_out(models, monkeypatch):
    """Beside what is kept by those before it."""
    cell, per_token = throughput.Cell(2, 20, 4), common.kv_bytes(models[0].config, 1, torch.float32)
    config = models[0].config
    prompt = 4 * 2 * 20 * (3 * config.intermediate_size + 6 * config.hidden_size)
    monkeypatch.setattr(common, "free_memory", lambda device: prompt + 2 * 2 * 24 * per_token)
    combos = ["sdpa/static", "fastattn/paged+compile", "fastattn/paged", "sdpa/dynamic"]
    rows = [{"combo": combo, "status": "ok"} for combo in combos]
    left = throughput.skip_what_does_not_fit(models[0], cell, {row["combo"]: row for row in rows})
    assert left == combos[:2]
    assert rows[2]["status"].startswith("skipped: needs about 0.0 GiB")
    assert rows[3]["status"].startswith("skipped")
    rows = [{"combo": combo, "status": "WRONG"} for combo in combos]
    assert throughput.skip_what_does_not_fit(models[0], cell, {row["combo"]: row for row in rows}) == []


def test_a_step_is_profiled(models):
    cell, saved = throughput.Cell(1, 8, 8), []
    rows = measure(models, ["fastattn/paged", "fastattn/default"], cell, profile=True, save=lambda: saved.append(True))
    assert len(saved) == 4  # behind the first calls of each, the rounds, and the comparison of tokens
    assert "profile" not in rows[0]  # not a compiled one
    found = rows[1]["profile"]
    products = {row["kernel"]: row for row in found["kernels"]}["aten::mm"]
    assert found["steps"] == 5
    assert products["calls"] == 7 * models[0].config.num_hidden_layers + 1
    assert sum(row["us"] for row in found["kernels"]) <= found["kernels_us"]
    assert any("aten::mm" in line for line in report.profile_lines(rows[1]))
    with pytest.raises(ValueError, match="expected 5 tokens to profile, got 0"):
        compiled_steps.StepProfiler(CPU, 2).result()


@pytest.mark.parametrize(
    ("graphs", "skips", "gave_up", "verdict"),
    [(1, 0, False, "ok"), (0, 0, False, "not compiled"), (1, 1, False, "not captured"), (1, 0, True, "could not be")],
)
def test_a_step_that_was_not_compiled_is_no_result(models, monkeypatch, graphs, skips, gave_up, verdict):
    monkeypatch.setattr(compiled_steps.compile_policy, "gave_up", lambda model: gave_up)
    compilation, row = compiled_steps.Compilation(), {}
    with compilation.watched(row):
        compiled_steps.counters["stats"]["unique_graphs"] += graphs
        compiled_steps.counters["inductor"]["cudagraph_skips"] += skips
    assert row == {"graphs": graphs, "graphs_not_captured": skips}
    assert verdict in compilation.verdict(models[0], row)


def test_a_lost_gpu_ends_the_run_and_keeps_what_is_done(models, monkeypatch, tmp_path):
    """An access outside of its memory fails, and everything behind it in that process."""

    def sticky():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    row = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert attempts.attempt(row, sticky) is None
    assert "illegal memory access" in row["status"]
    monkeypatch.setattr(torch.cuda, "synchronize", sticky)
    with pytest.raises(attempts.DeviceLost, match=r"the GPU was lost \(failed: RuntimeError: CUDA error"):
        attempts.attempt(row, sticky)
    monkeypatch.undo()

    def lost(*args, save, **kwargs):
        raise attempts.DeviceLost("the GPU was lost")

    monkeypatch.setattr(throughput, "measure_cell", lost)
    out = tmp_path / "throughput.json"
    argv = ["--cells", "1x8", "--new-tokens", "3", "--combos", "sdpa/dynamic", "--device", "cpu", "--out", str(out)]
    assert throughput.main(argv) == attempts.LOST
    assert json.loads(out.read_text())["rows"][0]["status"] == "ok"  # of its check


@pytest.mark.parametrize("combo", ["sdpa/static", "fastattn/paged", "fastattn/paged+compile"])
def test_calls_of_a_combination_have_the_same_addresses(models, combo):
    """Else each call of a compiled one would record its CUDA graphs anew."""
    model, cell, caches, places = models[0], throughput.Cell(2, 20, 5), throughput.Caches(), []
    inputs, tokens = throughput.make_inputs(model, cell), []
    for _ in range(3):
        tokens.append(throughput.generate_once(model, combo, cell, inputs, caches)["tokens"])
        [cache] = caches.kept.values()
        tensors = list(memory.cache_tensors(cache))
        if combo != "sdpa/static":
            tensors += [t for tables in cache.state.devices.values() for t in (tables.block_table, tables.seq_lens)]
        places.append([t.data_ptr() for t in tensors])
    assert places[0] == places[1] == places[2]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


def test_a_gpu_has_a_number(monkeypatch):
    """torch.cuda.set_device takes no device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert common.pick_device(None) == common.pick_device("cuda") == torch.device("cuda", 1)
    assert common.pick_device("cuda:0") == torch.device("cuda", 0)
    assert common.pick_device("cpu") == CPU


@pytest.mark.parametrize(("dtype", "status"), [(torch.float32, "WRONG tokens"), (torch.bfloat16, "ok")])
def test_tokens_are_judged_where_they_are_comparable(models, monkeypatch, dtype, status):
    """Speculative decoding whose tokens differ is wrong in full precision; in 16 bits rounding may do that."""
    model, prompts = copy.deepcopy(models[0]).to(dtype), [torch.full((1, 8), 5), torch.full((1, 8), 7)]
    model.config.pad_token_id = model.config.eos_token_id = None
    native = model.generate

    def changed(ids, **kwargs):
        out = native(ids, **kwargs)
        if "prompt_lookup_num_tokens" in kwargs and ids[0, 0] == 7:
            out[0, 11] = (out[0, 11] + 1) % 64
        return out

    monkeypatch.setattr(model, "generate", changed)
    rows = speculative.measure(model, prompts, [2], 6, 1)
    found = {(row["attention"], row["decoding"]): row for row in rows}
    assert found["sdpa", "plain"]["status"] == "ok" and found["sdpa", "plain"]["first_difference"] is None
    assert found["sdpa", "prompt lookup, 2"]["status"] == status
    assert found["sdpa", "prompt lookup, 2"]["first_difference"] <= 3


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(100, 16, 8), (100, 16, 16), (7, 16, 4), (33, 32, 1), (2, 2, 2)]
)
def test_every_token_but_the_first_is_counted_once(tokens, window, stride):
    counted = [i for _, end, first in perplexity.windows(tokens, window, stride) for i in range(first, end)]
    assert counted == list(range(1, tokens))
    assert all(
        begin < first and end - begin <= window for begin, end, first in perplexity.windows(tokens, window, stride)
    )


def test_perplexity_of_both_paths_is_the_models(models):
    model = models[0]
    ids = torch.randint(3, 64, (40,), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[1:]).exp().item()
    model.set_attn_implementation("fastattn")
    assert perplexity.by_window(model, ids, 64, 32, "") == pytest.approx(expected, rel=1e-5)
    assert perplexity.by_token(model, ids, 64, 32, "") == pytest.approx(expected, rel=1e-5)


def test_memory_counts_padding_as_waste(models):
    model = models[0]
    cell = throughput.Cell(2, 32, 4, padding=0.25)
    dynamic, paged = (memory.measure(model, name, cell) for name in ("DynamicCache", "PagedCache"))
    held = int(throughput.make_inputs(model, cell)["attention_mask"].sum()) + 2 * 3
    assert dynamic["sequence_tokens"] == paged["sequence_tokens"] == held < 2 * 35
    assert dynamic["reserved_mib"] * 2**20 == common.kv_bytes(model.config, 2 * 35, torch.float32)
    assert dynamic["waste"] == f"{1 - held / 70:.1%}"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cells", "4by8"], "a cell is BATCHxPROMPT"),
        (["--dtype", "float99"], "no floating-point dtype"),
        (["--new-tokens", "1"], "at least 2 new tokens"),
        (["--new-tokens", "3", "--profile"], "more than 3 new tokens"),
        (["--model", "/no/such/folder"], "cannot load the model"),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence):
    with pytest.raises(SystemExit, match=sentence):
        throughput.main(argv)


def test_a_missing_gpu_and_an_unreadable_text_are_sentences(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="sees no GPU"):
            throughput.main(["--device", "cuda"])
    text = tmp_path / "text"
    text.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(SystemExit, match="cannot read"):
        perplexity.main(["--text", str(text)])


REPORTED = """
import argparse, sys, time
parser = argparse.ArgumentParser()
for name in ("--device", "--out", "--mode"):
    parser.add_argument(name)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
with open(args.out, "a") as out:
    print("begun", file=out)
if args.mode == "hangs":
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        with open(args.out, "a") as out:
            print("kept", file=out)
        raise
if args.mode == "loses" and len(open(args.out).readlines()) < 3:
    sys.exit(75)
if args.mode == "fails":
    sys.exit("error: no such kernel")
"""


@pytest.mark.parametrize(
    ("arguments", "seconds", "failure", "lines"),
    [
        (("--mode", "works"), 60, None, ["begun"]),
        (("--mode", "hangs"), 6, "stopped after", ["begun", "kept"]),
        (("--mode", "fails"), 60, "exit code 1: error: no such kernel", ["begun"]),
        (("--mode", "loses"), 60, "exit code 75", ["begun"]),
        (("--mode", "loses", "--resume"), 60, None, ["begun"] * 3),
    ],
)
def test_a_measurement_that_fails_or_hangs_keeps_what_it_has(tmp_path, monkeypatch, arguments, seconds, failure, lines):
    """One that lost its GPU is started again where it can go on."""
    (tmp_path / "reported.py").write_text(REPORTED)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    folder = tmp_path / "results"
    found = report.run([report.Measurement("it", "reported", arguments, seconds)], folder, CPU, 60.0)
    assert len(found) == (failure is not None)
    assert all(text.startswith("it: ") and failure in text for text in found)
    assert (folder / "it.json").read_text().split() == lines
    assert "reported --mode" in (folder / "report.log").read_text()


def test_measurements_beyond_the_budget_are_named(tmp_path):
    item = report.Measurement("it", "reported", (), 60)
    [failure] = report.run([item], tmp_path, CPU, -1.0)
    assert "it: not started, the budget" in failure


def test_all_that_a_report_measures_exists(monkeypatch, capsys):
    """On a GPU too: time is lent there by the minute."""
    plans = {"cuda": report.gpu_plan(), "cpu": report.cpu_plan()}
    for device, plan in plans.items():
        assert len({item.name for item in plan}) == len(plan)
        for item in plan:
            assert report.kind_of(item.name) in report.COLUMNS or item.name in (
                "cold_start",
                "generate_loop",
                "linears",
            )
            if item.module == "eval.throughput":
                monkeypatch.setattr(common, "pick_device", torch.device)
                args = throughput.parse_args([*item.arguments, "--device", device])
                assert throughput.BASELINE in args.combos
                assert all(cell.columns > cell.prompt for cell in throughput.parse_cells(args))
            elif item.module == "eval.kernels":
                argv = [*item.arguments, "--device", "cpu", "--out", "file.json"]
                args, *_, cells = kernels.parse_args([*argv, "--small" if device == "cpu" else "--no-small"])
                if args.match:
                    assert all(any(text in f"{cell.op} {cell.name}" for cell in cells) for text in args.match)
                    assert len(cells) < 10
            elif item.module != "eval.linears":
                with pytest.raises(SystemExit) as end:
                    importlib.import_module(item.module).main([*item.arguments, "--help"])
                assert end.value.code == 0
    monkeypatch.undo()
    assert report.main(["--list", "--device", "cpu"]) == 0
    assert "python -m eval.throughput --model llama-20m" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no measurement kernel on this device"):
        report.main(["--only", "kernel", "--device", "cpu"])


def test_a_report_goes_on_where_it_was_and_leaves_readmes_alone(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(report, "run", lambda items, *args: ran.append([item.name for item in items]) or [])
    monkeypatch.setattr(report, "rewrite_readme", None)
    argv = ["--device", "cpu", "--measure-only", "--results", str(tmp_path)]
    assert report.main([*argv, "--only", "memory", "kernels"]) == 0
    folder = tmp_path / report.folder_name(CPU)
    common.write_result(folder / "kernels.json", "kernels", CPU, {}, [])
    assert report.main([*argv, "--resume"]) == 0
    assert ran == [["memory", "kernels"], ["throughput", "continuous", "perplexity", "memory"]]


def test_the_readme_shows_the_last_results_of_each_machine():
    names = ("amd-epyc-2026-11-27", "h200-2026-12-01", "intel-xeon-2026-11-27", "amd-epyc-2026-11-24")
    folders = [Path(f"results/{name}") for name in names]
    assert report.newest(folders) == [folders[1], folders[2], folders[0]]


def test_a_folder_without_results_that_the_readme_shows_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"{report.BEGIN}\n{report.END}\n")
    common.write_result(tmp_path / "h100-2026-12-01" / "loop.json", "loop", CPU, {}, [])
    with pytest.raises(SystemExit, match="holds no results of throughput"):
        report.main(["--render-only"])
    folder = tmp_path / "amd-epyc-2026-11-27"
    common.write_result(folder / "perplexity.json", "perplexity", CPU, {}, [{"path": "window", "tokens": 7}])
    assert report.main(["--render-only"]) == 0
    assert "amd-epyc-2026-11-27/README.md" in report.README.read_text()
    assert "h100" not in report.README.read_text()
    assert "| window | 7 |" in (folder / "README.md").read_text()


def test_the_readme_is_written_from_result_files(tmp_path, monkeypatch):
    rows = [
        {"cell": "1x8+4", "combo": combo, "status": "ok", "prefill_tokens_per_s": 10.0, "decode_tokens_per_s": speed}
        for combo, speed in (("sdpa/dynamic", 20.0), ("fastattn/paged", 30.0), ("fastattn/dynamic", 25.0))
    ]
    folder = tmp_path / "results" / "machine"
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    common.write_result(folder / "throughput.json", "throughput", CPU, {"model": "tiny"}, rows)
    assert {"device", "versions", "commit", "date", "command"} <= json.loads(
        (folder / "throughput.json").read_text()
    ).keys()
    rows[1]["decode_vs_sdpa"] = asdict(common.Spread(1.25, 1.0, 2.0, 3))
    common.write_result(folder / "throughput_by_round.json", "throughput", CPU, {"model": "tiny", "rounds": 3}, rows)
    common.write_result(folder / "loop.json", "loop", CPU, {}, [])
    long = [{**rows[0], "cell": "8x32k"}, {**rows[1], "cell": "8x32k", "combo": "fastattn/default+loop"}]
    long.insert(0, {**rows[0], "cell": "8x32k", "combo": "sdpa/static+compile", "decode_tokens_per_s": 21.5})
    common.write_result(folder / "throughput_8x32k.json", "throughput", CPU, {"model": "big", "rounds": 1}, long)
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.draw(folder)
    report.rewrite_readme([folder])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("**1.25x**") == 2  # one row a cell, of the file that was measured by rounds
    assert "1.50x" not in text
    assert "| 1x8+4 | 20 |  | 30 | PagedCache | 3 |" in text
    assert "| 8x32k | 20 | 21.5 | 30 | our loop | 1 |" in text
    assert "| 25 |" not in text  # what is no way of ours to generate
    assert "(results/machine/throughput.png)" in text
    assert "(results/machine/README.md)" in text
    assert (folder / "throughput.png").stat().st_size > 1000
    whole = (folder / "README.md").read_text()
    assert "1.25x" in whole
    assert "1.50x" in whole
    assert "(throughput.png)" in whole
    assert "[loop.json](loop.json)" in whole  # of a kind that has no table

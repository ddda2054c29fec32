"""The measurements measure: known times, wrong implementations found, every token counted once."""

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

from eval import common, memory, perplexity, report, speculative, throughput
from hf_fastattn.attention import fastattn_attention
from tests.tiny import make_pair

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models():
    """A model and the same one in float64."""
    pair = make_pair(vocab_size=64, max_position_embeddings=256)
    return pair.fast, pair.eager.double()


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
    combos = ["eager/dynamic", "sdpa/static", "fastattn/dynamic", "fastattn/paged"]
    rows = throughput.measure_cell(*models, combos, cell, rounds=1)
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert all(row["decode_tokens_per_s"] > 0 and row["first_difference"] is None for row in rows)


def test_beams_are_timed_over_the_cache_that_generate_would_make(models):
    cell = throughput.Cell(2, 12, 4, beams=3)
    rows = throughput.measure_cell(*models, ["sdpa/dynamic", "fastattn/paged"], cell, rounds=1)
    assert [(row["status"], row["first_difference"]) for row in rows] == [("ok", None)] * 2
    assert throughput.make_cache(models[0], "paged", cell).state.group == 3


def test_samples_are_drawn_alike_and_all_count(models):
    cell = throughput.Cell(2, 12, 4, samples=3)
    assert cell.name == "2x12+4 3 samples"
    rows = throughput.measure_cell(*models, ["sdpa/dynamic", "fastattn/paged"], cell, rounds=1)
    assert [(row["status"], row["first_difference"]) for row in rows] == [("ok", None)] * 2
    inputs = throughput.make_inputs(models[0], cell)
    tokens = throughput.generate_once(models[0], "fastattn/paged", cell, inputs, throughput.Caches())["tokens"]
    assert tokens.shape == (6, 4)
    assert not torch.equal(tokens[0], tokens[1])
    assert throughput.make_cache(models[0], "paged", cell).state.group == 3


def test_ratios_are_taken_round_by_round(models):
    combos = ["fastattn/dynamic", "sdpa/dynamic"]
    rows = throughput.measure_cell(*models, combos, throughput.Cell(1, 12, 4), rounds=3)
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
    rows = throughput.measure_cell(*models, ["sdpa/dynamic", "fastattn/paged"], throughput.Cell(1, 12, 4), rounds=1)
    assert [row["status"] for row in rows] == ["ok", "WRONG"]
    assert "decode_tokens_per_s" not in rows[1]


def test_a_failing_combination_is_a_row(models):
    def fails(*args):
        raise RuntimeError("no such kernel")

    rows = throughput.measure_cell(*models, ["sdpa/dynamic"], throughput.Cell(1, 8, 3), rounds=1, checker=fails)
    assert rows[0]["status"] == "failed: RuntimeError: no such kernel"


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
    rows = throughput.measure_cell(*models, combos, throughput.Cell(1, 8, 3), rounds=3)
    assert [row["status"] for row in rows] == ["ok", "failed: OutOfMemoryError: full", "ok"]
    assert "decode_tokens_per_s" not in rows[1]
    assert rows[0]["decode_tokens_per_s"] > 0 and rows[2]["decode_tokens_per_s"] > 0
    assert [calls.count(combo) for combo in combos] == [5, 4, 5]


def test_a_baseline_that_fails_leaves_speeds_without_a_comparison(models, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(throughput, "expected_tokens", full)
    [row] = throughput.measure_cell(*models, ["fastattn/paged"], throughput.Cell(1, 8, 3), rounds=1)
    assert row["status"] == "ok" and row["decode_tokens_per_s"] > 0
    assert row["tokens"] == "not compared, the baseline failed: OutOfMemoryError: full"


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
        for combo, speed in (("sdpa/dynamic", 20.0), ("fastattn/paged", 30.0))
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
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.draw(folder)
    report.rewrite_readme([folder])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("**1.25x**") == 1  # one row a cell, of the file that was measured by rounds
    assert "1.50x" not in text
    assert "(results/machine/throughput.png)" in text
    assert "(results/machine/README.md)" in text
    assert (folder / "throughput.png").stat().st_size > 1000
    whole = (folder / "README.md").read_text()
    assert "1.25x" in whole
    assert "1.50x" in whole
    assert "(throughput.png)" in whole
    assert "[loop.json](loop.json)" in whole  # of a kind that has no table

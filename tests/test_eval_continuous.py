"""The measurement of continuous batching measures what it says, and finds what is wrong."""

import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
from transformers import AttentionInterface

import hf_fastattn
from eval import common, continuous, report
from tests.tiny import make_pair

CPU = torch.device("cpu")
CELL = continuous.Cell(3, 40, 4)
BATCH, PADDED = "fastattn/generate_batch", "fastattn/generate"


@pytest.fixture(scope="module")
def models():
    """A model that is paged by default, and the same one in float64."""
    pair = make_pair(vocab_size=64, max_position_embeddings=256)
    return hf_fastattn.paged(pair.fast), pair.eager.double()


@pytest.fixture
def faulty(monkeypatch):
    """Let a function change what a call of a combination returns, given the call's number."""

    def change(combo, fault):
        native, calls = continuous.call, []

        def changed(model, name, cell, prompts, **options):
            run = native(model, name, cell, prompts, **options)
            if name == combo:
                calls.append(options)
                fault(run, len(calls))
            return run

        monkeypatch.setattr(continuous, "call", changed)
        return calls

    return change


def test_prompts_are_spread_from_a_quarter_of_the_longest(models):
    assert continuous.Cell(4, 100, 1).lengths == [25, 50, 75, 100]
    assert continuous.Cell(1, 100, 1).lengths == [100]
    assert continuous.Cell(2, 1, 1).lengths == [1, 1]
    prompts = continuous.make_prompts(models[0], CELL)
    assert [len(prompt) for prompt in prompts] == CELL.lengths
    assert prompts == continuous.make_prompts(models[0], CELL)


def test_all_combinations_are_right_and_timed(models):
    rows = continuous.measure_cell(*models, continuous.COMBOS[1:], CELL, rounds=1)
    assert [row["combo"] for row in rows] == continuous.COMBOS
    for row in rows:
        assert (row["status"], row["equal_requests"], row["first_difference"]) == ("ok", 1.0, None)
        assert row["peak_mib"] is None
        assert row["vs"]["count"] == row["serving_vs"]["count"] == 1
        assert row["new_tokens_per_s"] == pytest.approx(3 * 4 / row["seconds"]["median"])
        assert row["all_tokens_per_s"] == pytest.approx((12 + sum(CELL.lengths)) / row["seconds"]["median"])
        batched = row["combo"].endswith("generate_batch")
        assert (row["serving_s"]["median"] < row["seconds"]["median"]) == batched
    assert rows[0]["vs"] == rows[0]["serving_vs"] == asdict(common.Spread(1.0, 1.0, 1.0, 1))


def test_blocks_suffice_for_all_requests_at_once():
    cell = continuous.Cell(4, 1024, 32)
    config = continuous.batching_config(cell, False)
    needed = 2 + 3 + 4 + 5
    assert 0.85 * config.num_blocks > needed
    assert config.num_blocks < 2 * needed
    assert not getattr(config, "auto_switch_to_flash", False)


def test_the_attention_asked_for_computes(models):
    """Of transformers by whatever name it has there, ours in both calls; never one from the hub."""
    seen = set()
    model = models[0]
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, _: seen.add(module.config._attn_implementation)
    )
    prompts = continuous.make_prompts(model, CELL)
    for combo in continuous.COMBOS:
        seen.clear()
        continuous.call(model, combo, CELL, prompts)
        [name] = seen
        assert combo.split("/")[0] in name
        assert "flash_attention" not in name
    hook.remove()


@pytest.mark.parametrize("combo", [BATCH, PADDED])
def test_a_model_s_end_token_ends_nothing(models, monkeypatch, combo):
    prompts = continuous.make_prompts(models[0], CELL)
    tokens = continuous.call(models[0], combo, CELL, prompts).tokens
    monkeypatch.setattr(models[0].generation_config, "eos_token_id", int(tokens[0, 0]))
    assert torch.equal(continuous.call(models[0], combo, CELL, prompts).tokens, tokens)


def test_ratios_are_taken_round_by_round(models, faulty):
    """Three seconds of the baseline over those of the same round, whatever the clock says."""

    def slow(run, number):
        run.seconds, run.serving = (4.0, 2.0) if number == 3 else (1.0, 1.0)  # 1 and 2 are the check and the first

    faulty(BATCH, slow)
    faulty(continuous.BASELINE, lambda run, number: vars(run).update(seconds=8.0 if number == 3 else 1.0, serving=1.0))
    rows = continuous.measure_cell(*models, [BATCH], CELL, rounds=3)
    assert rows[1]["vs"] == asdict(common.Spread(1.0, 1.0, 2.0, 3))
    assert rows[1]["serving_vs"] == asdict(common.Spread(1.0, 0.5, 1.0, 3))
    assert rows[1]["seconds"] == asdict(common.Spread(1.0, 1.0, 4.0, 3))
    assert rows[1]["new_tokens_per_s"] == 12


def test_wrong_log_probabilities_are_found_though_tokens_are_equal(models, faulty):
    def fault(run, _):
        run.logprobs[-1, -1] += 0.01

    calls = faulty(PADDED, fault)
    rows = continuous.measure_cell(*models, [PADDED], CELL, rounds=1)
    assert [row["status"] for row in rows] == ["ok", "WRONG"]
    assert rows[1]["error"] == pytest.approx(0.01, rel=0.1)
    assert "seconds" not in rows[1]
    assert calls == [{"logprobs": True}]


def test_a_wrong_implementation_is_flagged_and_not_timed(models, monkeypatch):
    right = hf_fastattn.attention.fastattn_attention

    def scaled_wrong(*args, scaling, **kwargs):
        return right(*args, scaling=scaling * 1.03, **kwargs)

    for name in (hf_fastattn.IMPLEMENTATION, hf_fastattn.continuous.CONTINUOUS):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, scaled_wrong)
    rows = continuous.measure_cell(*models, [BATCH], CELL, rounds=1)
    assert [row["status"] for row in rows] == ["ok", "WRONG"]
    assert rows[1]["error"] > 100 * rows[1]["eager_error"]
    assert "seconds" not in rows[1]


def test_nan_is_an_error(models):
    prompts = continuous.make_prompts(models[0], CELL)
    run = continuous.call(models[0], PADDED, CELL, prompts, logprobs=True)
    run.logprobs[1, 1] = float("nan")
    assert math.isnan(continuous.error_of(models[1], prompts, run)[0])


def test_a_choice_that_is_not_the_likeliest_is_found(models):
    """Even with the right log probability, and in every dtype."""
    model, reference = models
    prompts = continuous.make_prompts(model, CELL)
    run = continuous.call(model, BATCH, CELL, prompts, logprobs=True)
    right, _ = continuous.error_of(reference, prompts, run)
    logits = reference(torch.tensor([prompts[0] + run.tokens[0, :-1].tolist()])).logits[0, -1].log_softmax(0)
    second = logits.topk(2)
    run.tokens[0, -1], run.logprobs[0, -1] = second.indices[1], second.values[1]
    wrong, _ = continuous.error_of(reference, prompts, run)
    assert wrong == pytest.approx((second.values[0] - second.values[1]).item() / 2)
    assert right < 1e-4 < wrong


@pytest.mark.parametrize(("dtype", "status"), [(torch.float32, "WRONG tokens"), (torch.bfloat16, "ok")])
def test_other_tokens_are_wrong_where_they_are_comparable(models, monkeypatch, faulty, dtype, status):
    model = copy.deepcopy(models[0]).to(dtype)
    expected = continuous.call(model, continuous.BASELINE, CELL, continuous.make_prompts(model, CELL)).tokens

    def fault(run, _):
        run.tokens[:] = expected
        run.tokens[1, 2:] = (expected[1, 2:] + 1) % 64

    calls = faulty(PADDED, fault)
    monkeypatch.setattr(continuous, "check", lambda *args: (True, {}))
    [_, row] = continuous.measure_cell(model, models[1], [PADDED], CELL, rounds=2)
    assert (row["status"], row["first_difference"]) == (status, 2)
    assert row["equal_requests"] == pytest.approx(2 / 3)
    assert ("seconds" in row) == (status == "ok")
    assert len(calls) == (1 if dtype == torch.float32 else 3)


def test_requests_that_fail_make_a_row(models, monkeypatch):
    native = models[0].generate_batch

    def failing(*args, **kwargs):
        out = native(*args, **kwargs)
        if models[0].config._attn_implementation == "fastattn":
            next(iter(out.values())).error = "no blocks left"
        return out

    monkeypatch.setattr(models[0], "generate_batch", failing)
    rows = continuous.measure_cell(*models, [BATCH, PADDED], CELL, rounds=1)
    assert [row["status"] for row in rows] == ["ok", "failed: RuntimeError: no blocks left", "ok"]
    assert "vs" not in rows[1]
    monkeypatch.setattr(models[0], "generate_batch", lambda *args, **kwargs: dict(list(native(*args).items())[1:]))
    with pytest.raises(RuntimeError, match="2 of 3 requests came back"):
        continuous.call(models[0], BATCH, CELL, continuous.make_prompts(models[0], CELL))


def test_a_baseline_that_fails_leaves_speeds_without_a_comparison(models, faulty):
    def full(run, _):
        raise torch.OutOfMemoryError("full")

    faulty(continuous.BASELINE, full)
    rows = continuous.measure_cell(*models, [BATCH], CELL, rounds=1)
    assert [row["status"] for row in rows] == ["failed: OutOfMemoryError: full", "ok"]
    assert rows[1]["tokens"] == "not compared, the baseline has none"
    assert rows[1]["new_tokens_per_s"] > 0
    assert "vs" not in rows[1]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cells", "4by8"], "a cell is BATCHxPROMPT"),
        (["--cells", "0x8"], "at least one sequence and one token"),
        (["--new-tokens", "0"], "at least one new token and round, got 0 and 5"),
        (["--rounds", "0"], "at least one new token and round, got 32 and 0"),
        (["--dtype", "float99"], "no floating-point dtype"),
        (["--model", "/no/such/folder"], "cannot load the model"),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence):
    with pytest.raises(SystemExit, match=sentence):
        continuous.main(argv)


def test_the_command_line_writes_what_it_measured_and_the_readme_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    folder = tmp_path / "machine"
    size = ["--model", "tiny", "--cells", "2x24", "1x8", "--new-tokens", "3", "--rounds", "1", "--device", "cpu"]
    assert continuous.main([*size, "--out", str(folder / "continuous.json")]) == 0
    assert capsys.readouterr().out.startswith("| cell | combo |")
    result = json.loads((folder / "continuous.json").read_text())
    assert result["kind"] == "continuous"
    assert [(row["cell"], row["combo"]) for row in result["rows"]] == [
        (cell, combo) for cell in ("2x24+3", "1x8+3") for combo in continuous.COMBOS[:3]
    ]
    report.README.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.rewrite_readme([folder])
    text = report.README.read_text()
    assert text.count("| tiny |") == 2
    assert f"**{result['rows'][1]['vs']['median']:.2f}x**" in text
    assert "Decoding" not in text  # which was not measured
    assert "| 2x24+3 | fastattn/generate_batch |" in (folder / "README.md").read_text()


def test_the_report_measures_it():
    for device in (CPU, torch.device("cuda")):
        [item] = [item for item in report.plan(device) if item.name == "continuous"]
        assert item.module == "eval.continuous"

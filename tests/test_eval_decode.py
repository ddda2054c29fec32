"""The measurements of decode loops, speculation and cold start measure what they say."""

import json

import pytest
import torch

import hf_fastattn
from eval import cold_start, common, generate_loop, speculative
from hf_fastattn.ops._library import has_triton

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    model = common.load_model("tiny", CPU, torch.float32)
    model.set_attn_implementation("fastattn")
    return hf_fastattn.paged(model)


@pytest.mark.parametrize("sampling", [False, True])
def test_both_loops_are_timed_on_equal_tokens(tiny, sampling):
    rows = generate_loop.measure_calls(tiny, "tiny", "2x12", 6, 1, sampling=sampling)
    assert [(row["attention"], row["loop"]) for row in rows] == [
        (attention, loop) for attention in generate_loop.ATTENTIONS for loop in ("transformers", "hf_fastattn")
    ]
    assert all(row["status"] == "ok" and row["cell"] == "2x12+6" for row in rows)
    assert all(row["tokens_per_s"] == pytest.approx(2e6 / row["us_per_token"]) for row in rows)


def test_other_tokens_are_wrong(tiny, monkeypatch):
    def short(model, input_ids, **kwargs):
        return torch.cat([input_ids, input_ids[:, :6]], 1)

    monkeypatch.setitem(generate_loop.LOOPS, "hf_fastattn", {"custom_generate": short})
    rows = generate_loop.measure_calls(tiny, "tiny", "1x12", 6, 1)
    assert [row["status"] for row in rows] == ["ok", "WRONG tokens"] * 2


def test_the_loop_alone_runs_no_layer_and_leaves_the_model_as_it_was(tiny):
    calls = []
    hook = tiny.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    forward = tiny.forward
    with generate_loop.free_forward(tiny):
        rows = generate_loop.measure_calls(tiny, "tiny", "1x12", 6, 1, bare=True)
    assert not calls
    assert {row["measured"] for row in rows} == {"loop alone"}
    assert tiny.forward == forward
    generate_loop.measure_calls(tiny, "tiny", "1x12", 2, 1)
    assert calls
    hook.remove()


def test_cost_of_a_layer_is_a_slope(monkeypatch):
    """A step that costs 1 ms and 0.1 ms for each layer, whatever the machine does."""
    names = iter(range(10**6))

    def seconds(action, device):
        model = next(c.cell_contents for c in action.__closure__ if hasattr(c.cell_contents, "config"))
        next(names)
        return 3 * (1e-3 + 1e-4 * model.config.num_hidden_layers)

    monkeypatch.setattr(common, "seconds", seconds)
    rows = generate_loop.measure_glue(CPU, 3, 1)
    assert [row["attention"] for row in rows] == [*generate_loop.ATTENTIONS, *[generate_loop.LAUNCHING] * has_triton()]
    assert next(names) == 4 * len(rows)
    for row in rows:
        assert row["us_per_layer"] == pytest.approx(100)
        assert row["us_per_step_beside_layers"] == pytest.approx(1000)


def test_speculation_counts_passes_and_proposals(tiny):
    prompts = speculative.code_prompts("tiny", 2, 48)
    assert [prompt.shape for prompt in prompts] == [(1, 48)] * 2
    assert not torch.equal(*prompts)
    rows = speculative.measure(tiny, prompts, [5], 24, 1)
    for attention in ("sdpa", "fastattn"):
        plain, lookup = [row for row in rows if row["attention"] == attention]
        assert plain["tokens_per_pass"] == 1
        assert plain["proposed"] == 0
        assert plain["accepted_share"] is None
        assert 1 < lookup["tokens_per_pass"] <= 6
        assert 0 < lookup["accepted_share"] <= 1
        accepted = lookup["accepted_share"] * lookup["proposed"]
        assert 48 / lookup["tokens_per_pass"] == pytest.approx(48 - accepted)
        assert lookup["status"] == plain["status"] == "ok"


def test_too_short_a_text_is_an_error():
    with pytest.raises(SystemExit, match="gives no 2 prompts of 1000000 tokens"):
        speculative.code_prompts("tiny", 2, 10**6)


def test_cold_start_takes_the_cold_from_the_warm(monkeypatch):
    caches = []

    def child(arguments, cache):
        caches.append(cache)
        cold = caches.count(cache) == 1
        return dict.fromkeys(cold_start.STAGES, 1.0) | {"first_token_s": 5.0 if cold else 0.5}

    monkeypatch.setattr(cold_start, "run_child", child)
    empty, warm = cold_start.measure(["tiny", "cpu", "float32"], 2)
    assert len(caches) == 4
    assert len(set(caches)) == 2
    assert (empty["to_first_token_s"], warm["to_first_token_s"]) == (8.0, 3.5)
    assert (empty["own_jit_s"], warm["own_jit_s"]) == (4.5, 0.0)


@pytest.mark.slow
def test_command_lines_write_what_they_measured(tmp_path, capsys):
    small = ["--rounds", "1", "--device", "cpu"]
    loop = ["--models", "tiny", "--cells", "1x8", "--new-tokens", "3", *small]
    runs = {
        "generate_loop": (generate_loop.main, loop, 14 + has_triton()),
        "speculative": (speculative.main, ["--prompts", "1", "--new-tokens", "12", "--candidates", "3", *small], 4),
        "cold_start": (cold_start.main, ["--model", "tiny", *small], 2),
    }
    for kind, (main, arguments, count) in runs.items():
        assert main([*arguments, "--out", str(tmp_path / f"{kind}.json")]) == 0
        result = json.loads((tmp_path / f"{kind}.json").read_text())
        assert result["kind"] == kind
        assert len(result["rows"]) == count
        assert capsys.readouterr().out.startswith("|")

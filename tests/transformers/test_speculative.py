"""Speculative decoding: proposals are checked through the multi-query decode path, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from models import _assistant, build, expected, generate, paged, prompt, under
from transformers import AutoModelForCausalLM

from hf_fastattn import attention, ops
from hf_fastattn.ops import MAX_DECODE_QUERY_LEN

TINY_LLAMA = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"


@pytest.fixture
def calls(monkeypatch, by_table):
    """Note which attention op was called with how many queries."""
    seen = []

    def spy_on(name):
        op = getattr(ops, name)

        def spy(query, *args, **kwargs):
            seen.append((name, query.shape[2]))
            return op(query, *args, **kwargs)

        monkeypatch.setattr(attention.ops, name, spy)

    for name in ("decode_attention", "prefill_attention"):
        spy_on(name)
    return seen


def check_paths(calls, layers):
    """Assert that one forward pass was a prefill and all others decoded, some of them several tokens at once."""
    assert [name for name, _ in calls[:layers]] == ["prefill_attention"] * layers
    later = calls[layers:]
    assert {name for name, _ in later} == {"decode_attention"}
    assert len(later) % layers == 0
    lengths = [length for _, length in later[::layers]]
    assert max(lengths) > 1
    return lengths


@pytest.mark.parametrize("candidates", [3, 10])
def test_prompt_lookup_on_code_checks_proposals_by_decoding(calls, candidates):
    from eval.speculative import code_prompts

    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, attn_implementation="fastattn")
    [ids] = code_prompts("tiny", 1, 64)
    options = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    plain = len(calls) // model.config.num_hidden_layers
    del calls[:]
    out = model.generate(ids, prompt_lookup_num_tokens=candidates, **options)
    assert torch.equal(out, wanted)
    lengths = check_paths(calls, model.config.num_hidden_layers)
    assert max(lengths) == candidates + 1
    assert len(lengths) + 1 < plain  # some proposals were accepted


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_assistant_model(calls, family):
    """The assistant has a dense cache of its own; its one query goes over dense keys."""
    model = build(family)
    assistant = _assistant(model)
    with under(model):
        out = generate(model, paged(model), input_ids=prompt(1), assistant_model=assistant)
    expected(family, "assisted").check([out])
    lengths = check_paths(calls, model.config.num_hidden_layers)
    assert len(lengths) < 11  # fewer passes than tokens


def test_more_proposals_than_a_decode_takes_are_a_prefill(calls):
    """The limit of the decode path is no limit of the caller."""
    model, ids = build("llama"), prompt(1, 50).repeat(1, 2)
    options = {"max_new_tokens": 60, "input_ids": ids}
    wanted, exact = generate(model, **options), MAX_DECODE_QUERY_LEN + 4
    with under(model):
        out = generate(model, paged(model), prompt_lookup_num_tokens=exact, **options)
    assert torch.equal(out.sequences, wanted.sequences)
    layers = model.config.num_hidden_layers
    assert ("prefill_attention", exact + 1) in calls[layers:]

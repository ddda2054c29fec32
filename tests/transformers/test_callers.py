"""Libraries that call generate() for their users get a PagedCache without knowing of it."""

from pathlib import Path

import pytest
import torch
import transformers
from models import SCENARIOS, build, expected, generate, left_padded, peft_with_prompts, prompt, run_eager
from transformers import AutoModelForCausalLM, DynamicCache, pipeline

import hf_fastattn
from hf_fastattn import PagedCache, auto
from hf_fastattn.generate import CACHE_NAME

TINY_LLAMA = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"


def watch(model):
    """Return the set of cache types that a model's forward passes will get."""
    types = set()
    model.register_forward_pre_hook(lambda _, args, kwargs: types.add(type(kwargs[CACHE_NAME])), with_kwargs=True)
    return types


def test_pipeline():
    ours = pipeline("text-generation", str(TINY_LLAMA), model_kwargs={"attn_implementation": "fastattn"})
    plain = pipeline("text-generation", str(TINY_LLAMA))
    assert type(plain.model) is transformers.LlamaForCausalLM
    caches, options = watch(ours.model), {"max_new_tokens": 8, "do_sample": False}
    assert ours("def read(self", **options) == plain("def read(self", **options)
    assert caches == {PagedCache}


def test_lm_eval():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def answers(**kwargs):
        lm = HFLM(str(TINY_LLAMA), device="cpu", dtype="float32", batch_size=2, **kwargs)
        caches, arguments = watch(lm.model), {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
        asked = [
            Instance(request_type="generate_until", doc={}, arguments=(text, arguments), idx=0)
            for text in ("import os\nimport", "def read(self", "class Reader:\n    def")
        ]
        return lm.generate_until(asked, disable_tqdm=True), caches

    ours, caches = answers(attn_implementation="fastattn")
    assert (ours, {DynamicCache}) == answers()
    assert caches == {PagedCache}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn", device_map=device_map)
    [out] = SCENARIOS["beams"](model, lambda _: None)
    expected("llama", "beams").check([out])
    assert type(out.past_key_values) is PagedCache


def test_early_exit_assistant():
    model = hf_fastattn.paged(build("llama", "fastattn"))
    out = generate(model, input_ids=prompt(1), assistant_early_exit=1)
    run_eager(build("llama"), lambda model, _: [generate(model, input_ids=prompt(1))]).check([out])
    assert type(out.past_key_values) is PagedCache


ADAPTERS = {  # what PEFT injects as keys and values is a DynamicCache in place of ours
    "LoraConfig": ({"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}, PagedCache),
    "PromptTuningConfig": ({"num_virtual_tokens": 4}, PagedCache),
    "PrefixTuningConfig": ({"num_virtual_tokens": 4}, DynamicCache),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("wrap_first", [True, False])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft_around_a_paged_model(adapter, wrap_first):
    peft = pytest.importorskip("peft") if adapter == "LoraConfig" else peft_with_prompts()
    settings, kind = ADAPTERS[adapter]

    def wrapped(model):
        torch.manual_seed(3)
        return peft.get_peft_model(model, getattr(peft, adapter)(task_type="CAUSAL_LM", **settings)).eval()

    native = build("llama", "fastattn")
    model = hf_fastattn.paged(wrapped(native)) if wrap_first else wrapped(hf_fastattn.paged(native))
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert isinstance(native, auto.PagedByDefault)
    inputs = left_padded(prompt(), 3, 0)
    out = generate(model, **inputs)
    assert type(out.past_key_values) is kind
    run_eager(wrapped(build("llama")), lambda model, _: [generate(model, **inputs)]).check([out])
    without = torch.stack(generate(build("llama"), **inputs).logits)
    assert (torch.stack(out.logits) - without).abs().max() > 0.1  # the adapter does something

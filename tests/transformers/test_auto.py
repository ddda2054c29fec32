"""Paged by default: who gets a PagedCache without asking, and that nobody else notices."""

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from models import FAMILIES, SCENARIOS, build, expected, generate, prompt, run_eager, shared
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_fastattn
from hf_fastattn import PagedCache, auto

ROOT = Path(__file__).resolve().parents[2]
TINY_LLAMA = ROOT / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a function that gives the folder of a family's saved model."""
    root = tmp_path_factory.mktemp("models")

    def of(family):
        if not (root / family).exists():
            shared(family).save_pretrained(root / family)
        return root / family

    return of


@pytest.fixture(scope="module")
def llama(folder):
    return load(folder("llama"))


def load(path, auto_class=AutoModelForCausalLM, **kwargs):
    return auto_class.from_pretrained(path, **({"attn_implementation": "fastattn"} | kwargs))


def native_class(family):
    return type(shared(family))


def check(family, scenario, model):
    """Assert that a model generates what eager does, over a PagedCache of its own making."""
    outputs = SCENARIOS[scenario](model, lambda _: None)
    expected(family, scenario).check(outputs)
    for out in outputs:
        assert type(out.past_key_values) is PagedCache
        assert out.past_key_values.uses_handles


# Who is paged


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_class_with_fastattn_generates_over_a_paged_cache(family, folder):
    model = load(folder(family))
    check(family, "left_padded", model)
    assert isinstance(model, native_class(family))
    assert str(type(model)) == str(native_class(family))
    assert type(model.config) is getattr(transformers, FAMILIES[family][0])


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "chat"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_every_way_of_decoding_works_over_the_default_cache(family, scenario, folder):
    check(family, scenario, load(folder(family)))


def test_assistant_may_be_paged_too(llama, folder):
    assistant = load(folder("llama"))
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.04 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    out = generate(llama, input_ids=prompt(1), assistant_model=assistant)
    run_eager(build("llama"), lambda model, _: [generate(model, input_ids=prompt(1))]).check([out])
    assert type(out.past_key_values) is PagedCache


def test_config_that_asks_for_fastattn_is_enough(folder):
    config = AutoConfig.from_pretrained(folder("llama"), attn_implementation="fastattn")
    built = AutoModelForCausalLM.from_config(config)
    loaded = AutoModelForCausalLM.from_pretrained(folder("llama"), config=config)
    for model in (built, loaded):
        assert isinstance(model, auto.PagedByDefault)
        assert type(model.config) is transformers.LlamaConfig
    check("llama", "greedy", loaded)
    made = AutoConfig.for_model("llama", attn_implementation="fastattn", hidden_size=64)
    assert isinstance(AutoModelForCausalLM.from_config(made), auto.PagedByDefault)


# Models built otherwise


def test_paged_makes_any_model_paged(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder("llama"), attn_implementation="fastattn")
    assert type(generate(model, input_ids=prompt()).past_key_values) is DynamicCache
    assert hf_fastattn.paged(model) is model
    check("llama", "left_padded", model)
    changed = type(model)
    assert type(hf_fastattn.paged(model)) is changed
    assert hf_fastattn.unpaged(model) is model
    assert type(model) is transformers.LlamaForCausalLM
    assert type(generate(model, input_ids=prompt()).past_key_values) is DynamicCache


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "expected a causal language model .* got Linear"),
        (lambda: shared("llama").model, TypeError, "expected a causal language model .* got LlamaModel"),
        (lambda: build("llama", "sdpa"), ValueError, "expected a model on 'fastattn', got one on 'sdpa': load it with"),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            ValueError,
            "serves decoder-only models, not the encoder-decoder t5",
        ),
    ],
)
def test_paged_refuses_what_it_cannot_serve(make, error, sentence):
    with pytest.raises(error, match=sentence):
        hf_fastattn.paged(make())


# Who is not


@pytest.mark.parametrize("family", FAMILIES)
def test_others_get_the_native_classes(family, folder):
    config_class = getattr(transformers, FAMILIES[family][0])
    config = AutoConfig.from_pretrained(folder(family))
    asking = AutoConfig.from_pretrained(folder(family), attn_implementation="fastattn")
    assert type(config) is config_class
    for model in (
        load(folder(family), attn_implementation="eager" if family in ("gemma2", "gpt_oss") else "sdpa"),
        AutoModelForCausalLM.from_pretrained(folder(family)),
        AutoModelForCausalLM.from_config(config),
        AutoModelForCausalLM.from_config(asking, attn_implementation="eager"),
        load(folder(family), config=asking, attn_implementation="eager"),
    ):
        assert type(model) is native_class(family)
        assert type(model.config) is config_class
        assert b"hf_fastattn" not in pickle.dumps(model)
    assert type(load(folder(family), AutoModel)) is type(shared(family).base_model)
    assert transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class] is native_class(family)


def test_other_auto_classes_are_as_before(folder):
    model = load(folder("llama"), AutoModelForSequenceClassification)
    assert type(model) is transformers.LlamaForSequenceClassification
    assert type(model.config) is transformers.LlamaConfig
    plain, ours = (AutoTokenizer.from_pretrained(TINY_LLAMA, **k) for k in ({}, {"attn_implementation": "fastattn"}))
    assert type(plain) is type(ours)


def test_registered_config_class_acts_as_the_native_one():
    registered, native = CONFIG_MAPPING["llama"], transformers.LlamaConfig
    assert type(registered(hidden_size=64)) is native
    assert isinstance(native(), registered)
    assert issubclass(native, registered)
    assert not isinstance(transformers.MistralConfig(), registered)
    assert type(AutoConfig.for_model("llama", hidden_size=64)) is native
    assert registered.__module__ == native.__module__
    inner = transformers.LlavaConfig(text_config={"model_type": "llama", "hidden_size": 64}).text_config
    assert type(inner) is native
    assert inner.hidden_size == 64

    class Child(registered):
        model_type = "child"

    assert type(Child()) is type(Child.from_dict({"hidden_size": 64})) is Child
    assert Child.__mro__[1] is native
    assert auto.registered() == list(auto.FAMILIES)


# Copies, pickles, files


def test_copies_and_pickles_name_native_classes(llama, folder):
    config = AutoConfig.from_pretrained(folder("llama"), attn_implementation="fastattn")
    for value, native in ((llama, transformers.LlamaForCausalLM), (config, transformers.LlamaConfig)):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(value, protocol)
            assert b"hf_fastattn" not in data
            assert type(pickle.loads(data)) is native
    assert type(copy.deepcopy(config)) is transformers.LlamaConfig
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    again = pickle.loads(pickle.dumps(llama))
    expected("llama", "greedy").check(SCENARIOS["greedy"](again, lambda _: None))


def test_deepcopy_stays_paged(llama):
    twin = copy.deepcopy(llama)
    assert type(twin) is type(llama)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    check("llama", "greedy", llama)
    assert not torch.stack(generate(twin, input_ids=prompt()).logits).any()


def test_saved_models_load_without_the_package(folder, tmp_path):
    model = load(folder("llama"))
    model.save_pretrained(tmp_path / "saved")
    native = load(folder("llama"), attn_implementation="eager")
    native.save_pretrained(tmp_path / "native")
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "saved" / file).read_text() == (tmp_path / "native" / file).read_text()
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    with torch.no_grad():
        torch.save(native(prompt()).logits, tmp_path / "logits.pt")
    python(
        tmp_path,
        """
        import pickle, sys, torch
        sys.modules["hf_fastattn"] = None
        from transformers import AutoModelForCausalLM, LlamaForCausalLM
        ids, wanted = torch.tensor(IDS), torch.load("logits.pt")
        for model in (
            AutoModelForCausalLM.from_pretrained("saved"),
            pickle.load(open("model.pickle", "rb")),
            torch.load("model.pt", weights_only=False),
        ):
            assert type(model) is LlamaForCausalLM
            model.set_attn_implementation("eager")
            with torch.no_grad():
                assert torch.equal(model(ids).logits, wanted)
        """.replace("IDS", json.dumps(prompt().tolist())),
    )


def test_remote_code_and_other_registrations_win(folder, tmp_path):
    """Custom code of a checkpoint, and classes that somebody registered first, are used as before."""
    remote = tmp_path / "remote"
    load(folder("llama")).save_pretrained(remote)
    config = json.loads((remote / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "custom.CustomForCausalLM"}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "custom.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass CustomForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    python(
        tmp_path,
        """
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        class MistralConfig(MistralConfig):
            pass

        AutoConfig.register("mistral", MistralConfig, exist_ok=True)
        import hf_fastattn
        assert CONFIG_MAPPING["mistral"] is MistralConfig
        assert "mistral" not in hf_fastattn.auto.registered()
        load = AutoModelForCausalLM.from_pretrained
        custom = load("remote", trust_remote_code=True, attn_implementation="fastattn")
        assert type(custom).__name__ == "CustomForCausalLM", type(custom)
        assert type(custom.config) is LlamaConfig
        assert isinstance(load("remote", attn_implementation="fastattn"), hf_fastattn.auto.PagedByDefault)
        assert type(load(FOLDER)) is LlamaForCausalLM
        assert isinstance(load(FOLDER, attn_implementation="fastattn"), hf_fastattn.auto.PagedByDefault)
        """.replace("FOLDER", repr(str(folder("llama")))),
    )


def python(cwd, script):
    """Run a script in a fresh process with a Hugging Face home of its own."""
    environment = os.environ | {"HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_rows_of_a_prompt_share_nothing_behind_dropout():
    for rate in (0.0, 0.1):
        model = hf_fastattn.paged(build("llama", "fastattn", attention_dropout=rate))
        for training in (False, True):
            out = generate(model.train(training), input_ids=prompt(), num_return_sequences=2, do_sample=True)
            assert out[hf_fastattn.CACHE_NAME].state.group == (1 if training and rate else 2)

"""The bundled model in examples/tiny-llama: it loads, is small, and still knows what it was trained on."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FOLDER = EXAMPLES / "tiny-llama"
GZIP_BITS_PER_BYTE = 1.97


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script():
    """The training script as a module; importing it trains nothing."""
    spec = importlib.util.spec_from_file_location("train_tiny_llama", EXAMPLES / "train_tiny_llama.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heldout_text() -> str:
    return (FOLDER / "heldout.txt").read_bytes().decode("utf-8")


def test_model_is_a_small_llama_with_grouped_queries(model, tokenizer, record):
    config = model.config
    assert isinstance(model, LlamaForCausalLM)
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    assert config.max_position_embeddings == tokenizer.model_max_length == 1024
    assert config.vocab_size == len(tokenizer)
    assert model.num_parameters() == record["parameters"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000


def test_special_tokens_agree(model, tokenizer):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected = getattr(tokenizer, name)
        assert expected is not None
        assert getattr(model.config, name) == getattr(model.generation_config, name) == expected
    assert tokenizer("x = 1").input_ids[0] == tokenizer.bos_token_id


def test_weights_are_stored_in_the_recorded_dtype(record):
    stored = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
    assert stored.dtype == getattr(torch, record["weights_dtype"])


@pytest.mark.parametrize(
    "text",
    [
        "def f(self):\n\treturn  1\n\n\n",
        "one\r\ntwo\r\n\r\n\tthree\rfour",
        "  leading and trailing blanks  ",
        "naïve Ωmega 漢字 🙂 e\u0301 \u200b\u00a0\u2028",
        "don't , stop . [ 'x' ] !",
        "\x00\x07\x1b[0m",
        "0123456789 __dunder__ CamelCase \\n %s",
    ],
)
def test_tokenizer_gives_text_back_unchanged(tokenizer, text):
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_tokenizer_gives_the_heldout_text_back_unchanged(tokenizer):
    text = heldout_text()
    tokens = tokenizer.backend_tokenizer.encode(text).ids
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert len(text.encode()) / len(tokens) > 3  # bytes per token: the merges fit this kind of text


def test_record_is_complete_and_better_than_gzip(record):
    assert record["bits_per_byte"] < GZIP_BITS_PER_BYTE
    assert record["bits_per_byte"] < record["heldout"]["gzip_9_bits_per_byte"]
    assert record["heldout_txt_bits_per_byte"] < GZIP_BITS_PER_BYTE
    assert set(record["heldout_txt_files"]) <= set(record["heldout"]["files"])
    assert {"seconds", "tokens_trained", "device", "torch", "transformers", "python", "date", "command"} <= set(record)


def test_heldout_text_is_small_and_has_its_licence():
    assert 60_000 <= len(heldout_text().encode()) <= 100_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (FOLDER / "LICENSE-PSF.txt").read_text(encoding="utf-8")


def test_weights_predict_heldout_text(model, tokenizer):
    """Recompute bits per byte on 5 KB, without the training script: random weights need about 3.4."""
    text = heldout_text()[10_000:15_000]
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    bits = 0.0
    with torch.inference_mode():
        for part in torch.tensor(tokens).split(1023):
            window = torch.nn.functional.pad(part, (1, 0), value=tokenizer.bos_token_id)[None]
            bits += model(input_ids=window, labels=window).loss.item() * len(part) / math.log(2)
    assert bits / len(text.encode()) < 2.2


def test_model_continues_a_list_of_imports(model, tokenizer):
    """Greedy generation starts another import line after eight of them."""
    prompt = "".join(f"import {name}\n" for name in ("os", "sys", "re", "os", "sys", "re", "os", "sys"))
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    continuation = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert continuation.startswith("import")


def test_likelihood_counts_every_token_once(script):
    """Zero weights predict uniformly, so a text costs log2(vocabulary) bits a token, however the windows fall."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
    )
    uniform = LlamaForCausalLM(config).eval()
    for parameter in uniform.parameters():
        torch.nn.init.zeros_(parameter)
    for count in (0, 1, 1023, 1024, 1600):
        bits = script.negative_log2_likelihood(uniform, [count % 64] * count)
        assert bits == pytest.approx(6 * count, rel=1e-5)


def test_every_twentieth_file_is_held_out(script):
    texts = {f"{index:03}.py": "pass\n" for index in range(65)}
    training, heldout = script.split_library(texts)
    assert list(heldout) == ["019.py", "039.py", "059.py"]
    assert training.keys() == texts.keys() - heldout.keys()


def test_library_without_sources_is_a_clear_error(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(SystemExit, match="Found 0 standard-library source files"):
        script.read_library()


def test_batches_are_deterministic_and_start_with_bos(script):
    def first_batches():
        generator = torch.Generator().manual_seed(7)
        iterator = script.batches(torch.arange(1, 101), length=8, batch_tokens=32, bos=0, generator=generator)
        return torch.stack([next(iterator) for _ in range(10)])

    drawn = first_batches()
    assert torch.equal(drawn, first_batches())
    assert drawn.shape == (10, 4, 8)
    assert (drawn[..., 0] == 0).all()
    assert (drawn[..., 1:].diff() == 1).all()  # a row is one piece of the stream

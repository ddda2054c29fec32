"""Models that are not plain decoders: they equal eager on their default cache, and PagedCache serves or refuses."""

import pytest
import torch
import transformers
from models import (
    _ALTERNATING,
    _SIZES,
    VOCAB,
    WINDOW,
    build,
    build_from,
    check_logits,
    generate,
    in_float64,
    left_padded,
    paged,
    prompt,
    under,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    CLIPVisionConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    DynamicCache,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    SiglipVisionConfig,
    WhisperConfig,
)

import hf_fastattn
from hf_fastattn import PagedCache, fallback

IMAGE = 60  # the image token, with 58 and 59 around it in Gemma 3
_ENCODER_DECODER = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
}
_LATENT = _SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_GEMMA3 = _SIZES | {
    "head_dim": 8,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": _ALTERNATING,
}


def _bart():
    config = BartConfig(**_ENCODER_DECODER, max_position_embeddings=64, forced_eos_token_id=None)
    return build_from(config, auto=AutoModelForSeq2SeqLM), left_padded(prompt(), 5, 0)


def _whisper():
    config = WhisperConfig(
        **_ENCODER_DECODER, num_mel_bins=8, max_source_positions=16, max_target_positions=64, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = build_from(config, auto=AutoModelForSpeechSeq2Seq)
    return model, {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))}


def _with_images(image_size):
    """Return a prompt whose columns 6 to 9 are an image, the first row padded on the left."""
    inputs = left_padded(prompt() % 58, 5, 0)
    inputs["input_ids"][:, 6:10] = IMAGE
    pixels = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(2))
    return inputs | {"pixel_values": pixels}


def _llava():
    config = LlavaConfig(
        text_config=LlamaConfig(**_SIZES), vision_config=CLIPVisionConfig(**_VISION, image_size=8, projection_dim=32),
        image_token_id=IMAGE, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    return build_from(config, auto=AutoModelForImageTextToText), _with_images(8)


def _gemma3():
    """Tokens of one image see each other both ways."""
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**_GEMMA3), vision_config=SiglipVisionConfig(**_VISION, image_size=16),
        mm_tokens_per_image=4, image_token_id=IMAGE, boi_token_index=58, eoi_token_index=59,
    )  # fmt: skip
    inputs = _with_images(16)
    inputs["input_ids"][:, 5] = 58
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return build_from(config, auto=AutoModelForImageTextToText), inputs


def _deepseek_v2():
    return build_from(DeepseekV2Config(**_LATENT)), left_padded(prompt(), 5, 0)


def _deepseek_v3():
    return build_from(DeepseekV3Config(**_LATENT)), left_padded(prompt(), 5, 0)


def _gemma3n():
    """The last two of its five layers use the keys and values of earlier ones."""
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3nTextConfig(**(_SIZES | {
        "num_hidden_layers": 5, "head_dim": 8, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2, "laurel_rank": 8, "sliding_window": WINDOW, "num_kv_shared_layers": 2,
        "layer_types": types, "activation_sparsity_pattern": [0.0] * 5,
    }))  # fmt: skip
    return build_from(config), left_padded(prompt(), 5, 0)


def _early_exit():
    """One model is its own assistant: drafts end after two of its four layers, over the user's cache or another."""
    return build("llama", num_hidden_layers=4), {"input_ids": prompt(1), "assistant_early_exit": 2}


def _compare(make, new_cache):
    model, inputs = make()
    wide = {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in inputs.items()}  # fmt: skip
    eager, exact = generate(model, **inputs), generate(in_float64(model), **wide)
    with under(model):
        cache = new_cache(model)
        out = generate(model, cache, **inputs)
    assert torch.equal(out.sequences, eager.sequences)
    assert torch.equal(exact.sequences, eager.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))
    return cache


DECODERS = [_llava, _gemma3, _deepseek_v2, _deepseek_v3, _gemma3n, _early_exit]


@pytest.mark.parametrize("make", [_bart, _whisper, *DECODERS])
def test_default_cache_equals_eager(make):
    _compare(make, lambda _: None)


@pytest.mark.parametrize("make", DECODERS)
@pytest.mark.filterwarnings("ignore:a model computes with cached keys")
def test_paged_cache_equals_eager(make):
    cache = _compare(make, paged)
    assert cache.get_seq_length() >= 25  # it was the cache that served


def _dynamic(model):
    return DynamicCache(config=model.config)


_THEMSELVES = {
    "megatron-bert": {"is_decoder": True},
    "rembert": {"is_decoder": True},
}


@pytest.mark.parametrize("new_cache", [_dynamic, paged])
@pytest.mark.parametrize("kind", _THEMSELVES)
def test_models_that_compute_attention_themselves_get_the_masks_of_eager(kind, new_cache):
    """They have never heard of attention functions, and took what ours understands for a mask to add."""
    model, fast = (
        build_from(AutoConfig.for_model(kind, **(_SIZES | _THEMSELVES[kind])), name) for name in ("eager", "fastattn")
    )
    fallback._warn.cache_clear()
    inputs = left_padded(prompt(2, 9), 4, 0)
    with pytest.warns(RuntimeWarning, match=f"models of type {kind} compute attention themselves"):
        generate(fast, new_cache(fast), **inputs)
    for beams in (1, 2):
        out, eager, exact = (
            generate(m, make(m), num_beams=beams, **inputs)
            for m, make in ((fast, new_cache), (model, _dynamic), (in_float64(model), _dynamic))
        )
        check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))


@pytest.mark.parametrize("new_cache", [_dynamic, paged])
def test_modules_that_say_they_see_ahead_are_causal_where_the_mask_is(new_cache):
    """PaliGemma's text model: sdpa leaves only whole prompts without padding to the modules."""
    config = GemmaConfig(**_SIZES, head_dim=8, use_bidirectional_attention=True)
    model, ids = build_from(config), prompt(2, 14)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    ways = (model, "eager", _dynamic), (in_float64(model), "eager", _dynamic), (model, "fastattn", new_cache)
    for shown in (None, mask):
        results = []
        for each, name, make in ways:
            with under(each, name), torch.no_grad():
                cache, logits = make(each), []
                for begin, end in ((0, 1), (1, 9), (9, 10), (10, 14)):
                    given = {} if shown is None else {"attention_mask": shown[:, :end]}
                    logits.append(each(ids[:, begin:end], past_key_values=cache, **given).logits)
                results.append(torch.cat(logits, 1)[mask.bool()])
        eager, exact, got = results
        check_logits(got, eager, exact)


def test_a_config_that_promises_more_layers_than_there_are():
    model = hf_fastattn.paged(build("llama", "fastattn", num_hidden_layers=3))
    model.model.layers = model.model.layers[:2]
    for cache in (None, paged(model)):
        with pytest.raises(ValueError, match="has 2 layers, but its config says num_hidden_layers=3: lower it"):
            generate(model, cache, input_ids=prompt())
    model.config.num_hidden_layers = 2
    assert generate(model, input_ids=prompt()).sequences.shape == (2, 26)


class NoAttention(torch.nn.Module):
    """What pruning leaves of a layer's attention."""

    def forward(self, hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None


@pytest.mark.parametrize("beams", [1, 2])
def test_a_last_layer_without_attention(beams):
    """Nobody would say that a forward pass is over; one in the middle is no matter."""
    models = [build("llama"), hf_fastattn.paged(build("llama", "fastattn"))]
    inputs = left_padded(prompt(2, 9), 4, 0) | {"num_beams": beams}
    for layer in (1, 2):
        for model in models:
            model.model.layers[layer].self_attn = NoAttention()
        wanted, got = (generate(model, **inputs) for model in models)
        assert torch.equal(got.sequences, wanted.sequences)
        assert isinstance(got[hf_fastattn.CACHE_NAME], PagedCache) == (layer == 1)
    with pytest.raises(ValueError, match="the last layer of the model does not attend"):
        generate(models[1], paged(models[1]), **inputs)


@pytest.mark.parametrize("beams", [1, 2])
def test_layers_that_are_run_again_store_what_they_saw_each_time(beams):
    """A forward pass ends with the last time that keys are stored, whatever the layer is called."""
    config = AutoConfig.for_model("hrm_text", **(_SIZES | {"num_hidden_layers": 1, "H_cycles": 1, "L_cycles": 2}))
    model, inputs = build_from(config), left_padded(prompt(2, 9), 4, 0) | {"num_beams": beams}
    eager, exact = generate(model, **inputs), generate(in_float64(model), **inputs)
    with under(model):
        out = generate(model, paged(model), **inputs)
    check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))


def test_images_see_each_other_both_ways():
    """Without that the comparison above would show nothing about a mask beside a handle."""
    model, inputs = _gemma3()
    with torch.no_grad():
        both_ways = model(**inputs).logits
        causal = model(**(inputs | {"token_type_ids": torch.zeros_like(inputs["token_type_ids"])})).logits
    assert (both_ways - causal)[:, 6:10].abs().max() > 0.1


def test_forward_passes_may_end_early(monkeypatch):
    """Two of the four layers for which the cache was made, as in early exit: a pass counts when its last is done."""
    model, inputs = build("llama", num_hidden_layers=4), left_padded(prompt(), 5, 0)
    cache = paged(model)
    monkeypatch.setattr(model.config, "num_hidden_layers", 2)
    eager, exact = generate(model, **inputs), generate(in_float64(model), **inputs)
    with under(model):
        out = generate(model, cache, **inputs)
    assert cache.get_seq_length() == 25
    assert torch.equal(out.sequences, eager.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))


def test_layers_that_share_keys_and_values_store_them_once():
    model, inputs = _gemma3n()
    with under(model):
        cache = paged(model)
        generate(model, cache, **inputs)
    assert [layer.is_initialized for layer in cache.layers] == [True, True, True, False, False]


REFUSED = {
    "BartConfig": {},
    "T5Config": {},
    "WhisperConfig": {},
    "JambaConfig": {},
    "Qwen3NextConfig": {},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "BambaConfig": {},
    "NemotronHConfig": {},
    "MambaConfig": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_paged_cache_refuses_other_state_than_keys_and_values(name):
    config = getattr(transformers, name)(**REFUSED[name])
    with pytest.raises(ValueError, match=rf"PagedCache .*\b{config.model_type}\b.* use its default cache"):
        PagedCache(config)


def test_paged_cache_takes_the_text_part_of_a_model_with_images():
    model, _ = _llava()
    assert len(PagedCache(model.config).layers) == model.config.get_text_config().num_hidden_layers


def test_model_loads_with_the_implementation(tmp_path):
    """The way users do it: from_pretrained with the name."""
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn")
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "fastattn"
    inputs = left_padded(prompt(), 5, 0)
    out, wanted = generate(model, paged(model), **inputs), generate(eager, **inputs)
    assert torch.equal(out.sequences, wanted.sequences)
    model.save_pretrained(tmp_path / "again")
    assert "fastattn" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.usefixtures("by_table")
def test_layers_may_have_other_numbers_of_key_heads(monkeypatch):
    """Each kind of layer has a schedule of its own: one for 4 key heads says nothing of the work over 2."""
    model = build("llama", num_attention_heads=4, num_key_value_heads=4)
    other = build("llama", num_attention_heads=4, num_key_value_heads=2)
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    wanted, exact = generate(model, input_ids=prompt()), generate(in_float64(model), input_ids=prompt())
    native, made = hf_fastattn.ops.decode_schedule, []

    def counted(q, k, v, **kwargs):
        made.append(k.shape[2])
        return native(q, k, v, **kwargs)

    monkeypatch.setattr(hf_fastattn.ops, "decode_schedule", counted)
    for each in model.modules():
        if hasattr(each, "config"):
            each.config._attn_implementation = "fastattn"
    out = generate(model, paged(model), input_ids=prompt())
    assert torch.equal(out.sequences, wanted.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, wanted, exact)))
    assert made.count(4) == made.count(2) > 0

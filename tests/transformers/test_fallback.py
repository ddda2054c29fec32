"""What the ops cannot do goes to PyTorch and says so once: gradients, dropout, biases; and training as users do it."""

import functools
import warnings

import peft
import pytest
import torch
from models import (
    SCENARIOS,
    VOCAB,
    build,
    build_from,
    check_logits,
    expected,
    generate,
    in_float64,
    left_padded,
    paged,
    peft_with_prompts,
    prompt,
    run_eager,
    shared,
    under,
    with_holes,
)
from torch import nn
from transformers import AutoModelForSeq2SeqLM, DynamicCache, T5Config

from hf_fastattn import reference
from hf_fastattn.attention import fastattn_attention
from hf_fastattn.fallback import AttentionOptions, fallback_attention

FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss"]
PADDINGS = {"none": lambda: {"input_ids": prompt()}, "left": lambda: left_padded(prompt(), 5, 2)}


def _gradients(model, inputs, **kwargs):
    model.zero_grad()
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    labels = inputs["input_ids"].masked_fill(real.cumsum(1) < 2, -100)  # padding predicts a row's first token
    model(**inputs, labels=labels, **kwargs).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def _check_gradients(actual, eager, exact):
    """Assert that gradients are as close to float64 as eager's; the last term is rounding of the largest of them."""
    assert actual.shape == eager.shape
    error, own = (actual - exact).norm(), (eager - exact).norm()
    assert error <= 2 * own + 4 * torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_eagers(family, padding):
    model, inputs = build(family).train(), PADDINGS[padding]()
    eager, exact = _gradients(model, inputs, use_cache=False), _gradients(in_float64(model), inputs, use_cache=False)
    with under(model):
        _check_gradients(_gradients(model, inputs, use_cache=False), eager, exact)


@pytest.mark.parametrize("cache", [paged, lambda _: DynamicCache()], ids=["PagedCache", "DynamicCache"])
def test_gradients_through_a_cache(cache):
    """A prefix in the cache, without gradients, and a loss on what follows."""
    model, inputs = build("llama").train(), {"input_ids": prompt()[:, 8:]}

    def gradients(model, cache):
        with torch.no_grad():
            model(input_ids=prompt()[:, :8], past_key_values=cache)
        return _gradients(model, inputs, past_key_values=cache)

    eager, exact = gradients(model, DynamicCache()), gradients(in_float64(model), DynamicCache())
    with under(model):
        _check_gradients(gradients(model, cache(model)), eager, exact)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_single_query_with_gradients_over_a_padded_cache(family):
    """The mask function gave no mask, as for blocks; dense columns still need one for what was never stored."""
    model, inputs = build(family), left_padded(prompt(), 5, 0)
    first = {name: value[:, :13] for name, value in inputs.items()}
    last = {"input_ids": inputs["input_ids"][:, 13:], "attention_mask": inputs["attention_mask"]}

    def last_logits(model, cache):
        with torch.no_grad():
            model(**first, past_key_values=cache)
        return model(**last, past_key_values=cache).logits

    eager, exact = last_logits(model, DynamicCache()), last_logits(in_float64(model), DynamicCache())
    with under(model):
        check_logits(last_logits(model, paged(model)), eager, exact)


def _reasons(caught):
    return [str(warning.message) for warning in caught if "leaves this to PyTorch" in str(warning.message)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_dropout_drops_and_warns_once(family):
    model = build(family, attention_dropout=0.5).train()
    with under(model), torch.no_grad():
        with pytest.warns(RuntimeWarning) as caught:
            first, second = (model(prompt()).logits for _ in range(2))
        quiet = model.eval()(prompt()).logits
    assert _reasons(caught) == ["fastattn leaves this to PyTorch's attention, because attention dropout is on"]
    assert (first - second).abs().max() > 0.1
    torch.testing.assert_close(quiet, shared(family)(prompt()).logits, rtol=1e-4, atol=1e-3)


def test_dropout_keeps_the_expected_output():
    """Weights are scaled up by what is dropped: the mean over many draws is the output without dropout."""
    model = build("llama", num_hidden_layers=1, attention_dropout=0.3).train()
    with under(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = model.model.layers[0].self_attn
        hidden = model.model.embed_tokens(prompt(1, 6))
        position = model.model.rotary_emb(hidden, torch.arange(6)[None])
        many = attention(hidden.expand(4000, -1, -1), position_embeddings=position, attention_mask=None)[0]
        attention.eval()
        plain = attention(hidden, position_embeddings=position, attention_mask=None)[0]
    spread = many.std(0) / 4000**0.5
    assert ((many.mean(0) - plain).abs() <= 6 * spread + 1e-5).all()


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradient_checkpointing(padding):
    model, inputs = build("llama").train(), PADDINGS[padding]()
    eager, exact = _gradients(model, inputs, use_cache=False), _gradients(in_float64(model), inputs, use_cache=False)
    if hasattr(model, "activation_checkpointing_enable"):  # the name from 5.23 on
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
    with under(model):
        _check_gradients(_gradients(model, inputs), eager, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_without_a_cache(family):
    with under(shared(family)) as model:
        expected(family, "left_padded").check([generate(model, use_cache=False, **left_padded(prompt(), 5, 0))])


def test_training_and_generation_take_turns():
    """Gradients for a step, then generate() over a PagedCache, on the same model."""
    model, wanted = build("llama"), expected("llama", "left_padded")
    with under(model):
        model.train()
        _gradients(model, PADDINGS["left"](), use_cache=False)
        model.eval()
        wanted.check(SCENARIOS["left_padded"](model, paged))


# PEFT

OLD_NAME = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # peft 0.21 asks for it


def _lora():
    model = build("llama")
    torch.manual_seed(5)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return tuned


@pytest.mark.filterwarnings(OLD_NAME)
@pytest.mark.parametrize("scenario", ["left_padded", "beams"])
def test_lora_generates_over_paged_cache(scenario):
    tuned = _lora().eval()
    with tuned.disable_adapter():
        untuned = generate(tuned, **left_padded(prompt(), 5, 0))
    tuned.set_attn_implementation("eager")
    wanted = run_eager(tuned, SCENARIOS[scenario])
    assert (torch.stack(untuned.logits)[0] - wanted.logits[0][0][: untuned.logits[0].shape[0]]).abs().max() > 0.1
    with under(tuned):
        wanted.check(SCENARIOS[scenario](tuned, paged))


@pytest.mark.filterwarnings(OLD_NAME)
def test_lora_gradients():
    tuned = _lora().train()
    inputs = PADDINGS["left"]()
    eager, exact = _gradients(tuned, inputs), _gradients(in_float64(tuned), inputs)
    with under(tuned):
        _check_gradients(_gradients(tuned, inputs), eager, exact)


@pytest.mark.filterwarnings(OLD_NAME)
@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
def test_prefix_tuning_on_its_own_cache(pads):
    peft_with_prompts()
    model = build("llama")
    torch.manual_seed(5)
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", num_attention_heads=2, token_dim=16)
    tuned = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.normal_(0, 1)
    inputs = left_padded(prompt(), *pads)
    eager = generate(tuned, **inputs)
    plain = generate(shared("llama"), **inputs)
    assert (torch.stack(eager.logits) - torch.stack(plain.logits))[0].abs().max() > 0.1
    exact = generate(in_float64(tuned), **inputs)
    with torch.no_grad():
        eager_alone, exact_alone = tuned(**inputs).logits, in_float64(tuned)(**inputs).logits
    with under(tuned.base_model), torch.no_grad():
        out = generate(tuned, **inputs)
        alone = tuned(**inputs).logits
    assert torch.equal(out.sequences, eager.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))
    check_logits(alone[:, -1], eager_alone[:, -1], exact_alone[:, -1])


# Things a model asks for that the kernels do not have


@pytest.mark.parametrize("mask", ["none", "int8", "bool", "float"])
def test_position_bias_is_added_to_the_scores(mask):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    bias, visible = torch.randn(1, 4, 3, 5), torch.ones(3, 5).tril(2).bool().expand(2, 1, 3, 5).clone()
    visible[0, :, :, 1] = mask == "none"
    given = {
        "none": None,
        "int8": visible[:, :, -1:].to(torch.int8),
        "bool": visible,
        "float": torch.zeros(2, 1, 3, 5).masked_fill(~visible, torch.finfo(torch.float32).min),
    }[mask]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, weights = fastattn_attention(nn.Module(), q, k, v, given, scaling=0.5, position_bias=bias)
    k, v = k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    scores = (q.double() @ k.transpose(2, 3) * 0.5 + bias).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2).float(), rtol=1e-5, atol=1e-5)
    assert weights is None


def test_position_bias():
    """T5 adds a learned bias to its scores, in the encoder (both ways) and in the decoder (causal)."""
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=16, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    make = functools.partial(build_from, config, auto=AutoModelForSeq2SeqLM)  # 5.17 cannot switch T5 later
    model, fast = make(), make(implementation="fastattn")
    inputs = left_padded(prompt(), 5, 0)
    eager, exact = generate(model, **inputs), generate(in_float64(model), **inputs)
    with pytest.warns(RuntimeWarning) as caught:
        out = generate(fast, **inputs)
    assert _reasons(caught) == [
        "fastattn leaves this to PyTorch's attention, because the model adds a position bias to its scores"
    ]
    assert torch.equal(out.sequences, eager.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))


@pytest.mark.parametrize("scenario", ["left_padded", "chat"])
def test_head_size_beyond_the_kernels(scenario):
    model = build("llama", head_dim=264, num_hidden_layers=2)
    wanted = run_eager(model, SCENARIOS[scenario])
    with under(model):
        wanted.check(SCENARIOS[scenario](model, paged))


@pytest.mark.parametrize("new_cache", [lambda _: None, paged], ids=["no cache", "PagedCache"])
def test_attention_weights_are_refused_with_one_warning(new_cache):
    model = build("llama")
    with under(model), torch.no_grad(), pytest.warns(RuntimeWarning) as caught:
        out = model(prompt(), output_attentions=True, past_key_values=new_cache(model))
    messages = [str(warning.message) for warning in caught if "attention weights" in str(warning.message)]
    assert messages == ["fastattn never computes attention weights: output_attentions returns None"]
    assert out.attentions is None or all(weights is None for weights in out.attentions)


def test_inference_on_plain_inputs_does_not_warn():
    model = build("llama")
    with under(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for inputs in (left_padded(prompt(), 5, 0), with_holes(prompt())):
            model(**inputs)
            generate(model, paged(model), **inputs)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
def test_any_scale(scale):
    """PyTorch's causal attention gives NaN for one that is not positive."""
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
    options = AttentionOptions(softmax_scale=scale, causal=True, window=2**31 - 1, softcap=0.0)
    wanted = reference.prefill_attention(*(x.double() for x in (query, key, value)), softmax_scale=scale)
    torch.testing.assert_close(
        fallback_attention(query, key, value, None, options).double(), wanted, rtol=1e-5, atol=1e-6
    )

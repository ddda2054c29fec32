"""What was once wrong without a word: windows and selections that other arguments or none say, copies, traces."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from models import (
    _SIZES,
    VOCAB,
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

import hf_fastattn
from hf_fastattn import PagedCache

WINDOWED = {
    "phimoe": lambda: transformers.PhimoeConfig(**_SIZES, sliding_window=6, num_local_experts=2),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SIZES,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=0,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}


@pytest.mark.parametrize("cache", [lambda model: None, paged], ids=["dynamic", "paged"])
@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_only_the_mask_tells(family, cache):
    """These models do not pass it to attention."""
    model = build_from(WINDOWED[family]())
    inputs = left_padded(prompt(2, 20), 3, 0)
    wanted, exact = generate(model, **inputs), generate(in_float64(model), **inputs)
    with under(model):
        out = generate(model, cache(model), **inputs)
    assert torch.equal(out.sequences, wanted.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, wanted, exact)))


def test_a_decoder_whose_modules_do_not_say_that_it_is_causal():
    """Models that do not support sdpa leave it to the mask: None would let a decoder see later tokens."""
    config = transformers.NllbMoeConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_experts=2,
        pad_token_id=0,
    )
    model = build_from(config, auto=transformers.AutoModelForSeq2SeqLM)
    given = {"input_ids": prompt(2, 9), "decoder_input_ids": prompt(2, 7, seed=1)}
    with torch.no_grad():
        wanted, exact = model(**given).logits, in_float64(model)(**given).logits
        with under(model):
            check_logits(model(**given).logits, wanted, exact)


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_a_selection_of_keys_is_refused(name):
    query = torch.randn(1, 2, 3, 8)
    module = torch.nn.Identity()
    given = {name: torch.zeros(1)}
    with pytest.raises(
        ValueError, match=f"Identity says by {name} what its queries attend to, which fastattn does not"
    ):
        hf_fastattn.attention.fastattn_attention(module, query, query, query, None, **given)
    hf_fastattn.attention.fastattn_attention(module, query, query, query, None, **{name: None})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_traced_model_still_sees_masks():
    """An example without padding says nothing of later calls."""
    model = build("llama", "fastattn").requires_grad_(False)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    inputs = left_padded(prompt(2, 14), 5, 2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    traced = torch.jit.trace(Logits(), (ids, torch.ones_like(mask)), check_trace=False)
    wanted = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(traced(ids, mask)[mask.bool()], wanted[mask.bool()])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_copies_of_wrappers_are_wrappers():
    """They pass on what they do not have, and would find a __deepcopy__ of what they wrap."""
    model = hf_fastattn.paged(build("llama", "fastattn"))
    hf_fastattn.optimize_linears(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    twin = copy.deepcopy(wrapped)
    assert type(twin) is type(wrapped)
    assert twin.state_dict().keys() == wrapped.state_dict().keys()
    assert type(twin.base_model.model) is type(wrapped.base_model.model)
    assert isinstance(copy.deepcopy(torch.compile(model)), torch._dynamo.OptimizedModule)
    for copied in (copy.copy(model), copy.deepcopy(model)):
        assert type(copied) is type(model)
        assert type(copied.lm_head) is hf_fastattn.linear.DecodeLinear
    assert copy.copy(model).lm_head is model.lm_head
    native = pickle.loads(pickle.dumps(model))
    assert type(native) is transformers.LlamaForCausalLM
    assert type(native.lm_head) is torch.nn.Linear
    assert b"hf_fastattn" not in pickle.dumps(torch.nn.Sequential(model.lm_head))


def test_image_states_have_no_place_in_a_paged_cache():
    config = transformers.MllamaConfig(
        text_config={**_SIZES, "cross_attention_layers": [1]}, vision_config={"hidden_size": 32, "attention_heads": 2}
    )
    with pytest.raises(ValueError, match="mllama also attends to images in layers of their own: use its default cache"):
        PagedCache(config)


def test_dense_keys_can_be_viewed_as_other_caches_keys_can():
    """GPT-NeoX-Japanese does."""
    config = transformers.GPTNeoXJapaneseConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_multiple_size=2
    )
    model = build_from(config)
    wanted = generate(model, input_ids=prompt())
    assert torch.equal(generate(model, paged(model), input_ids=prompt()).sequences, wanted.sequences)


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
def test_shared_layers_that_see_the_last_queries_only():
    """Gemma 4 drops the other queries in the layers that share keys; each of the rest keeps its position."""
    config = transformers.Gemma4TextConfig(
        **(_SIZES | {"num_hidden_layers": 6}),
        head_dim=16,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        sliding_window=6,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
    )
    model = build_from(config)
    inputs = left_padded(prompt(2, 14), 5, 0) | {"prefill_chunk_size": 4}
    wanted = generate(model, **inputs)
    with under(model):
        out = generate(model, paged(model), **inputs)
    assert torch.equal(out.sequences, wanted.sequences)

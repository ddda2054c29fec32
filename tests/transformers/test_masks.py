"""Masks of every kind, over every kind of cache, against eager's logits; and what the mask function returns."""

import pytest
import torch
from models import (
    VOCAB,
    build,
    build_from,
    check_logits,
    expected,
    generate,
    in_float64,
    left_padded,
    paged,
    prompt,
    shared,
    under,
    with_holes,
)
from transformers import DynamicCache, Llama4TextConfig, LlamaConfig, MistralConfig, StaticCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from hf_fastattn.masks import fastattn_mask

FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss"]
CACHES = {
    "no cache": lambda _: None,
    "DynamicCache": lambda model: DynamicCache(config=model.config),
    "PagedCache": paged,
}


def _right_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, 9:] = mask[1, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask}


PADDINGS = {
    "none": lambda ids: {"input_ids": ids},
    "all ones": lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    "left": lambda ids: left_padded(ids, 5, 2),
    "right": _right_padded,
    "holes": with_holes,
    "longer than the window on the left": lambda ids: left_padded(ids, 9, 0),
}


def _logits(model, cache=None, **inputs):
    with torch.no_grad():
        return model(**inputs, past_key_values=cache, use_cache=cache is not None).logits


def _eager(model, **inputs):
    """Return eager's logits without a cache, in float32 and in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with under(model, "eager"):
        return _logits(model, **inputs), _logits(in_float64(model), **wide)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_gives_eagers_logits_at_every_real_token(family, padding):
    model, inputs = shared(family), PADDINGS[padding](prompt())
    real = inputs.get("attention_mask", torch.ones(2, 14)).bool()
    eager, exact = _eager(model, **inputs)
    with under(model):
        for new_cache in CACHES.values():
            check_logits(_logits(model, new_cache(model), **inputs)[real], eager[real], exact[real])


@pytest.mark.parametrize("window", [1, 2, 5, 13, 14, 15])
@pytest.mark.parametrize("cache", CACHES)
def test_window_is_exact_to_one_token(window, cache):
    model = build("mistral", sliding_window=window)
    eager, exact = _eager(model, input_ids=prompt())
    with under(model):
        check_logits(_logits(model, CACHES[cache](model), input_ids=prompt()), eager, exact)


def _prefix_mask():
    """Return what queries may see: five columns both ways, then causal, with two columns hidden from some queries."""
    visible = torch.ones(14, 14).tril().bool()
    visible[:5, :5] = True
    visible[8:, 6] = visible[11:, 2] = False
    return visible.expand(2, 1, 14, 14)


def _additive(visible):
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_dimensional_mask_is_the_whole_truth(family, form, cache):
    """A user's own mask reaches the attention function as it is; a float mask may also weigh (-1.5 on a column)."""
    model, additive = shared(family), _additive(_prefix_mask())
    if form == "float":
        additive = additive.clone()
        additive[:, :, 9:, 7] -= 1.5
    eager, exact = _eager(model, input_ids=prompt(), attention_mask=additive)
    mask = _prefix_mask() if form == "bool" else additive
    with under(model):
        actual = _logits(model, CACHES[cache](model), input_ids=prompt(), attention_mask=mask)
    check_logits(actual, eager, exact)


@pytest.mark.parametrize("cache", ["DynamicCache", "PagedCache"])
def test_four_dimensional_mask_goes_on_over_a_cache(cache):
    """The last four tokens in two calls, with the rows of the same mask: eager's logits for the whole."""
    model, mask = shared("llama"), _prefix_mask()
    eager, exact = _eager(model, input_ids=prompt(), attention_mask=_additive(mask))
    with under(model):
        store, parts = CACHES[cache](model), []
        for start, end in ((0, 10), (10, 13), (13, 14)):
            inputs = {"input_ids": prompt()[:, start:end], "attention_mask": mask[:, :, start:end, :end]}
            parts.append(_logits(model, store, **inputs))
    check_logits(torch.cat(parts, 1), eager, exact)


@pytest.mark.parametrize("cache", CACHES)
def test_four_dimensional_mask_after_a_padded_prompt(cache):
    """The cache has compacted the padding away when the 4-D mask arrives, which counts columns."""
    model, inputs = shared("llama"), left_padded(prompt(), 5, 0)
    columns = inputs["attention_mask"].bool()
    mask = torch.ones(14, 14).tril().bool() & columns[:, None, None, :]
    positions = (columns.cumsum(1) - 1).clamp(min=0)
    eager, exact = _eager(model, input_ids=inputs["input_ids"], attention_mask=_additive(mask), position_ids=positions)
    with under(model):
        store = CACHES[cache](model)
        if store is None:
            actual = _logits(model, input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions)
        else:
            first = {"input_ids": inputs["input_ids"][:, :8], "attention_mask": inputs["attention_mask"][:, :8]}
            second = {"input_ids": inputs["input_ids"][:, 8:], "attention_mask": mask[:, :, 8:]}
            actual = torch.cat(
                [
                    _logits(model, store, position_ids=positions[:, :8], **first),
                    _logits(model, store, position_ids=positions[:, 8:], **second),
                ],
                1,
            )
    check_logits(actual[columns], eager[columns], exact[columns])


@pytest.fixture(scope="module")
def chunked():
    """Llama 4's text model: three layers of four attend in chunks of six tokens."""
    config = Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_chunk_size=6, num_local_experts=2,
        num_experts_per_tok=1, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return build_from(config)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
def test_chunked_attention(chunked, cache, padding):
    inputs = PADDINGS[padding](prompt())
    real = inputs.get("attention_mask", torch.ones(2, 14)).bool()
    eager, exact = _eager(chunked, **inputs)
    with under(chunked):
        check_logits(_logits(chunked, CACHES[cache](chunked), **inputs)[real], eager[real], exact[real])


def test_chunked_attention_generates_over_paged_cache(chunked):
    inputs = left_padded(prompt(), 5, 0)
    with under(chunked, "eager"):
        eager, exact = generate(chunked, **inputs), generate(in_float64(chunked), **inputs)
    with under(chunked):
        out = generate(chunked, paged(chunked), **inputs)
    assert torch.equal(out.sequences, eager.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_sequences_without_a_cache(family):
    model = shared(family)
    inputs = {"input_ids": prompt(), "position_ids": torch.cat([torch.arange(8), torch.arange(6)])[None]}
    eager, exact = _eager(model, **inputs)
    alone = _eager(model, input_ids=prompt()[:, 8:])[0]
    assert (eager[:, 8:] - alone).abs().max() < 1e-3  # eager itself keeps the sequences apart
    with under(model):
        check_logits(_logits(model, **inputs), eager, exact)


@pytest.mark.parametrize("cache", ["DynamicCache", "PagedCache"])
def test_packed_sequences_over_a_cache_raise(cache):
    """They would see each other: transformers builds no mask for them when it fills a cache."""
    model = shared("llama")
    positions = torch.cat([torch.arange(8), torch.arange(6)]).expand(2, -1)
    with under(model), pytest.raises(ValueError, match=r"position_ids .* packed .*use_cache=False"):
        _logits(model, CACHES[cache](model), input_ids=prompt(), position_ids=positions)


@pytest.mark.parametrize("scenario", ["left_padded", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache(family, scenario):
    """Its keys reach to its capacity: a mask that is left out, or too short, shows what was never written."""
    model = shared(family)
    inputs = left_padded(prompt(), 5, 0) if scenario == "left_padded" else with_holes(prompt())
    with under(model):
        out = generate(model, cache_implementation="static", disable_compile=True, **inputs)
    expected(family, scenario).check([out])


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache_without_a_mask(family):
    """A prompt, a chunk and a token, with room for more columns behind each."""
    model, parts = shared(family), []
    eager, exact = _eager(model, input_ids=prompt())
    with under(model):
        cache = StaticCache(model.config, max_cache_len=32)
        for start, end in ((0, 10), (10, 13), (13, 14)):
            parts.append(_logits(model, cache, input_ids=prompt()[:, start:end]))
    check_logits(torch.cat(parts, 1), eager, exact)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bidirectional_decoder(family, padding):
    model, inputs = build(family, is_causal=False), PADDINGS[padding](prompt())
    real = inputs.get("attention_mask", torch.ones(2, 14)).bool()
    eager, exact = _eager(model, **inputs)
    causal = _eager(shared(family), **inputs)[0]
    assert (eager - causal)[real].abs().max() > 0.1
    with under(model):
        check_logits(_logits(model, **inputs)[real], eager[real], exact[real])
        check_logits(_logits(model, paged(model), **inputs)[real], eager[real], exact[real])


# Masks that contradict the cache


def _cached(model, cache, **inputs):
    with torch.no_grad():
        return model(**inputs, past_key_values=cache).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_that_hides_cached_columns(family):
    """As another turn of a chat hides what generate() has put behind rows that had finished."""
    model, ids = shared(family), prompt(2, 20)
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[0, 8:14] = mask[1, 3] = mask[1, 15] = 0
    passes = [{"input_ids": ids[:, :14]}, {"input_ids": ids[:, 14:18], "attention_mask": mask}]
    passes += [{"input_ids": ids[:, i : i + 1], "attention_mask": torch.cat([mask, mask.new_ones(2, i - 17)], 1)}
               for i in (18, 19)]  # fmt: skip
    results = []
    for each, name, new_cache in (
        (model, "eager", _dynamic),
        (in_float64(model), "eager", _dynamic),
        (model, "fastattn", paged),
    ):
        with under(each, name):
            cache = new_cache(each)
            results.append(torch.cat([_cached(each, cache, **given) for given in passes], 1))
    eager, exact, got = results
    check_logits(got, eager, exact)  # those of hidden columns too


def _dynamic(model):
    return DynamicCache(config=model.config)


def test_mask_that_shows_a_padded_column_raises():
    model = shared("llama")
    with under(model):
        cache = paged(model)
        _cached(model, cache, **left_padded(prompt(), 4, 0))
        with pytest.raises(ValueError, match="shows columns that an earlier mask has hidden"):
            _cached(model, cache, input_ids=prompt(2, 3), attention_mask=torch.ones(2, 17, dtype=torch.long))


@pytest.mark.parametrize("width", [3, 16, 18])
def test_mask_of_another_width_raises(width):
    model = shared("llama")
    with under(model):
        cache = paged(model)
        _cached(model, cache, input_ids=prompt())
        with pytest.raises(ValueError, match=r"attention mask of shape \(2, 17\)"):
            _cached(model, cache, input_ids=prompt(2, 3), attention_mask=torch.ones(2, width, dtype=torch.long))


def test_refused_mask_leaves_the_cache_as_it_was():
    model, ids = shared("llama"), prompt(2, 17)
    eager, exact = _eager(model, input_ids=ids)
    with under(model):
        cache = paged(model)
        _cached(model, cache, input_ids=ids[:, :14])
        with pytest.raises(ValueError, match="attention mask of shape"):
            _cached(model, cache, input_ids=ids[:, 14:], attention_mask=torch.ones(2, 3, dtype=torch.long))
        assert cache.get_seq_length() == 14
        actual = _cached(model, cache, input_ids=ids[:, 14:])
    check_logits(actual, eager[:, 14:], exact[:, 14:])


# The mask function alone


def _mask(**kwargs):
    return fastattn_mask(**({"batch_size": 2, "q_length": 4, "kv_length": 4, "device": "cpu"} | kwargs))


HIDDEN = torch.tensor([[False, True, True, True], [True, True, True, True]])


@pytest.mark.parametrize("kwargs", [
    {},
    {"kv_length": 9, "q_offset": 5},
    {"kv_length": -64, "q_offset": 5},
    {"kv_length": -1, "q_length": 1, "attention_mask": HIDDEN},
    {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3},
    {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True, "allow_is_causal_skip": False},
])  # fmt: skip
def test_plain_patterns_need_no_mask(kwargs):
    assert _mask(**kwargs) is None


@pytest.mark.parametrize("kwargs", [{}, {"kv_length": -64}, {"local_size": 3}])
def test_causal_padding_is_int8_columns(kwargs):
    mask = _mask(attention_mask=HIDDEN, **kwargs)
    assert mask.dtype == torch.int8
    assert torch.equal(mask, HIDDEN[:, None, None].to(torch.int8))


def test_cached_columns_belong_to_the_padding_over_a_paged_cache():
    wide = torch.ones(2, 9, dtype=torch.bool)
    assert _mask(kv_length=-64, q_offset=5, attention_mask=wide).shape == (2, 1, 1, 9)


def test_window_that_dropped_columns_takes_the_last_of_the_padding():
    """A sliding layer of a DynamicCache: 4 keys from column 5 on."""
    wide = torch.ones(2, 9, dtype=torch.bool)
    wide[0, 6] = False
    mask = _mask(q_length=1, q_offset=8, kv_length=4, kv_offset=5, local_size=4, attention_mask=wide)
    assert mask[:, 0, 0].tolist() == [[1, 0, 1, 1], [1, 1, 1, 1]]


def test_bidirectional_padding_is_uint8_columns():
    options = {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True}
    mask = _mask(attention_mask=HIDDEN, **options)
    assert mask.dtype == torch.uint8
    assert torch.equal(mask, HIDDEN[:, None, None].to(torch.uint8))
    decoder = _mask(config=LlamaConfig(is_causal=False), **options)
    assert decoder.dtype == torch.uint8
    assert decoder.shape == (2, 1, 1, 4)
    assert decoder.all()


TRIL = torch.ones(4, 4).tril().bool()


@pytest.mark.parametrize(("kwargs", "pattern"), [
    ({"kv_length": 8}, torch.cat([TRIL, torch.zeros(4, 4, dtype=torch.bool)], 1)),
    ({"allow_is_causal_skip": False}, TRIL),
    ({"kv_length": -64, "allow_is_causal_skip": False}, TRIL),
    (
        {
            "mask_function": chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)),
            "local_size": 2,
            "config": MistralConfig(attention_chunk_size=2),
        },
        torch.block_diag(TRIL[:2, :2], TRIL[:2, :2]).bool(),
    ),
    ({"use_vmap": True, "mask_function": lambda b, h, q, k: causal_mask_function(b, h, q, k) & (k != 1)},
     TRIL & (torch.arange(4) != 1)),
])  # fmt: skip
def test_other_patterns_are_bool(kwargs, pattern):
    mask = _mask(**kwargs)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, pattern.expand(2, 1, -1, -1))


def test_the_padding_of_a_single_query_is_looked_at_where_the_host_can_or_must():
    """On a GPU, where looking waits, the cache asks for it; a meta tensor cannot be looked at."""
    shown, hidden = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    hidden[1, -1] = False
    for offset in (0, 1):
        single = {"batch_size": 2, "q_length": 1, "kv_length": -1, "q_offset": 8, "kv_offset": offset}
        assert fastattn_mask(**single, attention_mask=shown) is None
        mask = fastattn_mask(**single, attention_mask=hidden)
        assert mask.dtype == torch.int8
        assert torch.equal(mask[:, 0, 0].bool(), hidden)
    single["kv_offset"] = 0
    assert fastattn_mask(**single, attention_mask=shown.to("meta")) is None
    with pytest.raises(RuntimeError, match="meta"):
        fastattn_mask(**single | {"kv_offset": 1}, attention_mask=shown.to("meta"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_in_pieces_of_one_column(family, padding):
    model, ids = shared(family), prompt(2, 14)
    inputs = PADDINGS[padding](ids)
    mask = inputs["attention_mask"]
    wanted, exact = _eager(model, **inputs)
    with under(model), torch.no_grad():
        cache, pieces = paged(model), []
        for i in range(ids.shape[1]):
            pieces.append(model(ids[:, i : i + 1], past_key_values=cache, attention_mask=mask[:, : i + 1]).logits)
    shown = mask.bool()
    check_logits(torch.cat(pieces, 1)[shown], wanted[shown], exact[shown])


def test_custom_pattern_holds_for_a_single_query_over_a_paged_cache():
    mask = _mask(q_length=1, q_offset=3, kv_length=-64, use_vmap=True, allow_is_causal_skip=False,
                 mask_function=lambda b, h, q, k: (k <= q) & (k != 1))  # fmt: skip
    assert mask.dtype == torch.bool
    assert mask[:, 0, 0].tolist() == [[True, False, True, True]] * 2

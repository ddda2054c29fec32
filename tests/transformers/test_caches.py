"""Each cache that generate() can be given equals eager, and a PagedCache serves code that knows nothing of it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import (
    BLOCK,
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
    prompt,
    shared,
    under,
    with_holes,
)
from packaging import version
from transformers import DogeConfig, DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_fastattn import PagedCache
from hf_fastattn.generate import CACHE_NAME
from hf_fastattn.handles import Handle

CACHES = {
    "no cache": {"use_cache": False},
    "DynamicCache": {},
    "StaticCache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("scenario", ["greedy", "left_padded", "holes", "beams"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_transformers_own_caches(family, cache, scenario):
    model = shared(family)
    inputs = {
        "greedy": {"input_ids": prompt()},
        "left_padded": left_padded(prompt(), 5, 0),
        "holes": with_holes(prompt()),
        "beams": left_padded(prompt(), 5, 0) | {"num_beams": 4},
    }[scenario]
    with under(model):
        out = generate(model, **CACHES[cache], **inputs)
    expected(family, scenario).check([out])


def test_a_window_over_a_dynamic_cache_that_keeps_every_token():
    model = shared("mistral")
    with under(model):
        out = generate(model, input_ids=prompt(), past_key_values=DynamicCache())
    expected("mistral", "greedy").check([out])


@pytest.mark.parametrize("scenario", ["left_padded", "holes", "beams", "chat", "prompt_lookup"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_paged_cache_under_other_implementations(family, implementation, scenario):
    model = shared(family)
    with under(model, implementation):
        outputs = SCENARIOS[scenario](model, paged)
    expected(family, scenario).check(outputs)


@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
@pytest.mark.parametrize("order", [("fastattn", "sdpa"), ("fastattn", "eager"), ("sdpa", "fastattn")])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_switching_implementation_over_one_cache(family, order, pads):
    """The prompt under one implementation, the rest under another, which counts the padding in."""
    model, inputs = shared(family), left_padded(prompt(), *pads)
    cache, logits = paged(model), []
    for implementation, steps in zip(order, (4, 8), strict=True):
        with under(model, implementation):
            out = generate(model, cache, max_new_tokens=steps, **inputs)
        logits += out.logits
        ones = torch.ones(2, steps, dtype=torch.long)
        inputs = {"input_ids": out.sequences, "attention_mask": torch.cat([inputs["attention_mask"], ones], 1)}
    out.logits = tuple(logits)
    expected(family, "left_padded" if any(pads) else "greedy").check([out])


def _filled(model, inputs, cache):
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


def _both(model, inputs):
    """Return a PagedCache filled under fastattn and a DynamicCache filled under eager, all columns kept."""
    with under(model):
        ours = _filled(model, inputs, paged(model))
    with under(model, "eager"):
        return ours, _filled(model, inputs, DynamicCache())


def _assert_equal_states(ours, theirs, columns):
    """Equal up to float32's rounding where the mask shows a column, and 0 where nothing was stored."""
    assert ours.shape == theirs.shape
    shown = columns[:, None, :, None].expand_as(ours)
    torch.testing.assert_close(ours[shown], theirs[shown], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("inputs", [left_padded(prompt(), 0, 0), left_padded(prompt(), 5, 2), with_holes(prompt())])
def test_layers_keys_and_values_are_dense_columns(family, inputs):
    ours, theirs = _both(shared(family), inputs)
    columns = inputs["attention_mask"].bool()
    assert len(ours.layers) == len(theirs.layers) == 3
    for paged_layer, layer in zip(ours.layers, theirs.layers, strict=True):
        _assert_equal_states(paged_layer.keys, layer.keys, columns)
        _assert_equal_states(paged_layer.values, layer.values, columns)
        padding = ~columns[:, None, :, None].expand_as(layer.keys)
        if family == "llama":
            assert not paged_layer.keys[padding].any()
    assert ours.get_seq_length() == 14
    assert not ours.made_dense  # looking changes nothing


def _go_on(model, cache, inputs, out):
    """Go on over a cache for what is left of the tests' twelve tokens."""
    done = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, done, dtype=torch.long)], 1)
    rest = generate(model, cache, input_ids=out.sequences, attention_mask=mask, max_new_tokens=12 - done)
    rest.logits = out.logits + rest.logits
    return rest


@pytest.mark.parametrize("target", ["to_dynamic", "from_dynamic", "there and back", "deepcopy"])
@pytest.mark.parametrize("scenario", ["greedy", "left_padded", "holes"])
def test_conversion_goes_on_generating_the_same(scenario, target):
    model = shared("llama")
    inputs = {
        "greedy": left_padded(prompt(), 0, 0),
        "left_padded": left_padded(prompt(), 5, 0),
        "holes": with_holes(prompt()),
    }[scenario]
    with under(model):
        cache = DynamicCache() if target == "from_dynamic" else paged(model)
        out = generate(model, cache, max_new_tokens=5, **inputs)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        if target == "deepcopy":
            cache = copy.deepcopy(cache)
        if target in ("to_dynamic", "there and back"):
            cache = cache.to_dynamic()
            assert type(cache) is DynamicCache
        if target in ("from_dynamic", "there and back"):
            dynamic = cache
            cache = PagedCache.from_dynamic(dynamic, model.config, attention_mask=mask, block_size=BLOCK)
            assert cache.state.tables.lens == mask.sum(1).tolist()
            for ours, theirs in zip(cache.layers, dynamic.layers, strict=True):
                _assert_equal_states(ours.keys, theirs.keys, mask.bool())
        rest = _go_on(model, cache, inputs, out)
    expected("llama", scenario).check([rest])


def test_from_dynamic_refuses_a_cache_that_dropped_columns():
    model = shared("mistral")
    with under(model):
        cache = _filled(model, {"input_ids": prompt()}, DynamicCache(config=model.config))
        with pytest.raises(ValueError, match="layers that hold all columns"):
            PagedCache.from_dynamic(cache, model.config)


# Handles


@pytest.fixture
def states():
    """A model under fastattn, a cache with 9 columns, and the same in a DynamicCache; then 3 new columns for both."""
    model, inputs = shared("llama"), left_padded(prompt(2, 9), 4, 0)
    ours, theirs = _both(model, inputs)
    # columns that are never stored are 0
    hidden = ~inputs["attention_mask"].bool()[:, None, :, None]
    for layer in theirs.layers:
        layer.keys, layer.values = layer.keys.masked_fill(hidden, 0), layer.values.masked_fill(hidden, 0)
    new = torch.randn(2, 2, 2, 3, 8, generator=torch.Generator().manual_seed(3))
    with under(model):
        yield ours.update(new[0], new[1], 0), theirs.update(new[0], new[1], 0)


def _same(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_handle_has_the_dense_tensors_shape_without_becoming_dense(states):
    (key, value), (dense_key, _) = states
    assert isinstance(key, Handle)
    assert isinstance(value, Handle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert key.shape == dense_key.shape == key.size() == (2, 2, 12, 8)
        assert key.shape[-2] == key.size(-2) == 12
        assert key.dim() == 4
        assert key.dtype is torch.float32
        assert key.device == dense_key.device
        assert key.to(dense_key.device) is key
        assert "Handle(keys" in repr(key)
    assert not key.new.layer.cache.made_dense


OPERATIONS = {
    "matmul function": lambda k, v: torch.matmul(k, v.transpose(2, 3)),
    "cat with a tensor": lambda k, v: torch.cat([k, torch.ones(2, 2, 1, 8)], dim=2),
    "cat of both": lambda k, v: torch.cat((k, v), dim=1),
    "sdpa": lambda k, v: F.scaled_dot_product_attention(torch.ones(2, 2, 1, 8), k, v),
    "einsum": lambda k, v: torch.einsum("bhsd,bhtd->bhst", k, v),
    "repeat_interleave": lambda k, v: torch.repeat_interleave(v, 2, dim=1),
    "slice": lambda k, v: k[:, :, -4:],
    "index": lambda k, v: v[0, 1, 11, 3],
    "ellipsis": lambda k, v: v[..., None, 2:5],
    "plus": lambda k, v: k + 1.5,
    "both plus": lambda k, v: k + v,
    "reflected minus": lambda k, v: 1.0 - k,
    "scaled": lambda k, v: 2.0 * k / 3.0,
    "matmul operator": lambda k, v: k @ v.transpose(-1, -2),
    "reflected matmul": lambda k, v: torch.ones(2, 2, 1, 12) @ v,
    "negative": lambda k, v: -k,
    "power": lambda k, v: k**2,
    "less": lambda k, v: k < v,
    "to float64": lambda k, v: v.to(torch.float64),
    "method": lambda k, v: k.transpose(1, 2).reshape(2, 12, 16),
    "expand": lambda k, v: k[:, :, None].expand(2, 2, 2, 12, 8),
    "contiguous": lambda k, v: v.contiguous(),
    "norm": lambda k, v: F.layer_norm(k, (8,)),
    "length": lambda k, v: torch.tensor(len(k)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore:a model computes with cached keys")
def test_handle_computes_like_the_dense_tensor(states, operation):
    ours, theirs = states
    _same(OPERATIONS[operation](*ours), OPERATIONS[operation](*theirs))
    assert ours[0].new.layer.cache.made_dense


class _Touching(LlamaAttention):
    """Attention that computes with what the cache returns: keys and values are scaled, position by position."""

    def forward(self, *args, **kwargs):
        if kwargs.get(CACHE_NAME) is not None:
            kwargs[CACHE_NAME] = _Scaled(kwargs[CACHE_NAME])
        return super().forward(*args, **kwargs)


class _Scaled:
    def __init__(self, cache):
        self.cache = cache

    def update(self, k, v, layer_idx, *args, **kwargs):
        k, v = self.cache.update(k, v, layer_idx, *args, **kwargs)
        scale = 1.0 + torch.arange(k.shape[-2], dtype=k.dtype)[:, None] / 64
        return k * scale, torch.mul(v, scale)


def _touching_llama():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = _Touching
    return model


def _doge():
    """Doge's mask is made of cached values."""
    config = DogeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        keep_window_size=128,
    )  # fmt: skip
    return build_from(config)


doge_since_5_23 = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="earlier Doge drops causality when a mask function returns None, under sdpa too",
)


@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
@pytest.mark.parametrize("make", [_touching_llama, pytest.param(_doge, marks=doge_since_5_23)])
def test_model_that_touches_cached_states_works_and_warns_once(make, pads):
    model, inputs = make(), left_padded(prompt(), *pads)
    eager, exact = generate(model, **inputs), generate(in_float64(model), **inputs)
    with under(model):
        cache = paged(model)
        with pytest.warns(RuntimeWarning) as caught:
            out = generate(model, cache, **inputs)
    assert sum("computes with cached keys or values itself" in str(warning.message) for warning in caught) == 1
    assert cache.made_dense
    assert cache.get_seq_length() == 25
    assert torch.equal(out.sequences, eager.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))

"""Under torch.autocast rotary embeddings leave queries and keys in float32; attention runs in 16 bits all the same."""

import functools

import pytest
import torch
from models import build, generate, in_float64, left_padded, paged, prompt
from test_compiled import Graphs, _compiled
from transformers import DynamicCache

from hf_fastattn import attention, ops

STEPS = 6
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "paged": paged,
    "sized": lambda model: paged(model, max_length=64),
    "fixed": lambda model: paged(model, num_blocks=16),
    "offloaded": lambda model: paged(model, offload=True),
}


@pytest.fixture
def dtypes(monkeypatch):
    """Note the dtypes that the ops are called with."""
    seen = set()

    def spy(name):
        op = getattr(ops, name)

        def call(q, k, v, *args, **kwargs):
            seen.add((name, q.dtype, k.dtype, v.dtype))
            return op(q, k, v, *args, **kwargs)

        return call

    for name in ("prefill_attention", "decode_attention"):
        monkeypatch.setattr(attention.ops, name, spy(name))
    return seen


def run(model, cache, dtype=None):
    """Return the logits of prompt and given tokens, (rows, steps, vocabulary) float64."""
    inputs, logits = left_padded(prompt(2, 20), 4, 0), []
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(STEPS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits[:, -1].double())
        ids = prompt(2, 1, seed=step)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.stack(logits, 1)


@functools.cache
def expected(dtype):
    """Return the exact logits, and how far off sdpa is under autocast."""
    exact = run(in_float64(build("llama")), DynamicCache())
    own = run(build("llama", "sdpa"), DynamicCache(), dtype)
    return exact, (own - exact).abs().max().item()


def check(logits, dtype):
    exact, own = expected(dtype)
    assert (logits - exact).abs().max().item() <= 2 * own + torch.finfo(dtype).eps * exact.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CACHES)
def test_ops_run_in_autocasts_dtype(kind, dtype, dtypes):
    model = build("llama", "fastattn")
    check(run(model, CACHES[kind](model), dtype), dtype)
    assert dtypes == {(name, dtype, dtype, dtype) for name in ("prefill_attention", "decode_attention")}


def stored(cache):
    return {tensor.dtype for layer in cache.paged_layers for tensor in layer.blocks.tensors}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"max_length": 64}])
def test_the_first_step_decides_what_is_stored(first, sizes, dtypes):
    """Later steps are stored and attend in that dtype, in autocast or not; results are in the dtype asked for."""
    model, cache, shown = build("llama", "fastattn"), None, []
    cache = paged(model, **sizes)
    wanted = torch.bfloat16 if first else torch.float32
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: shown.append(args[0].dtype))
    for enabled in (first, not first, first):
        for ids in (prompt(2, 9), prompt(2, 1)):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = model(ids, past_key_values=cache).logits
            assert not logits.isnan().any()
            assert shown.pop() == (torch.bfloat16 if enabled else torch.float32)
    assert stored(cache) == {wanted}
    assert {seen[1:] for seen in dtypes} == {3 * (wanted,)}


def test_compiled_steps_under_autocast():
    model, eager, graphs = build("llama", "fastattn"), build("llama", "fastattn"), Graphs()
    for seed in range(2):
        inputs = left_padded(prompt(2, 9, seed=seed), 3, 0)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = generate(eager, paged(eager), **inputs)
            out = generate(model, paged(model, max_length=64), **inputs, **_compiled(graphs))
        assert torch.equal(out.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(wanted.logits))
    assert graphs.count == 1


def test_without_a_cache_and_with_gradients(dtypes):
    """The result has autocast's dtype, as sdpa's has; gradients come back in float32."""
    fast, plain = (build("llama", implementation) for implementation in ("fastattn", "sdpa"))
    shown = []
    for model in (fast, plain):
        layer = model.model.layers[0].self_attn.o_proj
        hook = layer.register_forward_pre_hook(lambda _, args: shown.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(prompt(), use_cache=False).logits.float().sum().backward()
            with torch.no_grad():
                model(prompt(), use_cache=False)
        hook.remove()
    assert shown == 4 * [torch.bfloat16]
    assert dtypes == {("prefill_attention", *3 * [torch.bfloat16])}
    for own, other in zip(fast.parameters(), plain.parameters(), strict=True):
        assert own.grad.dtype == torch.float32
        torch.testing.assert_close(own.grad, other.grad, rtol=0.1, atol=0.05 * other.grad.abs().max().item())


def test_float64_is_left_alone(dtypes):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = torch.randn(1, 2, 4, 8, dtype=torch.float64)
        out, _ = attention.fastattn_attention(torch.nn.Module(), states, states, states, None)
    assert out.dtype == torch.float64
    assert dtypes == {("prefill_attention", *3 * [torch.float64])}

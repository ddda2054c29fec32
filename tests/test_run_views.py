"""Views of a CPU's blocks, made some decode steps ahead: no change of tables or memory may leave one behind."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig

from hf_fastattn import BlockPoolExhausted, PagedCache
from hf_fastattn.attention import fastattn_attention
from hf_fastattn.paged_state import PagedState
from hf_fastattn.run_views import STEPS_AHEAD
from tests.tiny import assert_logits, eager, feed, left_padding, make_pair, tokens

pytestmark = pytest.mark.usefixtures("no_grad")

PROMPT, BLOCK = 30, 16


@pytest.fixture(params=["llama", "mistral"])
def pair(request):
    return request.getfixturevalue(request.param)


def begin(pair, batch=2, prompt=PROMPT, **sizes):
    """Return tokens, eager's logits for all of them, and a cache that holds the prompt and one token more."""
    ids = tokens(batch, 80)
    cache = PagedCache(pair.fast.config, block_size=BLOCK, **sizes)
    feed(pair.fast, ids[:, : prompt + 1], cache, steps=[prompt, 1])
    return ids, eager(pair, ids), cache


def check_decode(pair, ids, logits, cache, steps):
    """Assert the logits of the next tokens, fed one at a time."""
    done = cache.get_seq_length()
    assert_logits(feed(pair.fast, ids[:, done : done + steps], cache), logits[:, done : done + steps])


@pytest.mark.parametrize("sizes", [{}, {"max_length": 80}, {"num_blocks": 10}, {"offload": True}], ids=str)
def test_decode_steps_cross_blocks(pair, sizes):
    ids, logits, cache = begin(pair, **sizes)
    check_decode(pair, ids, logits, cache, 80 - PROMPT - 1)


def test_views_are_made_for_several_steps_and_all_layers_at_once(llama, monkeypatch):
    made = []
    views_of = torch.Tensor.as_strided
    monkeypatch.setattr(torch.Tensor, "as_strided", lambda *args: (made.append(1), views_of(*args))[1])
    ids, logits, cache = begin(llama, prompt=2 * BLOCK)
    made.clear()
    check_decode(llama, ids, logits, cache, STEPS_AHEAD - 1)
    assert not made, "the first decode step made them all"
    check_decode(llama, ids, logits, cache, 1)
    assert len(made) == 4 * len(cache.layers) * (BLOCK - STEPS_AHEAD), "for what is left of the block"


def test_the_pool_grows_for_another_cache(pair):
    ids, logits, cache = begin(pair)
    other = PagedCache(pair.fast.config, pool=cache.state.memory)
    before = cache.paged_layers[0].k_cache
    feed(pair.fast, tokens(4, 300, seed=1), other, steps=[300])
    assert cache.paged_layers[0].k_cache is not before
    before.fill_(float("nan"))
    check_decode(pair, ids, logits, cache, 20)


def test_crops_go_back_and_forth(pair):
    ids, logits, cache = begin(pair)
    for back in (1, 3, 9, 2):
        check_decode(pair, ids, logits, cache, 6)
        cache.crop(-back)
    check_decode(pair, ids, logits, cache, 20)


def test_sequences_are_chosen(pair):
    ids, logits, cache = begin(pair, batch=3)
    for index in ([2, 0, 1], [1, 1, 0], [0, 2]):
        check_decode(pair, ids, logits, cache, 3)
        cache._select(index)
        ids, logits = ids[index], logits[index]
    check_decode(pair, ids, logits, cache, 12)


def test_reset_and_another_batch(pair):
    ids, logits, cache = begin(pair)
    check_decode(pair, ids, logits, cache, 3)
    cache.reset()
    feed(pair.fast, ids[:1, :PROMPT], cache, steps=[PROMPT])
    check_decode(pair, ids[:1], logits[:1], cache, 12)


def test_several_tokens_between_single_ones(pair):
    ids, logits, cache = begin(pair)
    for steps in ([1, 1, 4], [1, 2, 1], [1, 1, 1]):
        done = cache.get_seq_length()
        count = sum(steps)
        assert_logits(feed(pair.fast, ids[:, done:], cache, steps=steps), logits[:, done : done + count])


@pytest.fixture
def planned(monkeypatch):
    """Note the forward passes that are planned anew."""
    passes, begin_pass = [], PagedState.begin

    def noted(state, *args, **kwargs):
        passes.append(state.columns)
        return begin_pass(state, *args, **kwargs)

    monkeypatch.setattr(PagedState, "begin", noted)
    return passes


@pytest.mark.parametrize(
    ("sizes", "blocks_added"),
    [({"max_length": 80}, []), ({}, [32, 48, 64]), ({"num_blocks": 10}, [32, 48, 64])],
    ids=str,
)
def test_a_decode_step_repeats_the_one_before_until_a_block_is_full(llama, planned, sizes, blocks_added):
    ids, logits, cache = begin(llama, **sizes)
    check_decode(llama, ids, logits, cache, 80 - PROMPT - 1)
    assert planned == [0, *blocks_added]


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.state.finish([True, False]),
        lambda cache: cache.reset(),
        lambda cache: cache.state.on(torch.device("meta")),
        lambda cache: setattr(cache.config, "num_hidden_layers", 1),
    ],
    ids=["crop", "reorder", "finish", "reset", "another device", "fewer layers"],
)
def test_what_changes_the_cache_is_followed_by_a_planned_step(llama, planned, change, monkeypatch):
    ids, _, cache = begin(llama, prompt=20)
    monkeypatch.setattr(cache.config, "num_hidden_layers", 2)  # restored afterwards
    feed(llama.fast, ids[:, :1], cache)
    planned.clear()
    change(cache)
    feed(llama.fast, ids[:, :1], cache)
    assert len(planned) == 1


def test_no_step_is_repeated_before_the_host_has_caught_up_with_compiled_ones(llama):
    _, _, cache = begin(llama, max_length=80)
    state, new = cache.state, torch.empty(2, 2, 1, 8)
    state.behind = True
    assert state.repeat(0, new, 2) is None
    state.sync()
    assert state.repeat(0, new, 2).lens == [PROMPT + 2] * 2


def test_steps_with_a_window_are_planned(mistral, planned):
    """Each layer has to say how far it looks back, and views would lack what was freed behind the window."""
    ids, logits, cache = begin(mistral)
    check_decode(mistral, ids, logits, cache, 5)
    assert len(planned) == 7


def test_padded_sequences_are_planned_at_every_step(llama, planned):
    ids, mask = tokens(2, 40), left_padding([40, 40], 40)
    mask[:, :4] = 0  # of one length, so that they can be viewed; but columns are not tokens
    cache = PagedCache(llama.fast.config, block_size=BLOCK)
    got = feed(llama.fast, ids, cache, mask, [PROMPT] + [1] * 10)
    assert_logits(got, eager(llama, ids, mask), mask)
    assert len(planned) == 11


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_attention_goes_on_in_the_middle(llama, implementation):
    ids, logits, cache = begin(llama)
    check_decode(llama, ids, logits, cache, 4)
    for name in (implementation, "fastattn"):
        llama.fast.set_attn_implementation(name)
        check_decode(llama, ids, logits, cache, 10)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_the_users_own_in_the_middle(llama, additive):
    ids, _, cache = begin(llama)
    own = DynamicCache(config=llama.eager.config)
    feed(llama.eager, ids[:, : PROMPT + 1], own, steps=[PROMPT + 1])
    for i in range(PROMPT + 1, PROMPT + 9):
        seen = torch.ones(2, 1, 1, i + 1, dtype=torch.bool)
        seen[0, ..., i % 7 :: 5], seen[..., -1] = False, True
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        want = llama.eager(ids[:, i : i + 1], attention_mask=mask, past_key_values=own).logits
        given = mask if additive else seen
        got = llama.fast(ids[:, i : i + 1], attention_mask=given if i % 3 else mask, past_key_values=cache).logits
        assert_logits(got, want)
    assert_logits(feed(llama.fast, ids[:, 50:60], cache), feed(llama.eager, ids[:, 50:60], own))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("again", [[1, 1, 1], [3]], ids=str)
def test_a_pass_that_fails_leaves_the_cache_as_it_was(llama, layer, again):
    ids, logits, cache = begin(llama)
    check_decode(llama, ids, logits, cache, 3)

    def fail(*args):
        raise KeyboardInterrupt

    attention = llama.fast.model.layers[layer].self_attn
    hook = attention.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        feed(llama.fast, tokens(2, 1, seed=9), cache)
    hook.remove()
    done = cache.get_seq_length()
    assert done == PROMPT + 4
    assert_logits(feed(llama.fast, ids[:, done:], cache, steps=again), logits[:, done : done + 3])


def test_a_capacity_ends_as_it_does_without_views(llama):
    ids, logits, cache = begin(llama, max_length=40)
    check_decode(llama, ids, logits, cache, 40 - PROMPT - 1)
    with pytest.raises(BlockPoolExhausted, match="max_length is 40"):
        feed(llama.fast, ids[:, 40:41], cache)
    cache.crop(-2)
    check_decode(llama, ids, logits, cache, 2)


def test_a_capacity_is_a_limit_for_whoever_updates_the_cache():
    config = LlamaConfig(num_hidden_layers=1, attn_implementation="fastattn")
    cache, layer = PagedCache(config, block_size=BLOCK, max_length=20), SimpleNamespace(layer_idx=0, config=config)
    for count in [17, 1, 1, 1]:
        new = torch.randn(1, 2, count, 8)
        fastattn_attention(layer, new, *cache.update(new, new, 0), None)
    with pytest.raises(BlockPoolExhausted, match="max_length is 20"):
        fastattn_attention(layer, new, *cache.update(new, new, 0), None)


def test_another_batch_is_refused(llama):
    ids, logits, cache = begin(llama)
    check_decode(llama, ids, logits, cache, 2)
    with pytest.raises(ValueError, match="the cache holds 2 sequences, the forward pass brings 1"):
        feed(llama.fast, ids[:1, :1], cache)
    check_decode(llama, ids, logits, cache, 2)


def test_forks_part_after_repeated_steps(llama):
    ids, logits, cache = begin(llama)
    check_decode(llama, ids, logits, cache, 5)
    twin = cache.fork(1)
    feed(llama.fast, tokens(2, 12, seed=3), twin)
    check_decode(llama, ids, logits, cache, 12)


@pytest.mark.parametrize("sizes", [{}, {"max_length": 80}], ids=str)
def test_compiled_steps_between_repeated_ones(llama, sizes):
    ids, logits, cache = begin(llama, **sizes)
    torch._dynamo.reset()
    compiled = torch.compile(llama.fast, backend="eager")
    for model in (llama.fast, compiled, llama.fast, compiled, llama.fast):
        done = len(cache) and int(cache.get_seq_length())
        assert_logits(feed(model, ids[:, done : done + 4], cache), logits[:, done : done + 4])


def test_compiled_layers_of_an_eager_model():
    pair = make_pair()
    ids, logits, cache = begin(pair)
    torch._dynamo.reset()
    for layer in pair.fast.model.layers:
        layer.compile(backend="eager")
    check_decode(pair, ids, logits, cache, 12)


def test_gradients_in_the_middle(llama):
    ids, logits, cache = begin(llama)
    check_decode(llama, ids, logits, cache, 3)
    llama.fast.requires_grad_(True)
    with torch.enable_grad():
        done = cache.get_seq_length()
        out = feed(llama.fast, ids[:, done : done + 1], cache)
        assert_logits(out, logits[:, done : done + 1])
        weight = llama.fast.model.layers[0].self_attn.v_proj.weight
        (grad,) = torch.autograd.grad(out.square().sum(), weight)
    own = DynamicCache(config=llama.fast.config)
    feed(llama.fast, ids[:, :done], own, steps=[done])
    with torch.enable_grad():
        out = feed(llama.fast, ids[:, done : done + 1], own)
        (want,) = torch.autograd.grad(out.square().sum(), weight)
    assert_logits(grad, want)
    llama.fast.requires_grad_(False)
    check_decode(llama, ids, logits, cache, 3)


def test_autocast_in_the_middle(llama):
    """What was cached in float32 is not rounded for queries in 16 bits, whether a step repeats another or not."""
    runs = []
    for repeats in (True, False):
        ids, _, cache = begin(llama)
        out = []
        for i in range(PROMPT + 1, PROMPT + 7):
            if not repeats:
                cache.state.steady = None
            with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 0):
                out.append(llama.fast(ids[:, i : i + 1], past_key_values=cache).logits.float())
        runs.append(torch.cat(out, 1))
    assert torch.equal(*runs)


def test_a_last_layer_that_shares_the_keys_of_another(llama):
    """As in Gemma 3n: the pass ends with a layer that stores nothing itself, so every step needs handles."""
    cache = PagedCache(llama.fast.config, block_size=BLOCK)
    layers = [SimpleNamespace(layer_idx=i, is_causal=True, config=llama.fast.config) for i in (0, 1)]
    q, k, v = (torch.randn(1, heads, 24, 8) for heads in (4, 2, 2))
    for begin_at, end in ((0, 20), (20, 21), (21, 22), (22, 23), (23, 24)):
        shared = cache.update(k[:, :, begin_at:end], v[:, :, begin_at:end], 0)
        for layer in layers:
            out, _ = fastattn_attention(layer, q[:, :, begin_at:end], *shared, None)
        assert cache.get_seq_length() == end
    want = F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
    assert torch.allclose(out, want.transpose(1, 2), atol=1e-5)


def test_views_outlive_the_mode_they_were_made_in(pair):
    ids, logits, cache = begin(pair)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode) * 3:
        with mode():
            check_decode(pair, ids, logits, cache, 1)
    pair.fast.requires_grad_(False)  # with gradients on, but nothing that needs one
    try:
        with torch.enable_grad():
            check_decode(pair, ids, logits, cache, 4)
    finally:
        pair.fast.requires_grad_(True)

"""Views of a CPU's blocks, made some decode steps ahead: no change of tables or memory may leave one behind."""

import pytest
import torch

from hf_fastattn import PagedCache
from hf_fastattn.run_views import STEPS_AHEAD
from tests.tiny import assert_logits, eager, feed, tokens

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

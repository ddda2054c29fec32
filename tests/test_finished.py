"""Rows that finish while others go on are let go of in calls that are paged by default: same tokens, fewer blocks."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

import hf_fastattn
from hf_fastattn import paged_generation
from hf_fastattn.cache import BLOCK_SIZE
from hf_fastattn.generate import CACHE_NAME
from tests.test_cache_machine import check_state
from tests.tiny import assert_logits, left_padding, make_pair, tokens

EOS, PAD = 2, 0
ENDS = [3, 40, 17]
NEW = 40


@pytest.fixture(scope="module", params=["llama", "mistral"])
def pair(request):
    made = make_pair(request.param, **({"sliding_window": 11} if request.param == "mistral" else {}))
    hf_fastattn.paged(made.fast)
    return made


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class EndAt:
    """Makes row i end after ends[i] tokens and no sooner; keeps the logits of every step."""

    def __init__(self, ends):
        self.ends, self.logits = torch.tensor(ends), []

    def __call__(self, ids, scores):
        self.logits.append(scores.clone())
        now = (self.ends == len(self.logits))[:, None]
        is_eos = torch.arange(scores.shape[1]) == EOS
        return scores.masked_fill(now & ~is_eos, -1e9).masked_fill(~now & is_eos, -1e9)


def generate(model, ids, mask=None, ends=ENDS, **given):
    """Return the ids, the logits of every step, and the tokens of each row and the pool's blocks after every pass."""
    processor, held = EndAt(ends), []

    def look(_module, _args, kwargs, _out):
        if isinstance(kwargs[CACHE_NAME], hf_fastattn.PagedCache):
            state = kwargs[CACHE_NAME].state
            if not state.sharing:  # a prompt's last block belongs to several until they part
                check_state(kwargs[CACHE_NAME])
            held.append((list(state.tables.lens), state.pool.num_used))

    hook = model.register_forward_hook(look, with_kwargs=True)
    try:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            logits_processor=LogitsProcessorList([processor]),
            **({"do_sample": False} | given),
        )
    finally:
        hook.remove()
    return out, processor.logits, held


def tokens_of(prompt, ends, step):
    """Return the tokens that each row holds after a pass, the prompt's being the first: none once it has finished."""
    return [n + step if step < end else 0 for n, end in zip(prompt, ends, strict=True)]


def check_rows_rest(pair, padded, late=0, **given):
    """Assert that rows give their blocks back ``late`` passes after their end, and that nobody else notices."""
    ids = tokens(3, 90)
    mask = left_padding([90, 12, 61]) if padded else torch.ones_like(ids)
    got, logits, held = generate(pair.fast, ids, mask, **given)
    want, expected, _ = generate(pair.eager, ids, mask)
    assert torch.equal(got, want)
    for step, (a, b) in enumerate(zip(logits, expected, strict=True), 1):
        going = torch.tensor(ENDS) >= step
        assert_logits(a[going], b[going])
        assert a.isfinite().all()
    assert len(held) == NEW
    for step, (lens, used) in enumerate(held):
        assert lens == tokens_of(mask.sum(1).tolist(), [end + late for end in ENDS], step)
        assert used == sum(-(-n // BLOCK_SIZE) for n in lens)


@pytest.mark.parametrize("padded", [False, True])
def test_finished_rows_give_their_blocks_back(pair, padded):
    check_rows_rest(pair, padded)


def test_sampled_rows_of_one_prompt(pair):
    """Rows that share a prompt part when one of them finishes at once; random numbers are those of eager's call."""
    ids, mask = tokens(2, 37), left_padding([37, 20])
    ends = [1, 9, 40, 1, 1, 30]
    outs = []
    for model in (pair.fast, pair.eager):
        torch.manual_seed(3)
        out, _, held = generate(model, ids, mask, ends, do_sample=True, num_return_sequences=3, top_k=3)
        outs.append(out)
        for step, (lens, _) in enumerate(held):
            assert lens == (tokens_of([37] * 3 + [20] * 3, ends, step) if step else [37, 20])  # one row per prompt
    assert torch.equal(*outs)


def budget(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Choose greedily, and go on with another token where a row would end: a loop of the user's."""
    ids, step = input_ids, input_ids
    for _ in range(12):
        logits = model(step, past_key_values=kwargs[CACHE_NAME]).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        done = stopping_criteria(torch.cat([ids, token], 1), None)
        step = torch.where(done[:, None], 7, token)
        ids = torch.cat([ids, step], 1)
    return ids


def test_a_loop_of_the_users_goes_on_with_every_row(pair):
    ids, outs = tokens(2, 20), []
    ends = int(pair.eager.generate(ids, max_new_tokens=3, eos_token_id=None, pad_token_id=0)[0, 22])
    for model in (pair.fast, pair.eager):
        given = {"max_new_tokens": 30, "eos_token_id": ends, "pad_token_id": 0}
        outs.append(model.generate(ids, custom_generate=budget, **given))
    assert torch.equal(*outs)


@pytest.mark.parametrize("how", ["function", "method"])
def test_rows_that_a_users_loop_tells_apart_share_nothing(pair, how, monkeypatch):
    """It may give each row a first token of its own, in the pass of the prompt."""

    def steered(model, input_ids, *args, **kwargs):
        ids = torch.cat([input_ids, torch.arange(3, 3 + len(input_ids))[:, None]], 1)
        for _ in range(6):
            seen = kwargs[CACHE_NAME].get_seq_length()
            logits = model(ids[:, seen:], past_key_values=kwargs[CACHE_NAME]).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids

    options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 8, "eos_token_id": None}
    options |= {"pad_token_id": 0}
    if how == "method":
        monkeypatch.setattr(type(pair.eager), "_sample", steered)  # of which the other model's class is a subclass
    else:
        options["custom_generate"] = steered
    assert torch.equal(*(model.generate(tokens(1, 20), **options) for model in (pair.fast, pair.eager)))


def test_nothing_rests_where_somebody_may_look(pair):
    """A returned or given cache, returned logits, beams, and stopping without an end token leave every row alone."""
    ids = tokens(3, 20)
    full = [20 + NEW - 1] * 3
    for given in ({"return_dict_in_generate": True}, {"past_key_values": hf_fastattn.PagedCache(pair.fast.config)}):
        assert generate(pair.fast, ids, **given)[2][-1][0] == full

    def stop(ids, scores, **_):
        return torch.tensor([True, False, ids.shape[1] > 50])

    given = {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([stop])}
    got, _, held = generate(pair.fast, ids, **given)
    assert held[-1][0] == full
    assert torch.equal(got, generate(pair.eager, ids, **given)[0])
    given = {"num_beams": 2, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(pair.fast.generate(ids, **given), pair.eager.generate(ids, **given))


def test_a_stop_criterion_of_the_users_counts_beside_the_end_token(pair):
    def stop(ids, scores, **_):
        return torch.tensor([ids.shape[1] == 26, False, False])  # once: transformers remembers it, and so do we

    ids = tokens(3, 20)
    given = {"ends": [99, 40, 4], "stopping_criteria": StoppingCriteriaList([stop])}
    got, _, held = generate(pair.fast, ids, **given)
    assert torch.equal(got, generate(pair.eager, ids, **given)[0])
    assert got[0, 26:].tolist() == [PAD] * 34
    assert [lens for lens, _ in held] == [tokens_of([20] * 3, [6, 40, 4], step) for step in range(NEW)]


def test_a_gpu_is_asked_now_and_then(pair, monkeypatch):
    monkeypatch.setattr(paged_generation, "_host_knows", lambda tensor: False)
    ids = tokens(3, 20)
    got, _, held = generate(pair.fast, ids)
    assert torch.equal(got, generate(pair.eager, ids)[0])
    ends = [-(-end // paged_generation.LOOK_EVERY) * paged_generation.LOOK_EVERY for end in ENDS]
    assert [lens for lens, _ in held] == [tokens_of([20] * 3, ends, step) for step in range(NEW)]


def resting(pair, ids, count=3):
    """Return a cache over ids whose first row has finished, and that of the others goes on; all tokens, and a mask."""
    cache = pair.cache()
    pair.fast(ids, past_key_values=cache)
    cache.state.finish([True] + [False] * (len(ids) - 1))
    mask = torch.ones_like(ids)
    for step in range(count):
        new = tokens(len(ids), 1, seed=step + 1)
        pair.fast(new, past_key_values=cache)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    mask[0] = 0
    return cache, ids, mask


def test_another_turn_over_rows_that_have_finished(pair):
    """Their columns are padding: hidden, the other rows are as with eager attention; shown, it is an error."""
    cache, ids, mask = resting(pair, tokens(2, 20))
    assert cache.state.tables.lens == [0, 23]
    turn = tokens(2, 5, 9)
    shown = torch.cat([torch.ones_like(mask), torch.ones_like(turn)], 1)
    with pytest.raises(ValueError, match="shows columns that an earlier mask has hidden"):
        pair.fast(turn, past_key_values=cache, attention_mask=shown)
    mask = torch.cat([mask, torch.ones_like(turn)], 1)
    got = pair.fast(turn, past_key_values=cache, attention_mask=mask).logits
    assert cache.state.tables.lens == [5, 28]
    assert_logits(got, pair.eager(torch.cat([ids, turn], 1), attention_mask=mask).logits[:, -5:])
    check_state(cache)


def test_what_a_finished_row_holds(pair):
    cache, ids, mask = resting(pair, tokens(2, 20))
    oracle = DynamicCache()
    pair.eager(ids, past_key_values=oracle)
    got, want = cache.to_dynamic().layers[0].keys, oracle.layers[0].keys
    assert not got[0].any()
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    cache.crop(-4)
    assert cache.state.tables.lens == [0, 19]
    assert cache.state.padding.finished is None
    check_state(cache)
    new = tokens(2, 2, 5)
    mask = torch.cat([mask[:, :19], torch.ones_like(new)], 1)
    logits = pair.fast(new, past_key_values=cache, attention_mask=mask).logits
    assert_logits(logits[1:], pair.eager(torch.cat([ids[1:, :19], new[1:]], 1)).logits[:, -2:])


def test_rows_that_are_chosen_do_not_rest_any_more(pair):
    cache, ids, _ = resting(pair, tokens(2, 20))
    cache.batch_select_indices(torch.tensor([1]))
    new = tokens(1, 1, 5)
    logits = pair.fast(new, past_key_values=cache).logits
    assert cache.state.tables.lens == [24]
    assert_logits(logits, pair.eager(torch.cat([ids[1:], new], 1)).logits[:, -1:])
    with pytest.raises(ValueError, match="hear about 1 sequences, got 2"):
        cache.state.finish([True, False])

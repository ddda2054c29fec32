"""Rows that finish rest in custom_generate=hf_fastattn.generate as in transformers' loop; on a GPU one pass later."""

import importlib

import pytest
import torch
from transformers import StoppingCriteriaList

import hf_fastattn
from hf_fastattn.paged_state import PagedState
from tests.test_finished import NEW, check_rows_rest, generate, tokens_of
from tests.tiny import left_padding, make_pair, tokens

loop = importlib.import_module("hf_fastattn.generate")
OURS = {"custom_generate": hf_fastattn.generate}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def pair(request):
    made = make_pair(request.param, **({"sliding_window": 11} if request.param == "mistral" else {}))
    hf_fastattn.paged(made.fast)
    return made


@pytest.fixture(params=[0, 1], ids=["at_once", "deferred"])
def late(request, monkeypatch):
    """Passes by which the cache learns late who has finished: none on a CPU, one on a GPU."""
    if request.param:
        monkeypatch.setattr(loop, "_defers", lambda device, cache: isinstance(cache, hf_fastattn.PagedCache))
    return request.param


@pytest.fixture
def told(monkeypatch):
    """Collect what caches are told."""
    calls, finish = [], PagedState.finish
    monkeypatch.setattr(PagedState, "finish", lambda self, flags: calls.append(list(flags)) or finish(self, flags))
    return calls


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("padded", [False, True])
def test_finished_rows_give_their_blocks_back(pair, padded, late, told):
    check_rows_rest(pair, padded, late, **OURS)
    assert told == [[True, False, False], [True, False, True]]  # and not with every token


def test_sampled_rows_of_one_prompt(pair, late):
    """Rows that share a prompt part when one of them finishes at once, and all end before the limit."""
    ids, mask = tokens(2, 37), left_padding([37, 20])
    ends, outs = [1, 9, 33, 1, 1, 30], []
    for model, how in ((pair.fast, OURS), (pair.eager, {})):
        torch.manual_seed(3)
        outs.append(generate(model, ids, mask, ends, do_sample=True, num_return_sequences=3, top_k=3, **how))
    (got, _, held), (want, *_) = outs
    assert torch.equal(got, want)
    assert got.shape[1] == 37 + 33
    for step, (lens, _) in enumerate(held):
        wanted = tokens_of([37] * 3 + [20] * 3, [end + late for end in ends], step)
        assert lens == (wanted if step else [37, 20])  # one row per prompt


def test_nothing_rests_where_somebody_may_look(pair, late, told):
    """A returned or given cache, and stopping without an end token."""

    def stop(ids, scores, **_):
        return torch.tensor([True, False, ids.shape[1] > 50])

    ids = tokens(3, 20)
    for given in (
        {"return_dict_in_generate": True},
        {"past_key_values": hf_fastattn.PagedCache(pair.fast.config)},
        {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([stop])},
    ):
        assert generate(pair.fast, ids, **given, **OURS)[2][-1][0] == [20 + NEW - 1] * 3
    assert not told

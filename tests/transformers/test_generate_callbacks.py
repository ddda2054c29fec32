"""What others see of our loop: logits processors, stopping criteria and streamers get what transformers' loop gives."""

import importlib
import queue

import pytest
import torch
from loop_calls import OURS, check_same, eos_of
from models import NEW_TOKENS, VOCAB, build, generate, prompt
from transformers import EosTokenCriteria, LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import hf_fastattn


@pytest.fixture(scope="module")
def llama():
    return hf_fastattn.paged(build("llama", "fastattn"))


class Watch(LogitsProcessor):
    """Notes what it is given; insists on contiguous ids."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.view(-1).tolist())
        scores[:, self.seen[-1][-1]] -= 5.0  # in place, as processors may
        return scores


class Odd(StoppingCriteria):
    """Ends a row when it has seen a number of tokens that depends on the row; counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.view(-1).tolist(), None if scores is None else len(scores)))
        return torch.tensor([input_ids.shape[1] >= 18 + 2 * row for row in range(len(input_ids))])


def test_processors_and_criteria_see_the_same(llama, deferred, runs):
    results = []
    for how in ({}, OURS):
        watch, odd = Watch(), Odd()
        out = generate(
            llama,
            input_ids=prompt(3),
            output_scores=True,
            logits_processor=[watch],
            stopping_criteria=StoppingCriteriaList([odd]),
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            max_new_tokens=20,
            **how,
        )
        results.append((out, watch.seen, odd.calls))
    check_same(results[1][0], results[0][0])
    assert results[1][1:] == results[0][1:]
    assert results[1][0].sequences.shape[1] == 22  # all rows have ended
    assert runs


class Editor(LogitsProcessor):
    """Replaces the last token of every row in place."""

    def __call__(self, input_ids, scores):
        input_ids[:, -1] = (input_ids[:, -1] + 1) % VOCAB
        return scores


class EditingStop(StoppingCriteria):
    """The same after a token was chosen, before the next forward pass; answers with integers."""

    def __call__(self, input_ids, scores, **kwargs):
        input_ids[:, -1] = input_ids[:, -1] * 3 % VOCAB
        return torch.zeros(len(input_ids), dtype=torch.long)


@pytest.mark.parametrize("rows", [1, 3])
def test_ids_that_others_edit_or_keep(llama, rows, deferred, runs):
    results = []
    for how in ({}, OURS):
        kept = []

        def keep(input_ids, scores, kept=kept, **kwargs):
            kept.append(input_ids)
            return torch.zeros(len(input_ids), dtype=torch.bool)

        criteria = StoppingCriteriaList([EditingStop(), keep])
        out = generate(
            llama,
            input_ids=prompt(rows),
            logits_processor=[Editor()],
            stopping_criteria=criteria,
            output_scores=True,
            **how,
        )
        results.append((out, [ids.tolist() for ids in kept]))
    check_same(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]
    assert runs


def test_integer_verdicts_end_rows(llama, deferred, runs):
    def stop(input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] == 17, input_ids.shape[1] == 20]).long()

    results = []
    for how in ({}, OURS):
        results.append(generate(llama, input_ids=prompt(), stopping_criteria=StoppingCriteriaList([stop]), **how))
    check_same(results[1], results[0])
    assert results[1].sequences.shape[1] == 20
    assert runs


def test_eos_criterion_of_the_user(llama, deferred):
    criteria = StoppingCriteriaList([EosTokenCriteria(eos_of(llama, {"input_ids": prompt()}, 1, 3))])
    wanted = generate(llama, input_ids=prompt(), stopping_criteria=criteria)
    check_same(generate(llama, input_ids=prompt(), stopping_criteria=criteria, **OURS), wanted)


class Streamer(BaseStreamer):
    """Collects what comes."""

    def __init__(self):
        self.values = queue.SimpleQueue()

    def put(self, value):
        self.values.put(value)  # itself: another thread may look at it later

    def end(self):
        self.values.put("end")

    def all(self):
        values = [self.values.get_nowait() for _ in range(self.values.qsize())]
        return [value if isinstance(value, str) else value.tolist() for value in values]


@pytest.mark.parametrize("ends", [False, True])
def test_streamer_gets_every_token_once(llama, deferred, ends):
    inputs = {"input_ids": prompt(1)}
    eos = eos_of(llama, inputs, 0, 5) if ends else None
    received = []
    for how in ({}, OURS):
        streamer = Streamer()
        out = generate(llama, streamer=streamer, eos_token_id=eos, **inputs, **how)
        received.append(streamer.all())
    assert received[1] == received[0]
    assert received[1][-1] == "end"
    assert [token for [token] in received[1][1:-1]] == out.sequences[0, 14:].tolist()
    assert len(received[1]) == (5 if ends else NEW_TOKENS) + 2


def test_tokenizer_for_stop_strings_arrives(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(importlib.import_module("pathlib").Path(__file__).parents[2] / "examples" / "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastattn")
    inputs = tokenizer("def add(a, b):", return_tensors="pt")
    options = {"max_new_tokens": 40, "do_sample": False, "stop_strings": ["\n"], "tokenizer": tokenizer}
    wanted = model.generate(**inputs, **options)
    assert wanted.shape[1] < inputs["input_ids"].shape[1] + 40
    assert torch.equal(model.generate(**inputs, **options, **OURS), wanted)
    assert runs

"""custom_generate=hf_fastattn.generate against transformers' own loop, over seeded combinations of arguments.

Everything that a caller can see is compared to the bit: what is returned and its types, what processors, criteria and
streamers were given and in which order, the cache, the random numbers left.
"""

import importlib
import random

import pytest
import torch
from models import VOCAB, build, generate, left_padded, prompt, under
from transformers import DynamicCache, LogitsProcessor, StaticCache, StoppingCriteria, StoppingCriteriaList

import hf_fastattn
from hf_fastattn import PagedCache
from hf_fastattn.paged_state import PagedState

loop = importlib.import_module("hf_fastattn.generate")

CALLS = 30
"""Calls of each test; each runs twice or more."""

CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=64),
    "paged": lambda config: PagedCache(config, block_size=16),
    "sized": lambda config: PagedCache(config, block_size=16, max_length=64),
}

OPTIONS = {
    "return_dict_in_generate": (False,),
    "output_scores": (True,),
    "output_hidden_states": (True,),
    "output_attentions": (True,),
    "output_logits": (False,),
    "repetition_penalty": (1.3,),
    "no_repeat_ngram_size": (2,),
    "bad_words_ids": ([[5], [7, 8]],),
    "forced_eos_token_id": (2,),
    "exponential_decay_length_penalty": ((3, 1.5),),
    "min_new_tokens": (4,),
    "renormalize_logits": (True,),
    "guidance_scale": (1.5,),
    "max_time": (0.0, 1000.0),
    "prefill_chunk_size": (1, 4, 100),
    "num_return_sequences": (2,),
    "use_cache": (False,),
    "num_beams": (2,),
    "logits_to_keep": (0, 3),
    "max_new_tokens": (0, 1, 2, 20),
    "max_length": (12,),
}
"""Arguments and values that a call may have: one in nine has each, half of them do_sample."""


class Everything(LogitsProcessor, StoppingCriteria):
    """Processor, criterion and streamer in one: keeps what it is given, edits ids in place if told to."""

    def __init__(self, ends, edits):
        self.ends, self.edits, self.seen, self.steps = ends, edits, [], 0

    def processor(self, ids, scores):
        self.seen.append(("processor", ids, ids.clone(), scores.clone()))
        if self.edits:
            ids[:, -1] = (ids[:, -1] + 1) % VOCAB
        return scores.index_fill(1, ids[:1, -1] * 7 % VOCAB, 3.0)

    def __call__(self, ids, scores, **kwargs):
        self.steps += 1
        self.seen.append(("criterion", ids, ids.clone(), scores, sorted(kwargs)))
        return torch.tensor([self.steps == self.ends[row % len(self.ends)] for row in range(len(ids))])

    def put(self, tokens):
        self.seen.append(("streamer", tokens))

    def end(self):
        self.seen.append(("end",))


class AsProcessor(LogitsProcessor):
    """The processor's half of :class:`Everything`."""

    def __init__(self, everything):
        self.everything = everything

    def __call__(self, ids, scores):
        return self.everything.processor(ids, scores)


def same(a, b):
    """Return whether two values are equal, with all their types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.is_contiguous() == b.is_contiguous() and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "layers"):
        return a.get_seq_length() == b.get_seq_length() and all(
            same(ours.keys, theirs.keys) and same(ours.values, theirs.values)
            for ours, theirs in zip(a.layers, b.layers, strict=True)
        )
    return a == b


def draw(seed):
    """Return the attention implementation, the kind of cache and a function that makes the arguments of a call."""
    rng = random.Random(seed)
    options = {name: rng.choice(values) for name, values in OPTIONS.items() if rng.random() < 1 / 9}
    options["do_sample"] = rng.random() < 0.5
    rows, length, kind = rng.choice((1, 1, 2, 3)), rng.choice((1, 3, 14)), rng.choice((*CACHES, "none", "paged"))
    ids = prompt(rows, length, seed=seed)
    inputs = left_padded(ids, *(2 * row % length for row in range(rows))) if rng.random() < 0.4 else {"input_ids": ids}
    if rng.random() < 0.15:
        inputs["input_ids"] = inputs["input_ids"].int()
    if rng.random() < 0.15:
        inputs["position_ids"] = torch.arange(length).expand(rows, -1)
    if rng.random() < 0.15:
        inputs["inputs_embeds"] = torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))
        if rng.random() < 0.5:
            del inputs["input_ids"]
    options["eos_token_id"] = rng.choice((None, [3, 9, 27, 41], list(range(3, VOCAB, 5))))
    who = {name for name in ("processor", "criterion", "streamer") if rng.random() < 0.4}
    ends, edits = [rng.choice((1, 2, 4, 9, 99)) for _ in range(3)], rng.random() < 0.2

    def make():
        seen = Everything(ends, edits)
        roles = {
            "processor": ("logits_processor", [AsProcessor(seen)]),
            "criterion": ("stopping_criteria", StoppingCriteriaList([seen])),
            "streamer": ("streamer", seen),
        }
        given = dict(roles[name] for name in sorted(who))
        return seen, options | {name: value.clone() for name, value in inputs.items()} | given

    return rng.choice(("fastattn", "fastattn", "sdpa")), kind, make


def call(model, kind, make, **how):
    """Return all that can be seen of a call; of one that fails, the error."""
    seen, kwargs = make()
    try:
        out = generate(model, CACHES[kind](model.config), **kwargs, **how)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return out, seen.seen, torch.rand(2)


@pytest.fixture(scope="module")
def llama():
    return hf_fastattn.paged(build("llama", "fastattn"))


@pytest.mark.parametrize("block", range(2))
@pytest.mark.parametrize("deferred", [False, True])
def test_random_calls(llama, deferred, block, monkeypatch):
    if deferred:
        monkeypatch.setattr(loop, "_defers", lambda device, cache: isinstance(cache, PagedCache))
        monkeypatch.setattr(PagedState, "finish", lambda self, flags: None)  # told late, rows would rest late
    runs, native = [], loop._Loop.run
    monkeypatch.setattr(loop._Loop, "run", lambda self, kwargs: runs.append(1) or native(self, kwargs))
    failed = 0
    for seed in range(block * CALLS, (block + 1) * CALLS):
        implementation, kind, make = draw(seed)
        with under(llama, implementation):
            wanted = call(llama, kind, make)
            out = call(llama, kind, make, custom_generate=hf_fastattn.generate)
        assert same(out, wanted), f"seed {seed}: {implementation}, {kind}, {make()[1]}"
        failed += isinstance(wanted, str)
    assert len(runs) > CALLS // 3
    assert failed < CALLS // 3

"""Calls of generate_batch on tiny models, and what their results have to be."""

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

BLOCK_SIZE = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
NEW = 9
LENGTHS = (1, 5, 40, 17, 16, 3)
NO_SWITCH = {"auto_switch_to_flash": False} if hasattr(ContinuousBatchingConfig(), "auto_switch_to_flash") else {}
TOLERANCE = 5e-5
"""Of logarithms of probabilities, whose largest differences are about 20."""


def prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length,), generator=generator).tolist() for length in lengths]


def sizes(**changes):
    """A small cache: blocks of 16 tokens, prompts in chunks of 24."""
    given = {BLOCK_SIZE: 16, "num_blocks": 64, "max_batch_tokens": 24, "return_logprobs": True, **NO_SWITCH}
    return ContinuousBatchingConfig(**(given | changes))


def greedy(**changes):
    return GenerationConfig(**({"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1} | changes))


def run(model, requests, config=None, **changes):
    out = model.generate_batch(
        requests, generation_config=greedy(**changes), continuous_batching_config=config or sizes()
    )
    assert [result.error for result in out.values()] == [None] * len(out)
    return list(out.values())


def check(model, results, requests, sampled=False):
    """Compare tokens and their probabilities with those of eager attention over the finished text of each request."""
    model.set_attn_implementation("eager")
    for result, prompt in zip(results, requests, strict=True):
        tokens = result.generated_tokens
        assert len(tokens) == NEW
        with torch.no_grad():
            text = torch.tensor([prompt + tokens], device=model.device)
            logits = model(text, use_cache=False).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).cpu()
        assert sampled or tokens == wanted.argmax(-1).tolist()
        got, wanted = torch.tensor(result.logprobs), wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        error = (got - wanted).abs().max().item()
        assert error <= TOLERANCE, f"off by {error}"
    model.set_attn_implementation("fastattn")

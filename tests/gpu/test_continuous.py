"""Continuous batching on a GPU, with and without CUDA graphs; FASTATTN_TEST_DEVICE=cpu makes the calls on a CPU."""

import os

import pytest
import torch

from hf_fastattn import paged
from tests.transformers.continuous_calls import check, prompts, run, sizes
from tests.transformers.models import build

DEVICE = os.environ.get("FASTATTN_TEST_DEVICE", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cpu" and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error:.*runs through PyTorch, slower:RuntimeWarning"),
]

GRAPHS = [False] if DEVICE == "cpu" else [False, True]


@pytest.fixture(autouse=True)
def _exact_products():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def make(family, dtype=torch.float32):
    model = build(family, "fastattn", head_dim=32, hidden_size=64).to(DEVICE, dtype).requires_grad_(False)
    return paged(model)


@pytest.mark.parametrize("graphs", GRAPHS, ids=["eager", "graphs"][: len(GRAPHS)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_requests_get_what_they_get_alone(family, graphs):
    model = make(family)
    requests = prompts((1, 5, 40, 70, 16, 3))
    config = sizes(use_cuda_graph=graphs, q_padding_interval_size=16, kv_padding_interval_size=64)
    for _ in range(2):  # graphs of the first call are gone in the second
        check(model, run(model, requests, config), requests)


@pytest.mark.parametrize("graphs", GRAPHS, ids=["eager", "graphs"][: len(GRAPHS)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype, graphs):
    """As far from eager attention in float32 as eager attention in these bits is, twice at most."""
    model = make("llama", dtype)
    requests = prompts((1, 40, 70))
    results = run(model, requests, sizes(use_cuda_graph=graphs))
    errors = {}
    for name, kind in (("same", dtype), ("exact", torch.float32)):
        model.set_attn_implementation("eager")
        errors[name] = [
            forced(model.to(kind), prompt, result) for prompt, result in zip(requests, results, strict=True)
        ]
    exact = torch.cat(errors["exact"])
    got = torch.cat([torch.tensor(result.logprobs) for result in results])
    rounding = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * (torch.cat(errors["same"]) - exact).abs().max() + rounding


def forced(model, prompt, result):
    """Return the log-probabilities of a result's tokens behind its prompt."""
    text = torch.tensor([prompt + result.generated_tokens], device=model.device)
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).cpu().gather(1, torch.tensor(result.generated_tokens)[:, None])[:, 0]

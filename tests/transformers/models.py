"""Tiny models with sharp attention, what to do with them, and how closely results must agree.

transformers' own tiny test models attend almost uniformly (their weights have a standard deviation of 0.02), so that a
wrong scale, a shifted window or a missing reorder_cache hardly shows in their logits. Here queries and keys are large
enough that one key in a few takes most of the weight; test_families.py measures that.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, DynamicCache

from hf_fastattn import PagedCache
from hf_fastattn.generate import CACHE_NAME

VOCAB = 64
WINDOW = 6
BLOCK = 16
NEW_TOKENS = 12

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 4.0,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    ),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.25}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoXConfig", {}),
}


def build(family: str, implementation: str = "eager", **changes: Any) -> Any:
    """Return a new model of a family in float32; the same weights every time."""
    name, extra = FAMILIES[family]
    return build_from(getattr(transformers, name)(**(_SIZES | extra | changes)), implementation)


def build_from(config: Any, implementation: str = "eager", auto: Any = AutoModelForCausalLM, seed: int = 0) -> Any:
    """Return a new model of a config with sharp attention."""
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation=implementation).eval()
    sharpen(model)
    return model


def sharpen(model: nn.Module) -> None:
    """Draw weights such that attention is far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "q_norm" in name or "k_norm" in name or ("layernorm" in name and ("q_" in name or "k_" in name)):
                parameter.copy_(parameter + 1.0 + 0.2 * noise)  # a normalised query and key have no other scale
            elif "sinks" in name:
                parameter.copy_(2.0 + noise)
            elif parameter.dim() == 1 and "bias" not in name:
                parameter.copy_(parameter + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)


@functools.cache
def shared(family: str) -> Any:
    """Return the process's one model of a family; tests set its implementation before they use it."""
    return build(family)


# Inputs


def prompt(batch_size: int = 2, length: int = 14, seed: int = 0) -> Tensor:
    """Return random token ids, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch_size, length), generator=generator)


def left_padded(ids: Tensor, *pads: int) -> dict[str, Tensor]:
    """Return ids and mask whose row i is padded by pads[i] on the left."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def with_holes(ids: Tensor) -> dict[str, Tensor]:
    """Return ids and a mask with hidden columns inside both rows, and padding on the left of the second."""
    mask = torch.ones_like(ids)
    mask[0, 3:6] = mask[0, 9] = mask[1, :2] = mask[1, 5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def paged(model: Any, **sizes: Any) -> PagedCache:
    """Return a PagedCache with the tests' block size."""
    return PagedCache(model.config, **({"block_size": BLOCK} | sizes))


# Scenarios: each returns what generate() gave, call by call

NewCache = Callable[[Any], Any]
Scenario = Callable[[Any, NewCache], list[Any]]


def generate(model: Any, cache: Any = None, **kwargs: Any) -> Any:
    """Generate with raw logits; greedy and without an end token unless told otherwise."""
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    if cache is not None:
        options["past_key_values"] = cache
    torch.manual_seed(0)
    return model.generate(**(options | kwargs))


def _plain(**kwargs: Any) -> Scenario:
    def run(model: Any, new_cache: NewCache) -> list[Any]:
        return [generate(model, new_cache(model), **kwargs)]

    return run


def _assisted(model: Any, new_cache: NewCache) -> list[Any]:
    return [generate(model, new_cache(model), input_ids=prompt(1), assistant_model=_assistant(model))]


@functools.cache
def _assistant_of(family: str) -> Any:
    """A disturbed copy of the family's model, so that some of its tokens are accepted and some are not."""
    window = {"sliding_window": 512} if "sliding_window" in FAMILIES[family][1] else {}  # 5.17 cannot crop a full one
    assistant = build(family, **window)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
    return assistant


def _assistant(model: Any) -> Any:
    torch.manual_seed(1)
    return _assistant_of(next(name for name, (config, _) in FAMILIES.items() if config == type(model.config).__name__))


def _embeds(model: Any, new_cache: NewCache) -> list[Any]:
    inputs = left_padded(prompt(), 4, 0)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    return [generate(model, new_cache(model), inputs_embeds=embeds, **inputs)]


def _chat(model: Any, new_cache: NewCache) -> list[Any]:
    """Three turns over one cache; the first and the second are padded on the left, in different rows."""
    cache, outputs = new_cache(model), []
    if cache is None:
        cache = DynamicCache(config=model.config)
    ids, mask = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    for turn, pads in enumerate(((5, 0), (0, 3), (0, 0))):
        said = left_padded(prompt(length=9, seed=turn), *pads)
        ids, mask = torch.cat([ids, said["input_ids"]], 1), torch.cat([mask, said["attention_mask"]], 1)
        out = generate(model, cache, input_ids=ids, attention_mask=mask, max_new_tokens=5)
        outputs.append(out)
        ids, mask = out.sequences, torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    return outputs


SCENARIOS: dict[str, Scenario] = {
    "greedy": _plain(input_ids=prompt()),
    "left_padded": _plain(**left_padded(prompt(), 5, 0)),
    "holes": _plain(**with_holes(prompt())),
    "sampled": _plain(do_sample=True, temperature=1.5, **left_padded(prompt(), 0, 3)),
    "beams": _plain(num_beams=4, **left_padded(prompt(), 5, 0)),
    "return_sequences": _plain(do_sample=True, num_return_sequences=3, **left_padded(prompt(), 5, 0)),
    "chunked_prefill": _plain(prefill_chunk_size=4, **left_padded(prompt(), 5, 0)),
    "chunked_holes": _plain(prefill_chunk_size=5, **with_holes(prompt())),
    "prompt_lookup": _plain(prompt_lookup_num_tokens=3, input_ids=prompt(1, 9).repeat(1, 2)),
    "assisted": _assisted,
    "inputs_embeds": _embeds,
    "chat": _chat,
}


# Oracles


class _Float64(TorchFunctionMode):
    """Run in float64 what models ask float32 for by name: norms, softmax, rotary angles."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


def in_float64(model: Any) -> Any:
    """Return a copy of a model whose forward pass is float64 throughout."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    twin.set_experts_implementation("eager")  # grouped matrix products have no float64
    inner = twin.get_base_model() if hasattr(twin, "get_base_model") else twin  # what a PEFT model calls
    forward = inner.forward

    @functools.wraps(forward)
    def widened(*args: Any, **kwargs: Any) -> Any:
        with _Float64():
            return forward(*args, **kwargs)

    inner.forward = widened
    return twin


@dataclass(frozen=True)
class Expected:
    """What PyTorch's attention gives, and how far it is from float64."""

    tokens: list[Tensor]
    logits: list[Tensor]  # eager's, one per call, (steps, rows, vocabulary)
    exact: list[Tensor]
    sdpa: list[Tensor]  # eager's once more for a model that has no sdpa

    def check(self, outputs: list[Any]) -> None:
        """Assert equal tokens, and logits as close to float64 as PyTorch's."""
        assert len(outputs) == len(self.tokens)
        for out, tokens, logits, exact, sdpa in zip(
            outputs, self.tokens, self.logits, self.exact, self.sdpa, strict=True
        ):
            assert out.sequences.tolist() == tokens.tolist()
            check_logits(torch.stack(out.logits), logits, exact, sdpa)


def check_logits(actual: Tensor, eager: Tensor, exact: Tensor, sdpa: Tensor | None = None) -> None:
    """Assert that logits are as close to float64 as those of PyTorch's attention are.

    The tolerance is computed, not tuned: the largest error may be twice that of eager's float32, because the ops round
    elsewhere (scores and sums in another order) but not more often, and the largest of a few thousand errors varies by
    less than that; unless they are one error, which a step that magnifies it spreads over all its logits. Eager may be
    lucky there, so sdpa's error counts too where it is known. The four units in the last place of the largest logit are
    for models so small that eager happens to be exact to the last bit.
    """
    assert actual.shape == eager.shape == exact.shape
    error, own = (actual - exact).abs().max().item(), (eager - exact).abs().max().item()
    if sdpa is not None:
        own = max(own, (sdpa - exact).abs().max().item())
    ulp = torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= 2 * own + 4 * ulp, f"error {error:.1e} against float64, PyTorch's is {own:.1e}, one ulp {ulp:.1e}"


def run_eager(model: Any, scenario: Scenario) -> Expected:
    """Run a scenario under eager attention on transformers' own cache, in float32 and in float64; and under sdpa."""
    model.set_attn_implementation("eager")
    outputs = scenario(model, lambda _: None)
    exact = scenario(in_float64(model), lambda _: None)
    for out, wide in zip(outputs, exact, strict=True):
        assert torch.equal(out.sequences, wide.sequences), "eager's tokens depend on rounding: choose another seed"
    others = outputs
    if _has_sdpa(model):
        with under(model, "sdpa"):
            others = scenario(model, lambda _: None)
    logits = [[torch.stack(out.logits) for out in run] for run in (outputs, exact, others)]
    return Expected([out.sequences for out in outputs], *logits)


def _has_sdpa(model: Any) -> bool:
    """Whether a model runs under sdpa: neither softcap nor attention sinks."""
    config = model.config.get_text_config()
    return model._supports_sdpa and getattr(config, "attn_logit_softcapping", None) is None


@functools.cache
def expected(family: str, scenario: str) -> Expected:
    """Return eager's results; computed once per process."""
    return run_eager(shared(family), SCENARIOS[scenario])


@contextmanager
def under(model: Any, implementation: str = "fastattn") -> Iterator[Any]:
    """Switch a model's attention implementation, and back."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def peft_with_prompts() -> Any:
    """Return PEFT; skip where its prompts are lost, which it looks for under the name that caches had before 5.24."""
    peft = pytest.importorskip("peft")
    if f'"{CACHE_NAME}"' not in inspect.getsource(peft.PeftModelForCausalLM.prepare_inputs_for_generation):
        pytest.skip(f"PEFT {peft.__version__} does not know the caches of transformers {transformers.__version__}")
    return peft

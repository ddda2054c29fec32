"""What does the decoding loop cost, and what does the glue of a layer? transformers' loop and ours side by side.

    python -m eval.generate_loop --models tiny llama-20m --cells 1x64 4x64 --new-tokens 128

Three measurements, alternating, medians: whole calls of generate() (tokens per second; tokens must be equal); the loops
alone, around a forward pass that costs nothing (microseconds per token); and what one more layer adds to an eager
decode step of a very small model, under sdpa over a DynamicCache and under fastattn over a PagedCache (microseconds per
layer). On a CPU the last is also measured on the way of a GPU's tensors, up to Triton's launch, which does nothing.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_fastattn
from hf_fastattn import CACHE_NAME, PagedCache
from hf_fastattn.ops._library import has_triton

from . import common, fake_gpu

LOOPS: dict[str, dict[str, Any]] = {"transformers": {}, "hf_fastattn": {"custom_generate": hf_fastattn.generate}}
ATTENTIONS = ("sdpa/dynamic", "fastattn/paged")
LAUNCHING = "fastattn/paged, a GPU's way"
FEW_LAYERS, MANY_LAYERS = 4, 20


def inputs_of(model: Any, cell: str) -> dict[str, Tensor]:
    """Return random prompts of a cell, BATCHxPROMPT."""
    batch, prompt = common.parse_cell(cell)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def options_of(new_tokens: int, sampling: bool) -> dict[str, Any]:
    """Return generate()'s arguments: an end token that is looked for and never comes."""
    return {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens if sampling else None,
        "do_sample": sampling,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "disable_compile": True,
        **({"top_k": 50, "temperature": 0.8} if sampling else {"suppress_tokens": [0]}),
    }


def set_attention(model: Any, attention: str) -> None:
    """Make a paged model generate under sdpa over a DynamicCache, or under fastattn over a PagedCache of its own."""
    model.set_attn_implementation(attention.split("/")[0])


@contextmanager
def free_forward(model: Any) -> Iterator[None]:
    """Replace a model's forward pass by one that returns the same logits at once."""
    native = model.forward
    logits: dict[int, Tensor] = {}

    @functools.wraps(native)
    def forward(input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        assert input_ids is not None
        rows = len(input_ids)
        if rows not in logits:
            logits[rows] = torch.randn(rows, 1, model.config.vocab_size, device=input_ids.device, dtype=model.dtype)
        return CausalLMOutputWithPast(logits=logits[rows], **{CACHE_NAME: kwargs.get(CACHE_NAME)})

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def measure_calls(
    model: Any, name: str, cell: str, new_tokens: int, rounds: int, *, sampling: bool = False, bare: bool = False
) -> list[dict[str, Any]]:
    """Time generate() with both loops and both attentions on one cell; with ``bare``, the loops alone."""
    inputs, options = inputs_of(model, cell), options_of(new_tokens, sampling)
    tokens: dict[str, Tensor] = {}

    def case(attention: str, loop: str) -> Callable[[], float]:
        def run() -> float:
            set_attention(model, attention)
            torch.manual_seed(0)

            def call() -> None:
                out = model.generate(**inputs, **options, return_dict_in_generate=bare, **LOOPS[loop])
                tokens[f"{attention} {loop}"] = out.sequences if bare else out

            return common.seconds(call, model.device)

        return run

    pairs = [(attention, loop) for attention in ATTENTIONS for loop in LOOPS]
    runs = common.alternate({" ".join(pair): case(*pair) for pair in pairs}, rounds, label=f"{name} {cell}")
    rows = []
    for attention, loop in pairs:
        key = f"{attention} {loop}"
        per_token = common.Spread.of([1e6 * value / new_tokens for value in runs[key]])
        equal = torch.equal(tokens[key], tokens[f"{attention} transformers"])
        rows.append(
            {
                "measured": "loop alone" if bare else "generate()",
                "model": name,
                "cell": f"{cell}+{new_tokens}",
                "sampling": sampling,
                "attention": attention,
                "loop": loop,
                "us_per_token": per_token.median,
                "spread": asdict(per_token),
                "tokens_per_s": inputs["input_ids"].shape[0] * 1e6 / per_token.median,
                "status": "ok" if equal else "WRONG tokens",
            }
        )
    return rows


def measure_glue(device: torch.device, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Time decode steps of models with few and with many layers that compute next to nothing."""

    def model_of(layers: int) -> Any:
        options: dict[str, Any] = {"attn_implementation": "sdpa"}
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            **options,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().to(device)

    models = {layers: model_of(layers) for layers in (FEW_LAYERS, MANY_LAYERS)}
    token = torch.ones(1, 1, dtype=torch.long, device=device)

    def case(attention: str, layers: int) -> Callable[[], float]:
        def run() -> float:
            model = models[layers]
            set_attention(model, attention)
            cache = (
                DynamicCache(config=model.config)
                if attention == "sdpa/dynamic"
                else PagedCache(model.config, reserve=512)
            )
            with torch.no_grad(), fake_gpu.launching() if attention == LAUNCHING else nullcontext():
                model(token.expand(1, 16), **{CACHE_NAME: cache}, use_cache=True)

                def decode() -> None:
                    for _ in range(steps):
                        model(token, **{CACHE_NAME: cache}, use_cache=True)

                return 1e6 * common.seconds(decode, device) / steps

        return run

    attentions = [*ATTENTIONS, *([LAUNCHING] if device.type == "cpu" and has_triton() else [])]
    cases = {f"{attention} {layers}": case(attention, layers) for attention in attentions for layers in models}
    runs = common.alternate(cases, rounds, label="glue")
    rows = []
    for attention in attentions:
        few, many = runs[f"{attention} {FEW_LAYERS}"], runs[f"{attention} {MANY_LAYERS}"]
        slopes = [(b - a) / (MANY_LAYERS - FEW_LAYERS) for a, b in zip(few, many, strict=True)]
        layer, step = common.Spread.of(slopes), common.Spread.of(few)
        rows.append(
            {
                "measured": "one more layer",
                "attention": attention,
                "us_per_layer": layer.median,
                "us_per_step_beside_layers": step.median - FEW_LAYERS * layer.median,
                "spread": asdict(layer),
                "status": "ok",
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if tokens differ."""
    parser = argparse.ArgumentParser(prog="python -m eval.generate_loop", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "llama-20m"])
    parser.add_argument("--cells", nargs="+", default=["1x64", "4x64"], metavar="BATCHxPROMPT")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=None, help="fewer layers of a named shape")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(args.dtype, device)
    rows = measure_glue(device, args.new_tokens, args.rounds)
    for name in args.models:
        model: Any = common.load_model(name, device, dtype, layers=args.layers)
        model.set_attn_implementation("fastattn")
        hf_fastattn.paged(model)
        for cell in args.cells:
            for sampling in (False, True):
                rows += measure_calls(model, name, cell, args.new_tokens, args.rounds, sampling=sampling)
        with free_forward(model):
            rows += measure_calls(model, name, args.cells[0], args.new_tokens, args.rounds, bare=True)
        if args.out:
            common.write_result(args.out, "generate_loop", device, vars(args), rows)
    calls = ["measured", "model", "cell", "sampling", "attention", "loop", "us_per_token", "tokens_per_s", "status"]
    glue = ["measured", "attention", "us_per_layer", "us_per_step_beside_layers"]
    for columns in (calls, glue):
        print(common.table([row for row in rows if columns[-1] in row and columns[2] in row], columns), end="\n\n")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

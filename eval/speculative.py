"""What does speculative decoding gain over a PagedCache? Prompt lookup on code, against plain decoding.

    python -m eval.speculative --model tiny --candidates 4 10 --new-tokens 128

Prompts are functions from the bundled model's held-out Python. Prompt lookup proposes what followed the last tokens
when they occurred before; one forward pass checks all proposals. In float32 and float64 tokens must equal those of
plain greedy decoding; in 16 bits rounding decides between close tokens, and the first difference is only reported, as
are tokens per second, tokens per forward pass, and the share of proposals that was accepted.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import hf_fastattn

from . import common

HELDOUT = common.TINY_MODEL / "heldout.txt"
ATTENTIONS = ("sdpa", "fastattn")


def code_prompts(name: str, count: int, length: int) -> list[Tensor]:
    """Return (1, length) prompts cut from held-out Python, spread evenly over the file, each from a line's start."""
    tokenizer = AutoTokenizer.from_pretrained(str(common.TINY_MODEL) if name == "tiny" else name)
    text = HELDOUT.read_text(encoding="utf-8")
    prompts = []
    for i in range(count):
        start = text.index("\n", i * len(text) // count) + 1
        ids = tokenizer(text[start : start + 8 * length], return_tensors="pt").input_ids[:, :length]
        if ids.shape[1] < length:
            common.fail(f"the held-out text gives no {count} prompts of {length} tokens: ask for fewer or shorter ones")
        prompts.append(ids)
    return prompts


def count_passes(model: Any, action: Callable[[], Any]) -> list[int]:
    """Return the tokens of each forward pass that an action makes."""
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        action()
    finally:
        hook.remove()
    return lengths


def first_difference(own: list[Tensor], plain: list[Tensor], prompts: list[Tensor]) -> int | None:
    """Return the first new token that differs in any prompt's continuation, None if none does."""
    places = [
        int((a != b).any(0).nonzero()[0]) - prompt.shape[1]
        for a, b, prompt in zip(own, plain, prompts, strict=True)
        if not torch.equal(a, b)
    ]
    return min(places, default=None)


def measure(
    model: Any, prompts: list[Tensor], candidates: list[int], new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Time plain decoding and prompt lookup under both attentions; model is paged by default."""
    kinds = [None, *candidates]
    exact = model.dtype in (torch.float32, torch.float64)
    tokens: dict[tuple[str, int | None], list[Tensor]] = {}

    def generate(attention: str, kind: int | None) -> None:
        model.set_attn_implementation(attention)
        lookup = {} if kind is None else {"prompt_lookup_num_tokens": kind}
        options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        tokens[attention, kind] = [
            model.generate(prompt, attention_mask=torch.ones_like(prompt), disable_compile=True, **options, **lookup)
            for prompt in prompts
        ]

    cases = {
        f"{attention} {kind}": (
            lambda attention=attention, kind=kind: common.seconds(lambda: generate(attention, kind), model.device)
        )
        for attention in ATTENTIONS
        for kind in kinds
    }
    runs = common.alternate(cases, rounds, label="speculative")
    rows: list[dict[str, Any]] = []
    for attention in ATTENTIONS:
        for kind in kinds:
            passes = count_passes(model, partial(generate, attention, kind))
            total = len(prompts) * new_tokens
            proposed = sum(passes) - sum(prompt.shape[1] for prompt in prompts) - (len(passes) - len(prompts))
            different = first_difference(tokens[attention, kind], tokens["sdpa", None], prompts)
            spread = common.Spread.of([total / value for value in runs[f"{attention} {kind}"]])
            rows.append(
                {
                    "attention": attention,
                    "decoding": "plain" if kind is None else f"prompt lookup, {kind}",
                    "tokens_per_s": spread.median,
                    "spread": asdict(spread),
                    "tokens_per_pass": total / len(passes),
                    "proposed": proposed,
                    "accepted_share": (total - len(passes)) / proposed if proposed else None,
                    "first_difference": different,
                    "status": "WRONG tokens" if different is not None and exact else "ok",
                }
            )
    plain = {row["attention"]: row["tokens_per_s"] for row in rows if row["decoding"] == "plain"}
    for row in rows:
        row["speedup"] = row["tokens_per_s"] / plain[row["attention"]]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if tokens differ."""
    parser = argparse.ArgumentParser(prog="python -m eval.speculative", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="hub name, folder or tiny")
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    model: Any = common.load_model(args.model, device, common.pick_dtype(args.dtype, device))
    model.set_attn_implementation("fastattn")
    hf_fastattn.paged(model)
    prompts = [prompt.to(device) for prompt in code_prompts(args.model, args.prompts, args.prompt_length)]
    rows = measure(model, prompts, args.candidates, args.new_tokens, args.rounds)
    if args.out:
        common.write_result(args.out, "speculative", device, vars(args), rows)
    columns = ["attention", "decoding", "tokens_per_s", "speedup", "tokens_per_pass", "accepted_share"]
    columns += ["first_difference", "status"]
    print(common.table(rows, columns))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

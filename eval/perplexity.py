"""Does fastattn change what a model knows? Strided perplexity, every implementation side by side.

    python -m eval.perplexity                                   # the bundled model on its held-out text
    python -m eval.perplexity --model NAME --text FILE --window 2048 --stride 1024 --dtype bfloat16

Two paths: whole windows through prefill, and token by token over a PagedCache, so that decoding is judged too. The last
column is the difference to eager attention in float32 over the same tokens.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_fastattn import CACHE_NAME, PagedCache

from . import common
from .common import Model

HELD_OUT = common.TINY_MODEL / "heldout.txt"


def read_tokens(model_name: str, text: str, limit: int | None) -> Tensor:
    """Return the token ids of a text file or of a data set's test split, (tokens,)."""
    path = Path(text)
    if path.is_file():
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            common.fail(f"cannot read {text!r} as UTF-8 text: {error}")
    else:
        content = read_dataset(text)
    tokenizer = AutoTokenizer.from_pretrained(str(common.TINY_MODEL) if model_name == "tiny" else model_name)
    ids = tokenizer(content, return_tensors="pt", add_special_tokens=False).input_ids[0]
    return ids[:limit]


def read_dataset(name: str) -> str:
    """Return the text of a data set's test split, given as NAME or NAME:CONFIG."""
    try:
        from datasets import load_dataset
    except ImportError:
        common.fail(f"{name!r} is no file, and reading a data set of that name needs `pip install datasets`")
    try:
        rows = load_dataset(*name.split(":", 1), split="test")
    except Exception as error:
        common.fail(f"{name!r} is no file, and no data set of that name could be loaded: {str(error).splitlines()[0]}")
    return "\n\n".join(rows["text"])


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first counted token): every token but the text's first is counted exactly once."""
    step = min(stride, window - 1)  # a counted token needs at least one before it
    first, end = 1, min(window, num_tokens)
    while first < num_tokens:
        yield max(end - window, 0), end, first
        first, end = end, min(end + step, num_tokens)


def window_nll(logits: Tensor, targets: Tensor) -> float:
    """Return the summed negative log-likelihood in nats, computed in float64."""
    return torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()


@torch.no_grad()
def by_window(model: Model, ids: Tensor, window: int, stride: int, label: str) -> float:
    """Return the perplexity from one prefill per window."""
    total, count = 0.0, 0
    for begin, end, first in common.bar(list(windows(len(ids), window, stride)), label):
        logits = model(ids[None, begin:end], use_cache=False).logits[0, first - begin - 1 : -1]
        total += window_nll(logits, ids[first:end])
        count += end - first
    return math.exp(total / count)


@torch.no_grad()
def by_token(model: Model, ids: Tensor, window: int, stride: int, label: str) -> float:
    """Return the perplexity from prefilling each window's context and then feeding its counted tokens one by one."""
    total, count = 0.0, 0
    for begin, end, first in common.bar(list(windows(len(ids), window, stride)), label):
        cache = PagedCache(model.config)
        logits = model(ids[None, begin:first], **{CACHE_NAME: cache}, logits_to_keep=1).logits[0, -1:]
        for i in range(first, end):
            total += window_nll(logits, ids[i : i + 1])
            if i + 1 < end:
                logits = model(ids[None, i : i + 1], **{CACHE_NAME: cache}).logits[0]
        count += end - first
    return math.exp(total / count)


def measure(
    model: Model, exact: Model, ids: Tensor, implementations: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return one row per implementation and path."""
    exact.set_attn_implementation("eager")
    reference = by_window(exact, ids, args.window, args.stride, "eager, float32")
    rows: list[dict[str, Any]] = [{"path": "window", "implementation": "eager (float32)", "perplexity": reference}]
    for implementation in implementations:
        model.set_attn_implementation(implementation)
        value = by_window(model, ids, args.window, args.stride, implementation)
        rows.append({"path": "window", "implementation": implementation, "perplexity": value})
    short = ids[: args.token_limit]
    model.set_attn_implementation("fastattn")
    token = by_token(model, short, args.window, args.stride, "fastattn, token by token")
    exact.set_attn_implementation("eager")
    base = by_window(exact, short, args.window, args.stride, "eager, float32, the same tokens")
    for row in rows:
        row["difference"] = row["perplexity"] - reference
    rows.append({"path": "token", "implementation": "eager (float32)", "perplexity": base, "difference": 0.0})
    rows.append({"path": "token", "implementation": "fastattn", "perplexity": token, "difference": token - base})
    for row in rows:
        row["tokens"] = len(ids) if row["path"] == "window" else len(short)
        row["perplexity"], row["difference"] = f"{row['perplexity']:.5f}", f"{row['difference']:+.5f}"
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.perplexity", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="hub name or folder; tiny is the bundled model")
    parser.add_argument("--text", default=str(HELD_OUT), help="UTF-8 file, or a data set as NAME or NAME:CONFIG")
    parser.add_argument("--implementations", nargs="+", default=["eager", "sdpa", "fastattn"])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--limit", type=int, default=None, help="most tokens of the text")
    parser.add_argument("--token-limit", type=int, default=1024, help="most tokens for the token-by-token path")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    if args.window < 2 or not 0 < args.stride <= args.window:
        common.fail(f"expected a window of at least 2 and a stride up to it, got {args.window} and {args.stride}")
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(args.dtype, device)
    model = common.load_model(args.model, device, dtype)
    exact = common.load_model(args.model, device, torch.float32)
    ids = read_tokens(args.model, args.text, args.limit).to(device)
    if len(ids) < 2:
        common.fail(f"the text {args.text!r} has {len(ids)} tokens, at least 2 are needed")
    rows = measure(model, exact, ids, args.implementations, args)
    settings = vars(args) | {"dtype": str(dtype), "text": Path(args.text).name}
    if args.out:
        common.write_result(args.out, "perplexity", device, settings, rows)
    print(common.table(rows, ["path", "implementation", "tokens", "perplexity", "difference"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

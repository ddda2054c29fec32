"""Complete a Python prompt through fastattn and through sdpa, side by side: text, tokens and speed.

python examples/quickstart.py                      # the bundled tiny model
python examples/quickstart.py --model NAME_OR_FOLDER --prompt "..." --max-new-tokens 64
"""

import sys
import time
from pathlib import Path

import torch
from loading import TINY_MODEL, load, parser_for
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file."""\n'


def main() -> None:
    """Parse the arguments, generate twice, compare."""
    parser = parser_for(__doc__)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    args = parser.parse_args()
    model, tokenizer = load(args)
    name = Path(args.model).name if args.model == str(TINY_MODEL) else args.model
    print(f"{name} ({model.num_parameters() / 1e6:.1f}M parameters) on {args.device}, {model.dtype}\n")

    print("--- fastattn, PagedCache " + "-" * 55)
    ours, speed = complete(model, tokenizer, args.prompt, args.max_new_tokens)
    model.set_attn_implementation("sdpa")
    print("--- sdpa, DynamicCache (the same model) " + "-" * 40)
    theirs, baseline = complete(model, tokenizer, args.prompt, args.max_new_tokens)

    same = torch.equal(ours, theirs)
    print("-" * 80)
    print(f"same tokens: {'yes' if same else f'no, from new token {first_difference(ours, theirs)} on'}")
    print(f"fastattn {speed:7.1f} tokens/s\nsdpa     {baseline:7.1f} tokens/s")
    if not same and model.dtype == torch.float32:
        sys.exit("the tokens must agree in float32: this is a bug")


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
) -> tuple[torch.Tensor, float]:
    """Stream a greedy completion; return its tokens and the tokens per second of a second, warm run."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "disable_compile": True}
    model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    start = time.perf_counter()
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return tokens, len(tokens) / (time.perf_counter() - start)


def first_difference(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return the position of the first token in which two sequences differ."""
    length = min(len(a), len(b))
    unequal = (a[:length] != b[:length]).nonzero()
    return int(unequal[0]) if len(unequal) else length


if __name__ == "__main__":
    main()

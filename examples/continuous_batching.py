"""Continuous batching: requests of different length join and leave a running batch, without padding.

python examples/continuous_batching.py                              # the bundled model, twelve requests
python examples/continuous_batching.py --model NAME --prompts "..." "..." --max-new-tokens 40
"""

import sys
import time

import torch
from loading import load, parser_for
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

PROMPTS = [
    f"class {name}:\n" + "".join(f"    def get_{field}(self):\n        return self.{field}\n\n" for field in fields)
    for name, fields in {
        "Point": ("x", "y"),
        "Timer": ("start",),
        "Queue": ("first", "last", "items", "maxsize", "closed"),
        "Reader": ("path", "lines", "encoding"),
    }.items()
]
OTHERS = ["import os\nimport", "def total(values):\n    result =", "for line in", "try:\n    value = int("] * 2


def main() -> None:
    """Answer all requests by continuous batching, and each alone; compare tokens and times."""
    parser = parser_for(__doc__)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS + OTHERS, metavar="PROMPT")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        sys.exit(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    model, tokenizer = load(args)
    requests = tokenizer(args.prompts)["input_ids"]
    longest = max(map(len, requests))

    replies, seconds = answer(model, requests, args.max_new_tokens)
    for number in (0, len(requests) - 1):
        text = tokenizer.decode(replies[number], skip_special_tokens=True)
        print(f"--- request {number + 1} " + "-" * 59 + f"\n{args.prompts[number]}[{text}]")
    tokens = sum(map(len, requests))
    print("-" * 73 + f"\nrequests: {len(requests)}, prompt tokens: {tokens} (padded: {len(requests) * longest})")
    print(f"continuous batching over the ops: {seconds:.2f} s")
    model.set_attn_implementation("sdpa")
    print(f"continuous batching over sdpa:    {answer(model, requests, args.max_new_tokens)[1]:.2f} s")
    model.set_attn_implementation("fastattn")
    alone = [generate(model, request, args.max_new_tokens) for request in requests]
    print(f"same tokens one request at a time: {'yes' if alone == replies else 'no'}")


def answer(model: PreTrainedModel, requests: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], float]:
    """Return what greedy decoding appends to each request, and the seconds it took."""
    generation = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=-1)
    blocks = sum(-(-(len(request) + max_new_tokens) // 256) for request in requests)  # of 256 tokens
    batching = ContinuousBatchingConfig(num_blocks=blocks + 1, max_batch_tokens=512)
    start = time.perf_counter()
    out = model.generate_batch(requests, generation_config=generation, continuous_batching_config=batching)
    return [result.generated_tokens for result in out.values()], time.perf_counter() - start


def generate(model: PreTrainedModel, request: list[int], max_new_tokens: int) -> list[int]:
    """Return what greedy decoding appends to one request."""
    ids = torch.tensor([request], device=model.device)
    options = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": False}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return out[0, len(request) :].tolist()


if __name__ == "__main__":
    main()

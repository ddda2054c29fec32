"""Generate for prompts of different lengths at once: padding is computed over, but never stored.

python examples/batch_generation.py                     # the bundled model, four prompts
python examples/batch_generation.py --model NAME --prompts "..." "..." --max-new-tokens 40
"""

import sys

import torch
from loading import load, parser_for
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fastattn import CACHE_NAME, PagedCache

PROMPTS = [
    "import os\nimport",
    "class Queue:\n    def __init__(self, size):\n        self.size =",
    "def total(values):\n    result = 0\n    for value in values:\n        if value:\n            result +=",
    'def read(path):\n    """Return the lines of a file, without line ends."""\n    lines = []\n'
    "    with open(path) as file:\n        for line in file:\n            lines.append(line.rstrip())\n    return",
]


def main() -> None:
    """Generate for all prompts at once, show what the cache holds, compare with one prompt at a time."""
    parser = parser_for(__doc__)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--block-size", type=int, default=16, choices=[16, 32, 64, 128, 256])
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        sys.exit(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    model, tokenizer = load(args)

    cache = PagedCache(model.config, block_size=args.block_size)
    replies = generate(model, tokenizer, args.prompts, args.max_new_tokens, cache)
    for number, (prompt, reply) in enumerate(zip(args.prompts, replies, strict=True), 1):
        print(f"--- prompt {number} " + "-" * 60 + f"\n{prompt}[{reply}]")

    state = cache.state
    print("-" * 73 + "\nprompt   columns   tokens stored   blocks")
    for number, (length, row) in enumerate(zip(state.tables.lens, state.tables.rows, strict=True), 1):
        print(f"{number:6}   {state.columns:7}   {length:13}   {len(row):6}")
    stored, columns = sum(state.tables.lens), state.num_seqs * state.columns
    used = state.pool.num_used
    print(f"tokens stored: {stored} of {columns} columns, so {1 - stored / columns:.0%} of a padded cache is padding")
    padded = state.num_seqs * state.tables.blocks_for(state.columns)
    print(f"blocks in use: {used}; with padding stored they would be {padded}")

    alone = [
        generate(model, tokenizer, [prompt], args.max_new_tokens)[0]  # over a cache made for the call
        for prompt in args.prompts
    ]
    print(f"same text one prompt at a time: {'yes' if alone == replies else 'no'}")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    cache: PagedCache | None = None,
) -> list[str]:
    """Return what greedy decoding appends to each prompt; a cache is passed only to look into it afterwards."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **{CACHE_NAME: cache})
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()

"""A conversation over one growing PagedCache: each turn computes its new tokens only.

    python examples/chat.py                                 # scripted turns for the bundled model
    python examples/chat.py --model NAME --turns "Hello!" "Say it in French." --max-new-tokens 60
    python examples/chat.py --model NAME --interactive      # turns from standard input, an empty line ends

A model without a chat template, such as the bundled one, continues the text: a turn is the beginning of a line of
Python and the reply is its end. Where the history is written or tokenized differently at a later turn (chat templates
may do that), the cache is cropped to what still agrees.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from loading import load, parser_for
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fastattn import CACHE_NAME, PagedCache

TURNS = [
    "import os\nimport",
    "\n\nclass Reader:\n    def __init__(self, path):\n        self.",
    "    def read(self",
    "        with open(",
]


class Chat:
    """The messages so far, their tokens and the cache that holds them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.cache = PagedCache(model.config)
        self.messages: list[dict[str, str]] = []
        self.tokens: list[int] = []

    def history(self) -> list[int]:
        """Return the tokens of all messages."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer("".join(message["content"] for message in self.messages)).input_ids
        text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def say(self, turn: str) -> tuple[str, int, int]:
        """Return the reply to a turn, the tokens found in the cache and the prompt tokens that were new."""
        self.messages.append({"role": "user", "content": turn})
        prompt = self.history()
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(prompt) + self.max_new_tokens > limit:
            sys.exit(f"the conversation has {len(prompt)} tokens and the model's context is {limit}: start a new one")
        cached = self.cache.get_seq_length()
        kept = min(common_prefix(self.tokens[:cached], prompt), len(prompt) - 1)
        self.cache.crop(kept - cached)
        options = {"stop_strings": "\n", "tokenizer": self.tokenizer} if self.tokenizer.chat_template is None else {}
        inputs = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            **{CACHE_NAME: self.cache},
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            **options,
        )
        self.tokens = output[0].tolist()
        reply = self.tokenizer.decode(self.tokens[len(prompt) :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": reply})
        return reply, kept, len(prompt) - kept


def main() -> None:
    """Hold the conversation, and say what the cache saved."""
    parser = parser_for(__doc__)
    parser.add_argument("--turns", nargs="+", default=TURNS, metavar="TEXT", help="what the user says")
    parser.add_argument("--interactive", action="store_true", help="read the turns from standard input instead")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()
    model, tokenizer = load(args)
    chat, replies, kept_tokens, new_tokens = Chat(model, tokenizer, args.max_new_tokens), [], 0, 0
    for number, turn in enumerate(turns(args), 1):
        reply, kept, new = chat.say(turn)
        used = chat.cache.state.pool.num_used
        print(f"--- turn {number}: {kept} tokens in the cache, {new} new ones; then {used} blocks in use")
        print(reply if tokenizer.chat_template is not None else f"{turn}[{reply.rstrip()}]")
        replies.append(reply)
        kept_tokens, new_tokens = kept_tokens + kept, new_tokens + new
    print("-" * 73)
    print(f"prompt tokens computed: {new_tokens}; without a cache between turns: {kept_tokens + new_tokens}")
    if not args.interactive:
        forgetful, again = Chat(model, tokenizer, args.max_new_tokens), []
        for turn in args.turns:
            forgetful.cache.reset()
            again.append(forgetful.say(turn)[0])
        print(f"same replies with a fresh cache at every turn: {'yes' if again == replies else 'no'}")


def turns(args: argparse.Namespace) -> Iterator[str]:
    """Yield the scripted turns, or lines from standard input until an empty one."""
    if not args.interactive:
        yield from args.turns
        return
    while True:
        sys.stdout.write("> ")
        sys.stdout.flush()
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    main()

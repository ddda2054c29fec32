"""A model with a sliding window shorter than its text: fastattn against eager attention, prefill and decoding.

python examples/sliding_window.py                       # a tiny Mistral with random weights
python examples/sliding_window.py --window 32 --length 300
python examples/sliding_window.py --model NAME --length 6000     # a model that has a window
"""

import sys

import torch
from loading import load, parser_for
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from hf_fastattn import CACHE_NAME, PagedCache


def main() -> None:
    """Compute the same logits four ways and print how far they are apart."""
    parser = parser_for(__doc__)
    parser.set_defaults(model="random")
    parser.add_argument("--window", type=int, default=24, help="tokens, of the random model")
    parser.add_argument("--length", type=int, default=160, help="tokens of text")
    args = parser.parse_args()
    if args.window < 1:
        sys.exit(f"--window must be at least 1 token, got {args.window}")
    model = random_mistral(args.window).to(args.device) if args.model == "random" else load(args)[0]
    window = getattr(model.config, "sliding_window", None)
    if window is None:
        sys.exit(f"{args.model!r} has no sliding window: pass the name of a model that has one")
    if args.length <= window:
        sys.exit(f"a text of {args.length} tokens fits into the window of {window}: pass a larger --length")
    torch.manual_seed(0)
    text = torch.randint(3, model.config.vocab_size, (1, args.length), device=model.device)
    prompt = args.length // 2
    print(f"{args.length} tokens of text, a window of {window}, {model.config.num_hidden_layers} layers")

    with torch.inference_mode():
        prefill = model(text).logits
        decoded, cache = decode(model, text, prompt)
        print(f"decoded over {cache}")
        model.set_attn_implementation("eager")
        eager = model(text).logits
        short = model(text[:, -window // 2 :]).logits[:, -1]
    scale = eager.abs().max().item()
    print(f"largest logit:                                      {scale:.3g}")
    print(f"largest difference of fastattn's prefill to eager:  {difference(prefill, eager):.1e}")
    print(f"largest difference of fastattn's decoding to eager: {difference(decoded, eager[:, prompt - 1 :]):.1e}")
    print(f"for comparison, seeing half a window instead:       {difference(short, eager[:, -1]):.1e}")


def decode(model: PreTrainedModel, text: Tensor, prompt: int) -> tuple[Tensor, PagedCache]:
    """Return the logits from the prompt's last token on, one token at a time over a PagedCache, and the cache."""
    cache = PagedCache(model.config, block_size=16)
    logits = [model(text[:, :prompt], **{CACHE_NAME: cache}).logits[:, -1:]]
    logits += [model(token, **{CACHE_NAME: cache}).logits for token in text[:, prompt:].split(1, dim=1)]
    return torch.cat(logits, dim=1), cache


def random_mistral(window: int) -> PreTrainedModel:
    """Return a small model whose weights are large enough for attention to prefer some tokens."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.3,
        attn_implementation="fastattn",
    )
    return MistralForCausalLM(config).eval()


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return (a - b).abs().max().item()


if __name__ == "__main__":
    main()

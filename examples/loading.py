"""What the examples share: which model, loaded with fastattn."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_fastattn  # noqa: F401  registers "fastattn"; models that ask for it generate over a PagedCache

TINY_MODEL = Path(__file__).parent / "tiny-llama"


def parser_for(description: str) -> argparse.ArgumentParser:
    """Return a parser with --model, --device and --dtype."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL), help="a hub name or a folder; default: the bundled model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32 on a CPU")
    return parser


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model with fastattn and its tokenizer, padding on the left; end with a sentence where that fails."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("cuda was asked for, but PyTorch sees no GPU here: pass --device cpu")
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="fastattn")
    except (OSError, ValueError) as error:
        sys.exit(f"cannot load the model {args.model!r}: {error}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(args.device).eval(), tokenizer

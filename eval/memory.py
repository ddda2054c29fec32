"""What does the KV cache cost? Reserved bytes, waste and peak of each cache over batch, beams, padding and lengths.

    python -m eval.memory --model llama-20m --cells 4x512 --beams 1 4 --padding 0 0.3

Waste is the share of the cache's reserved tokens that holds no token of a sequence (padding is not a token of one) when
generate() returns. On a GPU the allocator's peak during generate() is given too, with weights and activations in it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_fastattn import PagedCache

from . import common
from .throughput import Cell, make_cache, make_inputs

CACHES = {
    "DynamicCache": ("sdpa", "dynamic"),
    "StaticCache": ("sdpa", "static"),
    "PagedCache": ("fastattn", "paged"),
    "PagedCache(max_length)": ("fastattn", "paged-sized"),
}


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    """Yield the tensors that hold a cache's keys and values."""
    for layer in cache.layers:
        tensors = (layer.k_cache, layer.v_cache) if isinstance(cache, PagedCache) else (layer.keys, layer.values)
        yield from (tensor for tensor in tensors if tensor is not None)


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Return the bytes of the storages behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(model: PreTrainedModel, name: str, cell: Cell) -> dict[str, Any]:
    """Generate over one cache and return what it reserved and what it needed."""
    implementation, kind = CACHES[name]
    model.set_attn_implementation(implementation)
    inputs = make_inputs(model, cell)
    rows = cell.batch * cell.beams
    cache = make_cache(model, kind, cell)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=cell.new_tokens,
        num_beams=cell.beams,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        disable_compile=True,
    )
    reserved = storage_bytes(cache_tensors(cache))
    per_token = common.kv_bytes(model.config, 1, model.dtype)
    prompts = inputs["attention_mask"].sum(1).repeat_interleave(cell.beams)
    tokens = int(prompts.sum()) + rows * (cell.new_tokens - 1)
    row = {
        "cell": cell.name,
        "cache": name,
        "sequence_tokens": tokens,
        "reserved_mib": reserved / 2**20,
        "waste": f"{1 - min(tokens * per_token / reserved, 1):.1%}",
    }
    if isinstance(cache, PagedCache):
        state = cache.state
        used = state.pool.num_used
        row["blocks_used_mib"] = used * state.block_size * per_token / 2**20
        row["waste_in_used_blocks"] = f"{1 - min(tokens / (used * state.block_size), 1):.1%}"
    if model.device.type == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated(model.device) / 2**20
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help=f"hub name, folder, tiny, {', '.join(common.SHAPES)}")
    parser.add_argument("--cells", nargs="+", default=["4x256"], metavar="BATCHxPROMPT")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--padding", nargs="+", type=float, default=[0.0, 0.3])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    model = common.load_model(args.model, device, common.pick_dtype(args.dtype, device))
    rows = []
    for text in args.cells:
        batch, prompt = common.parse_cell(text)
        for beams in args.beams:
            for padding in args.padding:
                cell = Cell(batch, prompt, args.new_tokens, beams, padding)
                rows += [measure(model, name, cell) for name in CACHES]
                if args.out:
                    common.write_result(args.out, "memory", device, vars(args), rows)
    columns = ["cell", "cache", "sequence_tokens", "reserved_mib", "waste", "blocks_used_mib", "waste_in_used_blocks"]
    print(common.table(rows, columns + (["peak_mib"] if device.type == "cuda" else [])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What does the KV cache cost? Reserved bytes, waste and peak of each cache over batch, beams, padding and lengths.

    python -m eval.memory --model llama-20m --cells 4x512 --beams 1 4 --padding 0 0.3

Waste is the share of the cache's reserved tokens that holds no token of a sequence (padding is not a token of one) when
generate() returns. On a GPU the allocator's peak during generate() is given too, with weights and activations in it.
Two more scenarios per cell show what is computed and stored once instead of often: a system prompt forked for as many
questions as the batch has, and a chat whose turns come through a prefix store. With --out, a picture of who owns which
block (a beam search of four beams, behind its prompt) is drawn beside the result file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_fastattn
from hf_fastattn import CACHE_NAME, PagedCache

from . import common
from .common import Model
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


def measure(model: Model, name: str, cell: Cell) -> dict[str, Any]:
    """Generate over one cache and return what it reserved and what it needed."""
    implementation, kind = CACHES[name]
    model.set_attn_implementation(implementation)
    inputs = make_inputs(model, cell)
    rows = cell.batch * cell.beams
    cache = make_cache(model, kind, cell)
    if kind == "paged":  # what a model that is paged by default makes
        length = cell.prompt + cell.new_tokens
        cache = PagedCache(model.config, reserve=length, sequences_per_prompt=cell.beams)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    model.generate(
        **inputs,
        **{CACHE_NAME: cache},
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


QUESTION = 32
"""Tokens of a question behind a system prompt, and of a chat turn."""


def measure_forks(model: Model, cell: Cell) -> list[dict[str, Any]]:
    """Ask ``cell.batch`` questions behind one system prompt of ``cell.prompt`` tokens, with and without a fork."""
    model.set_attn_implementation("fastattn")
    full = make_inputs(model, Cell(cell.batch, cell.prompt + QUESTION, cell.new_tokens, 1, 0.0))["input_ids"]
    full[:, : cell.prompt] = full[:1, : cell.prompt]
    rows = []
    for name in ("separate prompts", "one prompt, forked"):
        cache, before = PagedCache(model.config), 0
        if name == "one prompt, forked":
            with torch.no_grad():
                model(full[:1, : cell.prompt], **{CACHE_NAME: cache}, logits_to_keep=1)
            system, cache, before = cache, cache.fork(cell.batch), cell.prompt
        generate(model, full, cache, cell.new_tokens)
        stats = cache.stats()
        rows.append(
            {
                "cell": f"{cell.batch} questions behind {cell.prompt}",
                "cache": name,
                "sequence_tokens": stats.tokens,
                "prefilled_tokens": before + cell.batch * (cell.prompt + QUESTION - before),
                "blocks_used_mib": stats.used_bytes / 2**20,
                "saved": f"{stats.saved:.0%}",
            }
        )
    del system
    return rows


def measure_chat(model: Model, cell: Cell, turns: int = 4) -> list[dict[str, Any]]:
    """Hold a chat of some turns, whose first prompt has ``cell.prompt`` tokens, with and without a prefix store."""
    model.set_attn_implementation("fastattn")
    rows = []
    for name in ("new cache per turn", "PrefixStore"):
        store = hf_fastattn.PrefixStore(model)
        ids = make_inputs(model, Cell(1, cell.prompt, cell.new_tokens, 1, 0.0))["input_ids"]
        question = make_inputs(model, Cell(1, QUESTION, 1, 1, 0.0))["input_ids"]
        prefilled = 0
        for _ in range(turns):
            cache = PagedCache(model.config) if name != "PrefixStore" else store.cache(ids)
            prefilled += ids.shape[1] - cache.get_seq_length()
            out = generate(model, ids, cache, cell.new_tokens)
            if name == "PrefixStore":
                store.add(cache, out)
            ids = torch.cat([out, question], 1)
        kept = cache.stats().used_bytes
        if name == "PrefixStore":
            kept = store.stats().kept_blocks * store.pool.bytes_per_block
        rows.append(
            {
                "cell": f"chat of {turns} turns from {cell.prompt}",
                "cache": name,
                "sequence_tokens": cache.stats().tokens,
                "prefilled_tokens": prefilled,
                "blocks_used_mib": kept / 2**20,
                "saved": f"{store.stats().hit_rate:.0%} of the prompts known" if store.stats().asked else "",
            }
        )
    return rows


def generate(model: Model, ids: Tensor, cache: PagedCache, new_tokens: int, beams: int = 1) -> Tensor:
    """Generate exactly new_tokens over a cache."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_NAME: cache},
        max_new_tokens=new_tokens,
        num_beams=beams,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        disable_compile=True,
    )


def draw_blocks(model: Model, cell: Cell, path: Path) -> None:
    """Draw who owns which block after a search of four beams behind each of two prompts."""
    model.set_attn_implementation("fastattn")
    length = cell.prompt + 2 * cell.new_tokens
    cache = PagedCache(model.config, block_size=16, reserve=length, sequences_per_prompt=4)
    ids = make_inputs(model, Cell(2, cell.prompt, cell.new_tokens, 1, 0.0))["input_ids"]
    generate(model, ids, cache, 2 * cell.new_tokens, beams=4)
    hf_fastattn.plot_blocks(cache).savefig(path, dpi=110)


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
        rows += measure_forks(model, Cell(batch, prompt, args.new_tokens, 1, 0.0))
        rows += measure_chat(model, Cell(batch, prompt, args.new_tokens, 1, 0.0))
        if args.out:
            common.write_result(args.out, "memory", device, vars(args), rows)
            draw_blocks(model, Cell(batch, prompt, args.new_tokens, 1, 0.0), args.out.with_name("blocks.png"))
    columns = ["cell", "cache", "sequence_tokens", "reserved_mib", "waste", "blocks_used_mib", "waste_in_used_blocks"]
    columns += ["prefilled_tokens", "saved"]
    print(common.table(rows, columns + (["peak_mib"] if device.type == "cuda" else [])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

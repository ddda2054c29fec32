"""How fast are the linear layers of a decode step? DecodeLinear beside nn.Linear, as modules, at their read roofline.

    python -m eval.linears --out eval/results/linears.json
    python -m eval.linears --end-to-end llama-3-8b --batches 1 8

Before it is timed, each is checked on some outputs: at most twice as far from float64 as the plain formula in the timed
dtype, plus rounding. On a GPU a CUDA graph of calls on rotating copies of the weights is replayed, so that they come
from memory, and the two take turns. The end-to-end measurement generates with one model, its layers put in and taken
out between the rounds.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from hf_fastattn import CACHE_NAME, reference
from hf_fastattn.linear import GROUPS, DecodeLinear, optimize_linears, restore_linears

from . import common
from .attempts import attempt
from .kernel_inputs import MAX_COPIES, cache_bytes
from .kernel_timing import Prepared, make_timer, measure_ceilings
from .roofline import Bound, Ceilings

BASELINE, OURS = "nn.Linear", "DecodeLinear"
CHECKED_COLUMNS = 256
NAMES: dict[int, tuple[str, ...]] = {1: ("linear",), **{len(names): names for names in reversed(GROUPS)}}


@dataclass(frozen=True)
class LinearCell:
    """Linear layers of ``sizes`` outputs and k inputs over one x of ``num_rows`` rows: several are called in turn."""

    sizes: tuple[int, ...]
    k: int
    num_rows: int

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"{'+'.join(map(str, self.sizes))}x{self.k} m{self.num_rows}"

    def moved_bytes(self, itemsize: int) -> int:
        """Return the bytes that must be read and written: weights and x once, outputs once."""
        return itemsize * (self.k * (sum(self.sizes) + self.num_rows) + self.num_rows * sum(self.sizes))

    def bound(self, ceilings: Ceilings, itemsize: int) -> Bound:
        """Return the least time that a machine needs for the cell."""
        memory = self.moved_bytes(itemsize) / ceilings.bytes_per_s
        compute = 2 * self.num_rows * sum(self.sizes) * self.k / ceilings.flops_per_s
        return Bound(memory, "memory") if memory >= compute else Bound(compute, "compute")


LLAMA_SHAPES = [((6144,), 4096), ((4096,), 4096), ((28672,), 4096), ((4096,), 14336), ((128256,), 4096)]
LLAMA_GROUPS = [((4096, 1024, 1024), 4096), ((14336, 14336), 4096)]


def all_cells(*, small: bool) -> list[LinearCell]:
    """Return Llama-3-8B's shapes at 1 to 128 rows and its projections of one input, or what a CPU does quickly."""
    if small:
        shapes = [((512,), 512), ((2048,), 512), ((512, 128, 128), 512), ((1536, 1536), 512)]
        return [LinearCell(sizes, k, rows) for sizes, k in shapes for rows in (1, 4, 16)]
    cells = [LinearCell(sizes, k, rows) for sizes, k in LLAMA_SHAPES for rows in (1, 2, 4, 8, 16, 32, 64, 128)]
    return cells + [LinearCell(sizes, k, rows) for sizes, k in LLAMA_GROUPS for rows in (1, 2, 4, 8, 16)]


class Layers(nn.Module):
    """The layers of a cell, named as models name them."""

    def __init__(self, cell: LinearCell) -> None:
        super().__init__()
        self.names = NAMES[len(cell.sizes)]
        for name, size in zip(self.names, cell.sizes, strict=True):
            setattr(self, name, nn.Linear(cell.k, size, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Call one after the other."""
        return [getattr(self, name)(x) for name in self.names]


def make_layers(cell: LinearCell, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Layers, Tensor]:
    """Build one copy of a cell's layers and its x, random."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        layers = Layers(cell).to(dtype)
    layers = layers.to_empty(device=device).eval().requires_grad_(False)
    for parameter in layers.parameters():
        parameter.normal_(0.0, cell.k**-0.5, generator=generator)
    return layers, torch.randn(cell.num_rows, cell.k, generator=generator, dtype=dtype, device=device)


def checker(layers: Layers, x: Tensor) -> Callable[[Any], str]:
    """Return a function that says what is wrong with a call's outputs; "ok" if nothing is."""

    def check(outs: Any) -> str:
        worst = 0.0
        for name, out in zip(layers.names, outs, strict=True):
            weight = getattr(layers, name).weight
            if out.shape != (x.shape[0], weight.shape[0]) or out.dtype != x.dtype or not bool(out.isfinite().all()):
                return f"WRONG: {name} gives {tuple(out.shape)} {out.dtype} or values that are not finite"
            columns = torch.linspace(0, weight.shape[0] - 1, min(CHECKED_COLUMNS, weight.shape[0])).long().to(x.device)
            exact = reference.decode_linear(x.double(), weight[columns].double())
            own = (reference.decode_linear(x, weight[columns]).double() - exact).abs().max()
            allowed = 2 * own + 4 * torch.finfo(x.dtype).eps * exact.abs().max()
            worst = max(worst, float((out[:, columns].double() - exact).abs().max() / allowed))
        return "ok" if worst <= 1 else f"WRONG: the error is {worst:.3g} times what is allowed"

    return check


def measure_cell(
    cell: LinearCell, device: torch.device, dtype: torch.dtype, ceilings: Ceilings, rounds: int
) -> list[dict[str, Any]]:
    """Check and time both kinds of layer on one cell; one row each."""
    moved, least = cell.moved_bytes(dtype.itemsize), cell.bound(ceilings, dtype.itemsize)
    fitting = common.free_memory(device) // (2 * moved)
    num_copies = max(1, min(math.ceil(2 * cache_bytes(device) / moved), MAX_COPIES[device.type], fitting))
    copies = [make_layers(cell, dtype, device, seed) for seed in range(num_copies)]
    check = checker(*copies[0])
    rows: dict[str, dict[str, Any]] = {}
    for name in (BASELINE, OURS):
        rows[name] = {"cell": cell.name, "layer": name, "MB": moved / 1e6, "bound_us": least.seconds * 1e6}
        rows[name].update(limited_by=least.limited_by, shape=asdict(cell), copies=num_copies)
    timers = {}
    for name, change in ((BASELINE, restore_linears), (OURS, optimize_linears)):
        for layers, x in copies:
            change(layers)(x)  # the first call shows which layers belong together
        rows[name]["status"] = check(copies[0][0](copies[0][1]))
        if rows[name]["status"] == "ok":
            timers[name] = _timer_of(copies, change, device, rows[name])
    for name, samples in common.alternate(timers, rounds, label=cell.name).items():
        spread = common.Spread.of(samples)
        rows[name].update(us=spread.median * 1e6, us_low=spread.low * 1e6, us_high=spread.high * 1e6)
        rows[name].update(GBps=moved / spread.median / 1e9, fraction=least.seconds / spread.median)
    if len(timers) == 2:
        rows[OURS]["x_baseline"] = rows[BASELINE]["us"] / rows[OURS]["us"]
    return list(rows.values())


def _timer_of(
    copies: Sequence[tuple[Layers, Tensor]], change: Callable[[Any], Any], device: torch.device, row: dict[str, Any]
) -> Callable[[], float]:
    """Return a function that measures seconds per call of one kind of layer, which it puts in before the clock starts.

    A captured graph holds the kind that was in when it was captured.
    """
    timer, row["timing"] = make_timer(Prepared([functools.partial(layers, x) for layers, x in copies]), device)

    def timed() -> float:
        for layers, x in copies:
            if row["timing"] != "graph" and _is_ours(layers) != (change is optimize_linears):
                change(layers)(x)
        return timer()

    return timed


def _is_ours(layers: Layers) -> bool:
    return isinstance(next(layers.children()), DecodeLinear)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return geometric mean and minimum of the ratios to nn.Linear, up to 16 rows and over all."""
    ratios = [(row["shape"]["num_rows"], row["x_baseline"]) for row in rows if "x_baseline" in row]
    few = [ratio for num_rows, ratio in ratios if num_rows <= 16]
    found = {}
    if few:
        found["geomean_up_to_16_rows"] = math.exp(sum(map(math.log, few)) / len(few))
    if ratios:
        found["minimum"] = min(ratio for _, ratio in ratios)
    return found


def measure_end_to_end(
    name: str, batches: Sequence[int], device: torch.device, dtype: torch.dtype, rounds: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Generate with a model, its linear layers put in and taken out between rounds; tokens per second of each."""
    model = common.load_model(name, device, dtype).requires_grad_(False)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        ids = torch.randint(3, model.config.vocab_size, (batch, 128), device=device)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        torch._dynamo.reset()  # what was compiled for other batches is no part of this one
        caches: dict[str, StaticCache] = {}
        if device.type == "cuda":  # compiled decode steps in CUDA graphs: else launching from Python is what is timed
            caches = {
                layer: StaticCache(config=model.config, max_cache_len=ids.shape[1] + new_tokens)
                for layer in (BASELINE, OURS)
            }

        def run(
            layer: str,
            change: Callable[[Any], Any],
            ids: Tensor = ids,
            options: dict[str, Any] = options,
            caches: dict[str, StaticCache] = caches,
        ) -> float:
            change(model)
            if layer in caches:  # the same in every call, for its addresses are part of a graph
                caches[layer].reset()
                options = options | {CACHE_NAME: caches[layer]}
            mask = torch.ones_like(ids)
            return common.seconds(lambda: model.generate(ids, attention_mask=mask, **options), device)

        cases = {
            layer: functools.partial(run, layer, change)
            for layer, change in ((BASELINE, restore_linears), (OURS, optimize_linears))
        }
        for layer, samples in common.alternate(cases, rounds, warmup=2, label=f"{name} batch {batch}").items():
            spread = common.Spread.of([batch * new_tokens / seconds for seconds in samples])
            rows.append({"cell": f"{name} batch {batch}", "layer": layer, "status": "ok", "shape": {"num_rows": batch}})
            rows[-1].update(tokens_per_s=spread.median, low=spread.low, high=spread.high)
        rows[-1]["x_baseline"] = rows[-1]["tokens_per_s"] / rows[-2]["tokens_per_s"]
        restore_linears(model)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if a layer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m eval.linears", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--match", nargs="+", metavar="TEXT", help="only cells whose name has one of these")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, default=None, help="CPU-sized cells")
    parser.add_argument("--end-to-end", metavar="MODEL", help="generate with a model or named shape instead")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(args.dtype, device)
    if min(args.rounds, args.new_tokens, *args.batches) < 1:
        common.fail("expected at least one round, one token and one sequence")
    small = device.type == "cpu" if args.small is None else args.small
    cells = [cell for cell in all_cells(small=small) if not args.match or any(t in cell.name for t in args.match)]
    if not cells:
        common.fail(f"no cell's name has {' or '.join(map(repr, args.match))}")
    settings: dict[str, Any] = {**vars(args), "dtype": str(dtype).removeprefix("torch.")}
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        if args.end_to_end:
            for batch in args.batches:
                common.say(f"{args.end_to_end} batch {batch}")
                rows += measure_end_to_end(args.end_to_end, [batch], device, dtype, args.rounds, args.new_tokens)
                if args.out:
                    common.write_result(args.out, "linears", device, settings, rows)
        else:
            ceilings = measure_ceilings(device, dtype)
            settings["ceilings"] = asdict(ceilings)
            for cell in common.bar(cells, "cells"):
                common.empty_caches(device)
                whole = {"cell": cell.name, "layer": "-", "shape": asdict(cell)}
                found = attempt(whole, functools.partial(measure_cell, cell, device, dtype, ceilings, args.rounds))
                rows += [whole] if found is None else found
                if args.out:
                    common.write_result(args.out, "linears", device, settings, rows)
    settings["summary"] = summary(rows)
    if args.out:
        common.write_result(args.out, "linears", device, settings, rows)
    measured = ["us", "GBps", "fraction", "tokens_per_s", "x_baseline", "status"]
    print(common.table(rows, ["cell", "layer", *measured]))
    print("\n" + ", ".join(f"{key} {value:.3f}" for key, value in settings["summary"].items()))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

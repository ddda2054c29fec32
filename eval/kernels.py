"""How fast are the ops? Prefill, decode and store_kv beside PyTorch's attention, flex_attention and xformers.

    python -m eval.kernels --ops decode prefill --out eval/results/kernels.json

Each implementation is checked before it is timed: on some sequences, heads and queries it may be at most twice as far
from float64 as the plain formula in the timed dtype, plus rounding. One that is further off is reported as WRONG and
not timed; one that does not take a call is reported with its reason. On a GPU a CUDA graph of calls on rotating copies
is replayed, so that nothing comes from the L2 cache; the implementations take turns. The roofline is measured in the
same run: the faster of a large copy and a large sum, and a large matrix product. In a decode cell "fastattn" reuses a
schedule, as the layers of a model do; the rows beside it make one in each call, share nothing, or take another softmax.
"""

import argparse
import itertools
import json
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import common
from .attempts import LOST, DeviceLost, attempt, ensure_device
from .kernel_checks import attention_checker, needed_bytes, store_checker
from .kernel_inputs import cache_bytes, count_copies, make_inputs
from .kernel_rivals import OURS, Prepare, candidates
from .kernel_timing import Prepared, make_timer, measure_ceilings, reason
from .roofline import Ceilings, Cell, StoreCell, all_cells, bound, counted_flops, moved_bytes

OPS = ("decode", "prefill", "store_kv")


def measure_cell(
    cell: Cell,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    rounds: int,
    implementations: dict[str, Prepare],
) -> list[dict[str, Any]]:
    """Check and time every implementation on one cell; one row each."""
    itemsize = dtype.itemsize
    num_copies = count_copies(cell, itemsize, device)
    copies: list[Any] = [make_inputs(cell, dtype, device, seed) for seed in range(num_copies)]
    check = store_checker(copies[0]) if isinstance(cell, StoreCell) else attention_checker(copies[0])
    least, moved, flops = bound(cell, ceilings, itemsize), moved_bytes(cell, itemsize), counted_flops(cell)
    counted = {"MB": moved / 1e6, "GFLOP": flops / 1e9, "bound_us": least.seconds * 1e6, "limited_by": least.limited_by}
    rotation = {"copies": num_copies, "cold": num_copies * moved > cache_bytes(device)}
    rows: dict[str, dict[str, Any]] = {}
    timers = {}
    for name, prepare in implementations.items():
        row = rows[name] = {"op": cell.op, "cell": cell.name, "implementation": name, **counted, **rotation}
        row["shape"] = asdict(cell)
        with warnings.catch_warnings(record=name != OURS) as caught:
            try:
                prepared: Prepared = prepare(cell, copies)
                with prepared.context():
                    result = check(prepared.calls[0]())
                row.update(status="ok" if result.right else "WRONG", error=result.error, tolerance=result.tolerance)
                if result.right:
                    timers[name], row["timing"] = make_timer(prepared, device)
            except Exception as error:  # a failing implementation is a row, not the end of the run
                row["status"] = f"{'failed' if name == OURS else 'not available'}: {reason(error, caught)}"
        if "status" in row and row["status"] != "ok":
            ensure_device(f"{name} {row['status']}")
    for name, samples in common.alternate(timers, rounds, label=cell.name).items():
        spread = common.Spread.of(samples)
        rows[name].update(
            us=spread.median * 1e6,
            us_low=spread.low * 1e6,
            us_high=spread.high * 1e6,
            rate=flops / spread.median / 1e12 if cell.op == "prefill" else moved / spread.median / 1e9,
            unit="TFLOP/s" if cell.op == "prefill" else "GB/s",
            fraction=least.seconds / spread.median,
        )
    rivals = [row["us"] for name, row in rows.items() if not name.startswith(OURS) and "us" in row]
    if rivals and "us" in rows.get(OURS, {}):
        rows[OURS]["x_best_rival"] = min(rivals) / rows[OURS]["us"]
        if "us" in rows.get("sdpa flash", {}):
            rows[OURS]["x_sdpa_flash"] = rows["sdpa flash"]["us"] / rows[OURS]["us"]
    return list(rows.values())


def spread_out(cells: Sequence[Cell]) -> list[Cell]:
    """Order cells so that every beginning of the list covers all ops and their whole range."""
    groups = []
    for op in OPS:
        group = [cell for cell in cells if cell.op == op]
        groups.append([group[i] for i in sorted(range(len(group)), key=lambda i: int(f"{i:010b}"[::-1], 2))])
    return [cell for turn in itertools.zip_longest(*groups) for cell in turn if cell is not None]


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device, torch.dtype, list[Cell]]:
    """Read the command line; end with a sentence where it asks for what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m eval.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument(
        "--match", nargs="+", default=None, metavar="TEXT", help="only cells whose name has one of these"
    )
    parser.add_argument("--budget", type=float, default=None, metavar="SECONDS", help="stop starting cells after it")
    parser.add_argument("--rounds", type=int, default=None, help="9 on a GPU, 5 on a CPU")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, default=None, help="CPU-sized cells")
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True, help="of ours, beside it")
    parser.add_argument("--resume", action="store_true", help="leave out the cells that --out holds already")
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU only")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    try:
        device = common.pick_device(args.device)
        known = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        known = False
    if not known:
        common.fail(f"no device {args.device!r} here: pass cpu, or cuda on a machine with a GPU")
    dtype = common.pick_dtype(args.dtype, device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        common.fail(f"the ops are measured in float32, bfloat16 or float16, got {args.dtype!r}")
    if (args.rounds is not None and args.rounds < 1) or (args.budget is not None and not args.budget > 0):
        common.fail(f"expected at least one round and a positive budget, got {args.rounds} and {args.budget}")
    if args.threads is not None and args.threads < 1:
        common.fail(f"expected at least one thread, got --threads {args.threads}")
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            common.fail(f"cannot write to {str(args.out)!r}: {error.strerror}")
        if args.out.is_dir():
            common.fail(f"--out names a file, but {str(args.out)!r} is a folder")
    args.rounds = args.rounds or (9 if device.type == "cuda" else 5)
    args.small = device.type == "cpu" if args.small is None else args.small
    args.flex = device.type == "cuda" if args.flex is None else args.flex
    cells = [cell for cell in all_cells(small=args.small) if cell.op in args.ops]
    if args.match is not None:
        cells = [cell for cell in cells if any(text in f"{cell.op} {cell.name}" for text in args.match)]
    if args.resume and args.out is None:
        common.fail("--resume needs --out, the file to go on with")
    if not cells:
        common.fail(f"no cell's name has {' or '.join(map(repr, args.match))}: python -m eval.roofline lists them")
    return args, device, dtype, cells if args.budget is None else spread_out(cells)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if an implementation was wrong or ours failed."""
    args, device, dtype, cells = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    if args.resume and args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
        done = {(row["op"], row["cell"]) for row in rows}
        cells = [cell for cell in cells if (cell.op, cell.name) not in done]
    left = [cell.name for cell in cells]
    exit_code = 0
    settings: dict[str, Any] = {**vars(args), "dtype": str(dtype).removeprefix("torch."), "left_out": left}
    try:
        with torch.no_grad(), common.bar(cells, "cells") as bar:
            ceilings = measure_ceilings(device, dtype)
            settings["ceilings"] = asdict(ceilings)
            for number, cell in enumerate(bar):
                if args.budget is not None and number and time.perf_counter() - start > args.budget:
                    break
                bar.set_postfix_str(f"{cell.op} {cell.name}")
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                whole = {"op": cell.op, "cell": cell.name, "implementation": "-"}
                wanted, found = needed_bytes(cell, dtype.itemsize), None
                if wanted > common.free_memory(device):
                    whole["status"] = f"skipped: needs about {wanted / 2**30:.1f} GiB"
                else:
                    implementations = candidates(cell.op, with_flex=args.flex, with_variants=args.variants)
                    measured = partial(measure_cell, cell, device, dtype, ceilings, args.rounds, implementations)
                    try:
                        found = attempt(whole, measured)
                    except DeviceLost:
                        rows.append(whole)
                        raise
                rows += [whole] if found is None else found
                left.remove(cell.name)
                if args.out:
                    common.write_result(args.out, "kernels", device, settings, rows)
    except KeyboardInterrupt:
        print("interrupted: what is done is kept")
    except DeviceLost as error:
        print(error)
        exit_code = LOST
    if args.out and rows:
        common.write_result(args.out, "kernels", device, settings, rows)
    if "ceilings" in settings:
        best = settings["ceilings"]
        print(f"{best['name']}: {best['bytes_per_s'] / 1e9:.0f} GB/s, {best['flops_per_s'] / 1e12:.3g} TFLOP/s\n")
    columns = ["us", "rate", "unit", "fraction", "x_best_rival", "x_sdpa_flash", "MB", "GFLOP", "limited_by"]
    missing = Counter((row["implementation"], row["status"]) for row in rows if "not available" in row["status"])
    shown = [row for row in rows if "not available" not in row["status"]]
    print(common.table(shown, ["op", "cell", "implementation", *columns, "status"]))
    for (implementation, status), count in missing.items():
        print(f"\n{implementation} in {count} cells: {status}")
    if left:
        print(f"\n{len(left)} of {len(cells)} cells were not reached")
    return exit_code or int(any("WRONG" in row["status"] or "failed" in row["status"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

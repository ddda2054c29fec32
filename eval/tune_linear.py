"""Make the table of decode_linear: which plan is fastest for a shape and a number of rows, on this GPU.

    python -m eval.tune_linear [--shapes 6144x4096 ...] [--rounds 5] [--out hf_fastattn/kernels/decode_linear_table.py]

Every plan runs through the launcher's own function and is compared with the oracle before it is timed. All candidates
are timed once, the best few then in turn with the library; a kernel gets a place in the table only where it is faster
by a margin. Tables of other architectures in the file are kept.
"""

import argparse
import functools
import math
import pprint
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_fastattn import reference
from hf_fastattn.kernels import decode_linear_table
from hf_fastattn.kernels.decode_linear_plan import LIBRARY, MAX_GEMV_ROWS, MULTIPROCESSORS, ROW_MULTIPLE, Plan

from . import common
from .attempts import ensure_device

ROWS = (1, 2, 4, 8, 16)
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}
"""Largest shared memory of one program."""
FINALISTS = 4
MARGIN = 1.02
"""How many times as fast as the library a kernel must be: the dispatcher is never to lose by noise."""

Fields = tuple[Any, ...]
Steps = tuple[tuple[int, Fields], ...]
Clock = Callable[[Plan, int], float]
"""Seconds per call of a plan with so many rows, of one shape; infinity for one that fails or is wrong."""


def candidates(num_rows: int, n: int, k: int, arch: int) -> list[Plan]:
    """Return the plans worth a try: a quarter to sixteen programs per multiprocessor, within shared memory."""
    sms, found = MULTIPROCESSORS[arch], []

    def keep(plan: Plan) -> None:
        programs = -(-n // plan.block_n) * plan.num_splits
        enough = plan.num_splits == 1 or (programs <= 16 * sms and k // plan.block_k >= 2 * plan.num_splits)
        if 4 * programs >= sms and enough:
            found.append(plan)

    for splits in (1, 2, 4, 8):
        if num_rows <= MAX_GEMV_ROWS:
            for block_n in (2, 4, 8):
                for num_warps in (1, 2, 4, 8):
                    if 256 * num_warps <= k and block_n * num_rows <= 8:  # its sums are registers of every thread
                        keep(Plan("gemv", block_n, 256 * num_warps, num_warps, 1, splits))
        block_m = 8 if num_rows <= 8 else 16
        for block_n, num_warps in ((16, 1), (32, 2), (64, 4), (128, 4), (128, 8)):
            for block_k in (64, 128, 256, 512):
                for stages in (3, 4, 5):
                    tile = 2 * block_n * block_k
                    shared = stages * 2 * (block_n + block_m) * block_k
                    if 4096 <= tile <= 32768 and shared <= SHARED_BYTES[arch]:
                        keep(Plan("flat", block_n, block_k, num_warps, stages, splits))
    return found


def tune_shape(n: int, k: int, arch: int, clock: Clock, *, rows: Sequence[int] = ROWS, rounds: int = 5) -> Steps:
    """Return the table's entry of a shape: the largest number of rows, and the plan up to there.

    The library is not written at the end: what comes behind the last step is its anyway.
    """
    steps: list[tuple[int, Plan]] = []
    for num_rows in rows:
        first = {plan: clock(plan, num_rows) for plan in candidates(num_rows, n, k, arch)}
        finalists = [plan for plan in sorted(first, key=first.__getitem__)[:FINALISTS] if math.isfinite(first[plan])]
        times: dict[Plan, list[float]] = {plan: [] for plan in (LIBRARY, *finalists)}
        for turn in range(rounds):
            for plan in times if turn % 2 == 0 else reversed(times):
                times[plan].append(clock(plan, num_rows))
        medians = {plan: statistics.median(taken) for plan, taken in times.items()}
        best = min(medians, key=medians.__getitem__)
        plan = best if MARGIN * medians[best] <= medians[LIBRARY] else LIBRARY
        if steps and steps[-1][1] == plan:
            steps.pop()
        steps.append((num_rows, plan))
    if steps and steps[-1][1] == LIBRARY:
        steps.pop()
    return tuple((largest, fields_of(plan)) for largest, plan in steps)


def fields_of(plan: Plan) -> Fields:
    """Return what the table holds of a plan: Plan(*fields) is the plan."""
    if plan == LIBRARY:
        return ("library",)
    return (plan.kind, plan.block_n, plan.block_k, plan.num_warps, plan.num_stages, plan.num_splits)


def write_table(path: Path, tables: dict[int, dict[str, Any]]) -> None:
    """Write the module that holds the tables, formatted as the repository's formatter would leave it alone."""
    lines = ["TABLES: dict[int, dict[str, Any]] = {"]
    for arch in sorted(tables):
        made, shapes = {key: tables[arch][key] for key in ("device", "date", "command")}, tables[arch]["shapes"]
        if not shapes:
            entries = [f"{_quote(key)}: {_quote(value)}" for key, value in made.items()]
            lines.append(f'    {arch}: {{{", ".join(entries)}, "shapes": {{}}}},')
            continue
        lines.append(f"    {arch}: {{")
        lines += [f"        {_quote(key)}: {_quote(value)}," for key, value in made.items()]
        lines.append('        "shapes": {')
        for shape, steps in sorted(shapes.items()):
            if not steps:
                lines.append(f"            {shape}: (),")
                continue
            lines.append(f"            {shape}: (")
            lines += [f"                ({most}, {_fields(fields)})," for most, fields in steps]
            lines.append("            ),")
        lines += ["        },", "    },"]
    head, _, rest = Path(decode_linear_table.__file__).read_text(encoding="utf-8").partition("TABLES: ")
    tail = rest.partition("\n}\n")[2]
    path.write_text(head + "\n".join(lines) + "\n}\n" + tail, encoding="utf-8")


def _fields(fields: Fields) -> str:
    texts = [_quote(field) for field in fields]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def _quote(value: Any) -> str:
    return (
        '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if isinstance(value, str) else pprint.pformat(value)
    )


class GpuClock:
    """Times plans of one shape on rotating copies of the weight in a CUDA graph; a wrong plan takes forever."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        from .kernels import cache_bytes

        random = torch.Generator(device).manual_seed(0)
        size = n * k * dtype.itemsize
        copies = max(2, min(-(-2 * cache_bytes(device) // size), 64, common.free_memory(device) // (2 * size)))
        self.weights = [
            torch.randn(n, k, generator=random, device=device, dtype=dtype).mul_(k**-0.5) for _ in range(copies)
        ]
        self.inputs = torch.randn(max(ROWS), k, generator=random, device=device, dtype=dtype)
        self.columns = torch.linspace(0, n - 1, min(n, 512)).long().to(device)
        self.timers: dict[tuple[Plan, int], Callable[[], float]] = {}

    def __call__(self, plan: Plan, num_rows: int) -> float:
        """Return seconds per call."""
        if (plan, num_rows) not in self.timers:
            try:
                self.timers[plan, num_rows] = self._prepare(plan, num_rows)
            except Exception as error:  # a plan that does not compile or is wrong is left out, and said so
                ensure_device(f"{plan} with {num_rows} rows: {error}")
                if plan == LIBRARY:  # without it nothing can be said of the others
                    raise
                tqdm.write(f"{plan} with {num_rows} rows left out: {str(error).splitlines()[0][:120]}", file=sys.stderr)
                self.timers[plan, num_rows] = lambda: math.inf
        return self.timers[plan, num_rows]()

    def _prepare(self, plan: Plan, num_rows: int) -> Callable[[], float]:
        from hf_fastattn.kernels.decode_linear import run

        from .kernels import Prepared, make_timer

        x = self.inputs[:num_rows]
        check_output(run(x, [self.weights[0]], [None], plan)[0], x, self.weights[0], self.columns)
        calls = [functools.partial(run, x, [weight], [None], plan) for weight in self.weights]
        timer, how = make_timer(Prepared(calls), x.device)
        if x.is_cuda and how != "graph":
            raise RuntimeError(f"not captured in a CUDA graph ({how})")
        return timer


def check_output(out: Tensor, x: Tensor, weight: Tensor, columns: Tensor) -> None:
    """Raise ValueError if some columns of an output are more than twice as far from float64 as the plain formula's."""
    exact = reference.decode_linear(x.double(), weight[columns].double())
    own = (reference.decode_linear(x, weight[columns]).double() - exact).abs().max()
    allowed = 2 * own + 4 * torch.finfo(x.dtype).eps * exact.abs().max()
    error = (out[:, columns].double() - exact).abs().max()
    if not error <= allowed:
        raise ValueError(f"wrong: expected an error of at most {allowed:.3g} against float64, got {error:.3g}")


def parse_shape(text: str) -> tuple[int, int]:
    """Return N and K of a shape written as NxK, or end with a sentence."""
    try:
        n, k = map(int, text.split("x"))
    except ValueError:
        common.fail(f"a shape is NxK, for example 6144x4096; got {text!r}")
    if n < 1 or k < 1 or k % ROW_MULTIPLE:
        common.fail(f"a shape needs rows, and columns in a multiple of {ROW_MULTIPLE}; got {text!r}")
    return n, k


def main(argv: list[str] | None = None) -> int:
    """Run the command line: measure, and write the table after every shape."""
    parser = argparse.ArgumentParser(prog="python -m eval.tune_linear", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="default: those of Llama-3-8B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path(decode_linear_table.__file__))
    args = parser.parse_args(argv)
    shapes = [parse_shape(text) for text in args.shapes] if args.shapes else list(SHAPES)
    if args.rounds < 1:
        common.fail(f"expected at least one round, got {args.rounds}")
    device = common.pick_device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    arch = 10 * major + minor
    if arch not in MULTIPROCESSORS:
        common.fail(f"expected a GPU of compute capability 8.0, 9.0 or 10.0, got {major}.{minor}")
    dtype = common.pick_dtype(args.dtype, device)
    made = common.environment(device)
    tables = {known: dict(table) for known, table in decode_linear_table.TABLES.items()}
    shapes_done = dict(tables.get(arch, {}).get("shapes", {}))
    for n, k in common.bar(shapes, "shapes"):
        torch.cuda.empty_cache()
        shapes_done[n, k] = tune_shape(n, k, arch, GpuClock(n, k, dtype, device), rounds=args.rounds)
        tables[arch] = {key: made[key] for key in ("device", "date", "command")} | {"shapes": shapes_done}
        write_table(args.out, tables)
        print(f"{n}x{k}: {shapes_done[n, k]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

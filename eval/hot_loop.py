"""How many instructions does a KV tile cost? The hot loop of each decode case, counted in its machine code.

    python -m eval.hot_loop [--arch 80 90] [--match paged64-bf16-d128-rows4]

Needs Triton (whose wheel holds nvdisasm), no GPU. The hot loop is the smallest one with matrix instructions; "common"
is what runs for every tile, "rare" what a branch mostly jumps over (the rescale of the lazy softmax). Counts are no
times.
"""

import argparse
import re
from dataclasses import dataclass

from hf_fastattn.kernels import _compile, _sass

from . import common
from .compile_report import kernel_cases

COUNTED = {
    "barriers": r"\bBAR\.SYNC",
    "exp2": r"\bMUFU\.EX2",
    "shuffles": r"\bSHFL",
    "shared": r"\b(?:LDS|STS|LDSM)\b",
    "matrix": r"\bH?G?MMA|\bHMMA",
    "fp32": r"\bF(?:MUL|ADD|FMA|MNMX|SETP|SEL)\b",
}


@dataclass(frozen=True)
class Loop:
    """One loop's instructions: those of every round, and how many a branch within it jumps over."""

    common: list[str]
    rare: int


def hot_loop(sass: str) -> Loop:
    """Find the smallest loop with matrix instructions in the output of nvdisasm -c.

    Raises:
        ValueError: there is no such loop.
    """
    code = _sass.parse(sass)
    matrix = re.compile(COUNTED["matrix"])
    loops = [(a, b) for a, b in code.loops if any(map(matrix.search, code.instructions[a : b + 1]))]
    if not loops:
        raise ValueError("expected a loop with matrix instructions, found none")
    begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
    over = (range(at + 1, to) for at, to, conditional in code.jumps if conditional and begin <= at < to <= end)
    skipped = {i for jumped_over in over for i in jumped_over}
    common_ones = [text for i, text in enumerate(code.instructions[begin : end + 1], begin) if i not in skipped]
    return Loop(common_ones, len(skipped))


def main(argv: list[str] | None = None) -> int:
    """Run the command line: print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m eval.hot_loop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=(80, 90), default=(80, 90), help="default: both")
    parser.add_argument("--match", default="paged64-bf16-d128-rows4", help="cases whose name begins so")
    args = parser.parse_args(argv)
    rows = []
    for arch in args.arch:
        for case in kernel_cases("decode_attention", arch):
            if not case.name.startswith(args.match):
                continue
            loop = hot_loop(_sass.disassemble(_compile.compiled(case, arch)))
            counts = {name: sum(bool(re.search(p, text)) for text in loop.common) for name, p in COUNTED.items()}
            softmax = case.constexprs["SOFTMAX"]
            rows.append(
                {"case": case.name, "sm": arch, "softmax": softmax, "common": len(loop.common), "rare": loop.rare}
                | counts
            )
    if not rows:
        common.fail(f"no case's name begins with {args.match!r}")
    print(common.table(rows, list(rows[0])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

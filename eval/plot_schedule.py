"""Draw how decoding shares the keys of a batch out to programs: ``python -m eval.plot_schedule``.

Nothing is timed. The lists of work are those of a fixed grid of 8 programs, as kernels/decode_schedule.py makes them,
beside one program for each sequence (PagedAttention) and a fixed number of splits (FlashDecoding).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hf_fastattn.kernels._decode_plan import Plan, share, work

LENS = (4096, 1536, 1408, 1280, 640, 256)
"""Tokens of each sequence: one long, three that begin alike, two short."""

SHARED = (1, 3, 0, 16)
"""The second to the fourth sequence share their first 16 blocks of 64 tokens."""

PROGRAMS, TILE, SPLITS = 8, 64, 2

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


class Piece(NamedTuple):
    """KV tiles that a program reads one after the other for one sequence, or for all that share them (None)."""

    seq: int | None
    tiles: int


def one_program_each() -> list[list[Piece]]:
    """Return the pieces of each program, if a sequence has one program."""
    return [[Piece(seq, _tiles(seq_len))] for seq, seq_len in enumerate(LENS)]


def fixed_splits(splits: int = SPLITS) -> list[list[Piece]]:
    """Return the pieces of each program, if every sequence is cut into as many."""
    return [
        [Piece(seq, share(part, _tiles(seq_len), splits))] for seq, seq_len in enumerate(LENS) for part in range(splits)
    ]


def even_ranges(programs: int = PROGRAMS) -> list[list[Piece]]:
    """Return the pieces of each program, as the schedule deals them out."""
    plan = Plan(len(LENS), 1, 1, 4, 16, TILE, programs, False)
    shared, own, _ = work(plan, LENS, [SHARED], block_size=64)
    pieces: list[list[Piece]] = [[] for _ in range(programs)]
    lists = (([None] * len(shared), shared, reversed(range(programs))), (range(len(LENS)), own, range(programs)))
    for seqs, segments, order in lists:
        total = sum(segment.num_tiles for segment in segments)
        begin = 0
        for place, program in enumerate(order):
            end = begin + share(place, total, programs)
            for seq, segment in zip(seqs, segments, strict=True):
                first, last = segment.first_item, segment.first_item + segment.num_tiles
                if min(end, last) > max(begin, first):
                    pieces[program].append(Piece(seq, min(end, last) - max(begin, first)))
            begin = end
    return pieces


def draw(path: Path) -> None:
    """Draw the three ways side by side, and save the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    ways = {
        "a program for each sequence": one_program_each(),
        f"{SPLITS} splits of each sequence": fixed_splits(),
        f"hf_fastattn: {PROGRAMS} programs, even ranges": even_ranges(),
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, (title, programs) in zip(axes, ways.items(), strict=True):
        for program, pieces in enumerate(programs):
            bottom = 0
            for seq, tiles in pieces:
                color, hatch = ("#bbbbbb", "//") if seq is None else (COLORS[seq], "")
                axis.bar(program, tiles, 0.8, bottom, color=color, hatch=hatch, edgecolor="white", linewidth=0.6)
                bottom += tiles
        busiest = max(sum(piece.tiles for piece in pieces) for pieces in programs)
        axis.axhline(busiest, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{title}\nbusiest: {busiest} tiles", fontsize=10)
        axis.set_xlabel("program")
        axis.set_xticks(range(len(programs)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"KV tiles of {TILE} tokens")
    names = [Patch(color=color, label=f"{n} tokens") for color, n in zip(COLORS, LENS, strict=True)]
    names.append(Patch(facecolor="#bbbbbb", hatch="//", edgecolor="white", label="shared by three, read once"))
    figure.legend(handles=names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _tiles(tokens: int) -> int:
    return -(-tokens // TILE)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture that README shows."""
    parser = argparse.ArgumentParser(prog="python -m eval.plot_schedule", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "notes" / "decode_schedule.png")
    draw(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()

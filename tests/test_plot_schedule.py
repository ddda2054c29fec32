"""The picture of the schedule shows every tile once, in the ways that it names."""

from collections import Counter

import pytest

from eval import plot_schedule
from eval.plot_schedule import LENS, SHARED, TILE


def tiles_of(programs):
    found = Counter()
    for pieces in programs:
        for seq, tiles in pieces:
            found[seq] += tiles
    return found


@pytest.mark.parametrize("way", [plot_schedule.one_program_each, plot_schedule.fixed_splits])
def test_every_sequence_reads_all_its_tiles(way):
    assert tiles_of(way()) == {seq: -(-n // TILE) for seq, n in enumerate(LENS)}


@pytest.mark.parametrize("programs", [1, 3, 8, 40])
def test_even_ranges_read_what_is_shared_once(programs):
    first, members, _, blocks = SHARED
    own = {seq: -(-n // TILE) - blocks * (first <= seq < first + members) for seq, n in enumerate(LENS)}
    pieces = plot_schedule.even_ranges(programs)
    assert tiles_of(pieces) == own | {None: blocks}
    sizes = [sum(piece.tiles for piece in program) for program in pieces]
    assert max(sizes) - min(sizes) <= 1


def test_the_picture_is_saved(tmp_path):
    pytest.importorskip("matplotlib")
    plot_schedule.main(["--out", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

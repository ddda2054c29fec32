"""packed_attention's launcher and kernel against the float64 oracle, run by Triton's interpreter on tiny tiles.

    TRITON_INTERPRET=1 python -m pytest tests/interpret/test_packed_attention.py

Rows of no sequence hold NaN, before, between and behind those of sequences.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn.ops import NO_WINDOW
from tests.test_packed import RAGGED, Packed

pytest.importorskip("triton")

from hf_fastattn.kernels import packed_attention
from hf_fastattn.kernels.packed_attention import launch
from hf_fastattn.kernels.prefill_attention import PrefillConfig

from . import runs_kernels

pytestmark = runs_kernels
TILES = PrefillConfig(16, 16, 4, 2)
ALL_TILES = [TILES, PrefillConfig(16, 32, 4, 2), PrefillConfig(32, 16, 4, 2, split=False), None]


@pytest.fixture(autouse=True)
def _few_idle_tiles(monkeypatch):
    """The interpreter takes its time for tiles behind the last query, too."""
    monkeypatch.setattr(packed_attention, "ROWS_STEP", 1)


def kernel(tiles):
    """Return the op's function, by the kernel."""

    def run(q, k, v, *, query_starts, key_starts, max_query_len, softmax_scale, sinks=None, **options):
        options = {"causal": True, "window": NO_WINDOW, "softcap": 0.0} | options
        return launch(
            *(q, k, v, query_starts, key_starts, sinks, max_query_len, softmax_scale),
            *(options["causal"], options["window"], options["softcap"]),
            config=tiles,
        )

    return run


@pytest.mark.parametrize("tiles", ALL_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ragged(dtype, tiles):
    Packed(RAGGED, heads=2, kv_heads=1, dtype=dtype).check(kernel(tiles))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
@pytest.mark.parametrize("dims", [(16, 16), (24, 40)])
def test_heads(heads, dims):
    Packed(RAGGED[:3], heads=heads[0], kv_heads=heads[1], dim=dims[0], v_dim=dims[1]).check(kernel(TILES))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 6},
        {"window": 6, "softcap": 2.0, "sinks": torch.tensor([1.0, 9.0, 2.0, 3.0, 7.0, 0.0, 5.0, 8.0])[::2]},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("tiles", ALL_TILES[1:3], ids=str)
def test_options(options, tiles):
    call = Packed(RAGGED)
    call.options |= options
    call.check(kernel(tiles))


@pytest.mark.parametrize("lens", [(), ((0, 0),), ((0, 4), (0, 0)), ((3, 0),)], ids=str)
def test_nothing_to_attend(lens):
    assert not Packed(lens).check(kernel(TILES)).any()


def test_the_longest_length_changes_nothing():
    call = Packed(RAGGED[2:], heads=1, kv_heads=1)
    out = call.check(kernel(TILES))
    for longest in (60, 0):
        call.options["max_query_len"] = longest
        assert torch.equal(call.check(kernel(TILES)), out)


@pytest.mark.parametrize(
    "lens", [(16, 16), (0, 16, 0), (17, 0, 0, 15, 1), (0, 0, 33), (1,) * 17, (48, 1, 31, 0)], ids=str
)
@pytest.mark.parametrize("gap", [0, 15, 16, 40])
def test_sequences_that_end_where_tiles_do(lens, gap):
    """Tiles of 16 rows, rows of no sequence before them too, and as many tiles as the shapes allow for."""
    Packed([(n, n + 3) for n in lens], heads=1, kv_heads=1, dim=16, gap=gap).check(kernel(TILES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_few_queries_take_few_rows(dtype, monkeypatch):
    chosen = []
    choose = packed_attention.choose
    monkeypatch.setattr(packed_attention, "choose", lambda *a, **k: chosen.append(choose(*a, **k)) or chosen[-1])
    for lens, bound, few in (((1, 1), 1, True), ((16, 1), 16, True), ((17, 1), 17, False), ((1, 1), 99, True)):
        packed_attention._kept.clear()
        call = Packed([(n, 40) for n in lens], heads=2, kv_heads=1, dtype=dtype, gap=0)
        call.options["max_query_len"] = bound
        call.check(kernel(None))
        assert (chosen[-1].BLOCK_M == 16) == few


def test_starts_and_heads_of_any_stride():
    call = Packed(RAGGED[:3], heads=2)
    out = call.check(kernel(TILES))
    call.starts = [starts.repeat_interleave(2)[::2] for starts in call.starts]
    call.q = call.q.repeat_interleave(2, 2)[..., ::2]
    assert torch.equal(call.check(kernel(TILES)), out)


@settings(deadline=None, max_examples=12)
@given(
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4),
    window=st.one_of(st.just(NO_WINDOW), st.integers(1, 50)),
    causal=st.booleans(),
    gap=st.integers(0, 3),
)
def test_any_lengths(lens, window, causal, gap):
    call = Packed(lens, heads=2, dim=16, gap=gap)
    call.options |= {"window": window, "causal": causal}
    call.check(kernel(TILES))

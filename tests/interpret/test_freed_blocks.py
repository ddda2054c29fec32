"""Kernels over tables whose blocks behind the window were freed (-1): NaN in those and in block 0 is not seen."""

import pytest
import torch

pytest.importorskip("triton")

from hf_fastattn import reference
from hf_fastattn.kernels import prefill_attention

from . import runs_kernels
from .decode_call import NAN, Call, poisoned_new_empty

pytestmark = runs_kernels

BLOCK = 16


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty(torch.Tensor.new_empty))


def without_block_0(call):
    """Move what lies in block 0 elsewhere."""
    call.k, call.v = (torch.cat([x[:1], x]) for x in (call.k, call.v))
    call.k[0] = call.v[0] = NAN
    call.block_table = torch.where(call.block_table >= 0, call.block_table + 1, call.block_table)
    return call


def free_behind(call, window):
    """Free the blocks that no query sees; return how many places that leaves."""
    gone = []
    for row, seq_len in enumerate(call.seq_lens.tolist()):
        count = max(seq_len - call.q.shape[2] - window + 1, 0) // BLOCK
        gone += call.block_table[row, :count].tolist()
        call.block_table[row, :count] = -1
    held = set(call.block_table.flatten().tolist())
    dead = [block for block in gone if block not in held]
    call.k[dead] = call.v[dead] = NAN
    return len(gone)


@pytest.mark.parametrize("block_n", [16, 32])
@pytest.mark.parametrize(("query_len", "num_programs"), [(1, 1), (1, 5), (3, 2)])
def test_decode(block_n, query_len, num_programs):
    """A tile of 32 keys spans two blocks, one of which may be gone."""
    call = without_block_0(Call((90, 38, 70), heads=2, query_len=query_len))
    call.options["window"] = 20
    before = call.expected(torch.float64)
    assert free_behind(call, 20) == 4 + 1 + 3
    out = call.check(num_programs, block_n)
    torch.testing.assert_close(out.double(), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_programs", [1, 3])
def test_decode_over_a_shared_prefix(num_programs):
    """Two sequences share four blocks, of which the first two are gone for both; a third stands alone."""
    call = without_block_0(Call((85, 81, 40), heads=2)).share([0, 2, 0, 4])
    call.options["window"] = 40
    before = call.expected(torch.float64)
    assert free_behind(call, 40) == 2 + 2
    out = call.check(num_programs)
    torch.testing.assert_close(out.double(), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_prefill(with_positions, masked):
    call = without_block_0(Call((150, 100), heads=2, query_len=35))
    positions = None
    if with_positions:
        positions = call.seq_lens[:, None] - 35 + torch.arange(35, dtype=torch.int32)
        positions[1, 3] = -1
    if masked:
        call.key_mask = (torch.rand(2, 160, generator=torch.Generator().manual_seed(0)) > 0.2).to(torch.int8)
    given = {"key_mask": call.key_mask, "query_positions": positions, "softmax_scale": 0.25, "window": 20}
    given |= {"block_table": call.block_table, "seq_lens": call.seq_lens}
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    want = reference.prefill_attention(q, k, v, **given)
    assert free_behind(call, 20) == 6 + 2
    out = launch(call, positions)
    assert not out.isnan().any()
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def launch(call, positions):
    return prefill_attention.launch(
        *(call.q, call.k, call.v, call.block_table, call.seq_lens, positions, call.key_mask, None),
        *(0.25, True, 20, 0.0),
    )

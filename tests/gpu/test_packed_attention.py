"""packed_attention through the op on a GPU, real sizes, against the float64 oracle; on a CPU small ones, as a check."""

import pytest
import torch

from hf_fastattn import ops
from tests.test_packed import RAGGED, Packed

LENGTHS = {"cuda": ((1, 3000), (0, 70), (700, 700), (130, 1500), (1, 1), (0, 0), (40, 30)), "cpu": RAGGED}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on(device, **layout):
    """Return a call on a device."""
    call = Packed(LENGTHS[device], **layout)
    call.q, call.k, call.v = (x.to(device) for x in (call.q, call.k, call.v))
    call.starts = [starts.to(device) for starts in call.starts]
    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_ragged(device, dim, dtype):
    on(device, dim=dim, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 256])
def test_options(device, dim, dtype):
    for options in ({"causal": False}, {"window": 20}, {"softcap": 5.0, "window": 100}):
        call = on(device, dim=dim, dtype=dtype, heads=8)
        call.options |= options
        call.check()
    call = on(device, dim=dim, dtype=dtype)
    call.options["sinks"] = torch.tensor([-30.0, 0.0, 2.0, 60.0], dtype=dtype, device=device)
    call.check()


def test_it_can_be_captured_and_replayed_over_other_lengths(device):
    """The grid is fixed, the lengths are read on the device."""
    if device == "cpu":
        pytest.skip("a CPU captures nothing")
    call = on(device, dim=64, dtype=torch.bfloat16)
    call.options["max_query_len"] = 1000
    call.run(ops.packed_attention)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run(ops.packed_attention)
    graph.replay()
    assert torch.equal(out, call.run(ops.packed_attention))
    call.starts[0].copy_(torch.tensor([2, 3, 403, 403, 600, 601, 602, 874]))
    graph.replay()
    call.check(lambda *args, **options: out)

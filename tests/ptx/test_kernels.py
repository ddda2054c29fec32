"""The kernels with their own configs for each architecture, in bfloat16, which the interpreter gets wrong.

`make test-ptx` runs the tests for a GPU on sm_90, too, and `make test-ptx-all` all of them on all that are known here.
"""

import pytest
import torch

pytest.importorskip("triton")

from hf_fastattn import ops, reference
from hf_fastattn.kernels import decode_linear, decode_linear_plan, store_kv
from tests.interpret.decode_call import Call

from .launches import emulated, on_the_way_of_a_gpu
from .traffic import Traffic

pytestmark = pytest.mark.ptx

BF16 = {"dtype": torch.bfloat16, "block_size": 64}


@pytest.fixture(params=[80, 90, 100], ids="sm_{}".format)
def arch(request):
    with emulated(request.param):
        yield request.param


@pytest.mark.parametrize(("heads", "kv_heads", "query_len"), [(8, 2, 1), (16, 1, 1), (8, 2, 8), (8, 1, 16)])
def test_decode(arch, heads, kv_heads, query_len):
    """Up to 128 rows for a key head: 4 to 16 take mma, more take wgmma on sm_90, and 128 tcgen05 on sm_100."""
    call = Call((300, 133, 0, 17), heads=heads, kv_heads=kv_heads, query_len=query_len, dim=128, **BF16)
    call.check(5, default_config=True)


@pytest.mark.parametrize("num_programs", [3, 16])
def test_decode_of_shared_prefixes(arch, num_programs):
    call = Call((330, 340, 200), heads=8, kv_heads=2, dim=64, **BF16).share([0, 3, 0, 2], [0, 2, 2, 4])
    call.check(num_programs, default_config=True)


def test_decode_options(arch):
    call = Call((300, 133, 17), heads=8, kv_heads=2, dim=80, dtype=torch.bfloat16, block_size=16)
    call.key_mask = (torch.rand(3, 300, generator=torch.Generator().manual_seed(0)) > 0.3).to(torch.int8)
    call.sinks = torch.linspace(-2, 2, 8)
    call.options |= {"window": 100, "softcap": 20.0}
    call.check(4, default_config=True)


def test_store(arch):
    """New tokens of two sequences land behind their old ones, bit for bit, and nothing else changes."""
    new = torch.randn(2, 2, 5, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    caches = [torch.full((4, 16, 2, 80), 7.0, dtype=torch.bfloat16) for _ in range(4)]
    table, past_lens = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32), torch.tensor([14, 0], dtype=torch.int32)
    reference.store_kv(new, -new, *caches[2:], table, past_lens)
    store_kv.launch(new, -new, *caches[:2], table, past_lens, None)
    assert all(torch.equal(got, wanted) for got, wanted in zip(caches[:2], caches[2:], strict=True))
    assert (caches[0] != 7.0).any()


@pytest.mark.parametrize(
    ("arch", "dim"), [(80, 64), (80, 128), (90, 128), (90, 256), (100, 64), (100, 128)], indirect=["arch"]
)
def test_prefill(arch, dim):
    """Several tiles of queries and keys, with masks and without; the table ends with the last sequence's last block."""
    call = Call((140, 330), heads=4, kv_heads=2, query_len=130, dim=dim, **BF16)
    table = call.block_table[:, :6].contiguous()
    where = {"block_table": table, "seq_lens": call.seq_lens, "softmax_scale": dim**-0.5}
    with on_the_way_of_a_gpu():
        for options in ({}, {"window": 50, "sinks": torch.linspace(-2, 2, 4)}):
            out = ops.prefill_attention(call.q, call.k, call.v, **where, **options)
            exact, plain = (
                reference.prefill_attention(
                    *(x.to(dtype) for x in (call.q, call.k, call.v)), **where, **options
                ).double()
                for dtype in (torch.float64, torch.bfloat16)
            )
            rounding = 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
            assert (out.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("query_len", [1, 4])
def test_decode_reads_memory_without_detours(arch, query_len):
    """Keys and values are read once, by whole sectors, and no two threads wait for one bank of shared memory.

    The rest is queries, results, partial results and the schedule.
    """
    call, traffic = Call((512, 512), heads=8, kv_heads=2, query_len=query_len, dim=128, **BF16), Traffic()
    with emulated(arch, traffic=traffic):
        call.run(4)
    keys = sum(x[call.block_table[call.block_table >= 0].long()].numel() * x.itemsize for x in (call.k, call.v))
    assert keys / 32 < traffic.fewest_sectors <= traffic.sectors < 1.06 * keys / 32
    assert 0 < traffic.wavefronts == traffic.fewest_wavefronts


@pytest.mark.parametrize("arch", [80, 90])
def test_prefill_reads_memory_without_detours(arch):
    call, traffic = Call((256,), heads=2, kv_heads=1, query_len=256, dim=128, **BF16), Traffic()
    where = {"block_table": call.block_table, "seq_lens": call.seq_lens, "softmax_scale": 0.1}
    with emulated(arch, traffic=traffic), on_the_way_of_a_gpu():
        ops.prefill_attention(call.q, call.k, call.v, **where)
    assert traffic.fewest_sectors > sum(x.numel() * x.itemsize for x in (call.q, call.k[:4], call.v[:4])) / 32
    assert traffic.sectors == traffic.fewest_sectors
    assert 0 < traffic.wavefronts == traffic.fewest_wavefronts


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 16])
def test_linear_layers_read_memory_without_detours(arch, num_rows):
    plan, traffic = decode_linear_plan.choose(num_rows, 4096, 4096, torch.bfloat16, arch), Traffic()
    x, weight = torch.randn(num_rows, 1024).bfloat16(), torch.randn(256, 1024).bfloat16()
    with emulated(arch, traffic=traffic):
        (out,) = decode_linear.run(x, [weight], [None], plan)
    torch.testing.assert_close(out, x @ weight.T, rtol=2**-6, atol=2**-4)
    assert traffic.fewest_sectors > weight.numel() * weight.itemsize / 32
    assert traffic.sectors < 1.01 * traffic.fewest_sectors
    assert 0 < traffic.wavefronts == traffic.fewest_wavefronts

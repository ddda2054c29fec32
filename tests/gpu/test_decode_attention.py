"""The decode op on a GPU at real sizes: against float64, in CUDA graphs, bitwise repeatable, beyond 2**31 elements.

FASTATTN_TEST_DEVICE=cpu runs the checks of values through the CPU implementation, at small sizes, to check the tests.
"""

import dataclasses
import os

import pytest
import torch

from hf_fastattn import reference
from hf_fastattn.ops import NO_WINDOW, decode_attention, decode_schedule

DEVICE = os.environ.get("FASTATTN_TEST_DEVICE", "cuda")
DRY_RUN = DEVICE == "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

on_gpu_only = pytest.mark.skipif(DRY_RUN, reason="needs a CUDA device")

SCALE = 1 if not DRY_RUN else 16
"""Divides the lengths in a dry run."""


def paged(lens, *, kv_heads, dim, v_dim=None, block_size=64, dtype=torch.bfloat16, max_blocks=None):
    """Return k, v, block_table, seq_lens with NaN in every slot that no sequence owns."""
    v_dim = dim if v_dim is None else v_dim
    needed = [-(-seq_len // block_size) for seq_len in lens]
    order = torch.randperm(sum(needed) + 3).tolist()
    k = torch.full((len(order), block_size, kv_heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    v = torch.full((len(order), block_size, kv_heads, v_dim), float("nan"), dtype=dtype, device=DEVICE)
    table = torch.full((len(lens), max_blocks or max(max(needed), 1)), -1, dtype=torch.int32)
    for seq, (seq_len, count) in enumerate(zip(lens, needed, strict=True)):
        for i in range(count):
            block, filled = order.pop(), min(block_size, seq_len - i * block_size)
            table[seq, i] = block
            k[block, :filled] = torch.randn(filled, kv_heads, dim, device=DEVICE).to(dtype)
            v[block, :filled] = torch.randn(filled, kv_heads, v_dim, device=DEVICE).to(dtype)
    return k, v, table.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE)


def check(q, k, v, *, largest_logit=0.0, **options):
    """Compare with float64: at most twice the error of the formula in the call's dtype, plus rounding.

    largest_logit: where fp32 logits are so large that their own rounding decides, which differs with the order of sums.
    """
    tensors = {name: value for name, value in options.items() if name != "sinks"}
    sinks = options.get("sinks")

    def expected(dtype):
        cast = None if sinks is None else sinks.to(dtype)
        return reference.decode_attention(q.to(dtype), k.to(dtype), v.to(dtype), sinks=cast, **tensors)

    out, exact, plain = decode_attention(q, k, v, **options), expected(torch.float64), expected(q.dtype)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert not exact.isnan().any()
    logit_rounding = torch.finfo(torch.float32).eps * largest_logit * v.nan_to_num().abs().max().item()
    rounding = 4 * (torch.finfo(q.dtype).eps * exact.abs().max().item() + logit_rounding)
    error = (out.double() - exact).abs().max().item()
    assert error <= 2 * (plain.double() - exact).abs().max().item() + rounding  # false for NaN
    return out


def queries(num_seqs, heads, query_len, dim, dtype=torch.bfloat16):
    return torch.randn(num_seqs, query_len, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("query_len", [1, 4, 32])
def test_ragged_batch(dtype, dim, query_len):
    lens = [8000 // SCALE, 1, 0, 64, 65, 1023, 4096 // SCALE]
    k, v, table, seq_lens = paged(lens, kv_heads=2, dim=dim, dtype=dtype)
    q = queries(len(lens), 8, query_len, dim, dtype)
    check(q, k, v, softmax_scale=3.0 * dim**-0.5, block_table=table, seq_lens=seq_lens)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (32, 1), (6, 2), (16, 1)])
@pytest.mark.parametrize("query_len", [1, 2, 8])
def test_every_number_of_rows(heads, kv_heads, query_len):
    k, v, table, seq_lens = paged([700, 33], kv_heads=kv_heads, dim=128)
    q = queries(2, heads, query_len, 128)
    check(q, k, v, softmax_scale=128**-0.5, block_table=table, seq_lens=seq_lens)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (192, 128), (20, 36)])
def test_block_and_head_sizes(block_size, dim, v_dim):
    k, v, table, seq_lens = paged([1000, 17], kv_heads=2, dim=dim, v_dim=v_dim, block_size=block_size)
    q = queries(2, 8, 1, dim)
    check(q, k, v, softmax_scale=dim**-0.5, block_table=table, seq_lens=seq_lens)


@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.parametrize("window", [NO_WINDOW, 100])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_options(query_len, window, softcap, masked, with_sinks):
    lens = [2000 // SCALE, 90, 0, 3]
    k, v, table, seq_lens = paged(lens, kv_heads=2, dim=128, block_size=16)
    options = {"softmax_scale": 128**-0.5, "window": window, "softcap": softcap}
    if masked:
        options["key_mask"] = torch.rand(len(lens), max(lens), device=DEVICE) > 0.3
        options["key_mask"][1] = False
    if with_sinks:
        options["sinks"] = torch.randn(8, device=DEVICE)
    check(queries(len(lens), 8, query_len, 128), k, v, block_table=table, seq_lens=seq_lens, **options)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seq_len", [1, 500, 8192 // SCALE])
def test_dense(seq_len, transposed):
    shape = (2, seq_len, 8, 128) if transposed else (2, 8, seq_len, 128)
    k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    if transposed:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    mask = torch.ones(2, seq_len, device=DEVICE, dtype=torch.int8)
    mask[0, : seq_len // 2] = 0
    check(queries(2, 32, 1, 128), k, v, softmax_scale=128**-0.5, key_mask=mask)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_far_from_zero(offset):
    k, v, table, seq_lens = paged([900], kv_heads=1, dim=64, dtype=torch.float32)
    q = queries(1, 4, 1, 64, torch.float32)
    k[..., 0], q[..., 0] = offset, 1.0
    check(q, k, v, softmax_scale=1.0, block_table=table, seq_lens=seq_lens, largest_logit=1e4)


@pytest.mark.filterwarnings("ignore:.*softmax_scale must be positive:RuntimeWarning")
@pytest.mark.parametrize("scale", [0.0, -0.125])
def test_a_scale_that_is_not_positive_goes_to_pytorch(scale):
    k, v, table, seq_lens = paged([300, 17], kv_heads=2, dim=64, dtype=torch.float32)
    q = queries(2, 8, 1, 64, torch.float32)
    check(q, k, v, softmax_scale=scale, block_table=table, seq_lens=seq_lens)


def sharing(lens, entries, query_len=1):
    """Return a call whose sequences share blocks as the entries say."""
    k, v, table, seq_lens = paged(lens, kv_heads=8, dim=128)
    for first, count, begin, end in entries:
        table[first : first + count, begin:end] = table[first : first + 1, begin:end].clone()
    entries = torch.tensor(entries, dtype=torch.int32, device=DEVICE)
    options = {"softmax_scale": 128**-0.5, "block_table": table, "seq_lens": seq_lens, "shared_prefixes": entries}
    return queries(len(lens), 32, query_len, 128), k, v, options


def shared_tree(query_len=1):
    """Return a call whose six sequences share two thirds of their blocks, and the first four of them all but one."""
    blocks = 6 if DRY_RUN else 30
    shared = blocks * 2 // 3
    entries = [[0, 6, 0, shared], [0, 0, 0, 0], [0, 4, shared, blocks - 1]]
    return sharing([64 * blocks + 5 * i for i in range(6)], entries, query_len)


@pytest.mark.parametrize("query_len", [1, 4, 16])
@pytest.mark.parametrize("window", [NO_WINDOW, 140 if DRY_RUN else 700])
def test_shared_prefixes(query_len, window):
    q, k, v, options = shared_tree(query_len)
    check(q, k, v, window=window, **options)


def test_many_prompts_of_eight_samples():
    prompts = 4 if DRY_RUN else 32
    entries = [[8 * i, 8, 0, 1 + i % 4] for i in range(prompts)]
    q, k, v, options = sharing([64 * 4 + 3 * i for i in range(8 * prompts)], entries)
    check(q, k, v, **options)


@pytest.mark.parametrize("scale", [500.0, 1e4])
@pytest.mark.parametrize("softmax", ["lazy", "fixed", "online"])
@on_gpu_only
def test_every_softmax_takes_any_logits(softmax, scale):
    from hf_fastattn.kernels import _decode_plan
    from hf_fastattn.kernels import decode_attention as kernel

    k, v, table, seq_lens = paged([3000, 17, 0], kv_heads=2, dim=64, dtype=torch.float32)
    q = torch.zeros(3, 8, 2, 64, device=DEVICE)
    q[..., 0] = 1.0
    k[..., 0] = torch.linspace(-1, 1, k[..., 0].numel(), device=DEVICE).view(k[..., 0].shape)
    config, _ = _decode_plan.make_plan(q, k, v, table, None, False)
    config = dataclasses.replace(config, softmax=softmax)
    out = kernel.launch(q, k, v, table, seq_lens, None, None, scale, NO_WINDOW, 0.0, config=config)
    options = {"softmax_scale": scale, "block_table": table, "seq_lens": seq_lens}
    exact = reference.decode_attention(q.double(), k.double(), v.double(), **options)
    plain = reference.decode_attention(q, k, v, **options)
    rounding = 4 * torch.finfo(torch.float32).eps * (scale + 1.0) * v.nan_to_num().abs().max().item()
    assert (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + rounding


@on_gpu_only
def test_one_schedule_serves_many_layers_and_replays():
    """A graph of a schedule and three layers, 1000 times: bitwise the same, whoever arrives last."""
    q, k, v, options = shared_tree(2)
    lengths = {name: value for name, value in options.items() if name != "softmax_scale"}

    def step():
        schedule = decode_schedule(q, k, v, **lengths)
        return [decode_attention(q * (i + 1), k, v, schedule=schedule, **options) for i in range(3)]

    first = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for _ in range(1000):
        graph.replay()
        assert all(torch.equal(out, wanted) for out, wanted in zip(outs, first, strict=True))


@on_gpu_only
def test_counters_of_an_aborted_step_are_healed():
    q, k, v, options = shared_tree()
    lengths = {name: value for name, value in options.items() if name != "softmax_scale"}
    wanted = decode_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    schedule = decode_schedule(q, k, v, **lengths)
    with torch.cuda.graph(graph):
        schedule = decode_schedule(q, k, v, **lengths)
        out = decode_attention(q, k, v, schedule=schedule, **options)
    schedule.fill_(7)  # whatever was left in the graph's memory
    graph.replay()
    assert torch.equal(out, wanted)


def test_a_batch_invariant_result_is_the_same_in_any_batch():
    lens = [4000 // SCALE, 77, 0, 20000 // SCALE]
    k, v, table, seq_lens = paged(lens, kv_heads=2, dim=128)
    q = queries(len(lens), 8, 2, 128)
    options = {"softmax_scale": 128**-0.5, "batch_invariant": True}
    together = check(q, k, v, block_table=table, seq_lens=seq_lens, **options)
    for row in range(len(lens)):
        one = slice(row, row + 1)
        alone = decode_attention(q[one], k, v, block_table=table[one], seq_lens=seq_lens[one], **options)
        if not DRY_RUN:  # a CPU makes no such promise
            assert torch.equal(alone[0], together[row])


@on_gpu_only
def test_one_graph_serves_every_length():
    k, v, table, seq_lens = paged([4000, 300, 0, 64], kv_heads=8, dim=128)
    q = queries(4, 32, 1, 128)
    options = {"softmax_scale": 128**-0.5, "block_table": table, "seq_lens": seq_lens}
    decode_attention(q, k, v, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, **options)
    for lens in ([4000, 300, 0, 64], [1, 299, 0, 63], [64, 0, 0, 1], [3999, 150, 0, 2]):
        seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        q.copy_(torch.randn_like(q))
        graph.replay()
        eager = check(q, k, v, **options)
        assert torch.equal(out, eager)


@on_gpu_only
def test_replays_are_bitwise_equal():
    k, v, table, seq_lens = paged([5000, 1000, 77], kv_heads=8, dim=128)
    q = queries(3, 32, 4, 128)
    options = {"softmax_scale": 128**-0.5, "block_table": table, "seq_lens": seq_lens}
    first = decode_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, **options)
    for _ in range(100):
        graph.replay()
        assert torch.equal(out, first)


@on_gpu_only
def test_a_pool_beyond_two_to_the_31_elements():
    block_size, kv_heads, dim = 64, 8, 128
    num_blocks = 2**31 // (block_size * kv_heads * dim) + 8
    if torch.cuda.mem_get_info()[0] < 3 * num_blocks * block_size * kv_heads * dim * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    k = torch.zeros(num_blocks, block_size, kv_heads, dim, dtype=torch.bfloat16, device=DEVICE)
    v = torch.zeros_like(k)
    far = [num_blocks - 1, num_blocks - 3, num_blocks - 2]
    k[far], v[far] = torch.randn_like(k[far]), torch.randn_like(v[far])
    q = queries(1, 32, 1, dim)
    seq_lens = torch.tensor([150], dtype=torch.int32, device=DEVICE)
    options = {"softmax_scale": dim**-0.5, "seq_lens": seq_lens}
    out = decode_attention(q, k, v, block_table=torch.tensor([far], dtype=torch.int32, device=DEVICE), **options)
    near = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=DEVICE)
    assert torch.equal(out, decode_attention(q, k[far], v[far], block_table=near, **options))
    assert out.any()


@on_gpu_only
def test_a_dense_row_beyond_two_to_the_31_elements():
    seq_len, kv_heads, dim = 2**20 + 4096, 16, 128
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of free GPU memory")
    k = torch.zeros(1, seq_len, kv_heads, dim, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    v = torch.zeros_like(k)
    k[:, :, -64:], v[:, :, -64:] = torch.randn(2, 1, kv_heads, 64, dim, device=DEVICE).to(torch.bfloat16)
    q = queries(1, 16, 1, dim)
    window = {"softmax_scale": dim**-0.5, "window": 64}
    out = decode_attention(q, k, v, **window)
    torch.testing.assert_close(out, decode_attention(q, k[:, :, -64:], v[:, :, -64:], **window), rtol=2**-7, atol=2**-9)
    assert out.any()


@on_gpu_only
def test_capture_needs_no_synchronisation():
    k, v, table, seq_lens = paged([500, 20], kv_heads=2, dim=64)
    q = queries(2, 8, 1, 64)
    options = {"softmax_scale": 0.125, "block_table": table, "seq_lens": seq_lens}
    decode_attention(q, k, v, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(q, k, v, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""store_kv through the op on a GPU against the oracle: equal to the bit.

The same checks run through the op's PyTorch implementation on the CPU.
"""

import pytest
import torch

from hf_fastattn import ops, reference


def check(device, dtype, query_len, past, block_size, heads=8, head_dim=128, v_head_dim=128, positions=None):
    """K is (seq, token, head) in memory, V (seq, head, token); the caches' slots without a token keep their value."""
    torch.manual_seed(0)
    num_seqs, max_blocks = len(past), 2 + (max(past) + query_len) // block_size
    k = torch.randn(num_seqs, query_len, heads, head_dim, device=device).to(dtype).transpose(1, 2)
    v = torch.randn(num_seqs, heads, query_len, v_head_dim, device=device).to(dtype)
    num_blocks = num_seqs * max_blocks
    k_cache = torch.full((num_blocks, block_size, heads, head_dim), -7.0, device=device, dtype=dtype)
    v_cache = torch.full((num_blocks, block_size, heads, v_head_dim), -7.0, device=device, dtype=dtype)
    table = torch.randperm(num_blocks, dtype=torch.int32).view(num_seqs, max_blocks)
    past = torch.tensor(past, dtype=torch.int32)
    expected = k_cache.cpu(), v_cache.cpu()
    reference.store_kv(k.cpu(), v.cpu(), *expected, table, past, positions=positions)
    positions = None if positions is None else positions.to(device)
    ops.store_kv(k, v, k_cache, v_cache, table.to(device), past.to(device), positions=positions)
    assert torch.equal(k_cache.cpu(), expected[0])
    assert torch.equal(v_cache.cpu(), expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("query_len", [1, 100])
def test_store(device, dtype, block_size, query_len):
    check(device, dtype, query_len, [0, 37, 250, 63], block_size)


@pytest.mark.parametrize(("heads", "head_dim", "v_head_dim"), [(1, 80, 64), (32, 96, 96), (3, 256, 128), (2, 40, 20)])
def test_shapes(device, heads, head_dim, v_head_dim):
    check(device, torch.bfloat16, 9, [5, 60], 64, heads, head_dim, v_head_dim)


def test_positions(device):
    positions = torch.tensor([[-1, -1, 0, 1], [17, 3, -1, 30]], dtype=torch.int32)
    check(device, torch.bfloat16, 4, [40, 40], 16, positions=positions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_without_a_block_are_skipped():
    """Beyond the table or at -1 in it: nothing is written, and nothing outside the cache is touched."""
    memory = torch.full((6, 16, 2, 64), -7.0, device="cuda")
    table = torch.tensor([[0], [-1]], dtype=torch.int32, device="cuda")
    k = torch.ones(2, 2, 4, 64, device="cuda")
    past = torch.tensor([16 * 3, 2], dtype=torch.int32, device="cuda")
    ops.store_kv(k, k, memory[2:4], memory[4:5], table, past)
    assert (memory == -7.0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_follows_the_lengths():
    k = torch.randn(2, 2, 1, 64, device="cuda")
    k_cache, v_cache = (torch.zeros(4, 16, 2, 64, device="cuda") for _ in range(2))
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device="cuda")
    past = torch.zeros(2, dtype=torch.int32, device="cuda")
    ops.store_kv(k, k, k_cache, v_cache, table, past)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.store_kv(k, k, k_cache, v_cache, table, past)
    past.copy_(torch.tensor([5, 17], dtype=torch.int32))
    graph.replay()
    assert torch.equal(k_cache[0, 5], k[0, :, 0])
    assert torch.equal(v_cache[3, 1], k[1, :, 0])

"""The store kernel against the oracle, run by Triton's interpreter: bytes are copied, so results are equal to the bit.

TRITON_INTERPRET=1 python -m pytest tests/interpret/test_store_kv.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn import reference

pytest.importorskip("triton")

from hf_fastattn.kernels.store_kv import launch

from . import runs_kernels

pytestmark = runs_kernels
UNUSED = -77.0


def new_tokens(num_seqs, heads, query_len, head_dim, v_head_dim, dtype=torch.float32):
    """New keys (seq, head, token) and values (seq, token, head) in memory, each in a wider tensor of NaN."""
    k = torch.full((num_seqs, heads + 1, query_len + 1, head_dim), float("nan"), dtype=dtype)[:, :heads, :query_len]
    v = torch.full((num_seqs, query_len + 2, heads, v_head_dim), float("nan"), dtype=dtype)[:, :query_len]
    k.copy_(torch.randn(k.shape))
    v.copy_(torch.randn(v.shape))
    return k, v.transpose(1, 2)


def new_caches(num_blocks, block_size, heads, head_dim, v_head_dim, dtype=torch.float32):
    """Caches laid out (block, token, head) for K and (block, head, token) for V, with a guard block around each."""
    k_memory = torch.full((num_blocks + 2, block_size, heads, head_dim), UNUSED, dtype=dtype)
    v_memory = torch.full((num_blocks + 2, heads, block_size, v_head_dim), UNUSED, dtype=dtype)
    return k_memory, v_memory, k_memory[1:-1], v_memory[1:-1].transpose(1, 2)


def check(k, v, table, past_lens, block_size, positions=None, stored=None, num_blocks=8):
    """Compare launch with the oracle; stored (num_seqs, query_len) says which tokens the oracle is given."""
    table = torch.tensor(table, dtype=torch.int32)
    past_lens = torch.tensor(past_lens, dtype=torch.int32)
    shape = num_blocks, block_size, k.shape[1], k.shape[3], v.shape[3]
    k_memory, v_memory, k_cache, v_cache = new_caches(*shape, dtype=k.dtype)
    k_expected_memory, v_expected_memory, k_expected, v_expected = new_caches(*shape, dtype=k.dtype)
    launch(k, v, k_cache, v_cache, table, past_lens, positions)
    all_positions = past_lens[:, None] + torch.arange(k.shape[2], dtype=torch.int32) if positions is None else positions
    if stored is not None:
        all_positions = torch.where(stored, all_positions, -1)
    reference.store_kv(k, v, k_expected, v_expected, table, past_lens, positions=all_positions)
    assert torch.equal(k_memory, k_expected_memory)
    assert torch.equal(v_memory, v_expected_memory)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("query_len", [1, 5, 33])
@pytest.mark.parametrize(("heads", "head_dim", "v_head_dim"), [(2, 16, 16), (3, 24, 40), (1, 80, 16)])
def test_store(block_size, query_len, heads, head_dim, v_head_dim):
    k, v = new_tokens(2, heads, query_len, head_dim, v_head_dim)
    check(k, v, [[5, 2, 0, 7], [1, 6, 3, 4]], [0, 15], block_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype):
    k, v = new_tokens(2, 2, 3, 16, 16, dtype)
    check(k, v, [[5, 2], [1, 6]], [14, 0], 16)


def test_bfloat16_is_copied_bit_for_bit():
    k, v = new_tokens(2, 2, 3, 16, 16, torch.bfloat16)
    check(k, v, [[5, 2], [1, 6]], [14, 0], 16)


def test_block_size_need_not_be_a_power_of_two():
    k, v = new_tokens(1, 2, 50, 16, 16)
    check(k, v, [[5, 2, 0, 7]], [11], 24)


def test_positions():
    """Padding, jumps and a row of padding; past_lens is not looked at."""
    k, v = new_tokens(3, 2, 4, 16, 16)
    positions = torch.tensor([[-1, -1, 0, 1], [17, 3, -1, 30], [-1, -1, -1, -1]], dtype=torch.int32)
    check(k, v, [[5, 2], [1, 6], [3, 4]], [9, 9, 9], 16, positions=positions)
    wide = torch.full((3, 8), -5, dtype=torch.int32)
    wide[:, ::2] = positions
    check(k, v, [[5, 2], [1, 6], [3, 4]], [9, 9, 9], 16, positions=wide[:, ::2])


def test_tokens_without_a_block_are_skipped():
    """Beyond the table, at -1 in it, before the start: nothing is written anywhere."""
    k, v = new_tokens(3, 2, 20, 16, 16)
    token = torch.arange(20)
    stored = torch.stack([token < 32 - 20, token >= 18, token + 10 >= 16])
    check(k, v, [[5, 2], [3, 4], [-1, 6]], [20, -18, 10], 16, stored=stored)


def test_tables_and_lengths_of_other_strides():
    k, v = new_tokens(2, 2, 3, 16, 16)
    table = torch.full((2, 6), -1, dtype=torch.int32)
    table[:, ::3] = torch.tensor([[5, 2], [1, 6]])
    lens = torch.tensor([14, -100, 3, -100], dtype=torch.int32)
    _, _, k_cache, v_cache = new_caches(8, 16, 2, 16, 16)
    _, _, k_expected, v_expected = new_caches(8, 16, 2, 16, 16)
    launch(k, v, k_cache, v_cache, table[:, ::3], lens[::2], None)
    reference.store_kv(k, v, k_expected, v_expected, table[:, ::3], lens[::2])
    assert torch.equal(k_cache, k_expected)
    assert torch.equal(v_cache, v_expected)


@pytest.mark.parametrize(("num_seqs", "query_len", "max_blocks"), [(0, 1, 2), (2, 0, 2), (2, 1, 0)])
def test_empty(num_seqs, query_len, max_blocks):
    k, v = new_tokens(num_seqs, 2, query_len, 16, 16)
    k_memory, v_memory, k_cache, v_cache = new_caches(4, 16, 2, 16, 16)
    table = torch.zeros(num_seqs, max_blocks, dtype=torch.int32)
    launch(k, v, k_cache, v_cache, table, torch.zeros(num_seqs, dtype=torch.int32), None)
    assert (k_memory == UNUSED).all()
    assert (v_memory == UNUSED).all()


def test_a_cache_with_a_strided_head_dimension_is_refused():
    k, v = new_tokens(1, 2, 1, 16, 16)
    cache = torch.zeros(4, 16, 2, 32)[..., ::2]
    with pytest.raises(ValueError, match="contiguous head dimension"):
        launch(k, v, cache, cache, torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), None)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(past=st.lists(st.integers(0, 40), min_size=1, max_size=3), query_len=st.integers(1, 23))
def test_any_lengths(past, query_len):
    k, v = new_tokens(len(past), 2, query_len, 16, 16)
    table = torch.randperm(12).view(3, 4)[: len(past)].tolist()
    check(k, v, table, past, 16, num_blocks=12)

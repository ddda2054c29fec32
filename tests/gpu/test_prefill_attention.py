"""prefill_attention through the op on a GPU, real sizes, against the float64 oracle.

The same checks run through the op's PyTorch implementation on small shapes on the CPU, so that the tests themselves are
tested where there is no GPU.
"""

import pytest
import torch

from hf_fastattn import ops, reference

from . import COMPILED

SIZES = {"cuda": (517, 1500), "cpu": (150, 330) if COMPILED else (20, 40)}
"""query_len and seq_len of a test, by device."""


def random(device, *shape, dtype):
    return torch.randn(*shape, device=device).to(dtype)


def inputs(device, dtype, heads=(4, 2), head_dim=64, v_head_dim=None, num_seqs=2):
    torch.manual_seed(0)
    query_len, seq_len = SIZES[device]
    q = random(device, num_seqs, query_len, heads[0], head_dim, dtype=dtype).transpose(1, 2) * 2
    k = random(device, num_seqs, heads[1], seq_len, head_dim, dtype=dtype)
    v = random(device, num_seqs, seq_len, heads[1], v_head_dim or head_dim, dtype=dtype).transpose(1, 2)
    return q, k, v


def paged(k, v, seq_lens, block_size):
    """Dense rows as blocks in random order, the table -1 padded, every slot without a token NaN."""
    num_seqs, num_kv_heads, _, head_dim = k.shape
    needed = [-(-n // block_size) for n in seq_lens]
    order = (torch.randperm(sum(needed)) + 1).tolist()
    k_cache = k.new_full((sum(needed) + 1, block_size, num_kv_heads, head_dim), float("nan"))
    v_cache = v.new_full((sum(needed) + 1, num_kv_heads, block_size, v.shape[3]), float("nan")).transpose(1, 2)
    table = torch.full((num_seqs, max(needed) + 1), -1, dtype=torch.int32)
    for seq, n in enumerate(seq_lens):
        for i in range(needed[seq]):
            block = table[seq, i] = order.pop()
            part = slice(i * block_size, min(n, (i + 1) * block_size))
            k_cache[block, : part.stop - part.start] = k[seq, :, part].transpose(0, 1)
            v_cache[block, : part.stop - part.start] = v[seq, :, part].transpose(0, 1)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return k_cache, v_cache, {"block_table": table.to(k.device), "seq_lens": lens.to(k.device)}


def check(q, k, v, **options):
    """Error at most twice that of plain PyTorch in the same dtype, plus rounding; sequence by sequence."""
    options.setdefault("softmax_scale", q.shape[3] ** -0.5)
    out = ops.prefill_attention(q, k, v, **options)
    assert out.is_contiguous()
    assert torch.isfinite(out).all()
    per_seq = ("block_table", "seq_lens", "query_positions", "key_mask")
    for seq in range(q.shape[0]):
        one = slice(seq, seq + 1)
        own = {name: value[one] if name in per_seq else value for name, value in options.items()}
        kv = (k, v) if "block_table" in own else (k[one], v[one])
        plain = oracle(q[one], *kv, q.dtype, own)
        expected = oracle(q[one], *kv, torch.float64, own)
        rounding = 2 * torch.finfo(q.dtype).eps * expected.abs().max()
        assert (out[one].double() - expected).abs().max() <= 2 * (plain.double() - expected).abs().max() + rounding
        assert (out[one][expected == 0] == 0).all()
    return out


def oracle(q, k, v, dtype, options):
    sinks = options.get("sinks")
    options = options | {"sinks": None if sinks is None else sinks.to(dtype)}
    return reference.prefill_attention(q.to(dtype), k.to(dtype), v.to(dtype), **options)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_dense(device, dtype, head_dim, causal):
    check(*inputs(device, dtype, head_dim=head_dim), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_paged(device, dtype, block_size, head_dim):
    q, k, v = inputs(device, dtype, head_dim=head_dim)
    k_cache, v_cache, where = paged(k, v, [k.shape[2], k.shape[2] // 3], block_size)
    check(q, k_cache, v_cache, **where)


@pytest.mark.parametrize(("heads", "head_dim", "v_head_dim"), [((4, 4), 192, 128), ((8, 1), 64, 32), ((3, 1), 72, 72)])
def test_shapes(device, heads, head_dim, v_head_dim):
    check(*inputs(device, torch.bfloat16, heads, head_dim, v_head_dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 33, 128, 700])
def test_window(device, dtype, window):
    check(*inputs(device, dtype), window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_softcap_sinks_and_window(device, dtype, head_dim):
    q, k, v = inputs(device, dtype, head_dim=head_dim)
    sinks = torch.tensor([1.5, -2.0, 20.0, 0.0], device=device, dtype=dtype)
    check(q, k, v, softcap=20.0)
    check(q, k, v, sinks=sinks)
    check(q, k, v, sinks=sinks, softcap=50.0, window=100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_key_mask_hides_nan(device, dtype, causal, head_dim):
    q, k, v = inputs(device, dtype, head_dim=head_dim, num_seqs=3)
    seq_len = k.shape[2]
    mask = torch.ones(3, seq_len, dtype=torch.int8, device=device)
    mask[0, : seq_len // 2] = 0
    mask[1, 3:-3:3] = 0
    mask[2] = 0
    if device == "cuda":  # PyTorch's own attention multiplies hidden values by 0
        hidden = (mask[:, None, :, None] == 0).expand_as(k)
        k.masked_fill_(hidden, float("nan"))
        v.masked_fill_(hidden, float("nan"))
    out = check(q, k, v, key_mask=mask, causal=causal)
    assert (out[2] == 0).all()


def test_query_positions(device):
    """Left padding, jumps, and nothing but padding."""
    q, k, v = inputs(device, torch.bfloat16, num_seqs=3)
    query_len, seq_len = SIZES[device]
    k_cache, v_cache, where = paged(k, v, [seq_len, seq_len, 7], 64)
    positions = torch.full((3, query_len), -1, dtype=torch.int32)
    positions[0, 5:] = torch.arange(seq_len - query_len + 5, seq_len)
    positions[1] = torch.arange(0, 2 * query_len, 2)
    out = check(q, k_cache, v_cache, query_positions=positions.to(device), **where)
    assert (out[2] == 0).all()


def test_more_queries_than_keys(device):
    q, k, v = inputs(device, torch.bfloat16)
    out = check(q, k[:, :, :13], v[:, :, :13])
    assert (out[:, : q.shape[2] - 13] == 0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_logits(device, sign):
    q, k, v = inputs(device, torch.float32)
    q = torch.full_like(q, 50.0)
    k = sign * (k.abs() + 50.0 - k.abs().mean(-1, keepdim=True))
    check(q, k, v)


def test_chunks_of_a_prompt_are_the_prompt(device):
    _, seq_len = SIZES[device]
    q, k, v = inputs(device, torch.float32)
    q = random(device, 2, 4, seq_len, 64, dtype=torch.float32)
    whole = check(q, k, v)
    start = 0
    for stop in (seq_len // 3, seq_len // 2 + 1, seq_len):
        k_cache, v_cache, where = paged(k[:, :, :stop], v[:, :, :stop], [stop, stop], 64)
        out = check(q[:, :, start:stop], k_cache, v_cache, **where)
        torch.testing.assert_close(out, whole[:, start:stop], atol=1e-5, rtol=1e-5)
        start = stop


def test_offsets_beyond_32_bits(device):
    """A cache of more than 2**31 elements: the block of the one sequence is the last."""
    if device == "cpu":
        pytest.skip("allocates 8 GiB")
    q, k, v = inputs(device, torch.bfloat16, (2, 1), 128, num_seqs=1)
    k_small, v_small, where = paged(k, v, [k.shape[2]], 64)
    num_blocks = 2**31 // (64 * 128) + 64
    big = [torch.zeros(num_blocks, 64, 1, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    shift = num_blocks - k_small.shape[0]
    for large, small in zip(big, (k_small, v_small), strict=True):
        large[shift:] = small
    expected = ops.prefill_attention(q, k_small, v_small, softmax_scale=0.1, **where)
    where["block_table"] = torch.where(where["block_table"] < 0, -1, where["block_table"] + shift)
    out = ops.prefill_attention(q, *big, softmax_scale=0.1, **where)
    assert torch.equal(out, expected)


def test_two_runs_are_equal_to_the_bit(device):
    q, k, v = inputs(device, torch.bfloat16, head_dim=128)
    first = ops.prefill_attention(q, k, v, softmax_scale=0.1)
    assert torch.equal(first, ops.prefill_attention(q, k, v, softmax_scale=0.1))

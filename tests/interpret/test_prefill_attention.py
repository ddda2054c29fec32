"""The prefill kernel against the float64 oracle, run by Triton's interpreter on tiny tiles.

    TRITON_INTERPRET=1 python -m pytest tests/interpret/test_prefill_attention.py

Unused slots, keys past the end and hidden keys hold NaN; K and V have different strides.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastattn import reference
from hf_fastattn.ops import NO_WINDOW

pytest.importorskip("triton")

from hf_fastattn.kernels.prefill_attention import PrefillConfig, config, launch, supports

from . import runs_kernels

pytestmark = runs_kernels
TILES = PrefillConfig(16, 16, 4, 2)
WIDE = PrefillConfig(16, 32, 4, 2)
ONE_LOOP = PrefillConfig(16, 16, 4, 2, split=False)
NAN = float("nan")


def dense(
    query_len=40, seq_len=40, num_seqs=1, heads=(2, 1), head_dim=16, v_head_dim=None, dtype=torch.float32, sharpness=2.0
):
    """Random q, k, v with strides of their own, NaN in the rows that lie between them in memory."""
    generator = torch.Generator().manual_seed(query_len * 1000 + seq_len)
    num_heads, num_kv_heads = heads

    def rows(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q = rows(num_seqs, query_len, num_heads, head_dim).transpose(1, 2) * sharpness
    k = torch.full((num_seqs, num_kv_heads, seq_len + 3, head_dim), NAN, dtype=dtype)[:, :, :seq_len]
    v = torch.full((num_seqs, seq_len + 1, num_kv_heads + 1, v_head_dim or head_dim), NAN, dtype=dtype)
    v = v[:, :seq_len, :num_kv_heads].transpose(1, 2)
    k.copy_(rows(*k.shape))
    v.copy_(rows(*v.shape))
    return q, k, v


def paged(k, v, seq_lens, block_size):
    """Dense rows as blocks in random order, -1 padded; K is (block, token, head), V (block, head, token) in memory."""
    num_seqs, num_kv_heads, _, head_dim = k.shape
    needed = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(needed) + 2
    generator = torch.Generator().manual_seed(7)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()  # block 0 is nobody's, and NaN
    k_cache = torch.full((num_blocks, block_size, num_kv_heads, head_dim), NAN, dtype=k.dtype)
    v_cache = torch.full((num_blocks, num_kv_heads, block_size, v.shape[3]), NAN, dtype=v.dtype).transpose(1, 2)
    table = torch.full((num_seqs, max(needed) + 1), -1, dtype=torch.int32)
    for seq, n in enumerate(seq_lens):
        for i in range(needed[seq]):
            block = table[seq, i] = free.pop()
            part = slice(i * block_size, min(n, (i + 1) * block_size))
            k_cache[block, : part.stop - part.start] = k[seq, :, part].transpose(0, 1)
            v_cache[block, : part.stop - part.start] = v[seq, :, part].transpose(0, 1)
    return k_cache, v_cache, table, torch.tensor(seq_lens, dtype=torch.int32)


def check(q, k, v, *, tiles=TILES, **options):
    """Compare the kernel with the float64 oracle: error at most twice plain PyTorch's in this dtype, plus rounding."""
    options.setdefault("softmax_scale", q.shape[3] ** -0.5)

    def oracle(dtype):
        sinks = options.get("sinks")
        typed = options | {"sinks": None if sinks is None else sinks.to(dtype)}
        return reference.prefill_attention(q.to(dtype), k.to(dtype), v.to(dtype), **typed)

    expected = oracle(torch.float64)
    plain_error = (oracle(q.dtype).double() - expected).abs().max()
    out = launch(
        q,
        k,
        v,
        options.get("block_table"),
        options.get("seq_lens"),
        options.get("query_positions"),
        options.get("key_mask"),
        options.get("sinks"),
        options["softmax_scale"],
        options.get("causal", True),
        options.get("window", NO_WINDOW),
        options.get("softcap", 0.0),
        config=tiles,
    )
    assert out.shape == expected.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert torch.isfinite(out).all()
    assert (out[expected == 0] == 0).all()
    rounding = 2 * torch.finfo(q.dtype).eps * expected.abs().max()
    error = (out.double() - expected).abs().max()
    assert error <= 2 * plain_error + rounding
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_dense(dtype, causal, heads):
    check(*dense(40, 54, 2, heads, dtype=dtype), causal=causal)


@pytest.mark.parametrize("tiles", [WIDE, ONE_LOOP, PrefillConfig(32, 16, 4, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_other_tiles(tiles, causal):
    check(*dense(70, 75), causal=causal, tiles=tiles)


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(32, 32), (80, 80), (32, 16), (24, 40)])
def test_head_sizes(head_dim, v_head_dim):
    check(*dense(20, 24, head_dim=head_dim, v_head_dim=v_head_dim))


@pytest.mark.parametrize("query_len", [1, 16, 17])
@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 32, 33])
def test_tile_boundaries(query_len, seq_len):
    """Query_len > seq_len included: queries before the first key give 0."""
    q, k, v = dense(query_len, seq_len)
    out = check(q, k, v)
    assert (out[:, : max(0, query_len - seq_len)] == 0).all()
    check(q, k, v, causal=False)


@pytest.mark.parametrize("window", [1, 5, 15, 16, 17, 35, 40])
@pytest.mark.parametrize("tiles", [TILES, ONE_LOOP])
def test_window(window, tiles):
    check(*dense(40, 60), window=window, tiles=tiles)


def test_window_is_ignored_when_not_causal():
    check(*dense(20, 20), window=3, causal=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(dtype, softcap):
    check(*dense(24, 40, dtype=dtype, sharpness=6.0), softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinks(dtype):
    sinks = torch.tensor([1.5, -2.0, 30.0, float("-inf")], dtype=dtype)
    check(*dense(20, 18, heads=(4, 2), dtype=dtype), sinks=sinks)
    check(*dense(20, 18, heads=(4, 2), dtype=dtype), sinks=sinks.repeat_interleave(3)[::3])  # not contiguous


def masks(num_seqs, seq_len):
    mask = torch.ones(num_seqs, seq_len + 4, dtype=torch.int8)
    mask[0, :35] = 0  # left padding: two tiles and a part
    mask[1, 3:9] = 0
    mask[1, 20:21] = 0
    mask[2] = 0
    mask[3, 30:] = 0
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "with_sinks"), [(torch.int8, True), (torch.bool, False)])
def test_key_mask(causal, dtype, with_sinks):
    q, k, v = dense(20, 50, 4)
    mask = masks(4, 50)
    hidden = (mask[:, None, :50, None] == 0).expand_as(k)
    k.masked_fill_(hidden, NAN)
    v.masked_fill_(hidden, NAN)
    sinks = torch.tensor([0.3, -1.0]) if with_sinks else None
    out = check(q, k, v, key_mask=mask.to(dtype), causal=causal, sinks=sinks)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("tiles", [TILES, WIDE, PrefillConfig(16, 128, 4, 2)])
def test_paged(block_size, tiles):
    seq_lens = [17, 1, 40, 64, 0]
    q, k, v = dense(20, 64, len(seq_lens))
    k_cache, v_cache, block_table, seq_lens = paged(k, v, seq_lens, block_size)
    check(q, k_cache, v_cache, block_table=block_table, seq_lens=seq_lens, tiles=tiles)


@pytest.mark.parametrize(("tiles", "causal"), [(TILES, True), (WIDE, False), (WIDE, True)])
def test_paged_everything(tiles, causal):
    """GQA, fp16, window, softcap, sinks, a mask and Dv != D together, not causal too."""
    q, k, v = dense(16, 50, 4, heads=(4, 2), head_dim=24, v_head_dim=16, dtype=torch.float16)
    k_cache, v_cache, block_table, seq_lens = paged(k, v, [50, 33, 16, 48], 16)
    options = {"block_table": block_table, "seq_lens": seq_lens, "key_mask": masks(4, 50), "softcap": 10.0}
    sinks = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float16)
    check(q, k_cache, v_cache, sinks=sinks, window=20, causal=causal, tiles=tiles, **options)


def test_blocks_freed_behind_the_window_are_not_read():
    q, k, v = dense(16, 80)
    k_cache, v_cache, block_table, seq_lens = paged(k, v, [80], 16)
    first_visible = 80 - 16 - 8 + 1
    freed = block_table[0, : first_visible // 16].long()
    k_cache[freed], v_cache[freed] = NAN, NAN
    block_table[0, : first_visible // 16] = -1
    check(q, k_cache, v_cache, block_table=block_table, seq_lens=seq_lens, window=8, tiles=PrefillConfig(16, 64, 4, 2))


@pytest.mark.parametrize("causal", [True, False])
def test_query_positions(causal):
    """Left padding, padding in the middle, a row of nothing but padding; positions that jump and end early."""
    q, k, v = dense(20, 50, 4)
    k_cache, v_cache, block_table, seq_lens = paged(k, v, [50, 50, 30, 50], 16)
    positions = torch.full((4, 20), -1, dtype=torch.int32)
    positions[0, 5:] = torch.arange(35, 50)
    positions[1] = torch.arange(0, 40, 2)
    positions[3, :4], positions[3, 10:] = torch.arange(4), torch.arange(10, 20)
    options = {"block_table": block_table, "seq_lens": seq_lens, "query_positions": positions, "causal": causal}
    out = check(q, k_cache, v_cache, **options)
    assert (out[positions < 0] == 0).all()
    check(q, k_cache, v_cache, window=7, **options)


def test_chunks_of_a_prompt_are_the_prompt():
    q, k, v = dense(50, 50)
    whole = check(q, k, v)
    for start, stop in ((0, 18), (18, 40), (40, 50)):
        k_cache, v_cache, block_table, seq_lens = paged(k[:, :, :stop], v[:, :, :stop], [stop], 16)
        out = check(q[:, :, start:stop], k_cache, v_cache, block_table=block_table, seq_lens=seq_lens, tiles=WIDE)
        torch.testing.assert_close(out, whole[:, start:stop])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_logits(sign):
    """Logits near 1e4 of either sign: no overflow, no 0/0."""
    q, k, v = dense(20, 40)
    q = torch.ones_like(q) * 50.0
    k.abs_().add_(50.0 - k.mean(-1, keepdim=True)).mul_(sign)
    assert (q[:, :1] @ k.transpose(2, 3) / 4).abs().min() > 5e3
    check(q, k, v)


def test_strides_of_q_and_expanded_rows():
    q, k, v = dense(18, 20, 3, heads=(2, 2))
    check(q.transpose(2, 3).contiguous().transpose(2, 3), k, v)
    check(q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1))
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, :5] = False
    check(q, k, v, key_mask=mask.expand(3, 20))


@pytest.mark.parametrize(("num_seqs", "query_len", "seq_len"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(num_seqs, query_len, seq_len):
    q, k, v = dense(query_len, seq_len, num_seqs)
    check(q, k, v, sinks=torch.zeros(2)) if num_seqs and query_len else None
    out = launch(q, k, v, None, None, None, None, None, 1.0, True, NO_WINDOW, 0.0)
    assert out.shape == (num_seqs, query_len, 2, 16)
    assert (out == 0).all()


def test_no_blocks():
    q, k, v = dense(4, 16, 2)
    k_cache, v_cache, _, _ = paged(k, v, [16, 16], 16)
    table, lens = torch.empty(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    out = launch(q, k_cache, v_cache, table, lens, None, None, None, 1.0, True, NO_WINDOW, 0.0)
    assert (out == 0).all()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    query_len=st.integers(1, 24),
    seq_lens=st.lists(st.integers(0, 40), min_size=1, max_size=2),
    window=st.sampled_from([1, 9, 16, NO_WINDOW]),
    tiles=st.sampled_from([TILES, WIDE, ONE_LOOP]),
)
def test_any_lengths(query_len, seq_lens, window, tiles):
    q, k, v = dense(query_len, max(seq_lens), len(seq_lens), heads=(1, 1))
    k_cache, v_cache, block_table, lens = paged(k, v, seq_lens, 16)
    check(q, k_cache, v_cache, block_table=block_table, seq_lens=lens, window=window, tiles=tiles)


def test_supports_names_the_reason():
    q, k, v = dense(4, 16)
    table = torch.zeros(1, 1, dtype=torch.int32)
    assert supports(q, k, v) is None
    assert "head sizes up to 256" in supports(*dense(4, 4, head_dim=320))
    assert "one dtype" in supports(q, k.half(), v)
    assert "positive softmax_scale" in supports(q, k, v, softmax_scale=0.0)
    assert "elements apart" in supports(torch.empty_strided((1, 2, 4, 16), (1, 1, 2**24, 1), device="meta"), k, v)
    assert "powers of two from 16, got 48" in supports(q, *(torch.zeros(2, 48, 1, 16),) * 2, table)
    with pytest.raises(ValueError, match="powers of two"):
        launch(q, *(torch.zeros(2, 48, 1, 16),) * 2, table, table[:, 0], None, None, None, 1.0, True, NO_WINDOW, 0.0)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_config_covers_every_head_size(arch, dtype):
    for head_dim in (8, 16, 64, 80, 128, 192, 256):
        assert config(arch, head_dim, 64, dtype).BLOCK_M >= 16
        assert config(arch, 64, head_dim, dtype, plain=False).BLOCK_N >= 16

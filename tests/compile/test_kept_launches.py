"""Launches that are kept give a kernel what Triton's own launch would give it, whatever changes between two calls.

Nothing is compiled or launched: see conftest.py.
"""

import os
import types

import pytest
import torch

pytest.importorskip("triton")


from hf_fastattn.kernels import (
    decode_attention,
    decode_linear,
    decode_schedule,
    packed_attention,
    prefill_attention,
    store_kv,
)
from hf_fastattn.kernels._launch import MOST_KEPT, Launch, keep
from hf_fastattn.kernels.decode_linear_plan import Plan
from hf_fastattn.ops import NO_WINDOW

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

pytestmark = pytest.mark.compile


def decode(*, num_seqs=2, heads=4, query_len=1, dim=32, block_size=64, blocks=4, dtype=torch.float16, **changes):
    """Arguments of decode_attention's launch, with one thing changed."""
    kv_heads = changes.get("kv_heads", 2)
    q = torch.zeros(num_seqs, query_len, heads, dim, dtype=dtype).transpose(1, 2)
    if changes.get("q_contiguous"):
        q = q.contiguous()
    if block_size is None:
        k = torch.zeros(num_seqs, kv_heads, changes.get("seq_len", 100), dim, dtype=dtype)
        table, lens = None, None
    else:
        k = torch.zeros(8, block_size, kv_heads, dim, dtype=dtype)
        if changes.get("heads_first"):
            k = torch.zeros(8, kv_heads, block_size, dim, dtype=dtype).transpose(1, 2)
        table = torch.zeros(num_seqs, blocks + changes.get("wider", 0), dtype=torch.int32)[:, :blocks]
        lens = torch.ones(num_seqs, dtype=torch.int32)
    v = torch.zeros(*k.shape[:3], changes.get("v_dim", dim), dtype=dtype)
    if changes.get("unaligned"):
        q = torch.zeros(q.numel() + 1, dtype=dtype)[1:].view(num_seqs, query_len, heads, dim).transpose(1, 2)
    mask = sinks = shared = None
    if "mask" in changes:
        mask = torch.ones(num_seqs, blocks * 64 + changes.get("mask_wider", 0), dtype=changes["mask"])
    if "sinks" in changes:
        sinks = torch.zeros(heads, dtype=changes["sinks"])
    if "shared" in changes:
        shared = torch.zeros(changes["shared"], 4, dtype=torch.int32)
    scale, window = changes.get("scale", 0.1), changes.get("window", NO_WINDOW)
    invariant = changes.get("invariant", False)
    return (q, k, v, table, lens, mask, sinks, scale, window, changes.get("softcap", 0.0), shared, None, invariant)


CHANGES = [
    {},
    {"num_seqs": 3},
    {"heads": 8},
    {"kv_heads": 1},
    {"dim": 64},
    {"v_dim": 48},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float32},
    {"block_size": 32},
    {"block_size": None},
    {"blocks": 5},
    {"wider": 1},
    {"heads_first": True},
    {"unaligned": True},
    {"mask": torch.int8},
    {"mask": torch.bool},
    {"mask": torch.int8, "mask_wider": 1},
    {"sinks": torch.float16},
    {"sinks": torch.float32},
    {"scale": 0.2},
    {"window": 16},
    {"softcap": 30.0},
]
"""Of both kinds of attention."""

DECODE_CHANGES = [
    *CHANGES,
    {"query_len": 2},
    {"block_size": None, "seq_len": 101},
    {"q_contiguous": True, "query_len": 2},
    {"shared": 1},
    {"shared": 2},
    {"invariant": True},
]


def prefill(*, query_len=130, blocks=4, **changes):
    """Arguments of prefill_attention's launch, with one thing changed."""
    changes.setdefault("seq_len", query_len)
    q, k, v, table, lens, mask, sinks, scale, window, softcap, *_ = decode(
        query_len=query_len, blocks=blocks, **changes
    )
    if changes.get("dim_strided"):
        q = torch.zeros(*q.shape, 2, dtype=q.dtype)[..., 0]
    positions = torch.zeros(q.shape[0], query_len, dtype=torch.int32) if changes.get("positions") else None
    if lens is not None:
        lens = lens.repeat_interleave(2)[:: changes.get("lens_stride", 1)][: len(lens)]
    return q, k, v, table, lens, positions, mask, sinks, scale, changes.get("causal", True), window, softcap


PREFILL_CHANGES = [
    *CHANGES,
    {"query_len": 300},
    {"block_size": None, "seq_len": 140},
    {"q_contiguous": True},
    {"dim_strided": True, "num_seqs": 4},
    {"lens_stride": 2},
    {"positions": True},
    {"causal": False},
]


def packed(*, num_seqs=3, heads=4, dim=32, dtype=torch.float16, **changes):
    """Arguments of packed_attention's launch, with one thing changed."""
    kv_heads, rows = changes.get("kv_heads", 2), changes.get("rows", 300)
    q = torch.zeros(rows, heads * changes.get("spread", 1), dim, dtype=dtype)[:, :: changes.get("spread", 1)]
    k, v = (torch.zeros(rows, kv_heads, size, dtype=dtype) for size in (dim, changes.get("v_dim", dim)))
    if changes.get("unaligned"):
        q = torch.zeros(q.numel() + 1, dtype=dtype)[1:].view(q.shape)
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32)
    sinks = torch.zeros(heads, dtype=changes["sinks"]) if "sinks" in changes else None
    scale, window, softcap = changes.get("scale", 0.1), changes.get("window", NO_WINDOW), changes.get("softcap", 0.0)
    longest = changes.get("longest", 200)
    return q, k, v, starts, starts.clone(), sinks, longest, scale, changes.get("causal", True), window, softcap


PACKED_CHANGES = [
    {},
    {"num_seqs": 4},
    {"heads": 8},
    {"kv_heads": 1},
    {"dim": 64},
    {"v_dim": 48},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float32},
    {"spread": 2},
    {"unaligned": True},
    {"sinks": torch.float16},
    {"sinks": torch.float32},
    {"rows": 600},
    {"longest": 16},
    {"scale": 0.2},
    {"causal": False},
    {"window": 16},
    {"softcap": 30.0},
]


def store(*, num_seqs=2, heads=2, query_len=1, dim=32, dtype=torch.float16, cache_dtype=torch.float16, **changes):
    """Arguments of store_kv's launch, with one thing changed."""
    k = torch.zeros(num_seqs, query_len, heads, dim, dtype=dtype).transpose(1, 2)
    v = torch.zeros(num_seqs, query_len, heads, changes.get("v_dim", dim), dtype=dtype).transpose(1, 2)
    if changes.get("contiguous"):
        k = k.contiguous()
    if changes.get("unaligned"):
        v = torch.zeros(v.numel() + 1, dtype=dtype)[1:].view(v.transpose(1, 2).shape).transpose(1, 2)
    block_size = changes.get("block_size", 64)
    k_cache = torch.zeros(8, block_size, heads, dim, dtype=cache_dtype)
    v_cache = torch.zeros(8, block_size, heads, v.shape[3], dtype=cache_dtype)
    blocks = changes.get("blocks", 4)
    table = torch.zeros(num_seqs, blocks + changes.get("wider", 0), dtype=torch.int32)[:, :blocks]
    lens = torch.zeros(num_seqs * 2, dtype=torch.int32)[:: changes.get("lens_stride", 1)][:num_seqs]
    positions = torch.zeros(num_seqs, query_len, dtype=torch.int32) if changes.get("positions") else None
    return k, v, k_cache, v_cache, table, lens, positions


STORE_CHANGES = [
    {},
    {"num_seqs": 3},
    {"heads": 3},
    {"query_len": 5},
    {"dim": 64},
    {"v_dim": 16},
    {"dtype": torch.float32},
    {"cache_dtype": torch.float32},
    {"contiguous": True, "query_len": 5},
    {"unaligned": True},
    {"block_size": 32},
    {"blocks": 5},
    {"wider": 1},
    {"lens_stride": 2},
    {"positions": True},
]

GEMV = Plan("gemv", block_n=16, block_k=64, num_splits=1, num_warps=4, num_stages=2)
SPLIT = Plan("gemv", block_n=16, block_k=64, num_splits=2, num_warps=4, num_stages=2)
FLAT = Plan("flat", block_n=16, block_k=64, num_splits=1, num_warps=4, num_stages=2)


def linear(*, plan=GEMV, num_rows=1, sizes=(64,), size_k=128, dtype=torch.float16, **changes):
    """Arguments of decode_linear's run, with one thing changed."""
    x = torch.zeros(num_rows, size_k * 2, dtype=dtype)[:, :: changes.get("x_stride", 1)][:, :size_k]
    weights = [torch.zeros(n, size_k + changes.get("wider", 0), dtype=dtype)[:, :size_k] for n in sizes]
    if changes.get("unaligned"):
        weights[0] = torch.zeros(sizes[0] * size_k + 1, dtype=dtype)[1:].view(sizes[0], size_k)
    bias = changes.get("bias")
    return x, weights, [None if bias is None else torch.zeros(n, dtype=bias) for n in sizes], plan


LINEAR_CHANGES = [
    {},
    {"plan": SPLIT},
    {"plan": FLAT},
    {"num_rows": 2},
    {"sizes": (80,)},
    {"sizes": (64, 64)},
    {"sizes": (64, 32, 16)},
    {"plan": SPLIT, "sizes": (64, 32, 16), "bias": torch.float16},
    {"size_k": 136},
    {"dtype": torch.bfloat16},
    {"x_stride": 2},
    {"wider": 8},
    {"unaligned": True},
    {"bias": torch.float16},
    {"bias": torch.float32},
]

CALLS = [
    pytest.param(decode_attention, decode_attention.launch, decode, DECODE_CHANGES, id="decode_attention"),
    pytest.param(prefill_attention, prefill_attention.launch, prefill, PREFILL_CHANGES, id="prefill_attention"),
    pytest.param(packed_attention, packed_attention.launch, packed, PACKED_CHANGES, id="packed_attention"),
    pytest.param(store_kv, store_kv.launch, store, STORE_CHANGES, id="store_kv"),
    pytest.param(decode_linear, decode_linear.run, linear, LINEAR_CHANGES, id="decode_linear"),
]


@pytest.mark.parametrize(("module", "call", "arguments", "changes"), CALLS)
def test_a_kept_launch_is_what_triton_would_launch(launched, monkeypatch, module, call, arguments, changes):
    """One change at a time, after all others were kept: what a key left out would be taken from another call."""
    log, asked = launched
    modules = (module, decode_schedule)
    fresh = []
    for change in changes:
        for each in modules:
            monkeypatch.setattr(each, "_kept", {})
        log.clear()
        decode_attention._schedules.clear()
        call(*arguments(**change))
        fresh.append(list(log))
    assert len({str(launches) for launches in fresh}) >= len(changes) - 1  # the changes are changes: but for bool masks
    for each in modules:
        monkeypatch.setattr(each, "_kept", {})
    for again in range(2):
        for change, expected in zip(changes, fresh, strict=True):
            log.clear()
            asked.clear()
            decode_attention._schedules.clear()
            call(*arguments(**change))
            assert log == expected, change
            unaligned = change.get("unaligned", False)
            assert bool(asked) == (not again or unaligned), change  # the second time nobody asks what to compile


def test_other_numbers_of_packed_rows_find_the_launch_that_is_kept(launched):
    log, asked = launched
    for bounds in ((200, 129, 256), (16, 1, 9)):
        log.clear()
        asked.clear()
        for rows, longest in zip((300, 512, 260), bounds, strict=True):
            packed_attention.launch(*packed(rows=rows, longest=longest))
        assert len(asked) == 1
        assert len({str(grid) for _, grid, _ in log}) == 1


def test_the_grid_of_packed_rows_is_their_tiles_and_one_a_sequence(launched):
    """As CUDA graphs of continuous batching are padded: all queries might be those of one sequence, or of 1024."""
    log, _ = launched
    packed_attention.launch(*packed(num_seqs=1024, rows=8192, longest=8192, heads=32, dim=128))
    (_, grid, _) = log[0]
    assert grid[0] <= 32 * (8192 // 64 + 1024)


@pytest.mark.parametrize(
    ("call", "arguments"), [(p.values[1], p.values[2]) for p in CALLS[:2]] + [(store_kv.launch, store)]
)
def test_caches_of_more_blocks_find_the_launch_that_is_kept(launched, call, arguments):
    """Pools grow; in continuous batching every layer sees its blocks from another one on."""
    _, asked = launched
    given = list(arguments())
    call(*given)
    asked.clear()
    for i, tensor in enumerate(given):
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[0] == 8:
            given[i] = torch.zeros(13, *tensor.shape[1:], dtype=tensor.dtype)
    call(*given)
    assert not asked


def test_an_unaligned_tensor_leaves_what_is_kept_alone(launched):
    log, asked = launched
    for change, asks in (({}, 2), ({"unaligned": True}, 1), ({}, 0), ({"unaligned": True}, 1), ({}, 0)):
        asked.clear()
        decode_attention.launch(*decode(**change))
        assert len(asked) == asks, change  # the schedule's tensors are new ones: aligned
    keys = [key for key, _, _ in log if key.startswith("_decode")]
    assert keys[0] == keys[2] == keys[4] != keys[1] == keys[3]


def test_a_captured_graph_takes_no_schedule_that_is_kept(launched, monkeypatch):
    """It may be replayed when what was kept is gone; other streams have schedules of their own, too."""
    log, _ = launched
    dense = decode(block_size=None)
    tensor = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    stream_of = decode_attention._stream
    for capturing, stream, schedules in ((False, 7, 1), (True, None, 2), (False, 7, 0)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert stream_of(tensor) == stream
        monkeypatch.setattr(decode_attention, "_stream", lambda q: stream_of(tensor))
        log.clear()
        for _ in range(2):
            decode_attention.launch(*dense)
        assert sum(key.startswith("_schedule") for key, _, _ in log) == schedules
    log.clear()
    monkeypatch.setattr(decode_attention, "_stream", lambda q: 8)
    decode_attention.launch(*dense)
    assert sum(key.startswith("_schedule") for key, _, _ in log) == 1


def test_a_refused_call_is_refused_again(launched):
    from hf_fastattn.kernels._launch import Unsupported

    for _ in range(2):
        with pytest.raises(Unsupported, match="positive"):
            decode_attention.launch(*decode(scale=-1.0))
    assert launched[0] == []


def test_constants_have_to_be_the_kernels_last_parameters_in_order(launched):
    with pytest.raises(AssertionError):
        Launch(torch.device("cpu"), store_kv.store_kv_kernel, (1,), (), {"BLOCK_DV": 1, "BLOCK_D": 1}, {})


def test_what_is_kept_is_bounded():
    kept = {}
    for length in range(3 * MOST_KEPT):
        assert keep(kept, length, str(length)) == str(length)
        assert kept[length] == str(length)
        assert len(kept) <= MOST_KEPT

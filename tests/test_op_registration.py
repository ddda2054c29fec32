"""The ops as torch.library knows them: opcheck, fake tensors, one graph under torch.compile."""

import sys
from types import SimpleNamespace

import pytest
import torch

from hf_fastattn import ops
from hf_fastattn.ops import _library
from tests.op_calls import Call, Store


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("name", ["prefill_attention", "decode_attention"])
def test_attention_ops_are_well_registered(name, paged):
    call = Call((20, 20), block_size=16 if paged else None, query_len=2)
    call.hide_keys(0.2)
    tables = [call.block_table, call.seq_lens]
    tail = [call.options["softmax_scale"], 9, 2.0]
    args = [call.q, call.k.nan_to_num(), call.v.nan_to_num(), *tables]
    if name == "prefill_attention":
        args.append(None)
        tail.insert(1, True)
    torch.library.opcheck(getattr(torch.ops.hf_fastattn, name).default, (*args, call.key_mask, torch.zeros(4), *tail))


def test_decode_is_well_registered_with_all_its_arguments():
    call = Call((40, 37), query_len=2)
    call.block_table[1, :2] = call.block_table[0, :2]
    entries = torch.tensor([[0, 2, 0, 2]], dtype=torch.int32)
    args = [call.q, call.k.nan_to_num(), call.v.nan_to_num(), call.block_table, call.seq_lens, None, None, 0.3, 99, 0.0]
    schedule = torch.empty(0, 0, dtype=torch.int32)
    torch.library.opcheck(torch.ops.hf_fastattn.decode_attention.default, (*args, entries, schedule, True))


def test_store_is_well_registered():
    store = Store()
    caches = [cache.zero_() for cache in store.caches]
    args = (store.k, store.v, *caches, store.block_table, store.past_lens, None)
    torch.library.opcheck(torch.ops.hf_fastattn.store_kv.default, args)


def test_where_gradients_are_needed_pytorch_computes_them(monkeypatch):
    pytest.importorskip("triton")
    launched = []
    launcher = SimpleNamespace(launch=lambda *args: launched.append(args))
    monkeypatch.setitem(sys.modules, "hf_fastattn.kernels.prefill_attention", launcher)
    _library._warn_slow.cache_clear()
    on_cuda = _library._kernel_or("prefill_attention", _library.DIRECT["prefill_attention"]["cpu"])
    q, k = torch.randn(1, 4, 8, 32, requires_grad=True), torch.randn(1, 2, 8, 32)
    args = (q, k, k, None, None, None, None, None, 0.3, True, ops.NO_WINDOW, 0.0)
    with pytest.warns(RuntimeWarning, match="prefill_attention runs through PyTorch, slower: gradients are needed"):
        on_cuda(*args).sum().backward()
    want = torch.autograd.grad(ops.prefill_attention(q, k, k, softmax_scale=0.3).sum(), q)[0]
    assert torch.equal(q.grad, want)
    assert not launched
    with torch.no_grad():
        on_cuda(*args)
    on_cuda(q.detach(), *args[1:])
    assert len(launched) == 2


def test_kernels_are_not_launched_on_other_gpus(monkeypatch):
    """PyTorch calls AMD's "cuda" as well."""
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "hf_fastattn.kernels.prefill_attention", SimpleNamespace(launch=None))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    _library._warn_slow.cache_clear()
    on_cuda = _library._kernel_or("prefill_attention", _library.DIRECT["prefill_attention"]["cpu"])
    q, k = torch.randn(1, 4, 8, 32), torch.randn(1, 2, 8, 32)
    with pytest.warns(RuntimeWarning, match="prefill_attention runs through PyTorch, slower: its kernel is for NVIDIA"):
        out = on_cuda(q, k, k, None, None, None, None, None, 0.3, True, ops.NO_WINDOW, 0.0)
    assert torch.equal(out, ops.prefill_attention(q, k, k, softmax_scale=0.3))


def attention_step(q, k, v, k_cache, v_cache, block_table, past_lens):
    """A layer's work: store, then attend over the blocks; and once over the new states alone."""
    ops.store_kv(k, v, k_cache, v_cache, block_table, past_lens)
    paged = {"block_table": block_table, "seq_lens": past_lens + k.shape[2], "softmax_scale": 0.3}
    first = ops.decode_attention(q * 2, k_cache, v_cache, window=20, **paged)
    second = ops.prefill_attention(q, k_cache, v_cache, softcap=5.0, **paged)
    return first + second + ops.prefill_attention(q, k, v, softmax_scale=0.3)


def step_arguments(past_lens=(3, 17), query_len=2):
    call, store = Call(query_len=query_len), Store(past_lens, query_len, dim=32, v_dim=32)
    caches = [torch.randn(cache.shape, generator=call.random) for cache in store.caches]
    return [call.q, store.k, store.v, *caches, store.block_table, store.past_lens]


def test_a_function_of_all_ops_compiles_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(attention_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for query_len in (2, 2, 5):
            given, again = step_arguments(query_len=query_len), step_arguments(query_len=query_len)
            torch.testing.assert_close(compiled(*given), attention_step(*again))
            assert torch.equal(given[3], again[3])
            assert torch.equal(given[4], again[4])


def test_compiled_code_does_not_copy_the_caches():
    torch._dynamo.reset()
    given, again = step_arguments(), step_arguments()
    with torch.no_grad():
        compiled = torch.compile(attention_step, fullgraph=True)
        out, (code,) = torch._inductor.utils.run_and_get_code(compiled, *given)
        torch.testing.assert_close(out, attention_step(*again))
    assert torch.equal(given[3], again[3])
    shape = ", ".join(map(str, given[3].shape))
    assert "hf_fastattn.store_kv" in code
    assert [line for line in code.splitlines() if "empty_strided" in line and f"(({shape})" in line] == []

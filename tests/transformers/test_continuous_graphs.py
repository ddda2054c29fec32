"""Continuous batching as CUDA graphs, on a CPU: what is recorded once is replayed over other requests.

A recorded graph stands for CUDA's: it repeats the operations on the tensors that they had, whatever the host thinks of
them by then. Reading a value on the host is what a capture would not survive.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.continuous_batching import initialization, model_runner

from hf_fastattn import optimize_linears, paged
from hf_fastattn import packed as packed_rows
from tests.transformers.continuous_calls import check, prompts, run, sizes
from tests.transformers.models import build

pytestmark = pytest.mark.skipif(
    not hasattr(model_runner, "create_accelerator_graph"), reason="transformers 5.17 makes CUDA's own graphs only"
)

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class Recorded(TorchDispatchMode):
    """A graph: every operation between its begin and its end."""

    def __init__(self, replays):
        super().__init__()
        self.tape, self.replays = [], replays
        self.running = False  # an operation, which on a GPU would be a kernel

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device, which cannot be captured"
        self.running = True
        out = func(*args, **(kwargs or {}))
        self.running = False
        aliases = [result.alias_info for result in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):  # a view needs no repetition
            self.tape.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        names = Counter()
        for func, args, kwargs, out in self.tape:
            names[func.overloadpacket.__name__] += 1
            with torch.no_grad():
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)
        self.replays.append(names)

    def reset(self):
        self.tape.clear()


@pytest.fixture
def replays(monkeypatch):
    """Let transformers record and replay graphs; return the operations of every replay."""
    replays = []

    @contextmanager
    def capture(graph, **_):
        tolist = torch.Tensor.tolist

        def as_list(tensor):
            assert graph.running, "tolist waits for the device, which cannot be captured"
            return tolist(tensor)

        with pytest.MonkeyPatch.context() as patch, graph:
            patch.setattr(torch.Tensor, "tolist", as_list)
            yield

    monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "CUDAGraph")
    monkeypatch.setattr(model_runner, "create_accelerator_graph", lambda: Recorded(replays))
    monkeypatch.setattr(model_runner, "accelerator_graph_capture_context", capture)
    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
    monkeypatch.setattr(model_runner, "memory_pool_context", lambda pool: nullcontext())
    return replays


GRAPHS = {
    "use_cuda_graph": True,
    "use_async_batching": False,
    "q_padding_interval_size": 16,
    "kv_padding_interval_size": 64,
    "max_requests_per_batch": 4,
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt_oss"])
def test_graphs_are_right_for_whatever_requests_they_are_replayed(replays, family):
    model = paged(build(family, "fastattn"))
    requests = prompts((1, 5, 40, 17, 16, 3, 33, 30))
    results = run(model, requests, sizes(**GRAPHS))
    check(model, results, requests)
    layers = model.config.num_hidden_layers
    packed = [names for names in replays if names["packed_attention"]]
    tables = [names for names in replays if names["decode_attention"]]
    assert packed
    assert all(names["packed_attention"] == layers for names in packed)
    if family in ("llama", "qwen3"):
        assert len(tables) > 5
        wanted = {"decode_attention": layers, "store_kv": layers, "decode_schedule": 1}
        assert all({name: names[name] for name in wanted} == wanted for names in tables)


def test_graphs_with_linear_layers_of_ours(replays):
    model = paged(build("llama", "fastattn"))
    optimize_linears(model)
    requests = prompts((9, 20, 31))
    results = run(model, requests, sizes(**GRAPHS))
    assert replays
    check(model, results, requests)


@pytest.mark.parametrize("fault", ["lengths", lambda lens: lens.tolist(), lambda lens: bool(lens.max())])
def test_a_graph_that_bakes_lengths_in_or_waits_would_be_noticed(replays, monkeypatch, caplog, fault):
    model = paged(build("llama", "fastattn"))
    begin = packed_rows._Step.begin

    def spoiled(self, cumulative, num_seqs):
        begin(self, cumulative, num_seqs)
        if fault == "lengths":
            self.seq_lens = torch.from_numpy(self.seq_lens.numpy().copy())
        else:
            fault(self.seq_lens)

    monkeypatch.setattr(packed_rows._Step, "begin", spoiled)
    requests = prompts((9, 20, 31))
    with pytest.raises(AssertionError):
        check(model, run(model, requests, sizes(**GRAPHS)), requests)
    assert ("waits for the device" in caplog.text) == (fault != "lengths")

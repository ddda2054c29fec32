"""warmup asks for every kernel that generate() needs, and for nothing on a CPU."""

import importlib

import pytest
import torch

import hf_fastattn
from hf_fastattn import attention, cache, leases, ops
from hf_fastattn import compile_policy as policy
from tests.tiny import make_pair

module = importlib.import_module("hf_fastattn.warmup")


@pytest.fixture(scope="module")
def model():
    return hf_fastattn.paged(make_pair().fast)


@pytest.fixture
def launches(monkeypatch, by_table):
    """Take the CPU for a device with kernels; note the kinds of launches by op: (rows, queries, options)."""
    monkeypatch.setattr(module, "_compiles", lambda device: True)
    seen = {"prefill_attention": set(), "decode_attention": set(), "store_kv": set()}

    def spy(name, kind):
        op = getattr(ops, name)

        def call(first, *args, **kwargs):
            seen[name].add((first.shape[0], *kind(first.shape[2], kwargs)))
            return op(first, *args, **kwargs)

        return call

    masked = {
        "prefill_attention": lambda n, k: (
            "paged" if k.get("block_table") is not None else "fresh",
            "mask" if k.get("key_mask") is not None else "plain",
        ),
        "decode_attention": lambda n, k: (n,),
    }
    for name, kind in masked.items():
        monkeypatch.setattr(attention.ops, name, spy(name, kind))
    positions = spy("store_kv", lambda n, k: ("positions" if k.get("positions") is not None else "plain",))
    monkeypatch.setattr(cache.ops, "store_kv", positions)
    return seen


def test_every_way_through_the_ops_is_taken(model, launches, capsys):
    assert module.warmup(model, batch_sizes=(1, 4), max_length=256, candidates=5) == 4 + 4
    sizes = (1, 4)
    assert launches["prefill_attention"] == {
        *((rows, way, "plain") for rows in sizes for way in ("fresh", "paged")),
        (4, "fresh", "mask"),
    }
    assert launches["decode_attention"] == {(1, queries) for queries in range(1, 7)} | {(4, 1)}
    assert launches["store_kv"] == {(1, "plain"), (4, "plain"), (4, "positions")}
    assert "warmup: 100%" in capsys.readouterr().err


def test_the_pool_that_is_left_is_that_of_the_calls_to_come(model, launches):
    hf_fastattn.release()
    model.generate(torch.ones(4, 30, dtype=torch.long), max_length=512, eos_token_id=None, pad_token_id=0)
    wanted = leases.idle_bytes(model)
    hf_fastattn.release()
    assert module.warmup(model, batch_sizes=(2, 4), max_length=512, progress=False) == 8
    assert leases.idle_bytes(model) >= wanted > 0


def test_generation_config_and_random_state_are_left_alone(model, launches):
    before, state = model.generation_config.to_dict(), torch.get_rng_state()
    module.warmup(model, max_length=128, progress=False)
    assert model.generation_config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_compiling_is_not_left_for_later(model, launches, monkeypatch):
    """However few tokens warmup asks for: the second call of a size compiles."""
    at_once, native = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda *args, **kwargs: at_once.append(model in policy._at_once) or native(*args, **kwargs)
    )
    module.warmup(model, max_length=128, progress=False)
    assert at_once and all(at_once)
    assert model not in policy._at_once


def test_nothing_to_compile_on_a_cpu(model, capsys):
    assert hf_fastattn.warmup(model) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "warmup: nothing to compile on cpu, PyTorch's own kernels run there\n"


@pytest.mark.parametrize("sizes", [{"batch_sizes": (2, 0)}, {"batch_sizes": ()}, {"max_length": 40}])
def test_bad_sizes(model, sizes):
    with pytest.raises(ValueError, match="expected batch sizes of at least 1 and a max_length of at least 86, got"):
        hf_fastattn.warmup(model, **sizes)

"""The compiled decode step: one graph for a model, whatever the prompt, padding or cache; and it copies no pool."""

import math
import re

import pytest
import torch
from models import NEW_TOKENS, build, check_logits, generate, in_float64, left_padded, paged, prompt, under
from transformers import CompileConfig

from hf_fastattn import BlockPoolExhausted, PagedCache

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gpt_oss"]
MAX_LENGTH = 96


class Graphs:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _inputs):
        self.count += 1
        return graph

    def __deepcopy__(self, memo):
        return self  # generate() copies its compile_config


def _compiled(backend):
    """Return the arguments that make generate() compile its decode step on a CPU too."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


def _check(out, eager, exact):
    assert torch.equal(out.sequences, eager.sequences)
    check_logits(*(torch.stack(result.logits) for result in (out, eager, exact)))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_serves_every_prompt(family):
    """Prompts of other lengths and paddings, each over a new cache of the same shape."""
    model, graphs = build(family), Graphs()
    exact = in_float64(model)
    for i, (length, pads) in enumerate([(9, (0, 0)), (9, (4, 0)), (14, (0, 2)), (5, (0, 0)), (33, (7, 0))]):
        inputs = left_padded(prompt(2, length, seed=i), *pads)
        wanted, wide = generate(model, **inputs), generate(exact, **inputs)
        with under(model):
            out = generate(model, paged(model, max_length=MAX_LENGTH), **_compiled(graphs), **inputs)
        _check(out, wanted, wide)
        assert graphs.count == 1, f"prompt {i} brought graph {graphs.count}"


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_one_graph_serves_two_hundred_steps(family):
    """Long enough for many blocks; no Python counter may have been baked in."""
    model, graphs, inputs = build(family), Graphs(), left_padded(prompt(2, 9), 4, 0)
    steps = {"max_new_tokens": 200}
    wanted, wide = generate(model, **steps, **inputs), generate(in_float64(model), **steps, **inputs)
    with under(model):
        cache = paged(model, max_length=256)
        out = generate(model, cache, **steps, **_compiled(graphs), **inputs)
    _check(out, wanted, wide)
    assert graphs.count == 1
    assert cache.get_seq_length() == 208
    assert cache.state.tables.lens == [204, 208]


def test_a_pool_that_grows_keeps_what_compiled_steps_stored():
    """The host does not know of them yet when another cache on the pool has all tables written anew."""
    model, graphs = build("llama"), Graphs()
    inputs, cache = left_padded(prompt(2, 9), 3, 0), paged(model, max_length=MAX_LENGTH)
    wanted, wide = generate(model, **inputs), generate(in_float64(model), **inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW_TOKENS, dtype=torch.long)], 1)
    follow = {"input_ids": wanted.sequences, "attention_mask": mask, "max_new_tokens": 4}
    expected = generate(model, **follow), generate(in_float64(model), **follow)
    with under(model):
        out = generate(model, cache, **_compiled(graphs), **inputs)
        _check(out, wanted, wide)
        assert cache.state.behind
        blocks, columns = cache.state.pool.num_blocks, wanted.sequences.shape[1] - 1
        other = PagedCache(model.config, pool=cache.state.memory)
        with torch.no_grad():
            model(prompt(3, 200), past_key_values=other)
        assert cache.state.pool.num_blocks > blocks
        assert cache.get_seq_length() == columns
        _check(generate(model, cache, **follow, disable_compile=True), *expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_chat_goes_on_over_compiled_steps(family):
    """The host learns from the device what compiled steps stored, before a second turn and for the states it shows."""
    model, graphs = build(family), Graphs()
    exact, cache = in_float64(model), paged(model, max_length=MAX_LENGTH)
    inputs = left_padded(prompt(2, 9), 3, 0)
    for turn in range(3):
        wanted, wide = generate(model, **inputs), generate(exact, **inputs)
        with under(model):
            out = generate(model, cache, **_compiled(graphs), **inputs)
        _check(out, wanted, wide)
        columns = out.sequences.shape[1] - 1
        assert cache.get_seq_length() == columns
        assert cache.layers[0].keys.shape == (2, 2, columns, model.config.head_dim)
        said = torch.cat([out.sequences, prompt(2, 4, seed=turn)], 1)
        grown = said.shape[1] - inputs["attention_mask"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, grown, dtype=torch.long)], 1)
        inputs = {"input_ids": said, "attention_mask": mask}
    assert graphs.count == 1


def test_another_size_needs_no_new_graph_for_one_sequence():
    model, graphs = build("llama"), Graphs()
    for max_length, length in [(64, 9), (128, 14), (320, 70)]:
        inputs = left_padded(prompt(1, length), 0)
        with under(model):
            out = generate(model, paged(model, max_length=max_length), **_compiled(graphs), **inputs)
        assert torch.equal(out.sequences, generate(model, **inputs).sequences)
        assert graphs.count == 1, f"a cache of {max_length} tokens brought graph {graphs.count}"


def test_cache_that_is_reset_needs_no_new_graph():
    model, graphs = build("llama"), Graphs()
    exact, cache = in_float64(model), paged(model, max_length=MAX_LENGTH)
    for seed in range(3):
        inputs = left_padded(prompt(2, 9, seed=seed), 2, seed)
        wanted, wide = generate(model, **inputs), generate(exact, **inputs)
        with under(model):
            out = generate(model, cache, **_compiled(graphs), **inputs)
        _check(out, wanted, wide)
        cache.reset()
    assert graphs.count == 1


@pytest.mark.parametrize("sizes", [{}, {"num_blocks": 32}, {"num_blocks": 32, "max_length": MAX_LENGTH}])
def test_cache_that_allocates_as_it_goes_is_not_compiled(sizes):
    model, graphs, inputs = build("llama"), Graphs(), left_padded(prompt(2, 9), 4, 0)
    wanted, wide = generate(model, **inputs), generate(in_float64(model), **inputs)
    with under(model):
        out = generate(model, paged(model, **sizes), **_compiled(graphs), **inputs)
    _check(out, wanted, wide)
    assert graphs.count == 0


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("pads", [(0, 0), (4, 0)])
def test_outgrowing_max_length_raises(compiled, pads):
    """The row without padding is full after 32 tokens: 24 steps fit, the next must raise, not write elsewhere."""
    model, inputs = build("llama"), left_padded(prompt(2, 9), *pads)
    arguments = (_compiled(Graphs()) if compiled else {}) | inputs
    fits = {"max_new_tokens": 24}
    wanted, wide = generate(model, **fits, **inputs), generate(in_float64(model), **fits, **inputs)
    with under(model):
        _check(generate(model, paged(model, max_length=32), **fits, **arguments), wanted, wide)
        with pytest.raises(BlockPoolExhausted, match="max_length is 32"):
            generate(model, paged(model, max_length=32), max_new_tokens=25, **arguments)


def test_padding_counts_towards_columns_only():
    """Both rows are padded by 4: 32 tokens are 36 columns."""
    model, inputs = build("llama"), left_padded(prompt(2, 9), 4, 4)
    with under(model):
        out = generate(model, paged(model, max_length=32), max_new_tokens=28, **_compiled(Graphs()), **inputs)
        assert out.sequences.shape[1] == 37
        with pytest.raises(BlockPoolExhausted):
            generate(model, paged(model, max_length=32), max_new_tokens=29, **_compiled(Graphs()), **inputs)


def test_inductor_writes_pools_in_place():
    """Functionalisation could clone what is written to: a copy of the whole pool, every layer, every step."""
    from torch._inductor.utils import run_and_get_code

    model, inputs = build("llama", num_hidden_layers=2), left_padded(prompt(2, 9), 4, 0)
    wanted, wide = generate(model, **inputs), generate(in_float64(model), **inputs)
    with under(model):
        cache = paged(model, max_length=MAX_LENGTH)
        out, sources = run_and_get_code(generate, model, cache, **_compiled("inductor"), **inputs)
    _check(out, wanted, wide)
    assert len(sources) == 1
    [source] = sources
    num_blocks, *rest = cache.layers[0].k_cache.shape
    pool = rf"\((?:s\d+|{num_blocks}), {', '.join(map(str, rest))}\)"  # the graph serves any number of blocks
    assert "torch.ops.hf_fastattn.store_kv" not in source  # written by generated kernels
    assert re.search(rf"assert_size_stride.*{pool}", source)  # the pools are inputs by this shape
    for line in source.splitlines():
        if re.search(rf"{pool}|\b{cache.layers[0].k_cache.numel()}L?\b", line):
            assert not re.search(r"empty|clone|copy|as_strided_scatter", line), line
    made = [found.split(",") for found in re.findall(r"\bempty_strided\w*\(\(([^()]*)\)", source)]
    assert made
    for sizes in made:  # of no buffer is the size a symbol, as that of a pool is
        assert math.prod(int(size) for size in sizes if size.strip()) < cache.layers[0].k_cache.numel(), sizes

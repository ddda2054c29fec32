"""What one decode step launches: counted on the graph that generate() compiles, per layer and beside the layers.

Counts come as a slope: a model with more layers minus one with fewer. eval/notes/decode_step.md has the table.
"""

import re
from collections import Counter

import pytest
import torch
from models import build, generate, left_padded, paged, prompt, under
from test_compiled import MAX_LENGTH, _compiled
from torch._inductor.utils import run_and_get_code

FEW, MANY = 2, 4


class Record:
    """A compiler that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _inputs):
        self.graphs.append(graph)
        return graph

    def __deepcopy__(self, memo):
        return self  # generate() copies its compile_config


def _run(family, layers, backend):
    """Generate over a compiled decode step; return the codes that inductor wrote."""
    changes = {"num_hidden_layers": layers}
    if family in ("gemma2", "gpt_oss"):
        changes["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    model = build(family, **changes)
    with under(model):
        cache = paged(model, max_length=MAX_LENGTH)
        _, codes = run_and_get_code(generate, model, cache, **_compiled(backend), **left_padded(prompt(2, 9), 4, 0))
    return codes


def _ops(family, layers):
    """Count the nodes of the traced step by what they call."""
    record = Record()
    _run(family, layers, record)
    [graph] = record.graphs
    return Counter(str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method"))


def _kernels(family, layers):
    """Count the calls in inductor's code for the step: generated kernels, matrix products, our ops."""
    [code] = _run(family, layers, "inductor")
    body = code[code.index("def call(") :]
    return Counter(
        generated=len(re.findall(r"^ +cpp_fused\w*\(", body, re.MULTILINE)),
        products=len(re.findall(r"^ +extern_kernels\.\w*mm\w*\(", body, re.MULTILINE)),
        ours=len(re.findall(r"^ +(?:buf\d+ = )?torch\.ops\.hf_fastattn\.\w+", body, re.MULTILINE)),
    )


def _split(few, many, name):
    """Return the calls per layer and those beside the layers."""
    per_layer, rest = divmod(many[name] - few[name], MANY - FEW)
    assert rest == 0
    return per_layer, few[name] - FEW * per_layer


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gpt_oss"])
def test_ops_per_layer_and_step(family):
    few, many = _ops(family, FEW), _ops(family, MANY)
    calls = {name: _split(few, many, name) for name in many if name.startswith("hf_fastattn.")}
    stores = {name: _split(few, many, name) for name in many if name == "index_put_"}
    assert stores == {"index_put_": (2, 0)}  # keys and values, for the compiler to fuse
    kinds = 2 if family in ("gemma2", "gpt_oss") else 1
    per_layer, beside = calls.pop("hf_fastattn.decode_schedule.default", (0, 0))
    assert per_layer == 0
    assert beside <= kinds  # its lists are made once per kind of layer
    assert calls == {"hf_fastattn.decode_attention.default": (1, 0)}


def test_a_step_over_a_static_cache_makes_its_schedules_itself():
    """One that the launcher kept would be memory of the graph's own pool that nobody has seen."""
    record, model = Record(), build("llama")
    with under(model):
        generate(model, cache_implementation="static", **_compiled(record), **left_padded(prompt(2, 9), 4, 0))
    nodes = [node for graph in record.graphs for node in graph.graph.nodes if "decode_attention" in str(node.target)]
    assert nodes
    for node in nodes:
        made = [str(arg.target) for arg in node.args if isinstance(arg, torch.fx.Node)]
        assert "hf_fastattn.decode_schedule.default" in made


@pytest.mark.slow
def test_kernels_per_layer_and_step():
    """Llama: 7 products in a layer and lm_head's beside them; what is between them is 6 generated kernels on a CPU."""
    few, many = _kernels("llama", FEW), _kernels("llama", MANY)
    counts = {name: _split(few, many, name) for name in ("generated", "products", "ours")}
    assert counts["products"] == (7, 1)
    assert counts["ours"] == (1, 1)  # decode_attention; decode_schedule once
    per_layer, beside = counts["generated"]
    assert per_layer <= 6  # as many as when store_kv was a launch of its own: its writes are in the rotary kernel
    assert beside <= 3

"""generate() on a GPU: eager and compiled steps, CUDA graphs, beams, padding, offloading, linear layers, memory.

Tiny models with sharp attention; logits are held against eager attention's in the same dtype and in float64.
FASTATTN_TEST_DEVICE=cpu makes the same calls on a CPU, compiled ones too, to check the tests.
"""

import gc
import inspect
import os

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationMixin

import hf_fastattn
from hf_fastattn import compile_policy, fallback
from hf_fastattn.ops.decode_linear import kernel_takes
from tests.transformers.models import build, check_logits, generate, in_float64, left_padded, paged, prompt, under

DEVICE = os.environ.get("FASTATTN_TEST_DEVICE", "cuda")
DRY_RUN = DEVICE == "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error:.*runs through PyTorch, slower:RuntimeWarning"),
    pytest.mark.filterwarnings("error:.*could not be compiled:RuntimeWarning"),
]

on_gpu_only = pytest.mark.skipif(DRY_RUN, reason="needs a CUDA device")

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gpt_oss"]
HEADS = {"head_dim": 32, "hidden_size": 64}
MAX_LENGTH = 128
PLAIN, OURS = {}, {"custom_generate": hf_fastattn.generate}
EAGER = {"disable_compile": True}

STARTS_OVER = "past_length = 0" in inspect.getsource(GenerationMixin._prefill)
"""transformers 5.17 cuts all of the input into chunks, what the cache holds too: over ours that is an error."""


@pytest.fixture(autouse=True)
def fresh():
    """No graph and no given warning is left of another test; fp32 means fp32."""
    fallback._warn.cache_clear()
    torch._dynamo.reset()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch._dynamo.reset()
    gc.collect()


def make(family, dtype=torch.float32, **sizes):
    """Return a model on the device, under eager attention."""
    model = build(family, **(HEADS | sizes)).to(DEVICE, dtype).requires_grad_(False)
    if family == "gpt_oss":
        model.set_experts_implementation("batched_mm")  # what can be captured in every dtype
    return model


def pair(family, dtype=torch.float32, **sizes):
    """Return a model that is paged by default, and its twin under eager attention."""
    fast = make(family, dtype, **sizes)
    fast.set_attn_implementation("fastattn")
    return hf_fastattn.paged(fast), make(family, dtype, **sizes)


def inputs(rows=2, length=37, pads=(9, 0), seed=0):
    """Return ids and mask of prompts; the ones that are given are padded on the left."""
    return {name: x.to(DEVICE) for name, x in left_padded(prompt(rows, length, seed=seed), *pads).items()}


def compiling():
    """Return the arguments that make generate() compile: none on a GPU."""
    if not DRY_RUN:
        return {}
    config = CompileConfig(mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


class Expected:
    """What eager attention gives for a call in fp32, and in float64."""

    def __init__(self, model, **kwargs):
        self.eager = generate(model, **EAGER, **kwargs)
        self.exact = generate(in_float64(model), **EAGER, **kwargs)
        assert torch.equal(self.eager.sequences, self.exact.sequences), "tokens depend on rounding: take another seed"

    def check(self, out):
        assert torch.equal(out.sequences, self.eager.sequences)
        check_logits(*(torch.stack(result.logits) for result in (out, self.eager, self.exact)))


def check_forced(model, out, given):
    """Hold a call's logits against those of a model under eager attention over the same tokens, and float64's.

    The error may be twice eager's, plus four units in the last place, see check_logits: rounding decides tokens in 16
    bits, so that each step is judged by what it was given.
    """
    ids, length = out.sequences, given["input_ids"].shape[1]
    mask = torch.cat([given["attention_mask"], ids.new_ones(len(ids), ids.shape[1] - length)], 1)
    forced = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        eager, exact = (m(**forced, use_cache=False).logits[:, length - 1 : -1] for m in (model, in_float64(model)))
    got = torch.stack(out.logits, 1)
    assert torch.equal(got.argmax(-1), ids[:, length:])
    error, own = ((x.double() - exact).abs().max().item() for x in (got, eager))
    ulp = torch.finfo(model.dtype).eps * exact.abs().max().item()
    assert error <= 2 * own + 4 * ulp, f"error {error:.1e} against float64, eager's is {own:.1e}, one ulp is {ulp:.1e}"


class Graphs:
    """What dynamo made and inductor left out of CUDA graphs since the last look."""

    def __init__(self):
        self.seen = self._read()

    def _read(self):
        return counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]

    def new(self):
        """Return the number of graphs since the last look; none may have been left out of CUDA graphs."""
        before, self.seen = self.seen, self._read()
        assert self.seen[1] == before[1], "a graph was not captured: TORCH_LOGS=perf_hints says why"
        return self.seen[0] - before[0]


def assert_captured():
    """Assert that some compiled step was recorded as a CUDA graph."""
    if DRY_RUN:
        return
    from torch._inductor import cudagraph_trees

    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None
    assert any(manager.roots.values())


CACHES = {
    "sized": lambda model: paged(model, max_length=MAX_LENGTH),
    "growing": paged,
    "blocks of 64": lambda model: paged(model, block_size=64),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "offloaded": lambda model: paged(model, offload=True),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_steps(family, cache):
    model, given = make(family), inputs()
    expected = Expected(model, **given)
    with under(model):
        expected.check(generate(model, CACHES[cache](model), **EAGER, **given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])  # rounding chooses gpt_oss's experts
@pytest.mark.parametrize("how", [PLAIN, OURS], ids=["transformers", "ours"])
def test_eager_steps_in_16_bits(family, dtype, how):
    (model, eager), given = pair(family, dtype), inputs(4, pads=(9, 0, 3))
    check_forced(eager, generate(model, paged(model), **EAGER, **how, **given), given)


@pytest.mark.parametrize("how", [PLAIN, OURS], ids=["transformers", "ours"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps(family, how):
    """One graph, whatever the prompt and its padding and whichever cache of one size; CUDA graphs hold all of it."""
    (model, eager), graphs = pair(family), Graphs()
    for call, (length, pads) in enumerate([(37, (9, 0)), (37, (9, 0)), (14, (0, 3)), (70, (0, 0))]):
        given = inputs(length=length, pads=pads, seed=call)
        expected = Expected(eager, **given)
        out = generate(model, paged(model, max_length=MAX_LENGTH), **compiling(), **how, **given)
        expected.check(out)
        assert out.past_key_values.is_compileable
        assert graphs.new() == (call == 0), f"call {call}"
    assert_captured()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_steps_in_16_bits(dtype):
    (model, eager), given, graphs = pair("llama", dtype), inputs(4, pads=(9, 0, 3)), Graphs()
    for call in range(2):
        out = generate(model, paged(model, max_length=MAX_LENGTH), **compiling(), **given)
        check_forced(eager, out, given)
        assert graphs.new() == (call == 0)
    assert_captured()


def test_compiled_steps_over_a_static_cache():
    """transformers' own compiled cache: dense keys, whose schedules must not outlive a graph's warm-up."""
    (model, eager), graphs = pair("llama"), Graphs()
    for call in range(3):
        given = inputs(seed=call)
        expected = Expected(eager, **given)
        expected.check(generate(model, cache_implementation="static", **compiling(), **given))
        assert graphs.new() == (call == 0), f"call {call}"
    assert_captured()


def test_a_reset_cache_replays():
    """The second call over one cache replays what the first recorded."""
    (model, eager), graphs = pair("llama"), Graphs()
    cache = paged(model, max_length=MAX_LENGTH)
    for seed in range(3):
        given = inputs(seed=seed, pads=(seed, 0))
        expected = Expected(eager, **given)
        expected.check(generate(model, cache, **compiling(), **given))
        assert graphs.new() == (seed == 0)
        cache.reset()
    assert_captured()


@pytest.mark.parametrize("how", [PLAIN, OURS], ids=["transformers", "ours"])
def test_default_cache(monkeypatch, how):
    """A bucket's first call is eager, its second is compiled, the others replay."""
    monkeypatch.setattr(compile_policy, "BREAK_EVEN_STEPS", 0, raising=False)
    (model, eager), graphs = pair("llama"), Graphs()
    for call, (length, pads, new) in enumerate(
        [(37, (9, 0), 12), (37, (9, 0), 12), (80, (0, 20), 40), (14, (0, 0), 12)]
    ):
        given = inputs(length=length, pads=pads, seed=call) | {"max_new_tokens": new}
        expected = Expected(eager, **given)
        out = generate(model, **compiling(), **how, **given)
        expected.check(out)
        assert isinstance(out.past_key_values, hf_fastattn.PagedCache)
        assert out.past_key_values.is_compileable == (call > 0)
        assert graphs.new() == (call == 1), f"call {call}"
        del out
    assert_captured()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("cache", ["growing", "offloaded"])
def test_beams(family, cache):
    model, given = make(family), inputs()
    options = {"num_beams": 4, "num_return_sequences": 2}
    expected = Expected(model, **options, **given)
    with under(model):
        expected.check(generate(model, CACHES[cache](model), **options, **given))


def test_chunked_prefill_and_a_second_turn():
    (model, eager), given = pair("llama"), inputs(pads=(0, 0))
    cache = paged(model, max_length=MAX_LENGTH)
    for turn in range(2):
        expected = Expected(eager, **given)
        chunks = {} if turn and STARTS_OVER else {"prefill_chunk_size": 16}
        out = generate(model, cache, **chunks, **compiling(), **given)
        expected.check(out)
        ids = torch.cat([out.sequences, prompt(2, 5, seed=turn).to(DEVICE)], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rows", [2, 5])
def test_optimized_linears(rows, compiled):
    """Layers so large that the kernels take them: a GEMV for two rows, a flat GEMM for five."""
    sizes = {"hidden_size": 64} if DRY_RUN else {"hidden_size": 2048, "intermediate_size": 4096}
    models, given, graphs = pair("llama", torch.bfloat16, **sizes), inputs(rows, pads=(9,)), Graphs()
    for module in (module for each in models for module in each.modules() if isinstance(module, nn.Linear)):
        module.weight.mul_((64 / module.in_features) ** 0.5)  # attention as sharp as that of the other models
    model, eager = models
    hf_fastattn.optimize_linears(model)
    if not DRY_RUN and torch.cuda.get_device_capability() in ((8, 0), (9, 0), (10, 0)):
        assert kernel_takes(4096, 2048, torch.bfloat16, torch.device(DEVICE, torch.cuda.current_device()))
    for call in range(2):
        options = compiling() if compiled else EAGER
        out = generate(model, paged(model, max_length=MAX_LENGTH), **options, **given)
        check_forced(eager, out, given)
        assert graphs.new() == (compiled and call == 0)
    if compiled:
        assert_captured()


@on_gpu_only
@pytest.mark.parametrize("how", [PLAIN, OURS], ids=["transformers", "ours"])
@pytest.mark.parametrize("kind", ["default", "eager", "beams", "own cache", "offloaded"])
def test_memory_does_not_grow(monkeypatch, kind, how):
    monkeypatch.setattr(compile_policy, "BREAK_EVEN_STEPS", 0, raising=False)
    model, _ = pair("llama")
    options = {"default": {}, "beams": {"num_beams": 4}}.get(kind, EAGER)
    used = []
    for call in range(8):
        cache = {"own cache": CACHES["sized"], "offloaded": CACHES["offloaded"]}.get(kind, lambda model: None)(model)
        generate(model, cache, **options, **how, **inputs(pads=(call, 0), seed=call))
        del cache
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert max(used[3:]) <= used[2] + 2**16, used  # compiled and recorded by then

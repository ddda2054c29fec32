"""optimize_linears on transformers models: the same tokens and logits, files and adapters, and back."""

import contextlib
import copy
import warnings

import pytest
import torch
from models import FAMILIES, NEW_TOKENS, build, generate, left_padded, paged, prompt, shared, under
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache

from hf_fastattn import linear, ops
from hf_fastattn.linear import DecodeLinear, optimize_linears, restore_linears

LEADERS, FOLLOWERS = (".q_proj", ".gate_proj"), (".k_proj", ".v_proj", ".up_proj")
OLD_NAME = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # peft 0.21 asks for it


@contextlib.contextmanager
def optimized(model):
    """Optimise a model without a warning, and give it back."""
    classes = {name: type(module) for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize_linears(model)
    try:
        yield model
    finally:
        restore_linears(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def assert_same(out, wanted):
    assert torch.equal(out.sequences, wanted.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(wanted.logits))


@pytest.fixture
def gpu_path(monkeypatch):
    """Take the path of GPU tensors through the ops' CPU implementation, which is F.linear: equal to the bit."""
    monkeypatch.setattr(linear, "_on_gpu", lambda x: True)
    monkeypatch.setattr(linear, "kernel_takes", lambda n, k, dtype, device: True)


@pytest.fixture
def launches(gpu_path, monkeypatch):
    """Record the shapes (rows, numbers of weights) of the ops' calls."""
    calls = []
    for name in ("decode_linear", "decode_linear_group"):
        monkeypatch.setattr(ops, name, _recorded(getattr(ops, name), calls))
    return calls


def _recorded(function, calls):
    def called(x, weights, biases):
        calls.append((x.numel() // x.shape[-1], len(weights) if isinstance(weights, list) else 1))
        return function(x, weights, biases)

    return called


@pytest.mark.parametrize("implementation", ["eager", "fastattn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_on_a_cpu_are_the_same(family, implementation):
    model, inputs = shared(family), left_padded(prompt(), 5, 0)
    with under(model, implementation):
        wanted = generate(model, **inputs)
        with optimized(model):
            assert all(type(module) is DecodeLinear for module in linears(model).values())
            assert type(model.get_output_embeddings()) is DecodeLinear
            assert_same(generate(model, **inputs), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_one_input_are_one_launch(family, launches):
    """In every family that has them apart; gpt_neox and phi3 have them fused, and mixture of experts has no linears."""
    model, inputs = copy.deepcopy(shared(family)).to(torch.bfloat16), left_padded(prompt(), 5, 0)
    with under(model, "eager"):
        wanted = generate(model, **inputs)
        with optimized(model):
            names = linears(model)
            leaders = [name for name in names if name.endswith(LEADERS)]
            followers = [name for name in names if name.endswith(FOLLOWERS)]
            assert_same(generate(model, **inputs), wanted)
    assert bool(leaders) == (family not in ("gpt_neox", "phi3"))
    assert all(rows <= 16 for rows, _ in launches)
    step = [count for rows, count in launches if rows == 2][-(len(names) - len(followers)) :]
    assert sum(step) == len(names)
    assert sum(count > 1 for count in step) == len(leaders)
    assert sum(count == 3 for count in step) == sum(name.endswith(".q_proj") for name in leaders)


def test_beams_and_a_second_prompt(gpu_path):
    model = build("llama").to(torch.bfloat16)
    with under(model, "fastattn"), optimized(copy.deepcopy(model)) as fast:
        for i, inputs in enumerate((left_padded(prompt(), 3, 0), {"input_ids": prompt(1, 30)})):
            options = {"num_beams": 3 if i == 0 else 1, **inputs}
            assert_same(generate(fast, paged(fast), **options), generate(model, paged(model), **options))


def test_files_know_nothing_of_it(tmp_path):
    model = optimize_linears(build("qwen2"))
    model.save_pretrained(tmp_path)
    assert "hf_fastattn" not in (tmp_path / "config.json").read_text()
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {type(module) for module in linears(back).values()} == {nn.Linear}
    state, wanted = back.state_dict(), build("qwen2").state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    missing = model.load_state_dict(wanted)
    assert not missing.missing_keys
    assert not missing.unexpected_keys


def test_tied_head(gpu_path, tmp_path):
    model = build("llama", tie_word_embeddings=True)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert_same(generate(optimize_linears(copy.deepcopy(half)), input_ids=prompt()), generate(half, input_ids=prompt()))
    wanted = generate(model, input_ids=prompt())
    optimize_linears(model)
    assert type(model.lm_head) is DecodeLinear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(generate(model, input_ids=prompt()), wanted)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)
    model.resize_token_embeddings(80)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert generate(model, input_ids=prompt()).logits[0].shape[-1] == 80


def _lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.filterwarnings(OLD_NAME)
def test_adapters_over_optimised_layers(gpu_path):
    plain, fast = _lora(build("llama").to(torch.bfloat16)), _lora(optimize_linears(build("llama").to(torch.bfloat16)))
    assert type(fast.base_model.model.model.layers[0].self_attn.q_proj.base_layer) is DecodeLinear
    wanted = generate(plain, input_ids=prompt())
    assert_same(generate(fast, input_ids=prompt()), wanted)
    for model in (plain, fast):
        model.merge_adapter()
    assert_same(generate(fast, input_ids=prompt()), generate(plain, input_ids=prompt()))
    for model in (plain, fast):
        model.unmerge_adapter()
    merged = fast.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is DecodeLinear
    assert_same(generate(merged, input_ids=prompt()), generate(plain.merge_and_unload(), input_ids=prompt()))


@pytest.mark.filterwarnings(OLD_NAME)
def test_adapters_train_over_optimised_layers(gpu_path):
    gradients = []
    for model in (_lora(build("llama")), _lora(optimize_linears(build("llama")))):
        model.train()
        model(input_ids=prompt(), labels=prompt()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 3 * 3 * 2
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.filterwarnings(OLD_NAME)
def test_lora_wrapped_layers_are_left_alone():
    model = _lora(build("llama"))
    wanted = generate(model, input_ids=prompt())
    with pytest.warns(UserWarning, match="left 9 linear layers as they are: 9 LoRA-wrapped") as caught:
        optimize_linears(model)
    assert len([one for one in caught if "optimize_linears" in str(one.message)]) == 1
    inner = model.base_model.model
    layer = inner.model.layers[0]
    assert type(layer.self_attn.q_proj.base_layer) is nn.Linear
    assert type(layer.self_attn.q_proj.lora_A["default"]) is nn.Linear
    assert type(layer.self_attn.k_proj) is type(inner.lm_head) is DecodeLinear
    assert_same(generate(model, input_ids=prompt()), wanted)


def test_device_map_hooks_are_left_alone():
    """With more than one device accelerate hooks every module; here the CPU and the disk's stand-in."""
    from accelerate import cpu_offload

    model = build("llama")
    wanted = generate(model, input_ids=prompt())
    count = len(linears(model))
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.warns(UserWarning, match=f"left {count} linear layers as they are: {count} hooked"):
        optimize_linears(model)
    assert_same(generate(model, input_ids=prompt()), wanted)


class Graphs:
    """A compiler that runs graphs as they are and keeps their code."""

    def __init__(self):
        self.codes = []

    def __call__(self, graph, _inputs):
        self.codes.append(graph.code)
        return graph

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_one_compiled_graph_serves_every_prompt(family, gpu_path):
    """Prefill runs eagerly and shows what belongs together; the compiled decode step is one graph."""
    model, graphs = build(family).to(torch.bfloat16), Graphs()
    config = CompileConfig(fullgraph=True, dynamic=False, backend=graphs, mode=None)
    config._compile_all_devices = True
    with optimized(copy.deepcopy(model)) as fast:
        for i, (length, pads) in enumerate([(9, (0, 0)), (14, (4, 0)), (5, (0, 0))]):
            inputs = left_padded(prompt(2, length, seed=i), *pads)
            with under(fast), under(model):
                wanted = generate(model, paged(model, max_length=96), **inputs)
                out = generate(fast, paged(fast, max_length=96), compile_config=config, **inputs)
            assert_same(out, wanted)
    assert len(graphs.codes) == 1
    groups = graphs.codes[0].count("torch.ops.hf_fastattn.decode_linear_group.default")
    assert groups == 2 * model.config.num_hidden_layers


def test_a_dense_cache_steps_through_the_same_layers(gpu_path):
    model = build("mistral").to(torch.bfloat16)
    wanted = generate(model, DynamicCache(config=model.config), input_ids=prompt())
    optimize_linears(model)
    out = generate(model, DynamicCache(config=model.config), input_ids=prompt())
    assert_same(out, wanted)
    assert out.sequences.shape[1] == prompt().shape[1] + NEW_TOKENS

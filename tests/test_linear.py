"""Linear layers put in and taken out, run together, copied, compiled and left alone: without transformers."""

import copy
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_fastattn import linear, ops
from hf_fastattn.linear import DecodeLinear, optimize_linears, restore_linears

BF16 = torch.bfloat16


class Attention(nn.Module):
    """Projections of one input; order and inputs of the calls can be changed."""

    def __init__(self, dtype=BF16, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, n, bias=bias) for n in (32, 16, 8))
        self.o_proj = nn.Linear(32, 32)
        self.inputs = lambda x: (("q_proj", x), ("k_proj", x), ("v_proj", x))
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x):
        return [getattr(self, name)(given) for name, given in self.inputs(x)]


def plain(module, x):
    """What the module computes, layer by layer, with F.linear."""
    layers = [(getattr(module, name), given) for name, given in module.inputs(x)]
    return [F.linear(given, layer.weight, layer.bias) for layer, given in layers]


def assert_plain(module, x):
    for got, wanted in zip(module(x), plain(module, x), strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture
def gpu_path(monkeypatch):
    """Take the path of GPU tensors, through the ops' CPU implementation."""
    monkeypatch.setattr(linear, "_on_gpu", lambda x: True)
    monkeypatch.setattr(linear, "kernel_takes", lambda n, k, dtype, device: True)


@pytest.fixture
def calls(gpu_path, monkeypatch):
    """Take that path too, and record on how many weights the ops were called."""
    recorded = []

    def record(name):
        function = getattr(ops, name)

        def called(x, weights, biases):
            recorded.append(len(weights) if name == "decode_linear_group" else 1)
            return function(x, weights, biases)

        monkeypatch.setattr(ops, name, called)

    record("decode_linear")
    record("decode_linear_group")
    return recorded


def x_of(*shape):
    return torch.randn(*(shape or (1, 2)), 32, dtype=BF16)


def test_in_and_out_changes_nothing_but_the_class():
    model = nn.ModuleDict({"a": Attention(), "head": nn.Linear(32, 8)})
    before, state = dict(model.named_modules()), model.state_dict()
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    attributes = {name: set(module.__dict__) for name, module in before.items()}
    assert optimize_linears(model) is model
    assert type(model["head"]) is type(model["a"].k_proj) is DecodeLinear
    assert list(model.state_dict()) == list(state)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert all(module is before[name] for name, module in model.named_modules())
    optimize_linears(model)
    assert restore_linears(model) is model
    assert type(model["head"]) is type(model["a"].k_proj) is nn.Linear
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


def test_cpu_computes_what_it_did(monkeypatch):
    monkeypatch.setattr(ops, "decode_linear", None)  # not called
    model = Attention(torch.float32)
    x = torch.randn(2, 3, 32)
    wanted = model(x)
    assert all(torch.equal(got, want) for got, want in zip(optimize_linears(model)(x), wanted, strict=True))
    layer = DecodeLinear(32, 8).train()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert all(torch.equal(got, want) for got, want in zip(compiled(x), wanted, strict=True))


def test_projections_run_together_once_seen_together(calls):
    model = optimize_linears(Attention())
    group = model.q_proj._group
    assert group is model.k_proj._group is model.v_proj._group
    assert model.o_proj._group is None
    assert_plain(model, x_of(1, 40))  # a prefill shows it
    assert calls == []
    for _ in range(3):
        assert_plain(model, x_of())
        assert group._held is None
    assert calls == [3] * 3
    assert_plain(model, x_of(1, 40))
    assert calls == [3] * 3


def test_nothing_is_kept_alive(calls):
    model = optimize_linears(Attention())
    for _ in range(3):
        x = x_of()
        outputs = model(x)
        alive = [weakref.ref(tensor) for tensor in (x, *outputs)]
        del x, outputs
        assert [ref() for ref in alive] == [None] * 4


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: (("q_proj", x), ("k_proj", x + 1), ("v_proj", x)),
        lambda x: (("q_proj", x), ("k_proj", x.clone()), ("v_proj", x.clone())),
        lambda x: (("k_proj", x), ("q_proj", x), ("v_proj", x)),
        lambda x: (("q_proj", x), ("v_proj", x), ("k_proj", x)),
        lambda x: (("q_proj", x), ("q_proj", x), ("k_proj", x), ("v_proj", x)),
        lambda x: (("q_proj", x), ("k_proj", x)),
    ],
    ids=["other input", "equal input", "k first", "v second", "q twice", "no v"],
)
def test_projections_called_otherwise_run_alone(calls, inputs):
    model = Attention()
    optimize_linears(model)
    model.inputs = inputs
    for _ in range(3):
        assert_plain(model, x_of())
    assert 3 not in calls
    assert calls == [1] * len(calls)
    assert model.q_proj._group._held is None


@pytest.mark.parametrize("change", ["other input", "in place", "no k or v"])
def test_a_model_that_changes_its_ways(calls, change):
    """Right at once, and alone again from the next call on."""
    model = optimize_linears(Attention())
    assert_plain(model, x_of())
    assert_plain(model, x_of())
    assert calls == [1, 1, 1, 3]
    if change == "other input":
        model.inputs = lambda x: (("q_proj", x), ("k_proj", x * 2), ("v_proj", x * 3))
        assert_plain(model, x_of())
    elif change == "in place":
        x = x_of()
        model.q_proj(x)
        x.add_(1)
        assert torch.equal(model.k_proj(x), F.linear(x, model.k_proj.weight, model.k_proj.bias))
    else:
        model.q_proj(x_of())
    del calls[:]
    assert_plain(model, x_of())
    assert_plain(model, x_of())
    assert calls == [1] * 6


def test_an_output_is_handed_out_once(calls):
    """A caller may change what it got; whoever calls the same layer again gets a new tensor."""
    model = optimize_linears(Attention())
    assert_plain(model, x_of())
    x = x_of()
    model.q_proj(x).zero_()
    model.k_proj(x).zero_()
    assert torch.equal(model.k_proj(x), F.linear(x, model.k_proj.weight, model.k_proj.bias))
    assert torch.equal(model.v_proj(x), F.linear(x, model.v_proj.weight, model.v_proj.bias))
    assert calls == [1, 1, 1, 3, 1]


def test_an_address_that_is_used_again_is_no_match(calls):
    model = optimize_linears(Attention())
    assert_plain(model, x_of())
    x = x_of()
    model.q_proj(x)
    other = x_of()
    other.set_(x.untyped_storage(), 0, x.shape, x.stride())
    x.copy_(torch.randn_like(x))
    assert torch.equal(model.k_proj(other), F.linear(other, model.k_proj.weight, model.k_proj.bias))


def test_inference_tensors_run_alone(calls):
    model = optimize_linears(Attention())
    assert_plain(model, x_of())
    with torch.inference_mode():
        assert_plain(model, x_of())
    assert calls == [1] * 6


def test_training_gradients_and_autocast_take_the_library(calls):
    model = optimize_linears(Attention())
    model.train()
    assert_plain(model, x_of())
    model.eval()
    model.requires_grad_(True)
    model(x_of())[0].sum().backward()
    assert model.q_proj.weight.grad is not None
    model.requires_grad_(False)
    x = x_of().requires_grad_(True)
    model(x)[1].sum().backward()
    assert x.grad is not None
    wide = optimize_linears(Attention(torch.float32))
    with torch.autocast("cpu", dtype=BF16):
        assert wide(torch.randn(2, 32))[0].dtype == BF16
        assert model(torch.randn(2, 32))[0].dtype == BF16
        assert_plain(model, x_of())
    assert_plain(wide, torch.randn(2, 32))
    assert calls == []
    with torch.no_grad():
        assert_plain(model.requires_grad_(True), x_of())
    assert calls == [1] * 3


def test_a_sibling_that_cannot_join_is_left_out(calls):
    model = optimize_linears(Attention())
    assert_plain(model, x_of())
    model.k_proj.to(torch.float32)
    model.inputs = lambda x: (("q_proj", x), ("k_proj", x.float()), ("v_proj", x))
    assert_plain(model, x_of())
    model.k_proj = nn.Linear(32, 16).to(BF16).eval().requires_grad_(False)
    model.inputs = lambda x: (("q_proj", x), ("k_proj", x), ("v_proj", x))
    assert_plain(model, x_of())
    assert 3 not in calls


def test_new_weights_are_used_at_once(calls):
    model = optimize_linears(Attention())
    assert_plain(model, x_of())
    model.k_proj.weight.mul_(-2)
    assert_plain(model, x_of())
    model.v_proj.weight = nn.Parameter(torch.randn_like(model.v_proj.weight), requires_grad=False)
    assert_plain(model, x_of())
    assert calls == [1, 1, 1, 3, 3]


def test_copies_group_among_themselves(calls):
    model = optimize_linears(Attention())
    assert_plain(model, x_of())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.k_proj.weight.zero_()
    assert type(twin.k_proj) is DecodeLinear
    for each in (model, twin):
        del calls[:]
        assert_plain(each, x_of())
        assert calls == [3]
    lonely = copy.deepcopy(model.q_proj)
    del calls[:]
    x = x_of()
    assert torch.equal(lonely(x), F.linear(x, lonely.weight, lonely.bias))
    assert_plain(model, x_of())
    assert calls == [1, 3]


def test_pickles_hold_plain_layers():
    model = optimize_linears(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    data = pickle.dumps(model)
    assert b"hf_fastattn" not in data
    back = pickle.loads(data)
    assert [type(module) for module in back] == [nn.Linear] * 2
    x = torch.randn(2, 8)
    assert torch.equal(back(x), model(x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


def test_a_compiled_model_runs_projections_together_in_one_graph(gpu_path):
    model = optimize_linears(Attention())
    assert_plain(model, x_of(1, 40))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (30, 2, 16, 17, 5):
        x = x_of(2, rows)
        torch._dynamo.mark_dynamic(x, 1)
        assert all(torch.equal(got, want) for got, want in zip(compiled(x), plain(model, x), strict=True))
        assert model.q_proj._group._held is None
    assert counter.frame_count == 1
    assert counter.graphs[0].code.count("ops.hf_fastattn.decode_linear_group") == 1
    assert "ops.hf_fastattn.decode_linear." not in counter.graphs[0].code


def test_a_model_compiled_before_its_first_call_runs_projections_alone(gpu_path):
    model = optimize_linears(Attention())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        x = x_of(1, 3)
        assert all(torch.equal(got, want) for got, want in zip(compiled(x), plain(model, x), strict=True))
    assert counter.frame_count == 1
    assert counter.graphs[0].code.count("ops.hf_fastattn.decode_linear.default") == 3


def test_inductor_calls_the_op_and_copies_no_weight(gpu_path):
    from torch._inductor.utils import run_and_get_code

    model = optimize_linears(Attention())
    assert_plain(model, x_of(1, 40))
    x = x_of()
    outs, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert all(torch.equal(got, want) for got, want in zip(outs, plain(model, x), strict=True))
    calls = [line for line in source.splitlines() if line.strip().startswith("buf") and "torch.ops.hf_fastattn" in line]
    assert len(calls) == 1
    assert "decode_linear_group" in calls[0]
    assert not [line for line in source.splitlines() if "(32, 32)" in line and ("empty" in line or "clone" in line)]


def test_layers_that_no_kernel_takes_stay_visible_to_the_compiler(gpu_path, monkeypatch):
    """Inside an op, inductor could neither fuse nor choose another matrix product."""
    monkeypatch.setattr(linear, "kernel_takes", lambda n, k, dtype, device: False)
    model = optimize_linears(Attention())
    assert_plain(model, x_of(1, 40))
    counter = CompileCounterWithBackend("eager")
    torch.compile(model, fullgraph=True, backend=counter)(x_of())
    assert "hf_fastattn" not in counter.graphs[0].code.replace("_modules_", "")
    assert counter.graphs[0].code.count("linear(") == 3


def test_fx_traces_through():
    model = optimize_linears(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))).eval()
    x = torch.randn(2, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


# Layers left alone


class NamedLikeQuantLinear(nn.Module):
    """Looks as quantisation libraries' layers do."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


class Int8Linear(nn.Linear):
    """A subclass whose weight is no floating-point tensor."""

    def __init__(self):
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_left_alone_are_counted_in_one_message():
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda module, inputs, out: out + 1)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.ModuleList(
        [nn.Linear(8, 8), NamedLikeQuantLinear(), Int8Linear(), Doubled(8, 8), hooked, parametrized, nn.Conv1d(8, 8, 1)]
    )
    classes = [type(module) for module in model]
    with pytest.warns(UserWarning, match="left 5 linear layers") as caught:
        optimize_linears(model)
    assert len(caught) == 1
    assert str(caught[0].message).endswith(": 1 hooked, 2 of a subclass of nn.Linear, 2 quantised")
    assert [type(module) for module in model] == [DecodeLinear, *classes[1:]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize_linears(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))


def test_offloaded_layers_are_left_alone():
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    wanted = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.warns(UserWarning, match="2 hooked"):
        optimize_linears(model)
    assert torch.equal(model(x), wanted)


def test_layers_offloaded_later_still_compute():
    from accelerate import cpu_offload

    model = Attention()
    x = x_of()
    wanted = plain(model, x)
    cpu_offload(optimize_linears(model), execution_device=torch.device("cpu"))
    for _ in range(2):
        assert all(torch.equal(got, want) for got, want in zip(model(x), wanted, strict=True))


def test_tensor_parallel_layers_are_left_alone():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        distribute_module(model[0], init_device_mesh("cpu", (1,)))
        with pytest.warns(UserWarning, match="left 1 linear layers as they are: 1 tensor-parallel"):
            optimize_linears(model)
        assert [type(module) for module in model] == [nn.Linear, DecodeLinear]
    finally:
        dist.destroy_process_group()


def test_hooks_added_later_run(calls):
    model = optimize_linears(Attention())
    model.k_proj.register_forward_hook(lambda module, inputs, out: out * 2)
    for _ in range(3):
        x = x_of()
        assert torch.equal(model(x)[1], 2 * plain(model, x)[1])
    assert calls[-1] == 3


def test_a_weight_quantised_later_takes_its_own_way(calls):
    class Scaled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out * 3 if func is F.linear else out

    layer = optimize_linears(nn.Sequential(nn.Linear(8, 8, bias=False)).to(BF16)).eval()[0]
    weight = layer.weight.detach().clone()
    layer.weight = nn.Parameter(weight.as_subclass(Scaled), requires_grad=False)
    x = torch.randn(2, 8, dtype=BF16)
    assert torch.equal(layer(x).as_subclass(torch.Tensor), 3 * F.linear(x, weight))
    assert calls == []


def test_parametrized_layers_are_not_restored_halfway():
    model = optimize_linears(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    nn.utils.parametrizations.weight_norm(model[1])
    with torch.no_grad():
        x = torch.randn(2, 8)
        torch.testing.assert_close(model[1](x), F.linear(x, model[1].weight, model[1].bias))
    with pytest.raises(ValueError, match=r"remove parametrizations of \['1'\]"):
        restore_linears(model)
    assert type(model[0]) is DecodeLinear
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    restore_linears(model)
    assert [type(module) for module in model] == [nn.Linear] * 2


def test_tied_layers_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(16, 8), "head": nn.Linear(8, 16, bias=False)})
    model["head"].weight = model["embed"].weight
    model["alias"] = model["head"]
    optimize_linears(model)
    assert type(model["head"]) is DecodeLinear
    assert model["alias"] is model["head"]
    assert model["head"].weight is model["embed"].weight

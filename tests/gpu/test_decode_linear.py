"""decode_linear through the op on a GPU against the float64 oracle, and DecodeLinear under CUDA graphs.

The same checks of the op run through its PyTorch implementation on the CPU, on smaller layers.
"""

import pytest
import torch
from torch import nn

from hf_fastattn import ops, reference
from hf_fastattn.linear import optimize_linears

from . import COMPILED


def tensors(device, shape, sizes, dtype, bias=True):
    """Random x, weights and biases on a device."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=random, device=device).to(dtype)

    weights = [normal(n, shape[-1]).mul_(shape[-1] ** -0.5) for n in sizes]
    return normal(*shape), weights, [normal(n) if bias else None for n in sizes]


def check(outs, x, weights, biases):
    """At most twice the error of the plain formula in the tested dtype, plus rounding."""
    wide = [None if bias is None else bias.double() for bias in biases]
    exacts = reference.decode_linear_group(x.double(), [weight.double() for weight in weights], wide)
    plains = reference.decode_linear_group(x, weights, biases)
    for out, exact, plain in zip(outs, exacts, plains, strict=True):
        assert out.shape == exact.shape
        assert out.dtype == x.dtype
        own, rounding = (plain.double() - exact).abs().max(), torch.finfo(x.dtype).eps * exact.abs().max()
        assert (out.double() - exact).abs().max() <= 2 * own + 4 * rounding  # false for NaN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_rows(device, dtype, num_rows, bias):
    n, k = (4096, 4096) if device == "cuda" else (64, 80)
    x, weights, biases = tensors(device, (num_rows, k), (n,), dtype, bias)
    check([ops.decode_linear(x, weights[0], biases[0])], x, weights, biases)


@pytest.mark.parametrize("num_rows", [1, 8, 16])
@pytest.mark.parametrize("sizes", [(4096, 1024, 1024), (4000, 200, 77), (7000, 1200)])
def test_groups(device, num_rows, sizes):
    k = 4096 if device == "cuda" else 80
    x, weights, biases = tensors(device, (num_rows, k), sizes, torch.bfloat16)
    check(ops.decode_linear_group(x, weights, biases), x, weights, biases)


@pytest.mark.parametrize(("n", "k"), [(4099, 4096), (4096, 5008), (1024, 16384), (129, 65536), (8200, 4104), (1, 64)])
def test_odd_sizes(device, n, k):
    n, k = (n, k) if device == "cuda" else (n % 100 + 1, k % 100 + 4)
    for num_rows in (1, 5, 16):
        x, weights, biases = tensors(device, (num_rows, k), (n,), torch.bfloat16)
        check([ops.decode_linear(x, weights[0], biases[0])], x, weights, biases)


def test_strides(device):
    n, k = (4096, 4096) if device == "cuda" else (64, 80)
    x, weights, biases = tensors(device, (3, 2, k), (n,), torch.bfloat16)
    spread = torch.zeros(3, 2, 2 * k, device=device, dtype=torch.bfloat16)[..., ::2].copy_(x)
    for activations in (x.transpose(0, 1), spread):
        out = ops.decode_linear(activations, weights[0], biases[0])
        assert out.is_contiguous()
        check([out], activations, weights, biases)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_plans(device, num_rows, num_splits):
    """Both kernels by given plans, small layers and row counts in the tail of a tile included."""
    if device == "cpu" and not COMPILED:
        pytest.skip("needs a CUDA device, or FASTATTN_TEST_PTX")
    from hf_fastattn.kernels.decode_linear import run
    from hf_fastattn.kernels.decode_linear_plan import Plan

    plans = [Plan("flat", n, 8192 // n, max(n // 16, 1), stages, num_splits) for n in (16, 32, 64) for stages in (2, 4)]
    if num_rows <= 4:
        plans += [Plan("gemv", n, 256 * warps, warps, 1, num_splits) for n in (2, 4) for warps in (1, 4)]
    k, sizes = (1040, (300, 100, 5)) if device == "cuda" else (272, (30, 10, 5))
    x, weights, biases = tensors(device, (num_rows, k), sizes, torch.bfloat16)
    for plan in plans:
        first = run(x, weights, biases, plan)
        check(first, x, weights, biases)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(x, weights, biases, plan), strict=True))


class Block(nn.Module):
    """A stand-in for a decoder layer: projections of one input, and one more layer."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4096, n) for n in (4096, 1024, 1024))
        self.o_proj = nn.Linear(4096, 4096, bias=False)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q * torch.cat([k, v, k, v], -1).tanh())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefill_and_decode_under_cuda_graphs():
    torch.manual_seed(0)
    block = optimize_linears(Block().to("cuda", torch.bfloat16).eval().requires_grad_(False))
    exact = Block().to("cuda", torch.float64).requires_grad_(False)
    exact.load_state_dict(block.state_dict())
    block(torch.randn(1, 40, 4096, device="cuda", dtype=torch.bfloat16))
    assert block.q_proj._group.together
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(8, 1, 4096, device="cuda", dtype=torch.bfloat16)
        wanted = exact(x.double())
        error = (compiled(x).double() - wanted).abs().max()
        own = (_plain(block)(x).double() - wanted).abs().max()
        assert error <= 2 * own + 4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()


def _plain(block):
    plain = Block().to("cuda", torch.bfloat16).requires_grad_(False)
    plain.load_state_dict(block.state_dict())
    return plain

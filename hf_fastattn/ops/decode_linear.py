"""decode_linear: linear layers over the few rows of activations of a decode step, at the speed of reading the weights.

Source: Hong et al., "FlashDecoding++", 2024, sections 4 and 5 (flat GEMM, heuristic dataflow). The one decision: which
implementation runs is decided inside the op, where the number of rows is a plain number, so that a compiled model has
no guard on it and serves prefill and decode with one graph.
"""

import functools
import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import define_op, has_triton


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T + bias`` like ``torch.nn.functional.linear``.

    Args:
        x: (..., K), any strides and any number of rows; kernels take 1 to 16 rows, PyTorch more.
        weight: (N, K) as in nn.Linear; read where it lies, never copied or packed.
        bias: (N,) or None.

    Returns:
        (..., N), contiguous, dtype and device of x. Sums are fp32 and in an order that depends on the sizes only.

    Supported by kernels: fp16 and bf16 on sm_80, sm_90 and sm_100, K a multiple of 16, weights whose rows are
    contiguous and 16-byte aligned, as :func:`hf_fastattn.kernels.decode_linear_plan.choose` says; everything else
    takes PyTorch, inputs that need gradients included.

    Raises:
        ValueError: shapes that do not belong together.

    Oracle: :func:`hf_fastattn.reference.decode_linear`; tests: tests/test_decode_linear.py,
    tests/interpret/test_decode_linear.py.
    """
    _check(x, weight, bias)
    if torch.is_grad_enabled() and needs_grad(x, weight, bias):
        return F.linear(x, weight, bias)
    return _OP(x, weight, bias)


def decode_linear_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Apply several linear layers to one input, in one launch where a kernel takes them: see :func:`decode_linear`.

    Args:
        x: (..., K).
        weights: of (N_i, K) each, up to 3 in one launch.
        biases: of (N_i,) each, or None.

    Returns:
        one (..., N_i) per weight, contiguous; they share no memory.

    Raises:
        ValueError: shapes that do not belong together, or another number of biases than of weights.

    Oracle: :func:`hf_fastattn.reference.decode_linear_group`; tests as for decode_linear.
    """
    if len(weights) != len(biases) or not weights:
        raise ValueError(f"expected a bias or None for each weight, got {len(biases)} for {len(weights)} weights")
    for weight, bias in zip(weights, biases, strict=True):
        _check(x, weight, bias)
    if torch.is_grad_enabled() and needs_grad(x, *weights, *biases):
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return _GROUP_OP(x, list(weights), list(biases))


@functools.cache
def kernel_takes(n: int, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a kernel is chosen for weights of n rows in all and k columns, for some number of rows of x.

    Where it is not, calling the op would only add its overhead to the library's call.
    """
    if device.type != "cuda" or not has_triton():
        return False
    kernel = importlib.import_module("hf_fastattn.kernels.decode_linear")
    arch = kernel.table_arch(device)
    rows = range(1, MAX_DECODE_LINEAR_ROWS + 1)
    return arch is not None and any(kernel.choose(m, n, k, dtype, arch) is not kernel.LIBRARY for m in rows)


MAX_DECODE_LINEAR_ROWS = 16
"""Most rows of activations that a kernel of decode_linear takes."""


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether one of some tensors, None left out, takes part in autograd."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected x (..., K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"expected a bias ({weight.shape[0]},) for weight {tuple(weight.shape)}, got {bias.shape}")


def _torch_decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias).contiguous()


def _torch_decode_linear_group(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [_torch_decode_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _fake_decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_decode_linear_group(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [_fake_decode_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


_OP = define_op(
    "decode_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _torch_decode_linear, _fake_decode_linear
)
_GROUP_OP = define_op(
    "decode_linear_group",
    "(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    _torch_decode_linear_group,
    _fake_decode_linear_group,
)

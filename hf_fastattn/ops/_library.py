"""Registration of the ops with PyTorch's dispatcher.

``Library.define`` and ``impl`` rather than ``custom_op``: a call costs 2 to 3 us instead of 4 to 16, and a decode step
makes two calls per layer. A CUDA tensor takes the Triton launcher from :mod:`hf_fastattn.kernels` (imported at the
first call), every other device the PyTorch implementation beside the op's definition.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("hf_fastattn", "DEF")
_TORCH_KEYS = ("CPU", "MPS", "XPU")

DIRECT: dict[str, dict[str, Callable[..., Any]]] = {}
"""By op and device type, what the dispatcher would go on to for a plain tensor: asking here saves 6 to 24 us a call."""

_DEFINED: dict[str, Callable[..., Any]] = {}
"""By op, the PyTorch implementation; in DIRECT others may have put another one in its place."""

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
"""All strides are honoured: without the second, inductor copies whatever it has not stored yet, once per call."""


@functools.cache
def has_triton() -> bool:
    """Return whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def define_op(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define ``hf_fastattn::<name>`` and return a function that calls it.

    Args:
        name: also the name of the module in ``hf_fastattn.kernels`` whose ``launch`` runs on CUDA tensors.
        schema: arguments and result in the dispatcher's language, without the name.
        implementation: the PyTorch implementation, called with the schema's arguments by position.
        fake: shapes and dtypes of the result, for tracing.
    """
    LIBRARY.define(f"{name}{schema}", tags=_TAGS)
    for key in _TORCH_KEYS:
        LIBRARY.impl(name, implementation, key)
    on_cuda = _kernel_or(name, implementation)
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"hf_fastattn::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.hf_fastattn, name).default
    direct = DIRECT[name] = {"cpu": implementation, "cuda": on_cuda}
    _DEFINED[name] = implementation

    def call(*args: Any) -> Any:
        tensor = args[0]
        run = direct.get("cpu" if tensor.is_cpu else tensor.device.type) if is_plain(tensor) else None
        return op(*args) if run is None else run(*args)

    return call


def is_direct(name: str, tensor: torch.Tensor) -> bool:
    """Whether a call of an op on this tensor goes straight to the CPU implementation that it was defined with."""
    return tensor.is_cpu and is_plain(tensor) and DIRECT[name]["cpu"] is _DEFINED[name]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether nobody between the caller and a device's implementation wants to see a call on this tensor."""
    return (
        type(tensor) is torch.Tensor and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
    )


def _kernel_or(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return the CUDA implementation of an op: its launcher, or PyTorch for calls that the kernel does not do."""

    @functools.cache
    def find_launcher() -> tuple[Callable[..., Any], tuple[type[Exception], ...]]:
        launcher = importlib.import_module(f"hf_fastattn.kernels.{name}")
        unsupported = importlib.import_module("hf_fastattn.kernels._launch").Unsupported
        too_large = importlib.import_module("triton.runtime.errors").OutOfResources  # raised before the launch
        return launcher.launch, (unsupported, too_large)

    def on_cuda(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            _warn_slow(name, "gradients are needed, which its kernel does not give")
            return implementation(*args)
        if not has_triton() or torch.version.hip is not None:
            _warn_slow(name, "its kernel is for NVIDIA GPUs" if has_triton() else "Triton is not installed")
            return implementation(*args)
        launch, refusals = find_launcher()
        try:
            return launch(*args)
        except refusals as error:
            _warn_slow(name, str(error))
            return implementation(*args)

    return on_cuda


@functools.cache
def _warn_slow(name: str, reason: str) -> None:
    warnings.warn(f"{name} runs through PyTorch, slower: {reason}", RuntimeWarning, stacklevel=3)

"""Linear layers at decode speed: optimize_linears makes nn.Linear a DecodeLinear, restore_linears undoes it.

A module changes its class and nothing else: the object, its parameters, buffers and hooks stay, so that state_dict,
save_pretrained, tied weights, PEFT and references held elsewhere see what they saw. The one decision: q/k/v and gate/up
projections are one launch because the first of them computes all, and the others hand out what is theirs when they are
called with that very tensor. No weight is copied or moved for that.
"""

import warnings
import weakref
from collections import Counter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .ops.decode_linear import MAX_DECODE_LINEAR_ROWS, kernel_takes, needs_grad
from .twofold import Twofold

Model = TypeVar("Model", bound=nn.Module)

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of projections that usually read one input, in the order in which models call them."""


class DecodeLinear(nn.Linear):
    """nn.Linear whose decode steps run through :func:`hf_fastattn.ops.decode_linear` on a GPU.

    Same parameters, same state_dict. A pickle holds an nn.Linear, so that reading it needs no hf_fastattn; a deep copy
    stays a DecodeLinear. Training mode, gradients, autocast, other devices and tensor subclasses take F.linear.
    """

    _group: "Group | None" = None
    _place: int = 0

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, (..., in_features) -> (..., out_features)."""
        if not _on_gpu(input):
            stored = self._parameters.get("weight")  # nn.Module's attribute access costs more than this check
            if stored is not None and "bias" in self._parameters:
                return F.linear(input, stored, self._parameters["bias"])
            return F.linear(input, self.weight, self.bias)
        weight, bias = self.weight, self.bias
        if self.training or not _kernel_may_run(input, weight, bias):
            return F.linear(input, weight, bias)
        if self._group is not None:
            return self._group.run(self, input)
        return _alone(input, weight, bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._group is not None:
            self._group.join(self)

    def __copy__(self) -> "DecodeLinear":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not DecodeLinear:
            return super().__reduce_ex__(protocol)
        state = {name: value for name, value in self.__dict__.items() if name not in ("_group", "_place")}
        return nn.Linear.__new__, (Twofold(DecodeLinear, nn.Linear),), Twofold(self.__dict__, state)


class Group:
    """Projections of one input: runs them together once they were seen to be called in order with one tensor.

    An eager forward pass on the GPU, usually the prefill, shows it: nothing is known beforehand about what a model
    feeds to its k_proj. When an output that was computed along is not asked for, they run alone from then on. Inference
    tensors (torch.inference_mode) have no version counter, so that a change of x between the calls would go unnoticed:
    there every projection runs alone, too.
    """

    def __init__(self, size: int) -> None:
        self.members: list[weakref.ref[DecodeLinear] | None] = [None] * size
        self.together: bool | None = None  # None: not known yet
        self._seen: tuple[weakref.ref[Tensor], int, int] | None = None  # tensor, its version, who comes next
        self._held: tuple[Tensor, int, list[Tensor | None]] | None = None  # tensor, its version, outputs to fetch

    def join(self, module: DecodeLinear) -> None:
        """Take a module for its place."""
        self.members[module._place] = weakref.ref(module)

    def run(self, module: DecodeLinear, x: Tensor) -> Tensor:
        """Return a member's output: computed for another member before, or now, alone or with all others' outputs."""
        place, version, held = module._place, _version(x), self._held
        if held is not None and place > 0 and held[0] is x and held[1] == version:
            if place == len(self.members) - 1:
                self._held = None
            output, held[2][place] = held[2][place], None  # the caller's alone: it may be changed in place
            if output is not None:
                return output
        if place == 0 and held is not None:
            self._held, self.together = None, False
        if place == 0 and self.together and version is not None:
            modules = self._ready(module, x)
            if modules is not None:
                outputs = ops.decode_linear_group(x, [m.weight for m in modules], [m.bias for m in modules])
                self._held = (x, version, [None, *outputs[1:]])
                return outputs[0]
        if self.together is None and version is not None and not torch.compiler.is_compiling():
            self._watch(place, x, version)
        return _alone(x, module.weight, module.bias)

    def _watch(self, place: int, x: Tensor, version: int) -> None:
        """Learn from one call whether all members get the same tensor, one after the other."""
        seen, self._seen = self._seen, None
        if place == 0 and seen is None:
            self._seen = (weakref.ref(x), version, 1)
        elif seen is None or seen[0]() is not x or seen[1] != version or seen[2] != place:
            self.together = False
        elif place == len(self.members) - 1:
            self.together = True
        else:
            self._seen = (seen[0], version, place + 1)

    def _ready(self, first: DecodeLinear, x: Tensor) -> list[DecodeLinear] | None:
        """Return all members if one launch may compute them for x, the first being the caller."""
        modules = [None if member is None else member() for member in self.members]
        found = [m for m in modules if m is not None and _kernel_may_run(x, m.weight, m.bias) and not m.training]
        if len(found) < len(modules) or found[0] is not first:
            return None
        return found if _pays(x, sum(m.weight.shape[0] for m in found)) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        """Return an empty group, which the members' copies join: whoever is copied alone stays alone."""
        twin = memo[id(self)] = Group(len(self.members))
        twin.together = self.together
        return twin


def optimize_linears(model: Model) -> Model:
    """Make the linear layers of a model run at decode at the speed of reading their weights, in place.

    Every nn.Linear becomes a :class:`DecodeLinear`, lm_head and tied ones included: parameters are read, never moved.
    Left as they are, with one warning that counts them by kind: quantised layers, layers wrapped by LoRA, tensor-
    parallel layers, layers with hooks (accelerate's offloading among them) and subclasses of nn.Linear.

    Args:
        model: on any device, in any dtype; may be moved and cast afterwards. On a CPU the layers compute what they did.

    Returns:
        the model itself. Calling it again takes in layers that were added since.

    Source: Hong et al., "FlashDecoding++", 2024; oracle and tests: tests/transformers/test_linear.py.
    """
    left: Counter[str] = Counter()
    wrapped = {id(inner) for outer in model.modules() if hasattr(outer, "base_layer") for inner in outer.modules()}
    for module in model.modules():
        kind = _kind(module, wrapped)
        if kind == "linear":
            module.__class__ = DecodeLinear
        elif kind is not None:
            left[kind] += 1
    for parent in model.modules():
        for names in GROUPS:
            _group([parent._modules.get(name) for name in names])
    if left:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        warnings.warn(f"optimize_linears left {sum(left.values())} linear layers as they are: {counts}", stacklevel=2)
    return model


def restore_linears(model: Model) -> Model:
    """Undo :func:`optimize_linears`: every DecodeLinear of a model is an nn.Linear again, in place.

    Returns:
        the model itself.

    Raises:
        ValueError: a layer has a parametrization, which made a class of its own from DecodeLinear; nothing was changed.
    """
    ours = {name: module for name, module in model.named_modules() if isinstance(module, DecodeLinear)}
    derived = [name for name, module in ours.items() if type(module) is not DecodeLinear]
    if derived:
        raise ValueError(
            f"expected DecodeLinear layers, got classes made from it: remove parametrizations of {derived}"
        )
    for module in ours.values():
        module.__dict__.pop("_group", None)
        module.__dict__.pop("_place", None)
        module.__class__ = nn.Linear  # type: ignore[assignment]
    return model


def _kind(module: nn.Module, wrapped: set[int]) -> str | None:
    """Return "linear" for a layer to take, what else it is for one to leave alone, None for what is no linear layer."""
    if hasattr(module, "base_layer"):
        return "LoRA-wrapped" if _is_linear(module.base_layer) else None
    if id(module) in wrapped or type(module) is DecodeLinear or not _is_linear(module):
        return None
    weight = module._parameters.get("weight")
    if hasattr(weight, "device_mesh") or hasattr(module, "_hf_tp_plan"):
        return "tensor-parallel"
    plain = type(weight) is nn.Parameter and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    if not isinstance(module, nn.Linear) or (not plain and not hasattr(module, "parametrizations")):
        return "quantised"
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return "hooked"
    return "linear" if type(module) is nn.Linear else "of a subclass of nn.Linear"


def _is_linear(module: Any) -> bool:
    """Whether a module is a linear layer of any make: quantised ones often have only the sizes in common."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Module)
        and hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and "linear" in type(module).__name__.lower()
    )


def _group(modules: list[nn.Module | None]) -> None:
    """Tie sibling projections together that one launch could compute."""
    members = [module for module in modules if type(module) is DecodeLinear]
    if len(members) < len(modules) or len({id(member) for member in members}) < len(members):
        return
    if len({(member.in_features, member.bias is None, member.weight.dtype) for member in members}) > 1:
        return
    group = Group(len(members))
    for place, member in enumerate(members):
        member._group, member._place = group, place
        group.join(member)


def _on_gpu(x: Tensor) -> bool:
    """Whether x is a plain tensor on a GPU: no subclass, no proxy of a tracer."""
    return type(x) is Tensor and x.is_cuda


def _kernel_may_run(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the op takes these tensors: 16-bit, of one dtype and device, without gradients or autocast."""
    if type(weight) is not nn.Parameter or x.dtype.itemsize != 2:
        return False
    if weight.dtype != x.dtype or weight.device != x.device or torch.is_autocast_enabled(x.device.type):
        return False
    return not (torch.is_grad_enabled() and needs_grad(x, weight, bias))


def _alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run one layer; where no kernel is chosen, without the op's overhead."""
    return ops.decode_linear(x, weight, bias) if _pays(x, weight.shape[0]) else F.linear(x, weight, bias)


def _pays(x: Tensor, size_n: int) -> bool:
    """Whether a kernel may be chosen for x (..., K) and size_n rows of weights; compiled code must not ask for rows."""
    size_k = x.shape[-1]
    if not torch.compiler.is_compiling() and x.numel() > MAX_DECODE_LINEAR_ROWS * size_k:
        return False
    return _kernel_takes(size_n, size_k, x.dtype, x.device)


@torch.compiler.assume_constant_result
def _kernel_takes(n: int, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    return kernel_takes(n, k, dtype, device)


def _version(x: Tensor) -> int | None:
    """Return how often x was changed in place; None if it does not count. A compiler sees such changes itself."""
    if torch.compiler.is_compiling():
        return 0
    return None if x.is_inference() else x._version

"""What ``PagedCache.update`` returns in place of keys and values: the new states and the layer they belong to.

The attention function, which alone sees the mask, unwraps the pair and stores it. Anybody else who touches a handle
as a tensor gets the layer's keys or values as one dense tensor with all columns, and the cache stays dense from
then on. A plain object, not a tensor subclass: dynamo traces it without guards on its data.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class DenseSource(Protocol):
    """The layer behind a handle."""

    def touch(self, pair: "NewStates") -> tuple[Tensor, Tensor]:
        """Store the pair and return all keys and values, (num_seqs, num_kv_heads, columns, head_dim)."""
        ...

    def columns_with(self, query_len: int) -> int:
        """Return the columns that the layer will hold with so many new ones."""
        ...


class NewStates:
    """What one layer got in one forward pass: k and v, (num_seqs, num_kv_heads, query_len, head_dim) each.

    ``owner`` is kept alive: the layer does not hold its cache, and a handle must work for as long as it exists.
    """

    def __init__(self, layer: DenseSource, k: Tensor, v: Tensor, owner: object = None) -> None:
        self.layer, self.k, self.v, self.owner = layer, k, v, owner
        self.dense: tuple[Tensor, Tensor] | None = None

    def detached(self) -> tuple[Tensor, Tensor]:
        """Return k and v for writing into a cache, which cuts gradients off."""
        return (self.k.detach(), self.v.detach()) if torch.is_grad_enabled() else (self.k, self.v)

    def touch(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values of the layer as dense tensors."""
        if self.dense is None:
            self.dense = self.layer.touch(self)
        return self.dense


class Handle:
    """Stands for the keys (``side`` 0) or values (1) of one layer, new states included."""

    def __init__(self, new: NewStates, side: int) -> None:
        self.new, self.side = new, side
        self.states = new.v if side else new.k  # the new ones alone

    def materialize(self) -> Tensor:
        """Return the dense tensor."""
        return self.new.touch()[self.side]

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor; asking for it touches nothing."""
        if self.new.dense is not None:  # the layer may have counted the new columns by now
            return self.new.dense[self.side].shape
        num_seqs, num_heads, query_len, head_dim = self.states.shape
        return torch.Size((num_seqs, num_heads, self.new.layer.columns_with(query_len), head_dim))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys or values."""
        return self.states.dtype

    @property
    def device(self) -> torch.device:
        """Device of keys or values."""
        return self.states.device

    def size(self, dim: int | None = None) -> Any:
        """Like ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Like ``Tensor.dim``."""
        return 4

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``Tensor.to``; a move to where the states are gives the handle itself (as models that share K/V do)."""
        target = self.states.to(*args, **kwargs)
        return self if target is self.states else self.materialize().to(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function on the dense tensors."""
        return func(*_dense(args), **_dense(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    def __repr__(self) -> str:
        return f"Handle({'values' if self.side else 'keys'}, new states {tuple(self.states.shape)})"


def _dense(value: Any) -> Any:
    if isinstance(value, Handle):
        return value.materialize()
    if isinstance(value, (tuple, list)):
        return type(value)(_dense(item) for item in value)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Handle, *args: Any) -> Any:
        return getattr(self.materialize(), name)(*_dense(args))

    apply.__name__ = name
    return apply


for _name in (
    "getitem",
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "matmul",
    "rmatmul",
    "neg",
    "pow",
    "rpow",
    "lt",
    "le",
    "gt",
    "ge",
    "len",
):
    setattr(Handle, f"__{_name}__", _operator(f"__{_name}__"))

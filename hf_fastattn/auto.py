"""Paged by default: models that ask for "fastattn" generate over a PagedCache made for the call.

Importing the package registers, for each family of :data:`FAMILIES`, a config class with ``AutoConfig`` that builds
the native config. Only a config that asks for "fastattn" comes back as a same-named subclass, whose one purpose is to
lead ``AutoModelForCausalLM`` to a same-named subclass of the native model, which generates as paged_generation.py says.
Everything else is built as if this package were not there, and what is saved, copied or pickled of either class names
the native one (a deepcopy of the model stays paged). :func:`paged` does it for a model built otherwise.
"""

import copy
import functools
from typing import Any, Self, TypeVar

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .cache import IMPLEMENTATION
from .model_config import text_config
from .paged_generation import PagedGeneration
from .twofold import Twofold

FAMILIES = (
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "starcoder2",
)
"""Model types that are paged by default when an Auto class loads them with "fastattn"."""

Model = TypeVar("Model", bound=nn.Module)


class PagedByDefault(PagedGeneration):
    """A model class in the place of a native one, whose name it has and as which it is saved."""

    _native: type

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Build the native class after all unless "fastattn" is what the caller wants in the end."""
        builder: Any = super() if _asks(config, kwargs) else cls._native
        return builder.from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        builder: Any = super() if _asks(config, kwargs) else cls._native
        if type(config) is not cls.config_class:  # type: ignore[attr-defined]
            config = copy.deepcopy(config)
        return builder._from_config(config, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _as_native(super().__reduce_ex__(1), type(self), Twofold(type(self), self._native))

    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())  # type: ignore[attr-defined]
        return twin


@functools.cache
def _paged_class(native: Any) -> type:
    """Return the subclass of a model class that is paged by default; it has its name and module."""
    names = {name: getattr(native, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(native)(native.__name__, (PagedByDefault, native), names | {"_native": native})


def paged(model: Model) -> Model:
    """Make a model that is loaded already generate over a PagedCache by default.

    Args:
        model: a causal language model of transformers on "fastattn", or a PEFT model around one; it changes its class
            to a subclass of the same name.

    Returns:
        The same model.

    Raises:
        TypeError: no generating model of transformers. ValueError: another attention implementation, or a model that
            keeps other state than keys and values.
    """
    inner = _generating_model(model)
    found = text_config(inner.config)._attn_implementation
    if found != IMPLEMENTATION:
        raise ValueError(
            f"expected a model on {IMPLEMENTATION!r}, got one on {found!r}: load it with "
            f"attn_implementation={IMPLEMENTATION!r}, or call model.set_attn_implementation({IMPLEMENTATION!r}) first"
        )
    if not isinstance(inner, PagedByDefault):
        inner.__class__ = _paged_class(type(inner))  # type: ignore[arg-type]
    return model


def unpaged(model: Model) -> Model:
    """Undo :func:`paged`: the model has its native class again and generates over transformers' default cache."""
    inner = _generating_model(model)
    if isinstance(inner, PagedByDefault):
        inner.__class__ = inner._native
    return model


def _generating_model(model: Any) -> Any:
    """Return the model of transformers that ``model`` is or, with PEFT, wraps."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate():
        raise TypeError(
            f"expected a causal language model of transformers or a PEFT model around one, got {type(model).__name__}"
        )
    return inner


# Registration


class _RouterType(type):
    """Makes a registered config class act as the native one: it builds it, and what the native class made is its."""

    native: type

    def __new__(meta, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        if any(isinstance(base, _RouterType) for base in bases):  # whoever derives from it derives from the native one
            return type(name, tuple(base.native if isinstance(base, _RouterType) else base for base in bases), names)
        return super().__new__(meta, name, bases, names)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _routed(cls.native(*args, **kwargs), cls.native)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.native)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.native)


def register() -> None:
    """Register every family that this version of transformers has and that nobody else registered a class for."""
    for family in FAMILIES:
        if family in CONFIG_MAPPING and CONFIG_MAPPING[family].__module__.startswith("transformers."):
            AutoConfig.register(family, _router(CONFIG_MAPPING[family]), exist_ok=True)


def registered() -> list[str]:
    """Return the families that are paged by default."""
    return [family for family in FAMILIES if family in CONFIG_MAPPING and type(CONFIG_MAPPING[family]) is _RouterType]


def _router(native: Any) -> Any:
    """Return the config class to register; its module is the native one, so that remote code wins as before."""

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        made = native.from_dict(config_dict, **kwargs)
        _routed(made[0] if isinstance(made, tuple) else made, native)
        return made

    names = {name: getattr(native, name) for name in ("__module__", "__qualname__", "__doc__")}
    return _RouterType(native.__name__, (native,), names | {"native": native, "from_dict": classmethod(from_dict)})


def _routed(config: Any, native: Any) -> Any:
    """Return the config, as one that leads to the paged model class if it asks for "fastattn"."""
    if type(config) is native and config._attn_implementation == IMPLEMENTATION:
        asking = _asking_class(native)  # type: ignore[arg-type]
        # Every time: loading a checkpoint's own code, 5.17 registers that for the class of the config.
        AutoModelForCausalLM.register(asking, _paged_class(MODEL_FOR_CAUSAL_LM_MAPPING[native]), exist_ok=True)
        config.__class__ = asking
    return config


@functools.cache
def _asking_class(native: Any) -> type:
    """Return the subclass of a config class that AutoModelForCausalLM is to map to the paged model class.

    Its module is this one, since 5.17 ignores registrations for classes of transformers'. A copy or a pickle is a
    native config, and models get copies.
    """

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _as_native(native.__reduce_ex__(self, 1), type(self), native)

    return type(native)(
        native.__name__, (native,), {"__module__": __name__, "__doc__": native.__doc__, "__reduce_ex__": reduce_ex}
    )


def _asks(config: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a model built from a config with these arguments will be on "fastattn"."""
    wanted = kwargs.get("attn_implementation") or getattr(config, "_attn_implementation", None)
    return IMPLEMENTATION in (wanted.values() if isinstance(wanted, dict) else [wanted])


def _as_native(reduced: Any, ours: type, native: Any) -> Any:
    """Return what ``__reduce_ex__(1)`` gave, with the native class (in pickles) in the place of ours.

    From protocol 2 on, pickle insists on the object's own class.
    """
    make, args, *rest = reduced
    return (make, tuple(native if arg is ours else arg for arg in args), *rest)

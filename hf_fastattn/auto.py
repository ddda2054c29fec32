"""Paged by default: models that ask for "fastattn" generate over a PagedCache made for the call.

Importing the package registers, for each family of :data:`FAMILIES`, a config class with ``AutoConfig`` that builds
the native config. Only a config that asks for "fastattn" comes back as a same-named subclass, whose one purpose is to
lead ``AutoModelForCausalLM`` to a same-named subclass of the native model that overrides how generate() makes its
cache. Everything else is built as if this package were not there, and what is saved, copied or pickled of either
class names the native one (a deepcopy of the model stays paged). :func:`paged` does it for a model built otherwise.
"""

import copy
import functools
import weakref
from types import SimpleNamespace
from typing import Any, Self, TypeVar

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerationMode, StoppingCriteriaList
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .cache import BLOCK_SIZE, IMPLEMENTATION, PagedCache
from .compile_policy import Bucket, forgiving, gave_up, length_to_size, stays_eager
from .continuous import ContinuousBatching
from .generate import CACHE_NAME, generate
from .leases import lease
from .model_config import text_config

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

LOOK_EVERY = 16
"""Steps after which a GPU is asked which rows have finished: the host would wait for it at every one."""

Model = TypeVar("Model", bound=nn.Module)


# Generation


class PagedByDefault(ContinuousBatching):
    """What a model class gains: generate() makes a PagedCache unless the caller chose a cache or another attention."""

    _native: type
    passes_streamers_on = True

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        """Give our loop what transformers keeps from a function passed as custom_generate: streamer, tokenizer, ..."""
        if custom_generate is generate:
            custom_generate = None
        return super()._extract_generation_mode_kwargs(  # type: ignore[misc]
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        given = model_kwargs.get(CACHE_NAME)
        takes = _takes_paged_cache(self, generation_config, model_kwargs)
        if takes or isinstance(given, PagedCache):
            _check_layers(self)
        if isinstance(given, PagedCache) and max_cache_length > (given.state.max_length or max_cache_length):
            given.state.stretch()  # if it was an earlier call that sized it
        if not takes:
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, mode, batch_size, max_cache_length
            )
        sequences = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        rows = batch_size * sequences
        steps = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # others never take a compiled step
        probe = {CACHE_NAME: SimpleNamespace(is_compileable=True)}
        length = None
        if steps and max_cache_length > 0 and self._valid_auto_compile_criteria(probe, generation_config):
            config = text_config(self.config)  # type: ignore[attr-defined]
            new_tokens = _new_tokens(generation_config, model_kwargs, max_cache_length)
            length, bucket = length_to_size(self, config, rows, max_cache_length, new_tokens)
            generation_config._bucket_of_call = bucket
        model_kwargs[CACHE_NAME] = _make_cache(
            self, generation_config, model_kwargs, batch_size, max_cache_length, sequences, length
        )
        if steps and rows > 1 and not generation_config.return_dict_in_generate:  # nobody sees finished rows' logits
            generation_config._cache_of_call = weakref.ref(model_kwargs[CACHE_NAME])
        return None

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)  # type: ignore[misc]
        cache = vars(generation_config).pop("_cache_of_call", lambda: None)()
        bucket = vars(generation_config).pop("_bucket_of_call", None)
        if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            cache = None  # without such a criterion, rows that are finished go on with real tokens
        return criteria if cache is bucket is None else _TellingCriteria(criteria, cache, bucket)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        valid = super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]
        valid = valid and not hasattr(generation_config, "_prefills")
        return valid and not gave_up(self) and not stays_eager(self, generation_config)  # type: ignore[arg-type]

    def _prefill(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        generation_config._prefills = True  # pieces of a prompt run eagerly: each would be a graph of its own
        try:
            return super()._prefill(input_ids, generation_config, *args, **kwargs)  # type: ignore[misc]
        finally:
            del generation_config._prefills

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return the compiled model, which falls back to the model itself."""
        return forgiving(self, super().get_compiled_call(compile_config))  # type: ignore[arg-type,misc]

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
        return _as_native(super().__reduce_ex__(1), type(self), self._native)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[attr-defined]
        return twin


class _TellingCriteria(StoppingCriteriaList):
    """The stopping criteria of a call, which count its steps for the compile policy and watch who has finished.

    They tell the call's cache, if it is to know: finished rows are padded from then on.
    """

    def __init__(self, criteria: Any, cache: PagedCache | None, bucket: Bucket | None) -> None:
        super().__init__(criteria)
        self.cache: Any = _nothing if cache is None else weakref.ref(cache)
        self.bucket, self.calls = bucket, 0
        self.finished: Any = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return whether each row is finished, as transformers' list does."""
        done = super().__call__(input_ids, scores, **kwargs)
        if self.bucket is not None:
            self.bucket.steps += 1
        cache = self.cache()
        if cache is not None:
            self.finished = done if self.finished is None else self.finished | done
            self.calls += 1
            if _host_knows(done) or self.calls % LOOK_EVERY == 0:
                cache.state.finish(self.finished.tolist())
        return done


def _nothing() -> None:
    return None


def _host_knows(tensor: Any) -> bool:
    return tensor.is_cpu


def _check_layers(model: Any) -> None:
    """Raise where the config promises more layers than a model has: a forward pass ends with the last of them.

    Raises:
        ValueError: as said.
    """
    layers, promised = getattr(model.base_model, "layers", None), text_config(model.config).num_hidden_layers
    if isinstance(layers, nn.ModuleList) and len(layers) < promised:
        raise ValueError(
            f"the model has {len(layers)} layers, but its config says num_hidden_layers={promised}: lower it"
        )


def _takes_paged_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Return whether a call leaves the choice of its cache to us, and the model can use ours."""
    chosen = model_kwargs.get(CACHE_NAME) is not None or generation_config.cache_implementation is not None
    if chosen or generation_config.use_cache is False or not model._supports_default_dynamic_cache():
        return False
    try:
        return text_config(model.config)._attn_implementation == IMPLEMENTATION
    except ValueError:  # state other than keys and values
        return False


def _new_tokens(generation_config: Any, model_kwargs: dict[str, Any], max_cache_length: int) -> int:
    """Return how many tokens a call can add to each row at most."""
    if generation_config.max_new_tokens is not None:
        return generation_config.max_new_tokens
    given = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))  # 5.23 drops a mask of ones
    prompt_columns = next((x.shape[1] for x in given if x is not None and x.dim() == 2), 0)
    return max_cache_length + 1 - prompt_columns


def _make_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    batch_size: int,
    max_cache_length: int,
    sequences_per_prompt: int,
    length: int | None = None,
) -> PagedCache:
    """Return the cache of one call of generate(), over the model's idle pool if it has one.

    Args:
        model: the generating model.
        generation_config: the call's, all defaults filled in.
        model_kwargs: what the first forward pass gets, already repeated for beams and returned sequences.
        batch_size: prompts.
        max_cache_length: columns that the call can fill.
        sequences_per_prompt: rows that start from each prompt.
        length: tokens per sequence to size the cache for, so that its decode step is compiled; None: as needed.
    """
    states_differ = model_kwargs.get("encoder_outputs") is not None or model_kwargs.get("adapter_names") is not None
    if states_differ or model.training:  # of rows with the same tokens: dropout
        sequences_per_prompt = 1
    pool = lease(model, BLOCK_SIZE, text_config(model.config).num_hidden_layers)
    cache = PagedCache(
        model.config,
        max_length=length,
        reserve=max(max_cache_length, 1),
        sequences_per_prompt=sequences_per_prompt,
        pool=pool,
    )
    cache.state.elastic = length is not None
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        cache.state.prompt_columns = mask.shape[1]  # it may come in chunks
    return cache


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


def _as_native(reduced: Any, ours: type, native: type) -> Any:
    """Return what ``__reduce_ex__(1)`` gave, with the native class in the place of ours.

    From protocol 2 on, pickle insists on the object's own class.
    """
    make, args, *rest = reduced
    return (make, tuple(native if arg is ours else arg for arg in args), *rest)

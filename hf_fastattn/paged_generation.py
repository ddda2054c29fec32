"""How generate() runs over a PagedCache: the methods of transformers' GenerationMixin that a paged model overrides.

A call that leaves the choice of its cache open gets one made for it: over the model's idle memory, sized where the
decode step is worth compiling, and told which rows have finished, so that their blocks are freed.
"""

import threading
import weakref
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.generation import GenerationMode, StoppingCriteriaList

from .cache import BLOCK_SIZE, IMPLEMENTATION, PagedCache
from .compile_policy import Bucket, forgiving, gave_up, length_to_size, stays_eager
from .continuous import ContinuousBatching
from .fallback import warn_once
from .generate import CACHE_NAME, generate, is_replaced
from .leases import lease
from .model_config import text_config
from .prompt_copies import prefill_first_copies, treats_rows_alike

LOOK_EVERY = 16
"""Steps after which a GPU is asked which rows have finished: the host would wait for it at every one."""


class _Call(threading.local):
    """What a thread's current call of generate() told an earlier step of it."""

    is_foreign = False  # it runs a loop of the caller's


_call = _Call()


class PagedGeneration(ContinuousBatching):
    """What a model class gains: generate() makes a PagedCache unless the caller chose a cache or another attention."""

    passes_streamers_on = True

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        """Give our loop what transformers keeps from a function passed as custom_generate: streamer, tokenizer, ..."""
        if custom_generate is generate:
            custom_generate = None
        _call.is_foreign = custom_generate is not None
        return super()._extract_generation_mode_kwargs(  # type: ignore[misc]
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        given = model_kwargs.get(CACHE_NAME)
        takes = _takes_paged_cache(self, generation_config, model_kwargs)
        if takes or isinstance(given, PagedCache):
            takes = _check_layers(self, given) and takes
        if isinstance(given, PagedCache) and max_cache_length > (given.state.max_length or max_cache_length):
            given.state.stretch()  # if it was an earlier call that sized it
        if not takes:
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, mode, batch_size, max_cache_length
            )
        sequences = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        rows = batch_size * sequences
        foreign = _call.is_foreign or is_replaced(self, "_sample")  # who knows what such a loop feeds the rows
        steps = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # others never take a compiled step
        probe = {CACHE_NAME: SimpleNamespace(is_compileable=True)}
        length = None
        if steps and max_cache_length > 0 and self._valid_auto_compile_criteria(probe, generation_config):
            config = text_config(self.config)  # type: ignore[attr-defined]
            new_tokens = _new_tokens(generation_config, model_kwargs, max_cache_length)
            length, bucket = length_to_size(self, config, rows, max_cache_length, new_tokens)
            generation_config._bucket_of_call = bucket
        model_kwargs[CACHE_NAME] = _make_cache(
            self, generation_config, model_kwargs, max_cache_length, 1 if foreign else sequences, length
        )
        unseen = not generation_config.return_dict_in_generate  # nobody sees finished rows' logits
        if steps and rows > 1 and unseen and not foreign:
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

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        generation_config._prefills = True  # pieces of a prompt run eagerly: each would be a graph of its own
        prefill: Any = super()._prefill  # type: ignore[misc]

        def run(ids: Any, some: dict[str, Any]) -> Any:
            return prefill(ids, generation_config, some, *args, **kwargs)

        try:
            cache = model_kwargs.get(CACHE_NAME)
            return prefill_first_copies(self, run, cache, input_ids, generation_config, model_kwargs)  # type: ignore[arg-type]
        finally:
            del generation_config._prefills

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return the compiled model, which falls back to the model itself."""
        return forgiving(self, super().get_compiled_call(compile_config))  # type: ignore[arg-type,misc]


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


def _check_layers(model: Any, cache: Any) -> bool:
    """Return whether a model can use a PagedCache: a forward pass ends when the last layer attends, and it has to.

    Args:
        model: which generates.
        cache: that the caller gave.

    Raises:
        ValueError: the config promises more layers than there are, or a PagedCache was given that cannot be used.
    """
    layers, promised = getattr(model.base_model, "layers", None), text_config(model.config).num_hidden_layers
    if not isinstance(layers, nn.ModuleList):
        return True
    if len(layers) < promised:
        raise ValueError(
            f"the model has {len(layers)} layers, but its config says num_hidden_layers={promised}: lower it"
        )
    if _attends(layers[promised - 1]) or not any(map(_attends, layers)):  # as far as attention says which it is
        return True
    reason = "the last layer of the model does not attend, which ends a forward pass over a PagedCache"
    if isinstance(cache, PagedCache):
        raise ValueError(f"{reason}: lower num_hidden_layers and drop the layer, or pass another cache")
    warn_once(f"{reason}: generate() takes transformers' own cache")
    return False


def _attends(layer: nn.Module) -> bool:
    """Return whether something in a layer has a layer's number, as attention does."""
    return any(getattr(module, "layer_idx", None) is not None for module in layer.modules() if module is not layer)


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
    max_cache_length: int,
    sequences_per_prompt: int,
    length: int | None = None,
) -> PagedCache:
    """Return the cache of one call of generate(), over the model's idle pool if it has one.

    Args:
        model: the generating model.
        generation_config: the call's, all defaults filled in.
        model_kwargs: what the first forward pass gets, already repeated for beams and returned sequences.
        max_cache_length: columns that the call can fill.
        sequences_per_prompt: rows that start from each prompt.
        length: tokens per sequence to size the cache for, so that its decode step is compiled; None: as needed.
    """
    states_differ = model_kwargs.get("encoder_outputs") is not None or model_kwargs.get("adapter_names") is not None
    if sequences_per_prompt > 1 and (states_differ or not treats_rows_alike(model)):
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

"""The decoding loop for ``model.generate(..., custom_generate=hf_fastattn.generate)``.

Greedy search and sampling with transformers' own arguments and results, at less host work per token: ids and mask are
written in place, the inputs of a step are prepared once, and the mask is left out where the cache needs none. The one
decision: on a GPU the forward pass of the next token is queued before the host asks whether the last token was the end,
so that the GPU never waits for the answer. A pass that turns out to be one too many is taken out of the cache again;
logits processors, stopping criteria, streamers and random numbers never see it. What the host learns of finished rows
it tells a cache that nobody else sees, which frees their blocks: never early, on a GPU one pass late.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .block_pool import BlockPoolExhausted
from .cache import PagedCache
from .prompt_copies import prefill_first_copies

CACHE_NAME = "cache" if "cache" in inspect.signature(GenerateDecoderOnlyOutput).parameters else "past_key_values"
"""What transformers calls a cache among a model's arguments and outputs: it renamed ``past_key_values`` in 5.24.

``model(ids, **{hf_fastattn.CACHE_NAME: cache})`` runs with every version, without a warning that the name is old.
"""

SAMPLING = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)

MIN_CHUNK = 256
"""Prompt tokens per row below which a prefill that ran out of memory is not cut any further."""

ROOM = 1024
"""Columns behind the prompt that ids get room for at first: a limit may be far beyond what is ever generated."""

CUTTABLE = (CACHE_NAME, "attention_mask", "position_ids", "logits_to_keep")
"""Arguments other than plain values with which a prompt's forward pass can be cut into pieces."""

NATIVE = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill", "_sample")
"""Methods that a model must not have replaced, its class or (PEFT does) the object."""

GROWING = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "cache_position")
"""Arguments of a model that grow with every token; transformers' loop knows how."""


def generate(
    model: Any,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Generate tokens; not called directly but passed as ``custom_generate`` to a model's generate().

    Beam search goes to transformers' own loop, and so does whatever this one does not do: encoder-decoder models,
    use_cache=False, synced_gpus, an assistant's own calls, caches that are neither a PagedCache nor a plain growing
    one, models that prepare the inputs of a step in their own way (Phi-3, PEFT's prompt tuning), token types, inputs on
    another device than the model, and a length without limit or with a criterion of its own.

    Args:
        model: on "fastattn" from an Auto class, or given to :func:`hf_fastattn.paged`.
        input_ids: (batch_size, prompt columns).
        logits_processor, stopping_criteria, generation_config, synced_gpus, streamer: as in transformers' loop.
        model_kwargs: what the first forward pass gets.

    Returns:
        (batch_size, columns) ids, or a GenerateDecoderOnlyOutput with return_dict_in_generate.

    Raises:
        TypeError: a model of a native class: transformers would drop its streamer. ValueError: assisted generation.

    Tests: tests/transformers/test_generate.py, tests/transformers/test_generate_random.py,
    tests/test_generate_finished.py.
    """
    if not getattr(model, "passes_streamers_on", False):
        raise TypeError(
            f"expected a model that is paged by default, got a native {type(model).__name__}, for which transformers "
            "drops streamer and tokenizer beside custom_generate: call hf_fastattn.paged(model) first"
        )
    mode = generation_config.get_generation_mode(model_kwargs.pop("assistant_model", None))
    for name in ("tokenizer", "assistant_tokenizer"):
        model_kwargs.pop(name, None)
    arguments = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus)
    if mode in BEAMS:
        return model._beam_search(*arguments, **model_kwargs)
    if mode not in SAMPLING:
        raise ValueError(
            f"expected greedy search, sampling or beam search, got {mode.value.replace('_', ' ')}: call generate() "
            "without custom_generate"
        )
    elsewhere = input_ids.device != model.device  # transformers' loop moves the inputs of every step
    if synced_gpus or elsewhere or not _does(model, stopping_criteria, generation_config, model_kwargs):
        return model._sample(*arguments, streamer, **model_kwargs)
    return _Loop(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer).run(model_kwargs)


def _does(model: Any, stopping_criteria: StoppingCriteriaList, generation_config: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the loop below does a call exactly as transformers' loop would."""
    if any(is_replaced(model, name) for name in NATIVE):
        return False
    cache, mask, positions = (kwargs.get(name) for name in (CACHE_NAME, "attention_mask", "position_ids"))
    if cache is not None and not _is_paged(cache) and cache.is_compileable:
        return False  # the masks of a static cache change their content with every step
    return not (
        model.config.is_encoder_decoder
        or not generation_config.use_cache
        or generation_config.is_assistant
        or type(_limit(stopping_criteria)) is not MaxLengthCriteria  # of another class only it knows the verdict
        or any(kwargs.get(name) is not None for name in GROWING)
        or (mask is not None and mask.dim() != 2)
        or (positions is not None and positions.dim() != 2)
        or model.is_remote_code()
    )


def is_replaced(model: Any, name: str) -> bool:
    """Whether a model has a method of its own in the place of transformers'; this package's call that one."""
    others = (kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] != __package__)
    return name in vars(model) or next(kind for kind in others if name in vars(kind)) is not GenerationMixin


def _limit(criteria: StoppingCriteriaList) -> Any:
    return next((criterion for criterion in criteria if isinstance(criterion, MaxLengthCriteria)), None)


def _is_paged(cache: Any) -> bool:
    """Whether a cache stores no padding, so that a step needs no mask."""
    return isinstance(cache, PagedCache) and cache.uses_handles


class _Loop:
    """One call of generate()."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: Any,
        streamer: Any,
    ) -> None:
        self.model, self.processors, self.config, self.streamer = model, processors, config, streamer
        batch_size, self.num_columns = input_ids.shape
        self.limit = _limit(criteria)  # the host knows its verdict
        self.criteria = StoppingCriteriaList([c for c in criteria if c is not self.limit])
        self.told = criteria.cache() if hasattr(criteria, "cache") else None  # a list that tells the cache who finished
        self.bucket = getattr(criteria, "bucket", None)  # and counts steps
        # Others may keep, view or edit the ids: for them each step makes new ones, as transformers' loop does.
        self.foreign = any(not type(x).__module__.startswith("transformers.") for x in (*processors, *self.criteria))
        self.ids = input_ids
        self.token = torch.empty(batch_size, 1, dtype=torch.long, device=input_ids.device)
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self.pad = config._pad_token_tensor
        if self.pad is not None:
            self.pad = self.pad.to(input_ids.device)
        wanted = {name: getattr(config, f"output_{name}") for name in ("scores", "logits", "attentions")}
        wanted["hidden_states"] = config.output_hidden_states
        self.records: dict[str, Any] = {
            name: () if config.return_dict_in_generate and asked else None for name, asked in wanted.items()
        }

    def run(self, model_kwargs: dict[str, Any]) -> Any:
        """Generate until everything is finished; return what transformers' loop returns."""
        model, cache = self.model, model_kwargs.get(CACHE_NAME)
        compiled = model._valid_auto_compile_criteria(model_kwargs, self.config)
        forward = model.get_compiled_call(self.config.compile_config) if compiled else model.__call__
        outputs = _prefill(model, self.ids, self.config, model_kwargs)
        cache = outputs.get(CACHE_NAME, cache)
        deferred = _defers(self.token.device, cache)
        notice = _Notice(self.finished, self.token, self.streamer, self.told, deferred=deferred)
        step: _Step | None = None
        with model._optimize_model_for_decode():
            while True:
                self._choose(outputs)
                del outputs  # it may hold the logits of a whole prompt, or memory of a captured graph
                if self._end(notice):
                    break
                if step is None:
                    step = _Step(model, self._seen(), self.token, model_kwargs | _cached(cache))
                if self.foreign:
                    self.token.copy_(self.ids[:, -1:])
                try:
                    outputs = forward(**step.inputs(), return_dict=True)
                except (BlockPoolExhausted, torch.OutOfMemoryError):  # no room for a token that nobody may want
                    if not notice.wait():
                        raise
                    break
                if notice.wait():
                    cache.crop(-1)
                    break
        if self.streamer is not None:
            self.streamer.end()
        sequences: Any = self._seen() if self.foreign else self._seen().clone(memory_format=torch.contiguous_format)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: cache}, **self.records)

    def _choose(self, outputs: Any) -> None:
        """Choose the next token of every row, and append it to the ids."""
        processors, records, seen = self.processors, self.records, self._seen()
        logits = outputs.logits[:, -1]
        plain = not processors and not self.config.do_sample and records["scores"] is records["logits"] is None
        if logits.device != self.ids.device or logits.dtype == torch.float64 or not plain:
            logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = processors(seen, logits) if processors else logits
        found = {"scores": scores, "logits": logits}
        for name, record in records.items():
            if record is not None:
                records[name] = record + (found[name] if name in found else getattr(outputs, name),)
        if self.config.do_sample:
            token = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)
        else:
            token = torch.argmax(scores, dim=-1, keepdim=True)
        if self.pads:
            token = torch.where(self.finished[:, None], self.pad, token)
        self.token.copy_(token)
        if self.foreign:
            self.ids = torch.cat([self.ids, token], 1)
        else:
            if self.num_columns == self.ids.shape[1]:
                self._make_room()
            self.ids[:, self.num_columns : self.num_columns + 1] = token
        self.num_columns += 1

    def _end(self, notice: "_Notice") -> bool:
        """Apply the stopping criteria; return whether this is known to be the end."""
        full, longest = self.num_columns >= self.limit.max_length, self.limit.max_position_embeddings
        if self.bucket is not None:
            self.bucket.steps += 1
        if self.criteria:
            self.finished |= self.criteria(self._seen(), self.records["scores"]).bool()
        beyond = longest is not None and self.num_columns > longest
        if beyond:
            self.limit(self._seen(), None)  # warns, once
        return notice.give(bool(self.criteria), last=full, at_once=beyond) or full

    def _seen(self) -> Any:
        return self.ids if self.foreign else self.ids[:, : self.num_columns]

    def _make_room(self) -> None:
        """Let the ids grow: by as many columns as there are, but not beyond what the call can fill."""
        old = self.ids
        width = min(max(self.limit.max_length, self.num_columns + 1), self.num_columns + max(self.num_columns, ROOM))
        self.ids = torch.empty(len(old), width, dtype=torch.long, device=old.device)
        self.ids[:, : self.num_columns] = old


def _cached(cache: Any) -> dict[str, Any]:
    return {} if cache is None else {CACHE_NAME: cache}


class _Step:
    """The inputs of one decode step, prepared once and brought up to date in place."""

    def __init__(self, model: Any, ids: Tensor, token: Tensor, model_kwargs: dict[str, Any]) -> None:
        kwargs = dict(model_kwargs)
        cache, mask, positions = (kwargs.get(name) for name in (CACHE_NAME, "attention_mask", "position_ids"))
        self.cache = cache if _is_paged(cache) else None
        self.mask: Tensor | None = None
        if self.cache is not None:
            kwargs["attention_mask"] = None
        elif mask is not None:
            self.mask = mask.new_ones(mask.shape[0], mask.shape[1] + ROOM)
            self.mask[:, : mask.shape[1]] = mask
            self.columns = mask.shape[1]
        if positions is not None:
            # Before the first step. Contiguous: for other strides, of a single row too, steps are compiled anew.
            kwargs["position_ids"] = positions[:, -1:].clone(memory_format=torch.contiguous_format)
        self.prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        self.prepared["input_ids"] = token
        self.positions = self.prepared.get("position_ids")

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the next step's forward pass."""
        if self.positions is not None:
            self.positions.add_(1)
        if self.cache is not None:
            self.cache.mask_sizes(1)  # keeps compiled steps inside the capacity, as making a mask does
        if self.mask is not None:
            self.columns += 1
            if self.columns > self.mask.shape[1]:
                self.mask = torch.cat([self.mask, torch.ones_like(self.mask)], 1)
            self.prepared["attention_mask"] = self.mask[:, : self.columns]
        return self.prepared


class _Notice:
    """Tells the host and the cache which rows are finished, and a streamer which token came.

    On a CPU at once. On a GPU flags and token are copied to pinned memory behind the step that made them, and looked at
    when the next forward pass is queued: the copy is done before that pass begins.
    """

    def __init__(self, finished: Tensor, token: Tensor, streamer: Any, cache: Any, *, deferred: bool) -> None:
        self.finished, self.token, self.streamer, self.deferred = finished, token, streamer, deferred
        self.cache = cache  # that stores nothing for finished rows; None if it is not to be told
        self.told: list[bool] | None = None
        self.pending: Callable[[], bool] | None = None
        if deferred:
            pinned = token.is_cuda
            self.flags = torch.zeros(token.shape[0], dtype=torch.bool, pin_memory=pinned)
            self.copy = torch.empty(token.shape[0], dtype=token.dtype, pin_memory=pinned)
            self.event = torch.cuda.Event() if pinned else None

    def give(self, may_finish: bool, *, last: bool, at_once: bool) -> bool:
        """Look after a step: return True if everything is finished, as far as that is known without waiting.

        Args:
            may_finish: there is something besides the length that can end a row.
            last: the length ends all of them.
            at_once: wait for the answer: the model may have no position for a token too many.
        """
        if self.streamer is None and not may_finish:
            return False
        if not self.deferred or last or at_once:
            if self.streamer is not None:
                self.streamer.put(self.token[:, 0].to("cpu", copy=True))
            return may_finish and not last and self._learn(self.finished.tolist())
        self.flags.copy_(self.finished, non_blocking=True)
        if self.streamer is not None:
            self.copy.copy_(self.token[:, 0], non_blocking=True)
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(self.token.device))  # it need not be the current device
        self.pending = self._look
        return False

    def wait(self) -> bool:
        """Return whether everything was finished before the forward pass that is queued now."""
        pending, self.pending = self.pending, None
        return pending is not None and pending()

    def _look(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        if self.streamer is not None:
            self.streamer.put(self.copy.clone())
        return self._learn(self.flags.tolist())

    def _learn(self, flags: list[bool]) -> bool:
        if all(flags):
            return True
        if self.cache is not None and any(flags) and flags != self.told:
            self.cache.state.finish(flags)
            self.told = flags
        return False


def _defers(device: torch.device, cache: Any) -> bool:
    """Whether the host looks at a step's end one forward pass later: it must be possible to take that pass back."""
    return device.type == "cuda" and isinstance(cache, PagedCache)


def _prefill(model: Any, ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> Any:
    """Run the prompt; if it runs out of memory over an empty PagedCache, in halves, quarters and so on."""
    cache, width = model_kwargs.get(CACHE_NAME), ids.shape[1]
    whole = cache is None or cache.get_seq_length() or config.output_hidden_states or config.output_attentions
    others = (value for name, value in model_kwargs.items() if name not in CUTTABLE)
    whole = whole or any(not isinstance(value, (bool, int, float, str, type(None))) for value in others)
    try:
        return model._prefill(ids, config, model_kwargs)
    except torch.OutOfMemoryError:
        if whole or not _is_paged(cache) or width <= MIN_CHUNK or config.prefill_chunk_size is not None:
            raise
    return prefill_first_copies(model, partial(_prefill_in_pieces, model), cache, ids, config, model_kwargs)


def _prefill_in_pieces(model: Any, ids: Tensor, model_kwargs: dict[str, Any]) -> Any:
    """Run the prompt in two forward passes, or in more where one runs out of memory; return what the last one does."""
    width = ids.shape[1]
    start, chunk, outputs = 0, -(-width // 2), None
    while start < width:
        end = min(start + chunk, width)
        kwargs = dict(model_kwargs)
        for name in ("attention_mask", "position_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, :end]
        inputs = model.prepare_inputs_for_generation(ids[:, start:end], is_first_iteration=start == 0, **kwargs)
        outputs = None
        try:
            outputs = model(**inputs, return_dict=True)
            start = end
        except torch.OutOfMemoryError:
            if chunk <= MIN_CHUNK:
                raise
            chunk = -(-chunk // 2)
    return outputs

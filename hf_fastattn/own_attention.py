"""What the code of a model does by itself: all of attention, or telling its window by the mask alone.

Some of transformers' older models compute attention themselves, whatever they were asked for. transformers lets them
ask for any implementation that is registered, and hands its masks to them. What our attention function understands
would be a wrong mask to them: they get eager attention's. Others call attention functions without their window.
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

_known: dict[str, bool] = {}
_sdpa: dict[str, bool] = {}
_passing: dict[str, bool] = {}


def attends_itself(config: Any) -> bool:
    """Return whether models of a config's type never call an attention function.

    Args:
        config: a model's, or that of its text part. Where it is None, of a type that transformers does not know, or
            first seen while a graph is traced, the answer is no.
    """
    kind = getattr(config, "model_type", None)
    if kind is None:
        return False
    if kind not in _known and not torch.compiler.is_compiling():
        _known[kind] = _look(kind)
    return _known.get(kind, False)


def supports_sdpa(config: Any) -> bool:
    """Return whether models of a config's type may run under sdpa; answered as by :func:`attends_itself`.

    Of others nobody has seen to it that modules say whether they are causal: eager attention needs masks only.
    """
    kind = getattr(config, "model_type", None)
    if kind is None:
        return True
    if kind not in _sdpa and not torch.compiler.is_compiling():
        _sdpa[kind] = all(getattr(model, "_supports_sdpa", True) for model in _models(kind))
    return _sdpa.get(kind, True)


def _look(kind: str) -> bool:
    """Look whether the code of the models of a type knows of attention functions."""
    for model in _models(kind):
        known = hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS")
        return not (known or getattr(model, "_supports_attention_backend", True))
    return False


def _models(kind: str) -> Iterator[Any]:
    """Yield transformers' model classes of a type."""
    for mapping in (MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        names = mapping.get(kind) or ()
        for name in (names,) if isinstance(names, str) else names:
            model = getattr(transformers, name, None)
            if model is not None:
                yield model


def passes_window(config: Any) -> bool:
    """Return whether models of a config give attention their sliding window, instead of relying on the mask.

    Args:
        config: a model's, or that of a part. Where there is no code for it in transformers' way of naming files, or it
            is first seen while a graph is traced, the answer is yes.
    """
    configuration = type(config).__module__
    if configuration not in _passing and not torch.compiler.is_compiling():
        modeling = configuration.replace(".configuration_", ".modeling_")
        code = sys.modules.get(modeling) if modeling != configuration else None
        try:
            _passing[configuration] = code is None or "sliding_window=" in inspect.getsource(code)
        except OSError:  # installed without its source
            _passing[configuration] = True
    return _passing.get(configuration, True)

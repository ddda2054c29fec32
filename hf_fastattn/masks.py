"""The mask function: what transformers' mask machinery hands to the attention function under "fastattn".

transformers calls it once per forward pass and mask type, with the sizes that the cache reports; what it returns
reaches every layer unchanged. The kernels need no score mask for causal and sliding-window attention, so it returns
as little as is right: None, or key padding as int8 (a dtype that no user's own mask has), or else transformers'
boolean mask.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

from .columns import announced
from .fallback import warn_once
from .own_attention import attends_itself, passes_window, supports_sdpa


def fastattn_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of one forward pass.

    Args:
        batch_size, q_length: shape of the queries.
        kv_length: columns of keys; negative when a :class:`~hf_fastattn.PagedCache` holds them.
        q_offset, kv_offset: column of the first query and of the first key. Of a PagedCache, kv_offset 1 asks to look
            whether a single new column is hidden, although a GPU has to be waited for: not in every decode step.
        mask_function: transformers' description of the pattern.
        attention_mask: (batch_size, columns) bool, False at padding; None when there is none.
        local_size: window or chunk of the layers that this mask is for.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether a plain pattern may be left to the attention
        function. use_vmap: set for custom patterns. config: the model's config.

    Returns:
        None: what the attention module says, causal (with the layer's window) or everything; all columns visible.
        int8 (batch_size, 1, 1, columns): causal with the layer's window, where non-zero columns only are visible.
        uint8 (batch_size, 1, 1, columns): every non-zero column is visible to every query.
        bool (batch_size, 1, q_length, kv_length): exactly the pattern.
        What eager attention would get: for models that compute attention themselves.
    """
    if attends_itself(config):
        return _eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            config=config,
            **kwargs,
        )
    paged = kv_length < 0
    window_in_mask = local_size is not None and not passes_window(config)
    if paged and q_length == 1 and not use_vmap and not window_in_mask:
        return _of_one_query(attention_mask, look=kv_offset > 0)
    bidirectional = mask_function is bidirectional_mask_function
    if bidirectional:
        plain = allow_is_bidirectional_skip and local_size is None and not paged
    else:
        plain = allow_is_causal_skip and not (use_vmap or window_in_mask or _is_chunked(config, local_size))
    if paged:
        if plain:
            if _modules_may_not_be_causal(config):
                columns = int(q_offset) + q_length
                return _causal_for_sure(config, attention_mask, batch_size, columns, q_length, kwargs.get("device"))
            return None if attention_mask is None else _key_padding(attention_mask)
        kv_length, kv_offset = int(q_offset) + q_length, 0
    elif plain and bidirectional:
        if attention_mask is None and getattr(config, "is_causal", None) is not False:
            return None
        if attention_mask is None:  # a decoder made bidirectional by its config: its modules still say causal
            return torch.ones(batch_size, 1, 1, kv_length, dtype=torch.uint8, device=kwargs.get("device"))
        if attention_mask.shape[-1] == kv_offset + kv_length:
            return _key_padding(attention_mask[:, kv_offset:]).view(torch.uint8)
    elif plain and _ends_with_queries(q_length, kv_length, q_offset, kv_offset):
        if _modules_may_not_be_causal(config):
            seen = None if attention_mask is None else attention_mask[:, kv_offset:]
            return _causal_for_sure(config, seen, batch_size, kv_length, q_length, kwargs.get("device"))
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] == kv_offset + kv_length:
            return None if _hides_nothing(attention_mask) else _key_padding(attention_mask[:, kv_offset:])
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor for static caches
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        config=config,
        **kwargs,
    )


def _eager_mask(*, config: Any, **given: Any) -> Tensor:
    warn_once(
        f'models of type {config.model_type} compute attention themselves: attn_implementation="fastattn" changes '
        "nothing there, they run as with eager attention"
    )
    return eager_mask(config=config, **given)


def _of_one_query(attention_mask: Tensor | None, *, look: bool) -> Tensor | None:
    """Return the mask of one new column over blocks: it sees every token of its window, and padding is never stored.

    So there is none, unless the column is padding itself: that is looked for where it costs nothing, and where asked.
    """
    if torch.compiler.is_compiling():
        return None
    announced.hidden = False
    if attention_mask is None or not (look or attention_mask.is_cpu) or bool(attention_mask[:, -1].all()):
        return None
    announced.hidden = True
    return _key_padding(attention_mask)


def _modules_may_not_be_causal(config: PreTrainedConfig | None) -> bool:
    """Whether attention modules say that they are not causal although the mask is (PaliGemma's text model)."""
    return bool(getattr(config, "use_bidirectional_attention", False)) or _modules_say_nothing(config)


def _modules_say_nothing(config: PreTrainedConfig | None) -> bool:
    """Whether a decoder's modules leave causality to the mask: that of an encoder-decoder that sdpa does not serve."""
    return bool(getattr(config, "is_encoder_decoder", False)) and not supports_sdpa(config)


def _causal_for_sure(
    config: Any, attention_mask: Tensor | None, batch_size: int, columns: int, q_length: int, device: Any
) -> Tensor | None:
    """Return a mask that is causal whatever the modules say; None where sdpa leaves the pattern to them."""
    whole = columns == q_length and (attention_mask is None or _is_all_ones(attention_mask))
    if whole and not _modules_say_nothing(config):
        return None
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, columns, dtype=torch.bool, device=device)
    return _key_padding(attention_mask)


def _hides_nothing(attention_mask: Tensor) -> bool:
    """Whether no column is hidden, where asking costs nothing: a GPU would have to be waited for."""
    return attention_mask.is_cpu and _is_all_ones(attention_mask)


def _is_all_ones(attention_mask: Tensor) -> bool:
    """Whether no column is hidden, as far as a graph that is traced may know."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and bool(attention_mask.all())


def _key_padding(attention_mask: Tensor) -> Tensor:
    return attention_mask[:, None, None, :].to(torch.int8)


def _ends_with_queries(q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> bool:
    """Whether the last key belongs to the last query: not so for StaticCache, whose keys reach to its capacity."""
    return not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length


def _is_chunked(config: PreTrainedConfig | None, local_size: int | None) -> bool:
    """Whether a local pattern is chunked attention, which arrives like a sliding window."""
    return local_size is not None and getattr(config, "attention_chunk_size", None) == local_size

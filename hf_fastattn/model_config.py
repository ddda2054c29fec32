"""What a model's config says about its cache. Configs are read, never changed, so this needs no transformers."""

from typing import Any

_ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local"}


def text_config(config: Any) -> Any:
    """Return the config of the text decoder, or raise if a PagedCache cannot serve it."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ValueError(
            f"PagedCache serves decoder-only models, not the encoder-decoder {config.model_type}: use its default cache"
        )
    if getattr(text, "cross_attention_layers", None):
        raise ValueError(
            f"PagedCache stores the text's keys and values only, {config.model_type} also attends to images in layers "
            "of their own: use its default cache"
        )
    other = sorted(set(layer_types(text)) - _ATTENTION_TYPES)
    if other:
        raise ValueError(
            f"PagedCache stores keys and values only, {config.model_type} also has {', '.join(other)} layers: "
            "use its default cache"
        )
    return text


def layer_types(config: Any) -> list[str]:
    """Return the kinds of layers a text config names, without repeats where it names none."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is None:
        types = ["chunked_attention"] if getattr(config, "attention_chunk_size", None) else ["full_attention"]
    return list(types)


def num_layers(config: Any) -> int | None:
    """Return how many layers a config names at the moment (early exit lowers it); None if it names none."""
    layers = vars(config).get("num_hidden_layers")  # a config takes its time to answer
    return getattr(config, "num_hidden_layers", None) if layers is None else layers


def last_caching_layer(config: Any) -> int:
    """Return the last layer that stores keys and values of its own (later ones may share those of earlier layers)."""
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return max(i for i, mode in enumerate(modes) if mode != "reuse")
    return config.num_hidden_layers - 1 - (getattr(config, "num_kv_shared_layers", None) or 0)


def window_of_all_layers(config: Any) -> int | None:
    """Return the tokens that a query sees at most in any layer of a text config; None if some layer sees all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]  # older configs name a window and no types
    return window if window and all(kind == "sliding_attention" for kind in types) else None

"""The ops: tensors in, tensors out. Each file holds one op's definition, contract and PyTorch implementation."""

from ._library import is_direct
from .decode_attention import decode_at_once, decode_attention
from .decode_linear import decode_linear, decode_linear_group
from .decode_schedule import decode_schedule
from .packed_attention import packed_attention
from .prefill_attention import prefill_attention
from .shapes import MAX_DECODE_QUERY_LEN, NO_WINDOW
from .store_kv import store_kv

__all__ = [
    "MAX_DECODE_QUERY_LEN",
    "NO_WINDOW",
    "decode_at_once",
    "decode_attention",
    "decode_linear",
    "decode_linear_group",
    "decode_schedule",
    "is_direct",
    "packed_attention",
    "prefill_attention",
    "store_kv",
]

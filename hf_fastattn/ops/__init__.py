"""The ops: tensors in, tensors out. Each file holds one op's definition, contract and PyTorch implementation."""

from .decode_attention import decode_attention
from .prefill_attention import prefill_attention
from .shapes import MAX_DECODE_QUERY_LEN, NO_WINDOW
from .store_kv import store_kv

__all__ = ["MAX_DECODE_QUERY_LEN", "NO_WINDOW", "decode_attention", "prefill_attention", "store_kv"]

"""hf_fastattn makes Hugging Face ``generate()`` fast: FlashAttention-2 prefill and flash-decoding over a paged KV
cache.

Importing registers the attention implementation "fastattn" with transformers; nothing else about transformers changes.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import fastattn_attention
from .block_pool import BlockPoolExhausted
from .cache import IMPLEMENTATION, PagedCache
from .masks import fastattn_mask
from .version import __version__

__all__ = ["IMPLEMENTATION", "BlockPoolExhausted", "PagedCache", "__version__"]

AttentionInterface.register(IMPLEMENTATION, fastattn_attention)
AttentionMaskInterface.register(IMPLEMENTATION, fastattn_mask)

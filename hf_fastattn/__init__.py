"""hf_fastattn makes Hugging Face ``generate()`` fast: FlashAttention-2 prefill and flash-decoding over a paged KV
cache.

Importing registers the attention implementation "fastattn" with transformers, and config classes that make the models
that ask for it page their cache; nothing else about transformers changes.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from . import auto
from .attention import fastattn_attention
from .auto import paged, unpaged
from .block_pool import BlockPoolExhausted
from .cache import IMPLEMENTATION, PagedCache
from .continuous import CONTINUOUS, TAKES_PREFIX, continuous_attention
from .generate import CACHE_NAME, generate
from .leases import release
from .linear import optimize_linears, restore_linears
from .masks import fastattn_mask
from .prefix_store import PrefixStats, PrefixStore
from .stats import CacheStats, plot_blocks
from .version import __version__
from .warmup import warmup

__all__ = [
    "CACHE_NAME",
    "IMPLEMENTATION",
    "BlockPoolExhausted",
    "CacheStats",
    "PagedCache",
    "PrefixStats",
    "PrefixStore",
    "__version__",
    "generate",
    "optimize_linears",
    "paged",
    "plot_blocks",
    "release",
    "restore_linears",
    "unpaged",
    "warmup",
]

AttentionInterface.register(IMPLEMENTATION, fastattn_attention)
AttentionInterface.register(CONTINUOUS, continuous_attention)
AttentionMaskInterface.register(IMPLEMENTATION, fastattn_mask)
if not TAKES_PREFIX:  # 5.17 would ask for a mask of packed rows
    AttentionMaskInterface.register(CONTINUOUS, fastattn_mask)
auto.register()

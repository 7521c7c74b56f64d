"""Where keys and values of served sequences are kept: blocks, tensors, and attention over them."""

from .attend import PagedAttend, Span
from .blocks import BLOCK_SIZE, BlockManager, KeyChain
from .budget import pool_blocks
from .key_bias import Angles
from .kv import KVCache, cache_dtype, kv_bytes_per_token

__all__ = [
    "BLOCK_SIZE",
    "Angles",
    "BlockManager",
    "KVCache",
    "KeyChain",
    "PagedAttend",
    "Span",
    "cache_dtype",
    "kv_bytes_per_token",
    "pool_blocks",
]

"""Where keys and values of served sequences are kept: blocks, tensors, and attention over them."""

from .attend import PagedAttend, Span
from .blocks import BLOCK_SIZE, BlockManager, KeyChain
from .budget import pool_blocks
from .kv import KVCache, cache_dtype

__all__ = ["BLOCK_SIZE", "BlockManager", "KVCache", "KeyChain", "PagedAttend", "Span", "cache_dtype", "pool_blocks"]

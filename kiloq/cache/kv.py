"""The cache's tensors: keys and values of every layer by slot. Knows no sequences; slots come in as numbers.

A slot is block * BLOCK_SIZE + offset. Tokens come first, [slots, K, D]: so a gather of tokens copies contiguous memory,
and a run of neighbouring blocks is a plain slice.
"""

import torch
from torch import Tensor

from kiloq.errors import ConfigError
from kiloq.model import ModelConfig

from .blocks import BLOCK_SIZE


class KVCache:
    """One tensor pair per layer, [num_blocks * BLOCK_SIZE, K, D]; memory is touched only where tokens are written."""

    def __init__(self, config: ModelConfig, num_blocks: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.heads_per_key = config.num_heads // config.num_kv_heads
        self.dtype = dtype
        self.device = device
        shape = (config.num_layers, num_blocks * BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device).unbind(0)
        self.values = torch.empty(shape, dtype=dtype, device=device).unbind(0)

    def write_kv(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v, [T, K, D], in the slots [T] of one layer."""
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)


def cache_dtype(kv_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """The type that keys and values are kept in; "auto" is the model's own."""
    if kv_dtype == "auto":
        return model_dtype
    raise ConfigError(f'kv_dtype is {kv_dtype!r}; this version keeps the cache in the model\'s own type: pass "auto".')

"""The cache's tensors: keys and values of every layer by slot. Knows no sequences; slots come in as numbers.

A slot is block * BLOCK_SIZE + offset. Tokens come first, [slots, K, D]: so a gather of tokens copies contiguous memory,
and a run of neighbouring blocks is a plain slice. int8 keeps codes and one fp16 scale per slot and head; its keys are
kept without their turned bias (key_bias.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kiloq import ops
from kiloq.errors import ConfigError
from kiloq.model import ModelConfig, Transformer

from .blocks import BLOCK_SIZE
from .key_bias import Angles, largest_pairs

_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LONG_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_SCALE = torch.float16


class KVCache:
    """One tensor pair per layer, [num_blocks * BLOCK_SIZE, K, D]; memory is touched only where tokens are written.

    int8 has `key_scales` and `value_scales` too, [slots, K]. `key_biases` are [K, D] fp32, or None where keys are kept
    whole; if any layer has one, `angles` turns it.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        key_biases: Sequence[Tensor | None] | None = None,
        angles: Angles | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.heads_per_key = config.num_heads // config.num_kv_heads
        self.dtype = dtype
        self.device = device
        self.key_biases = [None] * config.num_layers if key_biases is None else list(key_biases)
        self.angles = angles
        assert angles is not None or not any(bias is not None for bias in self.key_biases), "biases need angles"
        slots = num_blocks * BLOCK_SIZE
        shape = (config.num_layers, slots, config.num_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device).unbind(0)
        self.values = torch.empty(shape, dtype=dtype, device=device).unbind(0)
        self.key_scales: tuple[Tensor, ...] = ()
        self.value_scales: tuple[Tensor, ...] = ()
        if dtype == torch.int8:
            self.key_scales = torch.empty(shape[:3], dtype=_SCALE, device=device).unbind(0)
            self.value_scales = torch.empty(shape[:3], dtype=_SCALE, device=device).unbind(0)

    @classmethod
    def for_model(cls, model: Transformer, num_blocks: int, dtype: torch.dtype) -> "KVCache":
        """A cache on the model's device; an int8 one leaves the model's key biases out of what it keeps."""
        device = next(model.parameters()).device
        biases = model.key_biases() if dtype == torch.int8 else [None] * model.config.num_layers
        # A bias of zeros is none: there is nothing to leave out.
        rotary_dim = model.config.rope.rotary_dim
        biases = [None if b is None or not b.any() else largest_pairs(b.float(), rotary_dim) for b in biases]
        angles = Angles(model.rope, device) if any(bias is not None for bias in biases) else None
        return cls(model.config, num_blocks, dtype=dtype, device=device, key_biases=biases, angles=angles)

    def write_kv(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, [T, K, D], in the slots [T] of one layer; returns what reading them gives."""
        kept_k = _write(self.keys, self.key_scales, layer, slots, k)
        return kept_k, _write(self.values, self.value_scales, layer, slots, v)

    def keys_at(self, layer: int, slots: Tensor | slice) -> Tensor:
        """Keys of n slots, less their turned bias where `key_biases` has one: [n, K, D]; fp32 from int8."""
        return _read(self.keys, self.key_scales, layer, slots)

    def values_at(self, layer: int, slots: Tensor | slice) -> Tensor:
        """Values of n slots, [n, K, D]; fp32 from int8."""
        return _read(self.values, self.value_scales, layer, slots)


def cache_dtype(kv_dtype: str, model: Transformer) -> torch.dtype:
    """The type that keys and values are kept in; "auto" is that of the model's weights, and bf16 beside packed ones."""
    name = _LONG_NAMES.get(kv_dtype, kv_dtype)
    if name == "auto":
        return model.embed.weight.dtype if isinstance(model.embed, nn.Embedding) else torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"kv_dtype is {kv_dtype!r}; it must be auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token takes in a cache of this type, scales included."""
    return config.kv_bytes_per_token(dtype.itemsize, scale_bytes=_SCALE.itemsize if dtype == torch.int8 else 0)


def _write(kept: Sequence[Tensor], scales: Sequence[Tensor], layer: int, slots: Tensor, x: Tensor) -> Tensor:
    if not scales:
        x = x.to(kept[layer].dtype)
        kept[layer].index_copy_(0, slots, x)
        return x
    codes, steps = ops.quantize_heads(x)
    kept[layer].index_copy_(0, slots, codes)
    scales[layer].index_copy_(0, slots, steps)
    return codes * steps.float()[..., None]


def _read(kept: Sequence[Tensor], scales: Sequence[Tensor], layer: int, slots: Tensor | slice) -> Tensor:
    x = _at(kept[layer], slots)
    return x * _at(scales[layer], slots).float()[..., None] if scales else x


def _at(kept: Tensor, slots: Tensor | slice) -> Tensor:
    return kept[slots] if isinstance(slots, slice) else kept.index_select(0, slots)

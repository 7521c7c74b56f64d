"""Tiny networks of each family, for tests of what is around them."""

from typing import Any

import torch

from kiloq.model import ModelConfig, RopeConfig, Transformer
from kiloq.model.config import Family


def tiny_config(family: Family = "qwen2", *, original_length: int = 64, **changes: Any) -> ModelConfig:
    """Two layers of four heads of 8; the first generation with its NTK and LogN beyond `original_length`, the others
    with two key heads. `changes` are of ModelConfig's fields."""
    is_first = family == "qwen"
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4 if is_first else 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "qkv_bias": family != "qwen3",
        "qk_norm": family == "qwen3",
        "logn_length": original_length if is_first else None,
        "max_length": 256,
    }
    fields |= changes
    kind = "qwen1" if is_first else "plain"
    turned = {"rope": RopeConfig(rotary_dim=fields["head_dim"], kind=kind, original_length=original_length)}
    return ModelConfig(family=family, **({"windows": (None,) * fields["num_layers"]} | turned | fields))


def tiny_network(config: ModelConfig, seed: int = 0) -> Transformer:
    """With random weights, the same for the same seed."""
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model

"""The shapes of published models by short name, for measuring with random weights. Data only."""

from difflib import get_close_matches

from kiloq.errors import ConfigError
from kiloq.model import ModelConfig


def _qwen1(vocabulary: int, hidden: int, layers: int, width: int, length: int = 8192) -> dict[str, object]:
    return {
        "model_type": "qwen",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "kv_channels": 128,
        "intermediate_size": 2 * width,  # v1 files hold twice the width of the MLP
        "no_bias": True,
        "tie_word_embeddings": False,
        "seq_length": length,
        "max_position_embeddings": max(length, 8192),
        "torch_dtype": "bfloat16",
    }


def _later(
    model_type: str, hidden: int, layers: int, heads: tuple[int, int, int], width: int, tied: bool
) -> dict[str, object]:
    """heads: those of queries, those of keys and values, dimensions of each."""
    wide = model_type == "qwen2" and hidden >= 3584  # 2.5's vocabulary is padded further from 7B on
    return {
        "model_type": model_type,
        "vocab_size": 152_064 if wide else 151_936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "intermediate_size": width,
        "tie_word_embeddings": tied,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
        "torch_dtype": "bfloat16",
    }


SHAPES: dict[str, dict[str, object]] = {
    "qwen-1.8b": _qwen1(151_936, 2048, 24, 5504),
    "qwen-7b": _qwen1(151_936, 4096, 32, 11_008),
    "qwen-14b": _qwen1(152_064, 5120, 40, 13_696, 2048),
    # Not published: small enough to train on any machine, with the vocabulary of the large ones.
    "qwen2.5-0.1b": _later("qwen2", 512, 12, (8, 2, 64), 1408, True),
    "qwen2.5-0.5b": _later("qwen2", 896, 24, (14, 2, 64), 4864, True),
    "qwen2.5-1.5b": _later("qwen2", 1536, 28, (12, 2, 128), 8960, True),
    "qwen2.5-3b": _later("qwen2", 2048, 36, (16, 2, 128), 11_008, True),
    "qwen2.5-7b": _later("qwen2", 3584, 28, (28, 4, 128), 18_944, False),
    "qwen2.5-14b": _later("qwen2", 5120, 48, (40, 8, 128), 13_824, False),
    "qwen3-0.6b": _later("qwen3", 1024, 28, (16, 8, 128), 3072, True),
    "qwen3-1.7b": _later("qwen3", 2048, 28, (16, 8, 128), 6144, True),
    "qwen3-4b": _later("qwen3", 2560, 36, (32, 8, 128), 9728, True),
    "qwen3-8b": _later("qwen3", 4096, 36, (32, 8, 128), 12_288, False),
}


def shape_config(name: str) -> ModelConfig:
    """The configuration of a named shape; ConfigError with the nearest name for any other."""
    found = SHAPES.get(name.lower())
    if found is None:
        near = get_close_matches(name.lower(), SHAPES, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no shape {name!r}. {meant}The shapes are {', '.join(SHAPES)}.")
    return ModelConfig.from_hf(found)

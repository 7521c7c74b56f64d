"""A model small enough to be measured in a test."""

import pytest

from kiloq.model import ModelConfig


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "model_type": "qwen2",
            "vocab_size": 500,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": 512,
        }
    )

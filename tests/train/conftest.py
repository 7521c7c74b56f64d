"""A vocabulary of single bytes and models small enough to train within a test."""

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kiloq.model import ModelConfig, RopeConfig, Transformer
from kiloq.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (folder / "bytes.tiktoken").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(byte_vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(byte_vocabulary)


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(vocab_size: int = 64, *, num_kv_heads: int = 4, window: int | None = None, seed: int = 0) -> Transformer:
        config = ModelConfig(
            family="qwen",
            vocab_size=vocab_size,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=num_kv_heads,
            head_dim=8,
            intermediate_size=48,
            qkv_bias=True,
            rope=RopeConfig(rotary_dim=8, kind="qwen1", original_length=64),
            logn_length=64,
            windows=(window, None),
            max_length=256,
        )
        model = Transformer(config)
        model.init_weights(torch.Generator().manual_seed(seed))
        return model

    return make

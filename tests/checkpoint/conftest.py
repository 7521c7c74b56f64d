"""Tiny random checkpoints of every family, written once per session by transformers and by our own writer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kiloq.checkpoint import GenerationDefaults, save_checkpoint
from kiloq.model import ModelConfig, Transformer
from kiloq.model.config import Family
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.train import train_tokenizer
from tests.tiny import tiny_config

TEXT = """The cat sat on the mat, and the dog sat by the door. 你好，世界！你好吗？我很好。
안녕하세요, 세계! 안녕히 가세요. user system assistant\n
    def add(a, b):\n        return a + b\n\n1234567 don't can't it's    naïve café\r\n"""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT] * 3, 256 + 208 + 60, output=folder / "qwen.tiktoken")
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def make_config(tokenizer: Tokenizer) -> Callable[..., ModelConfig]:
    """A configuration of a family small enough for a test; keywords replace fields."""

    def make(family: Family, **changes: object) -> ModelConfig:
        shape = {"vocab_size": tokenizer.size + 4, "dtype": "float32"}  # spare rows, as every published model has
        shape |= {"head_dim": 16 if family == "qwen3" else 8}
        return tiny_config(family, original_length=64 if family == "qwen" else 256, **(shape | changes))

    return make


@pytest.fixture(scope="session")
def random_model() -> Callable[[ModelConfig], Transformer]:
    """A model with nothing at its initial value: norms are not one and biases are not zero."""

    def make(config: ModelConfig) -> Transformer:
        generator = torch.Generator().manual_seed(7)
        model = Transformer(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def chat_defaults(tokenizer: Tokenizer) -> GenerationDefaults:
    return GenerationDefaults(
        stop_ids=(tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.end_of_text_id),
        pad_id=tokenizer.end_of_text_id,
        chat_format="chatml",
        max_window=200,
        max_tokens=64,
        temperature=0.7,
        top_k=5,
        top_p=0.8,
        repetition_penalty=1.1,
    )


@pytest.fixture
def write(
    tmp_path: Path,
    tokenizer: Tokenizer,
    chat_defaults: GenerationDefaults,
    make_config: Callable[..., ModelConfig],
    random_model: Callable[[ModelConfig], Transformer],
) -> Callable[..., tuple[Path, Transformer]]:
    """Write a random checkpoint with our writer; gives the folder and the model that was written."""

    def make(
        family: Family = "qwen2",
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_bytes: int = 10**9,
        **changes: object,
    ) -> tuple[Path, Transformer]:
        model = random_model(make_config(family, **changes)).to(dtype)
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        save_checkpoint(
            folder,
            model_state=model.state_dict(),
            config=model.config,
            tokenizer=tokenizer,
            generation=chat_defaults,
            max_shard_bytes=max_shard_bytes,
        )
        return folder, model

    return make

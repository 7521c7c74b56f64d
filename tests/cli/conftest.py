"""A tiny random chat model of Qwen v1's format. It says nonsense, but sampling, history and files are real."""

from pathlib import Path

import pytest

from kiloq.checkpoint import GenerationDefaults, save_checkpoint
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.train import train_tokenizer
from tests.tiny import tiny_config, tiny_network

TEXT = "You are a helpful assistant. system user assistant 你好，世界！ 안녕하세요 The cat sat on the mat."


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model; it answers at most 24 tokens, at random unless told otherwise."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    train_tokenizer([TEXT] * 3, 256 + 208 + 40, output=vocabulary / "qwen.tiktoken")
    tokenizer = Tokenizer.load(vocabulary)
    shape = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "max_length": 1024}
    config = tiny_config("qwen", original_length=512, vocab_size=tokenizer.size, dtype="float32", **shape)
    model = tiny_network(config, seed=5)
    save_checkpoint(
        folder,
        model_state=model.state_dict(),
        config=config,
        tokenizer=tokenizer,
        generation=GenerationDefaults(
            stop_ids=(tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.end_of_text_id),
            pad_id=tokenizer.end_of_text_id,
            chat_format="chatml",
            max_window=800,
            max_tokens=24,
        ),
    )
    return folder

"""A tiny random chat model and base model in Qwen v1's file format, written by our own writer."""

from pathlib import Path

import pytest

from kiloq.checkpoint import GenerationDefaults, save_checkpoint
from kiloq.compat import AutoModelForCausalLM, AutoTokenizer, CausalLM, QwenTokenizer
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.train import train_tokenizer
from tests.tiny import tiny_config, tiny_network

TEXT = "user assistant system You are a helpful assistant. Observation: 你好，世界！안녕하세요 café 1234 " * 4


def write_model(folder: Path, tokenizer: Tokenizer, chat_format: str) -> Path:
    config = tiny_config("qwen", vocab_size=tokenizer.size + 3, max_length=512, dtype="float32")
    model = tiny_network(config, seed=1)
    state = {name: tensor * 4 if tensor.ndim == 2 else tensor for name, tensor in model.state_dict().items()}
    for token_id in range(config.vocab_size):  # greedy answers are plain ASCII
        if token_id in tokenizer.control_ids or not tokenizer.token_bytes(token_id).isascii():
            state["head.weight"][token_id] = 0
    ends = (tokenizer.im_end_id, tokenizer.im_start_id) if chat_format == "chatml" else ()
    generation = GenerationDefaults(
        stop_ids=(*ends, tokenizer.end_of_text_id),
        pad_id=tokenizer.end_of_text_id,
        chat_format="chatml" if chat_format == "chatml" else "raw",
        max_window=400,
        max_tokens=12,
        top_p=0.8,
        repetition_penalty=1.1,
    )
    save_checkpoint(folder, model_state=state, config=config, tokenizer=tokenizer, generation=generation)
    return folder


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    train_tokenizer([TEXT], 256 + 208 + 60, output=folder / "qwen.tiktoken")
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, vocabulary: Tokenizer) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "chat", vocabulary, "chatml")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, vocabulary: Tokenizer) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base", vocabulary, "raw")


@pytest.fixture(scope="session")
def tokenizer(chat_folder: Path) -> QwenTokenizer:
    return AutoTokenizer.from_pretrained(chat_folder, trust_remote_code=True)


@pytest.fixture
def model(chat_folder: Path) -> CausalLM:
    return AutoModelForCausalLM.from_pretrained(chat_folder, device_map="cpu", trust_remote_code=True).eval()

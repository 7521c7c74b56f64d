"""Two small vocabularies: in Qwen v1's file format, and in that of Qwen2 and 3, which transformers reads too."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.train import train_tokenizer
from kiloq.tokenizer.vocabulary import QWEN_PATTERN

CORPUS = [
    "You are a helpful assistant. You are Qwen, created by Alibaba Cloud.\n\nuser assistant system\n",
    "Question: Thought: Action: Action Input: Observation: Final Answer: Begin!",
    "# Tools\n\nYou may call one or more functions. {\"name\": \"arguments\"} <tool_call> <tools> <think>\n",
    "你好，我是一个语言模型。今天天气怎么样？ 안녕하세요. 반갑습니다.",
] * 4  # fmt: skip


@pytest.fixture(scope="session")
def v1_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("v1") / "tiny.tiktoken"
    train_tokenizer(CORPUS, 600, output=path)
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def fast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fast = FastTokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    names = ("tool_call", "tool_response", "think")
    fast.add_tokens([AddedToken(f"<{mark}{name}>", special=False) for name in names for mark in ("", "/")])
    folder = tmp_path_factory.mktemp("fast")
    fast.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def fast_tokenizer(fast_folder: Path) -> Tokenizer:
    return Tokenizer.load(fast_folder)

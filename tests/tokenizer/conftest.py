"""A small vocabulary that every test may use, and the real one where it is at hand."""

from pathlib import Path

import pytest

from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.train import train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's late; we'll see that they're there, I'm sure you've heard.",
    "def add(left, right):\n    return left + right\n\n\nprint(add(1, 2))  # 3\n",
    "你好，世界。今天天气很好，我们一起去公园散步吧。一只猫在椅子上睡觉，另一只猫在看窗外的鸟。",
    "안녕하세요. 오늘은 날씨가 아주 좋습니다. 고양이 한 마리가 의자 위에서 자고 있습니다.",
    "Die Straße ist naß; café, naïve, crème brûlée. Привет, как дела? こんにちは、元気ですか。",
    "the cat sat on the mat, and then the cat ran; there, the other cats were waiting for the rain to end.",
]


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `.tiktoken` of 600 ids, learned from a few sentences."""
    folder = tmp_path_factory.mktemp("small")
    train_tokenizer(TEXTS, 600, output=folder / "small.tiktoken", min_count=1)
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Tokenizer:
    return Tokenizer.load(small_folder)


@pytest.fixture(scope="session")
def real(shared_data: Path) -> Tokenizer:
    """The vocabulary of Qwen v1."""
    return Tokenizer.load(shared_data / "tokenizer" / "qwen.tiktoken")

"""A small vocabulary that every test may use, and the real one where it is at hand."""

import json
import tarfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.formats_hf import byte_of_character
from kiloq.tokenizer.train import train_tokenizer
from kiloq.tokenizer.vocabulary import QWEN_PATTERN

CHARACTER_OF_BYTE = {byte: character for character, byte in byte_of_character().items()}
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's late; we'll see that they're there, I'm sure you've heard.",
    "def add(left, right):\n    return left + right\n\n\nprint(add(1, 2))  # 3\n",
    "你好，世界。今天天气很好，我们一起去公园散步吧。一只猫在椅子上睡觉，另一只猫在看窗外的鸟。",
    "안녕하세요. 오늘은 날씨가 아주 좋습니다. 고양이 한 마리가 의자 위에서 자고 있습니다.",
    "Die Straße ist naß; café, naïve, crème brûlée. Привет, как дела? こんにちは、元気ですか。",
    "the cat sat on the mat, and then the cat ran; there, the other cats were waiting for the rain to end.",
]


CONTROL = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<tool_call>": False, "<think>": False}

Json = dict[str, Any]


def as_characters(piece: bytes) -> str:
    return "".join(CHARACTER_OF_BYTE[byte] for byte in piece)


def merges_of(ranks: Mapping[bytes, int]) -> list[list[str]]:
    """The two parts that each piece is merged from: what is left of it when only smaller ranks may merge."""
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in piece]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([as_characters(part) for part in parts])
    return merges


def tokenizer_json(ranks: Mapping[bytes, int]) -> Json:
    """A file in the style of Qwen 2.5 and 3, made from ranks."""
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": len(ranks) + i, "content": name, "special": special, **flags}
        for i, (name, special) in enumerate(CONTROL.items())
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {as_characters(piece): rank for piece, rank in ranks.items()},
            "merges": merges_of(ranks),
        },
    }


def write_pair(folder: Path, ranks: Mapping[bytes, int]) -> None:
    vocab = {as_characters(piece): rank for piece, rank in ranks.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges_of(ranks)), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


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


@pytest.fixture(scope="session")
def samples() -> list[str]:
    """Texts that are always at hand: the sentences above, and the licence as longer prose."""
    return [*TEXTS, (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")]


@pytest.fixture(scope="session")
def declarations(shared_data: Path) -> list[str]:
    """The Universal Declaration of Human Rights in 20 languages."""
    with tarfile.open(shared_data / "tokenizer" / "udhr.tar.gz") as archive:
        files = [archive.extractfile(member) for member in archive if member.isfile()]
        return [file.read().decode() for file in files if file is not None]


@pytest.fixture(scope="session")
def top(small: Tokenizer) -> Json:
    """A tokenizer.json in the style of Qwen 2.5 and 3, with the pieces of the small vocabulary."""
    return tokenizer_json(small.vocabulary.ranks)


@pytest.fixture(scope="session")
def json_folder(top: Json, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    (folder / "tokenizer.json").write_text(json.dumps(top, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def pair_folder(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, small.vocabulary.ranks)
    return folder


@pytest.fixture(scope="session")
def write_vocab_and_merges() -> Callable[[Path, Mapping[bytes, int]], None]:
    return write_pair


@pytest.fixture(scope="session")
def byte_characters() -> dict[int, str]:
    return CHARACTER_OF_BYTE

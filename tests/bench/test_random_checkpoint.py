"""A checkpoint with random weights is one that every reader takes."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from kiloq.bench import random_checkpoint
from kiloq.bench.random_checkpoint import kept_random_checkpoint, made_up_vocabulary, write_random_checkpoint
from kiloq.checkpoint import load_model, open_checkpoint
from kiloq.model import ModelConfig
from kiloq.tokenizer import Tokenizer

TEXT = "What time is it, year after year? fabedo 你好 42"


@pytest.fixture
def tiny(small: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    config = dataclasses.replace(small, vocab_size=2000)
    monkeypatch.setattr(random_checkpoint, "shape_config", lambda _: config)


@pytest.mark.usefixtures("tiny")
def test_it_loads_and_its_two_tokenizers_agree(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "m", "any")
    checkpoint = open_checkpoint(tmp_path / "m")
    load_model(checkpoint)
    ids = checkpoint.tokenizer.encode(TEXT)
    assert FastTokenizer.from_file(str(tmp_path / "m" / "tokenizer.json")).encode(TEXT).ids == ids
    assert checkpoint.tokenizer.decode(ids) == TEXT
    assert checkpoint.generation.chat_format == "chatml"


@pytest.mark.usefixtures("tiny")
def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = kept_random_checkpoint("qwen2.5-0.5b")
    made = (folder / "model.safetensors").stat()
    assert kept_random_checkpoint("Qwen2.5-0.5B") == folder
    assert (folder / "model.safetensors").stat() == made


def test_every_piece_of_the_vocabulary_is_one_token() -> None:
    tokenizer = Tokenizer(made_up_vocabulary(20_000))
    for piece, rank in list(tokenizer.vocabulary.ranks.items())[256::97]:
        assert tokenizer.encode(piece.decode()) == [rank]

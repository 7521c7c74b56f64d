"""Laws of `kiloq tokenizer`, run as a person would."""

import json
from pathlib import Path

import pytest

from kiloq.cli.main import run
from kiloq.tokenizer import Tokenizer


def test_train_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the cat and the hat and the bat\n" * 20, encoding="utf-8")
    vocabulary = tmp_path / "mine.tiktoken"
    assert run(["tokenizer", "train", str(tmp_path / "text.txt"), "--vocab-size", "470", "-o", str(vocabulary)]) == 0
    assert "learned 262 pieces" in capsys.readouterr().err
    assert Tokenizer.load(vocabulary).size == 470

    assert run(["tokenizer", "inspect", "the 猫<|im_end|>", "-m", str(vocabulary), "--allow-special"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert '"the"' in shown[0]
    assert '"<|im_end|>"' in shown[-2]
    assert shown[-1].endswith("bytes per token")


def test_inspect_as_json_counts_what_it_shows(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "inspect", "the 猫 <|im_end|>", "-m", str(small_folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    pieces = b"".join(bytes.fromhex(piece["bytes"]) for piece in shown["pieces"])
    assert pieces.decode() == "the 猫 <|im_end|>"
    assert (shown["tokens"], shown["bytes"]) == (len(shown["pieces"]), len(pieces))


def test_expand_names_what_it_left_out(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, extra = tmp_path / "words.txt", tmp_path / "extra.tiktoken"
    words.write_text("猫咪\t20\nthe\t3\ntwo words\t1\n", encoding="utf-8")
    assert run(["tokenizer", "expand", str(words), "-m", str(small_folder), "-o", str(extra)]) == 0
    said = capsys.readouterr().err
    assert "left out 1 (cut by the pattern): two words" in said
    assert "left out 1 (a token already): the" in said
    inspect = ["tokenizer", "inspect", "猫咪", "-m", str(small_folder), "--extra-vocab", str(extra), "--json"]
    assert run(inspect) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 1


def test_mistakes_are_one_line_and_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "inspect", "text", "-m", str(tmp_path)]) == 1
    assert run(["tokenizer", "train", str(tmp_path / "absent"), "--vocab-size", "500", "-o", "x.tiktoken"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("kiloq: ") for line in lines)

"""Laws of the files: found in a folder, saved whole, and refused with one clear error if damaged."""

import base64
import json
from pathlib import Path

import pytest

from kiloq.errors import TokenizerError
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.formats import dump_ranks


@pytest.mark.parametrize("kind", ["small_folder", "json_folder", "pair_folder"])
def test_a_saved_tokenizer_loads_as_the_same(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, samples: list[str]
) -> None:
    folder: Path = request.getfixturevalue(kind)
    first = Tokenizer.load(folder)
    for _ in range(2):  # over existing files too
        first.save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert again.special_tokens == first.special_tokens
    assert again.vocabulary.ranks == first.vocabulary.ranks
    assert [again.encode(text) for text in samples] == [first.encode(text) for text in samples]
    for file in folder.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert not [file for file in (tmp_path / "copy").iterdir() if file.name.startswith(".")]


def test_a_saved_config_names_no_remote_code(small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small.tiktoken").write_bytes((small_folder / "small.tiktoken").read_bytes())
    config = {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["code.QWenTokenizer", None]}, "x": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.load(tmp_path).save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved == {"tokenizer_class": "QWenTokenizer", "x": 1}


def test_a_failed_save_leaves_no_half_file(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "small.tiktoken" / "in the way").mkdir(parents=True)
    with pytest.raises(TokenizerError, match="cannot be written"):
        small.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.is_file() and file.name.startswith(".")] == []


def test_a_file_and_its_folder_are_the_same(small_folder: Path, json_folder: Path, pair_folder: Path) -> None:
    for file in ("small.tiktoken", "tokenizer.json", "vocab.json", "merges.txt"):
        folder = {"small.tiktoken": small_folder, "tokenizer.json": json_folder}.get(file, pair_folder)
        assert Tokenizer.load(folder / file).encode("the cat") == Tokenizer.load(str(folder)).encode("the cat")


BYTES = {bytes([byte]): byte for byte in range(256)}


def line(piece: bytes, rank: object) -> bytes:
    return base64.b64encode(piece) + f" {rank}\n".encode()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "no token for 256 of the 256 bytes"),
        (dump_ranks({piece: rank for piece, rank in BYTES.items() if rank != 255}), "no token for 1 of the 256"),
        (dump_ranks(BYTES) + b"!!!! 256\n", "line 257: .* is not base64"),
        (dump_ranks(BYTES) + b"YWI 256\n", "line 257: .* is not base64"),
        (dump_ranks(BYTES) + line(b"ab", 255), "line 257: id 255 is given twice"),
        (dump_ranks(BYTES) + line(b"a", 256), "line 257: piece b'a' is given twice"),
        (dump_ranks(BYTES) + line(b"ab", 257), "hole: id 256 is missing and the next is 257"),
        (dump_ranks(BYTES) + line(b"ab", -1), "line 257: .* a line is base64, a space and an id"),
        (dump_ranks(BYTES) + line(b"ab", "256 7"), "line 257: .* a line is base64, a space and an id"),
        (dump_ranks(BYTES) + line(b"ab", "9" * 5000), "line 257: .* a line is base64, a space and an id"),
        (dump_ranks(BYTES) + line(b"ab", "²"), "line 257: .* a line is base64, a space and an id"),
        (bytes(range(256)) * 50, "line 1: .* a line is base64, a space and an id"),
        (b"<html>Not found</html>", "line 1: .* a line is base64, a space and an id"),
    ],
)
def test_a_damaged_tiktoken_file_is_one_clear_error(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "bad.tiktoken").write_bytes(data)
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer.load(tmp_path)
    assert "bad.tiktoken" in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bad.tiktoken", "tokenizer.json", "tokenizer_config.json"])
def test_a_line_of_a_gigabyte_is_refused_unread(tmp_path: Path, small_folder: Path, name: str) -> None:
    if name == "tokenizer_config.json":
        (tmp_path / "good.tiktoken").write_bytes((small_folder / "small.tiktoken").read_bytes())
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**30)  # sparse: takes no room on the disk
    with pytest.raises(TokenizerError, match="1,073,741,824 bytes"):
        Tokenizer.load(tmp_path)


def test_a_missing_half_or_an_empty_folder_says_what_was_looked_for(tmp_path: Path, pair_folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no \*\.tiktoken, tokenizer.json, or vocab.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_bytes((pair_folder / "vocab.json").read_bytes())
    with pytest.raises(TokenizerError, match=r"merges.txt cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match=r"absent.tiktoken cannot be read"):
        Tokenizer.load(tmp_path / "absent.tiktoken")
    (tmp_path / "notes.txt").write_text("not a vocabulary")
    with pytest.raises(TokenizerError, match=r"notes.txt is no vocabulary"):
        Tokenizer.load(tmp_path / "notes.txt")


def test_a_cut_file_is_noticed_unless_whole_lines_are_missing(tmp_path: Path) -> None:
    whole = dump_ranks({**BYTES, b"ab": 256, b"abab": 257})
    for length in range(len(whole) - 30, len(whole) - 1):
        if whole[length - 1 : length] == b"\n" or whole[length : length + 1] == b"\n":
            continue
        (tmp_path / "cut.tiktoken").write_bytes(whole[:length])
        with pytest.raises(TokenizerError, match=r"cut.tiktoken"):
            Tokenizer.load(tmp_path)


def test_two_vocabularies_in_one_folder_are_a_question(tmp_path: Path) -> None:
    for name in ("one.tiktoken", "two.tiktoken"):
        (tmp_path / name).write_bytes(dump_ranks(BYTES))
    with pytest.raises(TokenizerError, match=r"one.tiktoken, two.tiktoken"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load(tmp_path / "two.tiktoken").size == 464

"""Laws of learning a vocabulary."""

import gzip
import json
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from kiloq.errors import DataError, TokenizerError
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.train import read_texts, train_tokenizer
from kiloq.tokenizer.vocabulary import QWEN_PATTERN, Vocabulary, qwen_specials

TEXT = [
    "She sells sea shells by the sea shore; the shells she sells are sea shells, I'm sure.\n\n  See?  ",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "가는 말이 고와야 오는 말이 곱다. 낮말은 새가 듣고 밤말은 쥐가 듣는다. 말 한마디에 천 냥 빚을 갚는다.",
    "for i in range(10):\n    for j in range(10):\n        print(i * j, end=' ')\n    print()\n",
]


def merge_as_the_learner_would(ranks: dict[bytes, int], texts: list[str], as_characters: dict[int, str]) -> list[int]:
    """Ids by the tokenizers package, with the merges in the order of the ranks."""
    vocab = {"".join(as_characters[byte] for byte in piece): rank for piece, rank in ranks.items()}
    known = set(as_characters.values())
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        if len(token) > 1:
            # Every way to make the token; only the pair that the learner chose can come up in merging.
            merges += [(token[:i], token[i:]) for i in range(1, len(token)) if {token[:i], token[i:]} <= known]
            known.add(token)
    peer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return [i for text in texts for i in peer.encode(unicodedata.normalize("NFC", text)).ids]


def tokenizer_of(ranks: dict[bytes, int]) -> Tokenizer:
    return Tokenizer(Vocabulary(name="learned", ranks=ranks, special=qwen_specials(len(ranks))))


def test_the_size_counts_ranks_and_specials_and_bytes_come_first() -> None:
    ranks = train_tokenizer(TEXT, 520)
    assert len(ranks) == 520 - 208
    assert sorted(ranks.values()) == list(range(312))
    assert {piece for piece, rank in ranks.items() if rank < 256} == {bytes([byte]) for byte in range(256)}
    assert tokenizer_of(ranks).size == 520


def test_the_smallest_vocabulary_is_the_bytes() -> None:
    assert tokenizer_of(train_tokenizer([], 464)).encode("aé") == [64, 127, 102]


def test_learning_twice_gives_equal_files(tmp_path: Path) -> None:
    for name in ("one.tiktoken", "two.tiktoken"):
        train_tokenizer(iter(TEXT), 560, output=tmp_path / name, min_count=1)
    assert (tmp_path / "one.tiktoken").read_bytes() == (tmp_path / "two.tiktoken").read_bytes()
    assert Tokenizer.load(tmp_path / "one.tiktoken").size == 560


def test_the_most_frequent_pair_comes_first() -> None:
    assert train_tokenizer(["ab ab ab", "ab cd", "cd"], 466, min_count=1)[b"ab"] == 256


def test_pieces_do_not_cross_the_cuts_of_the_pattern() -> None:
    ranks = train_tokenizer(["12 12 12 12 a.b a.b a.b\n\n" * 9], 467, min_count=1)
    assert not {b"12", b"a.", b"a.b"} & ranks.keys()


@pytest.mark.parametrize("run", ["a" * 10**6, " " * 10**6, "=" * 10**6, "\t " * 300_000, "中文" * 200_000])
def test_a_million_equal_characters_teach_the_same_pieces_as_a_thousand(run: str) -> None:
    assert train_tokenizer([f"x{run}y"], 467) == train_tokenizer([f"x{run[:1000]}y"], 467)


def test_decomposed_text_teaches_composed_pieces() -> None:
    decomposed = unicodedata.normalize("NFD", "한국어 é " * 20)
    assert train_tokenizer([decomposed], 470) == train_tokenizer([unicodedata.normalize("NFC", decomposed)], 470)


def test_tiktoken_merges_unseen_text_as_the_learner_does(byte_characters: dict[int, str], samples: list[str]) -> None:
    paragraphs = [part for text in samples for part in text.split("\n\n")]
    ranks = train_tokenizer(paragraphs[::2], 1000, min_count=1)
    unseen = [*TEXT, *paragraphs[1::2]]
    ours = [i for text in unseen for i in tokenizer_of(ranks).encode(text)]
    assert ours == merge_as_the_learner_would(ranks, unseen, byte_characters)


def test_faults_are_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"vocab_size is 463; .* at least 464"):
        train_tokenizer(TEXT, 463)
    with pytest.raises(TokenizerError, match=r"must end in \.tiktoken"):
        train_tokenizer(TEXT, 500, output=tmp_path / "vocabulary.txt")


def test_too_little_text_is_an_error_that_names_the_largest_size() -> None:
    with pytest.raises(TokenizerError, match="pairs for only 466"):
        train_tokenizer(["abc abc"], 10_000)


def test_texts_are_read_from_plain_and_json_lines_gzipped_or_not(tmp_path: Path) -> None:
    plain, lines, packed = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"
    plain.write_bytes("one\r\ntwo 二\n".encode())
    rows = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXT))
    lines.write_text(rows + "\n")
    packed.write_bytes(gzip.compress(rows.encode()))
    assert list(read_texts([plain, lines, packed])) == ["one\r\ntwo 二\n", *TEXT, *TEXT]


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"content": "x"}\n', 'line 1 has no field "text"'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1 has no field "text"'),
        ("a.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 99)[:-9], "cannot be read"),
    ],
)
def test_texts_that_cannot_be_read_are_one_clear_error(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=complaint) as caught:
        list(read_texts([tmp_path / name]))
    assert name in str(caught.value)
    with pytest.raises(DataError, match="No such file"):
        list(read_texts([tmp_path / "absent.txt"]))

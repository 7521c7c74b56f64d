"""Laws of the JSON formats: the same ids as transformers, and one clear error for a damaged file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.errors import TokenizerError
from kiloq.tokenizer import Tokenizer

Json = dict[str, Any]
Writer = Callable[[Path, Mapping[bytes, int]], None]

NAMES = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "<tool_call>"]
texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*NAMES, "the cat", " 猫", "\n"])), max_size=12)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(parts=texts)
def test_ids_of_tokenizer_json_equal_those_of_the_tokenizers_package(
    json_folder: Path, peers: tuple[tokenizers.Tokenizer, Tokenizer], parts: list[str]
) -> None:
    theirs, ours = peers
    text = "".join(parts)
    ids = ours.encode(text, allowed_special="all")
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="session")
def peers(json_folder: Path) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    return tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json")), Tokenizer.load(json_folder)


def test_vocab_and_merges_give_the_ids_of_transformers(small: Tokenizer, pair_folder: Path, samples: list[str]) -> None:
    from transformers import Qwen2TokenizerFast

    ours = Tokenizer.load(pair_folder)
    theirs = Qwen2TokenizerFast.from_pretrained(pair_folder)
    for text in samples:
        assert ours.encode(text) == theirs(text)["input_ids"] == small.encode(text)
    chat = "<|im_start|>user\n你好<|im_end|>\n<|endoftext|>"
    assert ours.encode(chat, allowed_special="all") == small.encode(chat, allowed_special="all")


@pytest.mark.slow
def test_the_real_vocabulary_gives_the_ids_of_transformers(
    real: Tokenizer, tmp_path: Path, declarations: list[str], write_vocab_and_merges: Writer
) -> None:
    from transformers import Qwen2TokenizerFast

    write_vocab_and_merges(tmp_path, real.vocabulary.ranks)
    ours, theirs = Tokenizer.load(tmp_path), Qwen2TokenizerFast.from_pretrained(tmp_path)
    assert ours.vocabulary.ranks == real.vocabulary.ranks
    for text in declarations:
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_all_formats_of_one_vocabulary_give_equal_ids(small: Tokenizer, json_folder: Path, pair_folder: Path) -> None:
    text = "The cat, 猫, 고양이: it's 12 o'clock.\n\n  <|im_end|>"
    for folder in (json_folder, pair_folder):
        other = Tokenizer.load(folder)
        assert other.encode(text) == small.encode(text)
        assert (other.end_of_text_id, other.im_start_id, other.im_end_id) == (392, 393, 394)


def test_added_tokens_that_are_no_control_tokens_stay_in_the_text(json_folder: Path) -> None:
    tokenizer = Tokenizer.load(json_folder)
    ids = tokenizer.encode("<think>cat<|im_end|>", allowed_special="all")
    assert ids[0] == tokenizer.special_tokens["<think>"]
    assert tokenizer.decode(ids, skip_special=True) == "<think>cat"
    assert tokenizer.special_tokens["<think>"] not in tokenizer.encode("<think>")


def test_added_tokens_beside_the_vocabulary_are_read(
    tmp_path: Path, small: Tokenizer, write_vocab_and_merges: Writer
) -> None:
    write_vocab_and_merges(tmp_path, small.vocabulary.ranks)
    entry = {"content": "<think>", "special": False}
    config = {"added_tokens_decoder": {"392": {"content": "<|endoftext|>", "special": True}, "400": entry}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens == {"<|endoftext|>": 392, "<think>": 400}
    assert tokenizer.size == 401
    assert tokenizer.decode([395, 400]) == "<|unused_395|><think>"
    with pytest.raises(TokenizerError, match="im_start"):
        _ = tokenizer.im_start_id


def test_the_config_adds_tokens_to_tokenizer_json(top: Json, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**top, "added_tokens": top["added_tokens"][:3]}))
    added = {"392": {"content": "<|endoftext|>", "special": False}, "400": {"content": "<think>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens["<think>"] == 400
    assert tokenizer.control_ids == {392, 393, 394}  # tokenizer.json has the last word on its own tokens


def test_the_older_added_tokens_file_is_read(tmp_path: Path, small: Tokenizer, write_vocab_and_merges: Writer) -> None:
    write_vocab_and_merges(tmp_path, small.vocabulary.ranks)
    (tmp_path / "added_tokens.json").write_text('{"<|endoftext|>": 392, "<|im_start|>": 393, "<|im_end|>": 394}')
    assert Tokenizer.load(tmp_path).im_end_id == 394


def test_the_longest_added_token_wins(top: Json, tmp_path: Path) -> None:
    added = [{"id": 500, "content": "<a>", "special": True}, {"id": 501, "content": "<a><b>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({**top, "added_tokens": added}))
    assert Tokenizer.load(tmp_path).encode("<a><b><a>", allowed_special="all") == [501, 500]


def change(*path: str | int, to: object) -> Callable[[Json], None]:
    def apply(top: Any) -> None:
        for key in path[:-1]:
            top = top[key]
        top[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (change("model", to=None), "model is NoneType where an object"),
        (change("model", "type", to="Unigram"), "'Unigram' model"),
        (change("model", "byte_fallback", to=True), "only byte-level BPE"),
        (change("model", "vocab", to=[]), "vocab is list where an object"),
        (change("model", "vocab", "a", to=1.5), "id 1.5; an id is a whole number"),
        (change("model", "vocab", "a", to=True), "id True; an id is a whole number"),
        (change("model", "vocab", "a", to=-3), "the id -3; ids go from 0"),
        (change("model", "vocab", "a", to=2**40), "the id 1099511627776; ids go from 0"),
        (change("model", "vocab", "a", to=65), "id 65 to both"),
        (change("model", "vocab", "zzz", to=5000), "1 tokens that no merge makes"),
        (change("model", "merges", to=None), "merges is NoneType where a list"),
        (change("model", "merges", 0, to=["a", "b", "c"]), "a merge is two pieces"),
        (change("model", "merges", 0, to="ab"), "a merge is two pieces"),
        (change("model", "merges", 0, to=["中", "b"]), "is not a known token"),
        (lambda top: top["model"]["merges"].reverse(), "is not a known token|follow the order of the merges"),
        (lambda top: top["model"]["vocab"].pop("a"), "no token for 1 of the 256|is not a known token"),
        (change("added_tokens", 0, "id", to="0"), "added token without content or id"),
        (change("added_tokens", 0, "id", to=5), "id 5 to both"),
        (change("added_tokens", 0, "content", to=""), "added token without content or id"),
        (change("added_tokens", 1, "content", to="<|endoftext|>"), "two ids"),
        (change("normalizer", to={"type": "Lowercase"}), "normalises text in an unknown way"),
        (change("pre_tokenizer", to={"type": "Whitespace"}), "cuts text in an unknown way"),
        (change("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", to="(["), "a pattern that cannot be used"),
    ],
)
def test_a_damaged_tokenizer_json_is_one_clear_error(
    top: Json, tmp_path: Path, fault: Callable[[Json], None], complaint: str
) -> None:
    broken = json.loads(json.dumps(top))
    fault(broken)
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"{", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "where an object"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
        (b"\xff{}", "not UTF-8"),
    ],
)
def test_what_is_no_json_object_is_one_clear_error(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_contradict_one_another_are_refused(top: Json, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(top))
    config = {"added_tokens_decoder": {"999": {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"<\|im_end\|> the id 394, but tokenizer_config.json says 999"):
        Tokenizer.load(tmp_path)

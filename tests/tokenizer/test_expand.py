"""Laws of adding words to a trained vocabulary."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.errors import TokenizerError
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.expand import expand_vocabulary, read_words
from kiloq.tokenizer.formats import dump_ranks

WORDS = {"猫咪": 30, "公园": 5, "白猫咪": 7, "wonderfully": 12, "안녕하십니까": 9, "🦙🦙🦙": 2}


def expand_slowly(tokenizer: Tokenizer, words: dict[str, int]) -> list[bytes]:
    """The definition: count every pair anew, merge the best everywhere, until no word has two pieces."""
    split = {word: [tokenizer.token_bytes(i) for i in tokenizer.encode(word)] for word in words}
    learned: list[bytes] = []
    while any(len(pieces) > 1 for pieces in split.values()):
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                counts[pair] += words[word]

        def order(pair: tuple[bytes, bytes], counts: Counter[tuple[bytes, bytes]] = counts) -> tuple[object, ...]:
            piece = b"".join(pair)
            text = piece.decode("utf-8", "replace")
            return -counts[pair], len(text), len(piece), text, piece, pair

        best = min(counts, key=order)
        learned.append(b"".join(best))
        for pieces in split.values():
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = [learned[-1]]
                i += 1
    return list(dict.fromkeys(learned))


def test_the_published_expansion_is_reproduced_to_the_byte(real: Tokenizer, shared_data: Path) -> None:
    folder = shared_data / "tokenizer"
    expansion = expand_vocabulary(real, read_words(folder / "qwen_extra_vocab.txt"))
    assert dump_ranks(expansion.ranks) == (folder / "qwen_extra.tiktoken").read_bytes()
    assert (expansion.num_new, expansion.known, expansion.cut) == (6, ("一只",), ("夸张的 比喻手法",))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(words=st.dictionaries(st.text("ab猫한", min_size=1, max_size=9), st.integers(1, 9), max_size=12))
def test_counting_in_place_gives_the_order_of_counting_anew(small: Tokenizer, words: dict[str, int]) -> None:
    expansion = expand_vocabulary(small, words)
    unknown = {word: count for word, count in words.items() if word not in expansion.known}
    assert list(expansion.ranks) == expand_slowly(small, unknown)
    assert list(expansion.ranks.values()) == list(range(600, 600 + expansion.num_new))


@pytest.fixture
def expanded(small: Tokenizer, small_folder: Path, tmp_path: Path) -> Tokenizer:
    extra = tmp_path / "extra.tiktoken"
    extra.write_bytes(dump_ranks(expand_vocabulary(small, WORDS).ranks))
    return Tokenizer.load(small_folder, extra_vocab=extra)


def test_each_word_becomes_one_token_and_nothing_else_changes(small: Tokenizer, expanded: Tokenizer) -> None:
    for word in WORDS:
        assert len(expanded.encode(word)) == 1
        assert expanded.encode(word)[0] >= 600
    plain = "The cat sat; it's late.\n 今天天气很好 <|im_end|>"
    assert expanded.encode(plain, allowed_special="all") == small.encode(plain, allowed_special="all")
    assert expanded.special_tokens == small.special_tokens


def test_new_tokens_survive_every_way_of_decoding(expanded: Tokenizer) -> None:
    text = "".join(WORDS)
    ids = [i for word in WORDS for i in expanded.encode(word)]
    decoder = expanded.stream_decoder()
    assert expanded.decode(ids) == expanded.decode(ids, skip_special=True) == text
    assert expanded.decode(ids, errors="strict") == expanded.decode_bytes(ids).decode() == text
    assert "".join(map(decoder.push, ids)) + decoder.flush() == text


def test_an_expanded_tokenizer_is_saved_and_loaded_whole(expanded: Tokenizer, tmp_path: Path) -> None:
    expanded.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.vocabulary.ranks == expanded.vocabulary.ranks
    assert again.special_tokens == expanded.special_tokens
    assert again.size == expanded.size


def test_both_parts_in_one_file_mean_the_same(expanded: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "merged.tiktoken").write_bytes(dump_ranks(expanded.vocabulary.ranks))
    merged = Tokenizer.load(tmp_path / "merged.tiktoken")
    assert merged.vocabulary.ranks == expanded.vocabulary.ranks
    assert merged.special_tokens == expanded.special_tokens


def test_a_second_expansion_keeps_the_first(expanded: Tokenizer, small_folder: Path, tmp_path: Path) -> None:
    second = expand_vocabulary(expanded, {"游乐场": 3, "公园": 1})
    assert second.known == ("公园",)
    (tmp_path / "second.tiktoken").write_bytes(dump_ranks(second.ranks))
    again = Tokenizer.load(small_folder, extra_vocab=tmp_path / "second.tiktoken")
    for word in (*WORDS, "游乐场"):
        assert len(again.encode(word)) == 1
    assert [again.encode(word) for word in WORDS] == [expanded.encode(word) for word in WORDS]


def test_words_that_the_pattern_cuts_are_left_out_and_named(small: Tokenizer) -> None:
    expansion = expand_vocabulary(small, {"two words": 1, "v2": 1, "<|im_end|>": 1, "the": 1})
    assert expansion.cut == ("two words", "v2", "<|im_end|>")
    assert expansion.known == ("the",)
    assert expansion.ranks == {}


def test_new_ids_start_where_asked_but_not_among_the_old(small: Tokenizer) -> None:
    assert min(expand_vocabulary(small, WORDS, start_id=700).ranks.values()) == 700
    with pytest.raises(TokenizerError, match="start_id is 599, but ids below 600 are in use"):
        expand_vocabulary(small, WORDS, start_id=599)


def test_an_extra_file_may_not_take_ids_in_use_and_known_pieces_keep_theirs(
    small: Tokenizer, small_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken.tiktoken").write_bytes(dump_ranks({"猫咪".encode(): 599}))
    with pytest.raises(TokenizerError, match="id 599, but the first free id is 600"):
        Tokenizer.load(small_folder, extra_vocab=tmp_path / "taken.tiktoken")
    (tmp_path / "known.tiktoken").write_bytes(dump_ranks({b"the": 600, "猫咪".encode(): 601}))
    tokenizer = Tokenizer.load(small_folder, extra_vocab=tmp_path / "known.tiktoken")
    assert tokenizer.encode("the") == small.encode("the")
    assert tokenizer.encode("猫咪") == [601]


def test_an_extra_file_of_the_same_name_is_refused(small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small.tiktoken").write_bytes(dump_ranks({"猫咪".encode(): 600}))
    with pytest.raises(TokenizerError, match="rename it"):
        Tokenizer.load(small_folder, extra_vocab=tmp_path / "small.tiktoken")


def test_only_a_tiktoken_vocabulary_can_be_expanded(json_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"only a .tiktoken vocabulary can"):
        expand_vocabulary(Tokenizer.load(json_folder), WORDS)
    (tmp_path / "extra.tiktoken").write_bytes(dump_ranks({b"ab": 600}))
    with pytest.raises(TokenizerError, match=r"adds to a .tiktoken vocabulary"):
        Tokenizer.load(json_folder, extra_vocab=tmp_path / "extra.tiktoken")


def test_words_are_read_composed_and_repeated_ones_add_up(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffcafé\t3\r\n\n猫\ncafe\u0301\t4\n".encode())
    assert read_words(file) == {"café": 7, "猫": 1}


@pytest.mark.parametrize("count", ["many", "-1", "0", "1.5", "3\t4", "9" * 5000])
def test_a_line_without_a_count_is_one_clear_error(tmp_path: Path, count: str) -> None:
    (tmp_path / "words.txt").write_text(f"cat\t3\ndog\t{count}\n")
    with pytest.raises(TokenizerError, match=r"words.txt, line 2: .* is no count"):
        read_words(tmp_path / "words.txt")
    with pytest.raises(TokenizerError, match="No such file"):
        read_words(tmp_path / "absent.txt")

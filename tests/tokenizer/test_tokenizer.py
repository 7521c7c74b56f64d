"""Laws of encoding and decoding."""

import pickle
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.errors import TokenizerError
from kiloq.tokenizer import RefusedTextError, Tokenizer
from kiloq.tokenizer.normalise import nfc
from kiloq.tokenizer.vocabulary import QWEN_PATTERN

SEPARATOR = "\n__ggml_vocab_test__\n"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]

# Unrestricted characters, and the places where pre-tokenisers differ: blanks, contractions, marks, control names.
BLANKS = [" ", "  ", "\n", "\r\n", "\t", "\u2028", "\x1c", "\x85", "\u3000"]
WORDS = ["'s", "'LL", "'ſ", "!?", "_", "ǅ", "12", "e\u0301", "\u0344", "ㅎㅏㄴ", "한", "你好"]
SIGNS = ["<|im_", "|>", "🦙", "👩‍👩‍👧", "\u200d", "\ufffd", "\ud83d", "\ude00"]
fragments = st.sampled_from([*CONTROL, *BLANKS, *WORDS, *SIGNS])
texts = st.lists(st.one_of(st.text(max_size=8), fragments), max_size=20).map("".join)
LONG_RUNS = {
    "letters": "a" * 10**6,
    "blanks": " " * 10**6,
    "tabs": "x" + "\t " * 500_000 + "y",
    "newlines": "\n" * 10**6,
    "blank lines": " \n" * 400_000 + "z",
    "signs": "!" * 10**6,
    "Chinese": "中" * 400_000,
    "marks": "a" + "\u0315\u0300" * 150_000,
    "Tibetan vowels": "\u0f73" * 200_000,
}
fuzz = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('print("<|endoftext|>")', [1350, 9639, 91, 8691, 723, 427, 91, 82598]),
        ("Panda", [47, 9817]),
        (" Panda", [72410]),
        ("Pandas", [47, 55433]),
        ("你好", [108386]),
        (" A", [362]),
        ("A", [32]),
        ("Observation:", [37763, 367, 25]),
        ("Observation:\n", [37763, 367, 510]),
        ("1234567", [16, 17, 18, 19, 20, 21, 22]),
    ],
)
def test_ids_are_those_of_the_first_qwen(real: Tokenizer, text: str, ids: list[int]) -> None:
    assert real.encode(text) == ids
    assert real.decode(ids) == text


def test_korean_takes_as_many_tokens_as_in_the_first_qwen(real: Tokenizer) -> None:
    assert len(real.encode("한국어 토크나이저")) == 11


def test_control_names_become_ids_only_where_the_caller_allows_them(real: Tokenizer) -> None:
    assert real.encode('print("<|endoftext|>")', allowed_special="all") == [1350, 445, 151643, 899]
    text = 'print("<|extra_0|>")<|endoftext|>'
    some = real.encode(text, allowed_special={"<|endoftext|>"})
    assert some == [1350, 9639, 91, 15460, 62, 15, 91, 82598, 151643]


def test_half_a_character_decodes_to_the_replacement_sign_and_the_rest_completes_it(real: Tokenizer) -> None:
    assert real.decode([51461, 117]) == " 根"
    assert real.decode([51461]) == " \ufffd"
    assert real.decode([51461], errors="ignore") == " "
    with pytest.raises(UnicodeDecodeError):
        real.decode([51461], errors="strict")


def test_the_real_vocabulary_has_151851_ids_with_the_specials_last(real: Tokenizer) -> None:
    assert real.size == len(real) == 151851
    assert (real.end_of_text_id, real.im_start_id, real.im_end_id) == (151643, 151644, 151645)
    assert (real.special_tokens["<|extra_0|>"], real.special_tokens["<|extra_204|>"]) == (151646, 151850)
    assert real.newline_ids == (198,)


def test_the_47_reference_strings_of_qwen2_give_the_reference_ids(real: Tokenizer, shared_data: Path) -> None:
    folder = shared_data / "tokenizer"
    strings = (folder / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode().split(SEPARATOR)
    answers = (folder / "ggml-vocab-qwen2.gguf.out").read_text().split("\n")
    assert len(strings) == len(answers) == 47
    assert [real.encode(string) for string in strings] == [[int(i) for i in line.split()] for line in answers]


def test_all_languages_of_the_udhr_come_back_whole(real: Tokenizer, small: Tokenizer, declarations: list[str]) -> None:
    assert len(declarations) == 20
    for text in declarations:
        for tokenizer in (real, small):
            assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.fixture(scope="module")
def oracle(small: Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "oracle",
        pat_str=QWEN_PATTERN,
        mergeable_ranks=dict(small.vocabulary.ranks),
        special_tokens=dict(small.special_tokens),
    )


@fuzz
@given(text=texts, allowed=st.one_of(st.just("all"), st.sets(st.sampled_from(CONTROL))))
def test_ids_equal_those_of_tiktoken(small: Tokenizer, oracle: tiktoken.Encoding, text: str, allowed: object) -> None:
    # tiktoken joins surrogates only after our NFC would have run, so give it text without any.
    normal = unicodedata.normalize("NFC", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    expected = oracle.encode(normal, allowed_special=allowed, disallowed_special=())
    assert small.encode(text, allowed_special=allowed) == expected


@fuzz
@given(text=texts)
def test_a_text_comes_back_composed_and_without_control_tokens(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    normal = unicodedata.normalize("NFC", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    assert small.decode(ids) == normal
    assert small.control_ids.isdisjoint(ids)
    assert small.decode(ids, skip_special=True) == normal


def test_composed_and_decomposed_text_give_the_same_ids(small: Tokenizer) -> None:
    for text in ("한국어 토크나이저", "crème brûlée", "Å"):
        assert small.encode(unicodedata.normalize("NFD", text)) == small.encode(unicodedata.normalize("NFC", text))


def test_disallowed_names_are_refused_and_the_error_says_where(small: Tokenizer) -> None:
    text = "one <|im_end|> two"
    with pytest.raises(RefusedTextError, match=r"<\|im_end\|>.*character 4") as caught:
        small.encode(text, disallowed_special="all")
    assert isinstance(caught.value, ValueError)
    with pytest.raises(RefusedTextError):
        small.encode(text, allowed_special="all", disallowed_special={"<|im_end|>"})
    assert small.im_end_id in small.encode(text, allowed_special={"<|im_end|>"}, disallowed_special="all")
    assert small.encode(text, disallowed_special={"<|im_start|>"}) == small.encode(text)


def test_a_bare_name_for_a_set_of_names_is_refused(small: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"allowed_special .* set of names"):
        small.encode("text", allowed_special="<|im_end|>")


def test_skip_special_drops_control_tokens_and_nothing_else(small: Tokenizer) -> None:
    ids = [small.im_start_id, *small.encode("the cat"), small.im_end_id, *small.newline_ids]
    assert small.decode(ids) == "<|im_start|>the cat<|im_end|>\n"
    assert small.decode(ids, skip_special=True) == "the cat\n"


@pytest.mark.parametrize("spare", [600, 151_935, 2**31, -1])
def test_spare_ids_show_as_a_placeholder(small: Tokenizer, spare: int) -> None:
    cat = small.encode("cat")
    assert small.decode([*cat, spare, *cat]) == f"cat<|unused_{spare}|>cat"
    assert small.token_bytes(spare) == f"<|unused_{spare}|>".encode()


def test_every_id_has_bytes_of_its_own(small: Tokenizer) -> None:
    pieces = [small.token_bytes(i) for i in range(small.size)]
    assert len(set(pieces)) == small.size
    assert all(pieces)


def test_broken_surrogates_become_replacement_signs(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\ud83d b")) == "a\ufffd b"
    assert small.decode(small.encode("\ud83d\ude00")) == "😀"


@pytest.mark.parametrize("name", LONG_RUNS)
def test_a_million_equal_characters_are_encoded_and_come_back(small: Tokenizer, name: str) -> None:
    text = LONG_RUNS[name]
    # unicodedata itself would take minutes for some; test_normalise.py shows that ours is the same.
    assert small.decode(small.encode(text)) == nfc(text)


def test_long_runs_of_blanks_are_cut_as_short_ones_are(small: Tokenizer, oracle: tiktoken.Encoding) -> None:
    # 300,000 is beyond our limit and still within that of tiktoken's engine.
    for text in ("a" + " " * 300_000 + "b, c's  d\n", "\t " * 150_000 + "\n \n  (x", " " * 300_000):
        assert small.encode(text) == oracle.encode_ordinary(text)


def test_threads_share_one_tokenizer(small: Tokenizer) -> None:
    lines = [f"the cat number {i} sat on {i * i} mats 猫{i}" for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(small.encode, lines)) == [small.encode(line) for line in lines]


def test_a_pickled_tokenizer_is_the_same(small: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(small))
    text = "the cat<|im_end|>猫"
    assert copy.encode(text, allowed_special="all") == small.encode(text, allowed_special="all")


def test_the_room_imports_no_torch() -> None:
    modules = "kiloq.tokenizer, kiloq.tokenizer.train, kiloq.tokenizer.expand, kiloq.cli.tokenizer_commands"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

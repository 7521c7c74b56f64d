"""Laws of the one form of a text."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.tokenizer.normalise import _LONG_MARKS, join_surrogates, nfc

fuzz = settings(derandomize=True, deadline=None, max_examples=100)
# Marks of many combining classes, marks that decompose, an unassigned character, and starters that compose.
marks = st.sampled_from("\u0300\u0301\u0315\u0327\u0344\u0345\u0f71\u0f72\u0f73\u0f75\u0f81\u05b0\u3099\u302a\u05c8")
others = st.sampled_from("aeé한ᄒ\u1161\u11ab中か\u0f40\u0903\U0001d15e")


@fuzz
@given(seed=st.lists(marks, min_size=1, max_size=12), before=others, after=st.lists(others, max_size=3))
def test_long_runs_of_marks_compose_as_in_unicodedata(seed: list[str], before: str, after: list[str]) -> None:
    text = before + "".join(seed) * (1500 // len(seed)) + "".join(after)
    assert nfc(text) == unicodedata.normalize("NFC", text)


@fuzz
@given(text=st.text())
def test_any_text_composes_as_unicodedata_composes_it(text: str) -> None:
    assert nfc(text) == unicodedata.normalize("NFC", text)


def test_every_character_that_decomposes_into_marks_counts_as_a_mark() -> None:
    for code in range(0x110000):
        if unicodedata.combining(unicodedata.normalize("NFD", chr(code))[0]):
            assert _LONG_MARKS.fullmatch(chr(code) * 1000), hex(code)


@pytest.mark.parametrize(("text", "joined"), [("\ud83d\ude00", "😀"), ("a\ud83d", "a\ufffd"), ("\ude00b", "\ufffdb")])
def test_surrogates_become_whole_characters(text: str, joined: str) -> None:
    assert join_surrogates(text) == joined

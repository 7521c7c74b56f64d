"""The one form of a text before it is cut: whole characters, composed (NFC). Knows no vocabulary."""

import unicodedata
from itertools import groupby

import regex

# unicodedata sorts a run of combining marks by insertion: quadratic. The three Tibetan vowels decompose into marks.
_LONG_MARKS = regex.compile(r"(?<![\P{ccc=0}\u0F73\u0F75\u0F81])[\P{ccc=0}\u0F73\u0F75\u0F81]{1000,}+")


def join_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which no UTF-8 text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def nfc(text: str) -> str:
    """NFC in time linear in the text, however many combining marks follow on one another."""
    if text.isascii():
        return text
    if len(text) >= 1000:
        text = _LONG_MARKS.sub(lambda run: _sort_marks(run[0]), text)
    return unicodedata.normalize("NFC", text)


def _sort_marks(run: str) -> str:
    """Canonical order of combining marks (Unicode 15.0, 3.11, D109) in n log n; NFC of the result is the same."""
    decomposed = "".join(map(_decompose, run))
    groups = groupby(decomposed, key=lambda character: unicodedata.combining(character) > 0)
    return "".join("".join(sorted(group, key=unicodedata.combining)) for _, group in groups)


def _decompose(character: str) -> str:
    return unicodedata.normalize("NFD", character)

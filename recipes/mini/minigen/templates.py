"""Templates: `[a|b]` is a free choice, `{slot}` a value, `{slot:은/는}` a value with the particle that fits it,
`{:은/는}` the particle alone, for the word written before it; `{slot:a}` is a value with its English article.

Knows nothing of topics or files' contents beyond their TOML and TSV form.
"""

import functools
import random
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "chat_data"
LANGUAGES = ("en", "zh", "ko")

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w*)(?::([^}]*))?\}")
# The last consonant of how Koreans read a digit; it decides the particle.
_DIGIT_FINALS = {"0": "ㅇ", "1": "ㄹ", "2": "", "3": "ㅁ", "4": "", "5": "", "6": "ㄱ", "7": "ㄹ", "8": "ㄹ", "9": ""}
# Latin words that Koreans end in a consonant (컵, 캣, 북, 문, 타임); any other ends in a vowel (밀크, 라이스).
_LATIN_CLOSED = re.compile(r"(ll?e?|me?|ne?|ng|ck|ook|ood|(?<![aeiou])[aeiou][tpb])$")


def pick(rng: random.Random, template: str | list[str], **slots: object) -> str:
    """One reading of a template (or of one of several), with its slots filled."""
    text = rng.choice(template) if isinstance(template, list) else template
    while True:
        opened = _CHOICE.search(text)
        if opened is None:
            return re.sub(r" {2,}", " ", fill(text, slots)).strip(" ")
        text = text[: opened.start()] + rng.choice(opened.group(1).split("|")) + text[opened.end() :]


def fill(text: str, slots: Mapping[str, object]) -> str:
    """Puts values in their slots; a particle pair after the colon fits the last sound of what stands before it."""
    out, position = "", 0
    for match in _SLOT.finditer(text):
        name, forms = match.groups()
        word = str(slots[name]) if name else ""
        out += text[position : match.start()] + (with_article(word) if forms == "a" else word)
        if forms and forms != "a":
            out += particle(out, forms)
        position = match.end()
    return out + text[position:]


def particle(word: str, forms: str) -> str:
    """The Korean particle for a word; `forms` is "after consonant/after vowel", as in 은/는, 이/가, 으로/로."""
    consonant, vowel = forms.split("/")
    final = _final(word)
    if consonant.startswith("으로") and final == "ㄹ":
        return vowel
    return consonant if final else vowel


def with_article(word: str) -> str:
    """A word with "a" or "an"."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def phrases(name: str) -> dict[str, list[str]]:
    """The template lists of a TOML file of chat_data."""
    return _table(name)


def talk_section(lang: str, section: str) -> tuple[list[str], list[str]]:
    """The questions and the answers of one section of small talk."""
    sections: dict[str, dict[str, list[str]]] = _table(f"talk_{lang}")
    return sections[section]["ask"], sections[section]["answer"]


@functools.cache
def rows(name: str) -> tuple[tuple[str, ...], ...]:
    """The rows of a TSV file of chat_data; lines that start with # are comments."""
    lines = (DATA / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(tuple(line.split("\t")) for line in lines if line and not line.startswith("#"))


@functools.cache
def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((DATA / f"{name}.toml").read_text(encoding="utf-8"))


def _final(word: str) -> str:
    """The last consonant of a word's reading, "" after a vowel."""
    last = word.rstrip("'\"”’」)!?. ")[-1:]
    if "가" <= last <= "힣":
        index = (ord(last) - ord("가")) % 28
        return "" if index == 0 else "ㄹ" if index == 8 else "ㅇ"
    if last.isdigit():
        # 10, 100, 1000 end in 십, 백, 천: all consonants, as 영 and 공 do.
        return _DIGIT_FINALS[last]
    ending = _LATIN_CLOSED.search(word.lower().rstrip("'\"”’」)!?. "))
    if ending is None:
        return ""
    return "ㄹ" if ending.group().startswith("l") else "ㅇ"

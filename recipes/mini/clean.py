"""Cleaning: one raw document in, its prose paragraphs out. Knows the markup of each kind of source, no files."""

import re
import unicodedata
from collections.abc import Callable

GROUP_BYTES = 1900  # about one training context of the small vocabulary

_FENCE = re.compile(r"^(```|~~~|:::|\.\. )")
_LINK = re.compile(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
_TAG = re.compile(r"<[^>]{1,200}>|\{/\*.*?\*/\}|\{#[^}]*\}|:[a-z]+:`[^`]*`|<!--.*?-->", re.S)
_MARK = re.compile(r"\*\*|__|~~|`")
_BULLET = re.compile(r"^\s*(#|[-*+>|=]|\d+\.\s|:|\||\$\$|@|//|import |export |const |let )")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")
_CODE = re.compile(r"[{}<>=;$\\_|^@#/]")
_ODD = re.compile(r"[\u200b-\u200f\u2060\ufeff\ufffd\u2028\u2029\x00-\x08\x0b-\x1f]")


def fiction(text: str, lang: str) -> list[str]:
    """Paragraphs of a clean novel: chapter numbers dropped, quotes and dashes made plain."""
    paragraphs = [_plain(p) for p in text.split("\n\n")]
    return [p for p in paragraphs if not re.fullmatch(r"(Chapter )?[IVXLC]+\.?", p)]


def gutenberg(text: str, lang: str) -> list[str]:
    """Paragraphs of hard-wrapped Project Gutenberg text; verse, headings and notices are dropped."""
    paragraphs = [_plain(" ".join(p.split())) for p in text.split("\n\n")]
    return [p for p in paragraphs if len(p) > 60 and "Gutenberg" not in p and not p.isupper() and "[" not in p]


def docs(text: str, lang: str) -> list[str]:
    """Prose sentences of Markdown or reStructuredText: code, tables, links, lists and front matter are dropped."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    text = re.sub(r"^(```|~~~).*?^\1.*?$", "", text, flags=re.S | re.M)
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if any(_FENCE.match(x) or _BULLET.match(x) or x.startswith(("    ", "\t")) for x in lines if x.strip()):
            continue
        joined = ("" if lang == "zh" else " ").join(x.strip() for x in lines)
        prose = _plain(_MARK.sub("", _LINK.sub(r"\1", _TAG.sub("", joined))))
        prose = re.sub(r"\*([^*]+)\*|\b_([^_]+)_\b", r"\1\2", prose)
        if _is_prose(prose, lang):
            paragraphs.append(prose)
    return paragraphs


def poetry(text: str, lang: str) -> list[str]:
    """Poems of a collection, one each, in simplified script only (what GB 2312 can write)."""
    poems = [unicodedata.normalize("NFC", _ODD.sub("", p)).strip() for p in text.split("\n\n")]
    return [p for p in poems if 20 <= len(p) <= 400 and _simplified(p)]


CLEANERS: dict[str, Callable[[str, str], list[str]]] = {
    "fiction": fiction,
    "gutenberg": gutenberg,
    "docs": docs,
    "poetry": poetry,
}


def groups(paragraphs: list[str], kind: str) -> list[str]:
    """Neighbouring paragraphs joined up to GROUP_BYTES; a poem stays alone. Very short remains are dropped."""
    if kind == "poetry":
        return paragraphs
    out: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in paragraphs:
        length = len(paragraph.encode()) + 2
        if current and size + length > GROUP_BYTES:
            out.append("\n\n".join(current))
            current, size = [], 0
        if length <= 3 * GROUP_BYTES:
            current.append(paragraph)
            size += length
    out.append("\n\n".join(current))
    return [g for g in out if len(g.encode()) >= 120]


def _plain(text: str) -> str:
    """NFC with plain quotes, dashes and single spaces, so that the small vocabulary is not spent on their variants."""
    text = unicodedata.normalize("NFC", _ODD.sub("", text))
    if not _HAN.search(text):
        text = text.translate(
            {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2014: " - ", 0x2013: "-", 0xA0: " "}
        )
    text = text.replace("…", "...") if not _HAN.search(text) else text
    return re.sub(r"[ \t\u2009\u200a\u202f]+", " ", text).strip()


def _is_prose(text: str, lang: str) -> bool:
    if len(text.encode()) < 60 or "http" in text or len(_CODE.findall(text)) > len(text) * 0.01:
        return False
    if lang == "en":
        return len(_HAN.findall(text)) == 0 and text[0].isalpha() and text[-1] in ".!?:"
    latin, han = len(_LATIN.findall(text)), len(_HAN.findall(text))
    return latin < 0.25 * (latin + han) and text[-1] in "。！？：" and not re.search(r"\\|\[\^|:label", text)


def _simplified(text: str) -> bool:
    han = _HAN.findall(text)
    good = len("".join(han).encode("gb2312", errors="ignore")) // 2
    return bool(han) and good >= 0.985 * len(han) and len(han) >= 0.6 * len(text)

"""Where an answer is in text that its grammar leaves free, as far as that decides which tokens may come next.

Most of an answer is such text, and there one of a few sets of tokens is allowed: which, depends on how much of a mark
that ends the free text stands at its end. So the sets need not be computed again. Knows bytes, not grammars: which
marks those are is written in the grammar's first line.
"""

import json
import re
from dataclasses import dataclass

from kiloq.chat.answer_grammar import FREE_TEXT

_MOST_SEEN = 3  # marks; what comes behind more is too rare to be worth remembering
_MOST_MARKS, _LONGEST_MARK = 8, 64  # every beginning of every mark is kept

Key = tuple[tuple[bytes, ...], bytes]


@dataclass(frozen=True, slots=True)
class FreeSpan:
    """Text is free from `after`, which is empty or begins the answer, to one of `until`; `marks` divide it."""

    after: bytes
    until: tuple[bytes, ...]
    marks: tuple[bytes, ...]

    @classmethod
    def of_grammar(cls, grammar: str) -> "FreeSpan | None":
        """What the first line of a grammar says of it; None if it says nothing usable: clients write grammars too."""
        line = grammar.partition("\n")[0]
        if not line.startswith(FREE_TEXT):
            return None
        try:
            read = json.loads(line.removeprefix(FREE_TEXT))
            until, marks = (tuple(str(text).encode() for text in read[key]) for key in ("until", "marks"))
            after = str(read["after"]).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        # An empty mark would be found everywhere, for ever.
        texts = (*until, *marks, after or b"-")
        is_usable = 1 < len(texts) <= _MOST_MARKS and all(0 < len(text) <= _LONGEST_MARK for text in texts)
        return cls(after, until, marks) if is_usable else None


class FreeText:
    """One answer's place in its free span."""

    def __init__(self, span: FreeSpan) -> None:
        self._span = span
        marks = sorted({*span.until, *span.marks, *filter(None, [span.after])}, key=len, reverse=True)
        self._any_mark = re.compile(b"|".join(map(re.escape, marks)))
        self._beginnings = {mark[:end] for mark in marks for end in range(1, len(mark))}
        self._longest = max(map(len, marks)) - 1
        self._is_open = not span.after
        self._is_over = False
        self._since = 0  # bytes since the last mark, less the blanks before them
        self._seen: tuple[bytes, ...] = ()
        self._begun = self._line = b"\n" if b"\n" in self._beginnings else b""  # of a mark; an answer begins a line
        self._last = b""

    def push(self, piece: bytes) -> None:
        """The answer goes on with these bytes."""
        if self._is_over:
            return
        self._last = (self._last + piece)[-4:]
        text = self._begun + piece
        while found := self._any_mark.search(text):
            mark = found[0]
            first = not self._seen and not self._since and not found.start()
            self._is_open = self._is_open or (first and mark == self._span.after)
            self._is_over = self._is_over or mark in self._span.until or not self._is_open
            self._seen = (*self._seen, b"^" * first + mark)
            self._since, text = 0, text[found.end() :]
        sizes = range(min(self._longest, len(text)), 0, -1)
        self._begun = next((text[-size:] for size in sizes if text[-size:] in self._beginnings), b"")
        plain = text[: len(text) - len(self._begun)]
        self._since += len(plain if self._since else plain.lstrip())
        if not self._since and not self._seen:
            self._begun = self._begun or self._line
        self._is_over = self._is_over or len(self._seen) > _MOST_SEEN

    @property
    def key(self) -> Key | None:
        """Answers with the same key may go on in the same ways; None where only the grammar can tell."""
        if self._is_over or not self._is_open or self._since <= self._longest or _is_cut(self._last):
            return None
        return self._seen, self._begun


def _is_cut(text: bytes) -> bool:
    """Whether the last character of a text in UTF-8 is incomplete."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte < 0x80:
            return False
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return True

"""Token ids become text, up to the first stop string. Knows nothing of models, sampling or requests."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Turns ids into text piece by piece; `flush` gives what is left of an unfinished character."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class TextStream:
    """The text of one answer as it may be shown: it ends before the first stop string, however tokens cut the text.

    The first stop string to be complete wins (of several complete at once, the longest), so that the result depends on
    the text alone and streaming gives what a cut of the whole text gives. Only text that may still become a stop string
    is held back.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; `stopped` tells whether a stop string ended it."""
        assert not self.stopped, "a token was pushed after the stop string"
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The rest, when the tokens end for another reason; empty after a stop string."""
        if self.stopped:
            return ""
        shown = self._release(self._decoder.flush()) + self._held
        self._held = ""
        return shown

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        cut = find_stop(text, self._stop)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = _may_become_stop(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first complete stop string begins."""
    ends = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    return min(ends)[1] if ends else None


def _may_become_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of the text that is a proper prefix of a stop string."""
    longest = max(len(word) for word in stop) - 1
    for length in range(min(longest, len(text)), 0, -1):
        suffix = text[len(text) - length :]
        if any(len(word) > length and word.startswith(suffix) for word in stop):
            return length
    return 0


class NoText:
    """The decoder of an engine without a tokenizer."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

"""How v1 writes an answer with tools: the reader of Thought, Action and Final Answer. Knows no tokens."""

import re
from collections.abc import Callable

from .grammar import ObjectScan, Reader, safe_length

_OBSERVATION = "\nObservation:"
_INPUT = "\nAction Input:"
_ACTION = re.compile(r"(?:\A\s*|\n)Action:")
_FINAL = re.compile(r"(?:\A\s*|\n)Final Answer:")
_DECIDING = ("Final Answer:", "Action Input:")  # before one of them is complete, no answer shows which way it goes


class ReActReader(Reader):
    """Thought: reasoning, then either Action: name and Action Input: arguments, or Final Answer: content.

    As the published server reads it, but from left to right: the first complete marker decides. Markers begin a line;
    an answer may begin with one, without a thought. The thought before a call is its content; an answer that has no
    marker is content as it stands, known when it ends. Where no `calls` may be made, an action is no marker.
    """

    def __init__(self, new_id: Callable[[], str], *, calls: bool) -> None:
        super().__init__(self._think, new_id)
        self._may_call = calls
        self._begun = False
        self._searched = 0  # characters of a thought
        self._scan = ObjectScan()

    @property
    def is_thinking(self) -> bool:
        return self.step == self._think

    @property
    def in_call(self) -> bool:
        return self.step == self._input and self._scan.is_open

    def _think(self, last: bool) -> bool:
        # A thought may be long and comes in small pieces: what was searched before is not searched again.
        begin, self._searched = max(0, self._searched - len(_DECIDING[0])), len(self.text)
        if not last and all(self.text.find(marker, begin) < 0 for marker in _DECIDING):
            return False
        final, action = _FINAL.search(self.text), _ACTION.search(self.text) if self._may_call else None
        given = self.text.find(_INPUT, action.end()) if action else -1
        name = self.text[action.end() : given].strip() if action and given >= 0 else ""
        if action and name and not (final and final.start() < given):
            start, end = _thought(self.text, action.start())
            self.show_content(self.text[start:end], start)
            self.begin_call(name)
            return self.go(self._input, self.text[given + len(_INPUT) :])
        if final:
            start, end = _thought(self.text, final.start())
            self.show_reasoning(self.text[start:end])
            return self.go(self._lead, self.text[final.end() :])
        if last:
            self.show_content(self.text, 0)
            self.text = ""
        return False

    def _input(self, last: bool) -> bool:
        at = self.text.find(_OBSERVATION)
        certain = at if at >= 0 else len(self.text) if last else safe_length(self.text, _OBSERVATION)
        said = self.text[:certain].rstrip()
        if said:  # blanks alone may still begin the marker
            self.take(len(said))
            self.show_arguments(said if self._begun else said.lstrip())
            self._scan.find_end(said)
            self._begun = True
        return at >= 0 and self.go(self._ignore, "")

    def _lead(self, last: bool) -> bool:
        """The blank after the marker belongs to it."""
        return bool(self.text) and self.go(self._answer, self.text.removeprefix(" "))

    def _answer(self, last: bool) -> bool:
        self.show_content(self.text, 0)
        self.text = ""
        return False

    def _ignore(self, last: bool) -> bool:
        self.text = ""
        return False


def _thought(text: str, end: int) -> tuple[int, int]:
    """Where a thought begins and ends, without its marker and the blanks around it."""
    marker = text.find("Thought:", 0, end)
    said = text[marker + len("Thought:") if marker >= 0 else 0 : end]
    stripped = said.strip()
    start = end - len(said.lstrip())
    return start, start + len(stripped)

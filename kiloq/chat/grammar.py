"""How answers are written: a reader that turns text into deltas from left to right, and that of the JSON style.

The reader of v1's style is in react_reader.py. They know no tokens.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
# The usual beginning of a call, after which its arguments can be shown as they come.
_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a tool call: the first of each index has id and name, the pieces of `arguments` add up to JSON."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """What became certain: a piece of content, or of reasoning, or of one tool call.

    Content is always a piece of the answer's text; `start` is its place there, in characters.
    """

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None
    start: int = field(default=0, compare=False)


class Reader:
    """Text that is not yet certain, and the step that reads it; a step says whether the next one can go on at once."""

    def __init__(self, first: Callable[[bool], bool], new_id: Callable[[], str]) -> None:
        self.step = first
        self.text = ""
        self.calls = 0
        self._new_id = new_id
        self._shown: list[Delta] = []
        self._length = 0  # of all that was read

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next may be part of a thought."""
        raise NotImplementedError

    @property
    def in_call(self) -> bool:
        """Whether a call has begun and not ended."""
        return False

    def read(self, text: str, *, last: bool) -> list[Delta]:
        self.text += text
        self._length += len(text)
        while self.step(last):
            pass
        shown, self._shown = self._shown, []
        return shown

    def go(self, step: Callable[[bool], bool], text: str) -> bool:
        self.step, self.text = step, text
        return True

    def show_content(self, content: str, at: int) -> None:
        """`at` is where it begins in `text`; negative: before it."""
        if content:
            self._shown.append(Delta(content=content, start=self._length - len(self.text) + at))

    def show_reasoning(self, thought: str) -> None:
        if thought:
            self._shown.append(Delta(reasoning=thought))

    def begin_call(self, name: str) -> None:
        self._shown.append(Delta(call=CallDelta(self.calls, id=self._new_id(), name=name)))
        self.calls += 1

    def show_arguments(self, text: str) -> None:
        if text:
            self._shown.append(Delta(call=CallDelta(self.calls - 1, arguments=text)))

    def take(self, end: int) -> str:
        """Cut the first part of the text off."""
        taken, self.text = self.text[:end], self.text[end:]
        return taken


def safe_length(text: str, marker: str) -> int:
    """Length of the text without an ending that may become the marker."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return len(text) - size
    return len(text)


class HermesReader(Reader):
    """<think>reasoning</think> content <tool_call>{"name": ..., "arguments": ...}</tool_call>

    Newlines around thoughts and blanks around calls belong to the markers. A call that is no JSON, or gets no name, is
    content as it stands; one that is cut off keeps the arguments it has.
    """

    def __init__(self, new_id: Callable[[], str], *, tools: bool, thinks: bool, inside: bool) -> None:
        super().__init__(self._reason if inside else self._start if thinks else self._speak, new_id)
        self._tools = tools
        self._trim = inside  # newlines come next that belong to a marker
        self._blank = ""  # before the present call; shown only if it turns out to be none
        self._scan = ObjectScan()

    @property
    def is_thinking(self) -> bool:
        return self.step in (self._start, self._reason)

    @property
    def in_call(self) -> bool:
        return self.step == self._show_arguments

    def _start(self, last: bool) -> bool:
        begin = self.text.lstrip()
        if begin.startswith(_THINK):
            self._trim = True
            return self.go(self._reason, begin.removeprefix(_THINK))
        return (last or not _THINK.startswith(begin)) and self.go(self._speak, self.text)

    def _reason(self, last: bool) -> bool:
        if not self._trimmed():
            return False
        at = self.text.find(_END_THINK)
        if at >= 0:
            self.show_reasoning(self.text[:at].rstrip("\n"))
            self._trim = True
            return self.go(self._speak, self.text[at + len(_END_THINK) :])
        safe = len(self.text) if last else safe_length(self.text, _END_THINK)
        self.show_reasoning(self.take(len(self.text[:safe].rstrip("\n"))))
        return False

    def _speak(self, last: bool) -> bool:
        if not self._trimmed():
            return False
        at = self.text.find(_CALL) if self._tools else -1
        if at >= 0:
            said = self.text[:at].rstrip()
            self._blank = self.text[len(said) : at]
            self.show_content(said, 0)
            return self.go(self._call, self.text[at + len(_CALL) :])
        safe = len(self.text)
        if self._tools and not (last and not self.calls):
            safe = len(self.text[: safe if last else safe_length(self.text, _CALL)].rstrip())
        self.show_content(self.text[:safe], 0)
        self.take(safe)
        return False

    def _call(self, last: bool) -> bool:
        end = self.text.find(_END_CALL)
        body = self.text if end < 0 else self.text[:end]
        head = _CALL_HEAD.match(body)
        name = _json(head[1]) if head else None
        if head and isinstance(name, str) and name:
            self.begin_call(name)
            self._scan = ObjectScan()
            return self.go(self._show_arguments, self.text[head.end() :])
        if end < 0 and not last:
            return False
        call = _whole_call(body)
        if call:
            self.begin_call(call[0])
            self.show_arguments(call[1])
        else:
            lead = self._blank + _CALL
            self.show_content(f"{lead}{body}{_END_CALL if end >= 0 else ''}", -len(lead))
        return self.go(self._speak, "" if end < 0 else self.text[end + len(_END_CALL) :])

    def _show_arguments(self, last: bool) -> bool:
        end = self._scan.find_end(self.text)
        self.show_arguments(self.take(len(self.text) if end is None else end))
        return end is not None and self.go(self._after_call, self.text)

    def _after_call(self, last: bool) -> bool:
        at = self.text.find(_END_CALL)
        return at >= 0 and self.go(self._speak, self.text[at + len(_END_CALL) :])

    def _trimmed(self) -> bool:
        """Whether something is left to read after the newlines of the last marker."""
        if self._trim:
            self.text = self.text.lstrip("\n")
            self._trim = not self.text
        return bool(self.text)


class ObjectScan:
    """Finds the end of one JSON object in pieces of text."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False

    @property
    def is_open(self) -> bool:
        """Whether more has to come."""
        return self._quoted or self._depth > 0

    def find_end(self, text: str) -> int | None:
        """The place after the closing brace, or of a `<`, which JSON has only in strings; None: not in this piece."""
        for i, char in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._quoted = True
            elif char == "<":
                return i
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


def _whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call whose keys come in any order; None if it is no call."""
    whole = _json(text)
    if not isinstance(whole, dict) or not isinstance(whole.get("name"), str) or not whole["name"]:
        return None
    arguments = whole.get("arguments", {})
    if isinstance(arguments, str):
        return whole["name"], arguments
    try:
        return whole["name"], json.dumps(arguments, ensure_ascii=False)
    except RecursionError:  # what was just within the depth that json reads
        return None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None

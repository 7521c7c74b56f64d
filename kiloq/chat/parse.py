"""An answer's text becomes content, reasoning and tool calls while it is being written. Knows no tokens.

What the deltas of a stream add up to does not depend on how the text was cut, and half a marker is never shown.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .chatml import ChatFormat
from .grammar import Delta, HermesReader, Reader
from .messages import ToolCall
from .react_reader import ReActReader


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, taken apart."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]


class ReplyParser:
    """Reads one answer of a model of the given format; `tools` and `thinking` are those of its prompt.

    Without `calls` the conversation knows tools, but none may be called. `new_id` names the tool calls; clients tell
    calls of a whole conversation apart by it.
    """

    def __init__(
        self,
        fmt: ChatFormat,
        *,
        tools: bool = False,
        calls: bool = True,
        thinking: bool | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        name = new_id or _random_id
        self._reader: Reader
        if tools and fmt.tool_style == "react":
            self._reader = ReActReader(name, calls=calls)
        else:
            expects = fmt.thinking == "always" or (fmt.thinking == "hybrid" and thinking is not False)
            inside = fmt.thinking == "always"
            self._reader = HermesReader(name, tools=tools and calls, thinks=expects, inside=inside)

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next may be part of a thought."""
        return self._reader.is_thinking

    @property
    def in_call(self) -> bool:
        """Whether a call has begun whose arguments are not complete."""
        return self._reader.in_call

    def push(self, text: str) -> list[Delta]:
        """What the next piece of text makes certain."""
        return self._reader.read(text, last=False)

    def finish(self) -> list[Delta]:
        """The rest, when no more text comes."""
        return self._reader.read("", last=True)


def parse_reply(text: str, fmt: ChatFormat, *, tools: bool = False, thinking: bool | None = None) -> Reply:
    """Take a whole answer apart."""
    parser = ReplyParser(fmt, tools=tools, thinking=thinking)
    return join([*parser.push(text), *parser.finish()])


def join(deltas: Sequence[Delta]) -> Reply:
    """The answer that some deltas add up to."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        if delta.call is not None:
            old = calls.get(delta.call.index, ToolCall(name="", arguments=""))
            calls[delta.call.index] = ToolCall(
                id=old.id or delta.call.id,
                name=old.name or delta.call.name,
                arguments=old.arguments + delta.call.arguments,
            )
    content = "".join(delta.content for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    return Reply(content, reasoning, tuple(calls[i] for i in sorted(calls)))


def _random_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"

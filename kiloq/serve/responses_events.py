"""An answer as the responses API tells it: output items that open, grow and close, and the events that say so.

Knows deltas of a dialogue and OpenAI's event types; no HTTP. A whole response is what its own events add up to.
"""

import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Literal

from kiloq.chat import CallDelta, Delta
from kiloq.engine import Usage

from .dialogue import Ending
from .errors import Problem

Json = dict[str, object]
Kind = Literal["reasoning", "message", "function_call"]

_ID = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_TEXT = {"reasoning": "reasoning_text", "message": "output_text"}  # the type of the part, and of its events


@dataclass(slots=True)
class _Item:
    """One output item in the making."""

    kind: Kind
    index: int
    call: CallDelta | None = None
    text: str = ""
    logprobs: list[Json] = field(default_factory=list)
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_ID[self.kind]}_{uuid.uuid4().hex}"

    def json(self, status: str) -> Json:
        """The item as it is now; one in progress shows its parts only by their own events."""
        head: Json = {"id": self.id, "type": self.kind, "status": status}
        if self.call is not None:
            return {**head, "call_id": self.call.id, "name": self.call.name, "arguments": self.text}
        content = [] if status == "in_progress" else [self.part()]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}

    def part(self) -> Json:
        """The one part of a message or thought."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}


class ResponseWriter:
    """Turns one answer into events, and into the response that they describe; `head` is the response at its start."""

    def __init__(self, head: Json) -> None:
        self.response: Json = {**head, "status": "in_progress", "output": []}
        self._output: list[Json] = []
        self._number = 0
        self._item: _Item | None = None

    def begin(self) -> list[Json]:
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def write(self, delta: Delta, logprobs: list[Json]) -> list[Json]:
        """What a delta adds: at most one item closes, and one opens or grows."""
        if delta.call is not None:
            call = delta.call
            events = [] if not call.id else self._open("function_call", call)
            return [*events, *(self._grow(call.arguments, []) if call.arguments else [])]
        kind: Kind = "reasoning" if delta.reasoning else "message"
        text = delta.reasoning or delta.content
        if not text:
            return []
        events = [] if self._item is not None and self._item.kind == kind else self._open(kind)
        return [*events, *self._grow(text, logprobs)]

    def end(self, ending: Ending, usage: Json) -> list[Json]:
        """The last events; what was cut off is incomplete, and so is the response."""
        is_cut = ending == "length"
        events: list[Json] = []
        if self._item is None and not self._output:  # clients read the first item
            events += self._open("message")
        events += self._close("incomplete" if is_cut else "completed")
        details: Json | None = {"reason": "max_output_tokens"} if is_cut else None
        self.response |= {
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": details,
            "output": self._output,
            "usage": usage,
        }
        return [*events, self._whole("response.incomplete" if is_cut else "response.completed")]

    def fail(self, problem: Problem) -> list[Json]:
        """The last events of a response that failed on its way."""
        error = {"code": "server_error", "message": problem.message}
        events = self._close("incomplete")
        self.response |= {"status": "failed", "error": error, "output": self._output}
        return [*events, self._whole("response.failed")]

    def _open(self, kind: Kind, call: CallDelta | None = None) -> list[Json]:
        events = self._close("completed")
        self._item = item = _Item(kind, len(self._output), None if call is None else replace(call, arguments=""))
        events.append(self._event("response.output_item.added", output_index=item.index, item=item.json("in_progress")))
        if call is None:
            events.append(self._in_item("response.content_part.added", item, part=item.part()))
        return events

    def _grow(self, text: str, logprobs: list[Json]) -> list[Json]:
        item = self._item
        assert item is not None
        item.text += text
        if item.kind == "function_call":
            return [self._in_item("response.function_call_arguments.delta", item, delta=text)]
        item.logprobs += logprobs
        more: Json = {"logprobs": _brief(logprobs)} if item.kind == "message" else {}
        return [self._in_item(f"response.{_TEXT[item.kind]}.delta", item, delta=text, **more)]

    def _close(self, status: str) -> list[Json]:
        item = self._item
        if item is None:
            return []
        if item.call is not None:
            done: Json = {"name": item.call.name, "arguments": item.text}
            events = [self._in_item("response.function_call_arguments.done", item, **done)]
        else:
            more: Json = {"logprobs": _brief(item.logprobs)} if item.kind == "message" else {}
            events = [
                self._in_item(f"response.{_TEXT[item.kind]}.done", item, text=item.text, **more),
                self._in_item("response.content_part.done", item, part=item.part()),
            ]
        whole = item.json(status)
        self._output.append(whole)
        self._item = None
        return [*events, self._event("response.output_item.done", output_index=item.index, item=whole)]

    def _in_item(self, kind: str, item: _Item, **more: object) -> Json:
        place: Json = {} if item.kind == "function_call" else {"content_index": 0}
        return self._event(kind, item_id=item.id, output_index=item.index, **place, **more)

    def _whole(self, kind: str) -> Json:
        return self._event(kind, response=dict(self.response))

    def _event(self, kind: str, **fields: object) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _brief(tokens: list[Json]) -> list[Json]:
    """Log probabilities as events show them: without the bytes, which items have."""
    return [
        {name: _brief(value) if isinstance(value, list) else value for name, value in one.items() if name != "bytes"}
        for one in tokens
    ]


def usage_json(usage: Usage, reasoning_tokens: int) -> Json:
    """Tokens of a response; the cache is free, so nothing is counted as written to it."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }

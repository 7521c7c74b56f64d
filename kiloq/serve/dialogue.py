"""One conversation, from messages to deltas: what chat completions, responses and DashScope have in common.

Knows conversations, formats and the engine's events; no wire format.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Literal

from kiloq.chat import Message, ReplyParser, Tool
from kiloq.chat.grammar import Delta
from kiloq.engine import Event, SamplingParams, Usage
from kiloq.engine.params import Constraint
from kiloq.engine.sampler import Sampled

from .bridge import AnswerStream
from .service import Service

Ending = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools may, must or must not be called, and which; no names: any of them."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChatTask:
    """What every chat API asks for, whatever its wire format. `content` is what the answer's content must be."""

    messages: tuple[Message, ...]
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_calls: bool = True
    thinking: bool | None = None
    content: Constraint | None = None
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What became certain of answer `index`. The last of an answer has its ending, the last of all the usage."""

    index: int
    delta: Delta = field(default_factory=Delta)
    logprobs: tuple[Sampled, ...] = ()
    finish_reason: Ending | None = None
    usage: Usage | None = None


class Dialogue:
    """The answers to one ChatTask as they are made, in lists of deltas. `close` ends them."""

    def __init__(self, service: Service, task: ChatTask, stream: AnswerStream, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._stream = stream
        fmt, tools = service.llm.format, bool(task.tools)
        self._parsers = [ReplyParser(fmt, tools=tools, thinking=task.thinking) for _ in range(task.params.n)]
        self._has_calls = [False] * task.params.n
        self.completion_tokens = [0] * task.params.n  # drawn so far, stop tokens included

    @classmethod
    async def open(cls, service: Service, task: ChatTask) -> "Dialogue":
        """Admitted, or refused with RequestError or BusyError, before anything is answered."""
        prompt_ids, params = service.llm.prompt_of(task.messages, task.params, tools=task.tools, thinking=task.thinking)
        params = replace(params, constraint=params.constraint or task.content)
        stream = await service.engine.open(prompt_ids, params, adapter=task.adapter)
        return cls(service, task, stream, len(prompt_ids))

    def close(self) -> None:
        self._stream.close()

    async def __aiter__(self) -> AsyncIterator[list[AnswerDelta]]:
        async for events in self._stream:
            yield [delta for event in events for delta in self._deltas(event)]

    def _deltas(self, event: Event) -> list[AnswerDelta]:
        parser = self._parsers[event.index]
        self.completion_tokens[event.index] += len(event.token_ids) + (event.stop_id is not None)
        deltas = parser.push(event.text) + (parser.finish() if event.finish_reason else [])
        parts = [AnswerDelta(event.index, delta) for delta in deltas]
        self._has_calls[event.index] |= any(delta.call is not None for delta in deltas)
        if event.logprobs:
            parts.insert(0, AnswerDelta(event.index, logprobs=event.logprobs))
        if event.finish_reason:
            ending: Ending = "length" if event.finish_reason == "length" else "stop"
            if ending == "stop" and self._has_calls[event.index]:
                ending = "tool_calls"
            parts.append(AnswerDelta(event.index, finish_reason=ending, usage=event.usage))
        return parts

"""One conversation, from messages to deltas: what chat completions, responses and DashScope have in common.

Knows conversations, formats and the engine's events; no wire format.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Literal

from kiloq.chat import Message, ReplyParser, Tool
from kiloq.engine import SamplingParams
from kiloq.engine.params import Constraint

from .answers import AnswerDelta, AnswerReader, Ending, TokenSpans
from .bridge import AnswerStream
from .service import Service

__all__ = ["AnswerDelta", "ChatTask", "Dialogue", "Ending", "ToolChoice"]

_LONG_TEXT = 4_000  # characters; laying out as much takes longer than a thread's start
_TURN_COST = 100  # characters that are laid out in the time that a turn takes by itself


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


class Dialogue:
    """The answers to one ChatTask as they are made, in lists of deltas. `close` ends them."""

    def __init__(self, stream: AnswerStream, answers: list[AnswerReader], prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._stream = stream
        self._answers = answers

    @property
    def completion_tokens(self) -> list[int]:
        """Of each answer, drawn so far, stop tokens included."""
        return [answer.completion_tokens for answer in self._answers]

    @property
    def reasoning_tokens(self) -> int:
        """Of all answers so far; a part of the completion's."""
        return sum(answer.reasoning_tokens for answer in self._answers)

    @classmethod
    async def open(cls, service: Service, task: ChatTask) -> "Dialogue":
        """Admitted, or refused with RequestError or BusyError, before anything is answered."""
        llm, tools = service.llm, task.tools if task.tool_choice.mode != "none" else ()

        def lay_out() -> tuple[list[int], SamplingParams]:
            ids, params = llm.whole_prompt_of(
                task.messages, task.params, tools=tools, thinking=task.thinking, recall=service.memory.recall
            )
            return list(ids), replace(params, constraint=params.constraint or task.content)

        is_long = sum(_TURN_COST + len(message.content) for message in task.messages) > _LONG_TEXT
        ids, params = await asyncio.to_thread(lay_out) if is_long else lay_out()
        stream = await service.engine.open(ids, params, adapter=task.adapter)
        # Results of tools in the history make v1 go on in the form of calls, even if none may follow.
        in_form = bool(tools) or any(message.role == "tool" for message in task.messages)
        answers = [
            AnswerReader(
                index,
                ReplyParser(llm.format, tools=in_form, calls=bool(tools), thinking=task.thinking),
                service.memory,
                None if params.logprobs is None else TokenSpans(llm.tokenizer),
            )
            for index in range(params.n)
        ]
        return cls(stream, answers, len(ids))

    def close(self) -> None:
        self._stream.close()

    async def __aiter__(self) -> AsyncIterator[list[AnswerDelta]]:
        async for events in self._stream:
            yield [delta for event in events for delta in self._answers[event.index].read(event)]

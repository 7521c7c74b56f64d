"""One conversation, from messages to deltas: what chat completions, responses and DashScope have in common.

Knows conversations, formats and the engine's events; no wire format.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Literal

from kiloq.chat import ChatFormat, Message, ReplyParser, Tool
from kiloq.chat.answer_grammar import answer_grammar, json_expression
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
    """What every chat API asks for, whatever its wire format.

    `content` is what the answer's content must be, as JSON; a constraint among the parameters is for the whole answer,
    and wins over it and over what tools ask for.
    """

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
        self.stream = stream
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
        llm = service.llm

        def lay_out() -> tuple[list[int], SamplingParams]:
            ids, params = llm.whole_prompt_of(
                task.messages, task.params, tools=task.tools, thinking=task.thinking, recall=service.memory.recall
            )
            return list(ids), replace(params, constraint=params.constraint or _constraint(task, llm.format))

        is_long = sum(_TURN_COST + len(message.content) for message in task.messages) > _LONG_TEXT
        ids, params = await asyncio.to_thread(lay_out) if is_long else lay_out()
        stream = await service.engine.open(ids, params, adapter=task.adapter)
        # Results of tools in the history make v1 go on in the form of calls, even if none may follow.
        in_form = bool(task.tools) or any(message.role == "tool" for message in task.messages)
        may_call = bool(task.tools) and task.tool_choice.mode != "none"
        answers = [
            AnswerReader(
                index,
                ReplyParser(llm.format, tools=in_form, calls=may_call, thinking=task.thinking),
                service.memory,
                None if params.logprobs is None else TokenSpans(llm.tokenizer),
            )
            for index in range(params.n)
        ]
        return cls(stream, answers, len(ids))

    def close(self) -> None:
        self.stream.close()

    async def __aiter__(self) -> AsyncIterator[list[AnswerDelta]]:
        async for events in self.stream:
            yield [delta for event in events for delta in self._answers[event.index].read(event)]


def _constraint(task: ChatTask, fmt: ChatFormat) -> Constraint | None:
    """What the whole answer must look like: thoughts, content and calls."""
    if not task.tools and fmt.thinking == "none":
        return task.content  # nothing but content
    grammar = answer_grammar(
        fmt,
        tools=task.tools,
        may_call=task.tool_choice.mode != "none",
        required=task.tool_choice.mode == "required",
        names=task.tool_choice.names,
        parallel=task.parallel_calls,
        thinking=task.thinking,
        content=None if task.content is None else _expression(task.content),
    )
    return None if grammar is None else Constraint("lark", grammar)


def _expression(content: Constraint) -> str:
    """The content alone, in a grammar of more than it."""
    if content.kind == "json_object":
        return json_expression({"type": "object"})
    assert content.kind == "json_schema", content.kind
    return json_expression(json.loads(content.source))

"""/v1/responses: OpenAI's newer API of items and typed events, over the same dialogue as chat completions.

Nothing is stored: a conversation comes whole with each request. Knows the wire format, not the model.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from kiloq.engine import SamplingParams
from kiloq.engine.params import Constraint
from kiloq.tokenizer import Tokenizer

from .access_log import record_of
from .dialogue import ChatTask, Dialogue
from .http import EventStream, json_router, while_connected
from .openai_chat_answer import token_logprobs
from .prompts import refuse, told_of
from .responses_events import Json, ResponseWriter, usage_json
from .responses_input import messages_of, tool_choice_of, tools_of
from .sampling import SamplingFields, sampling_params
from .service import Service

_LOGPROBS = "message.output_text.logprobs"  # what `include` calls them
# Documented by OpenAI, and without them the answer would not be what was asked for.
_REFUSED = {
    "previous_response_id": "nothing is stored here; send the whole conversation as input",
    "conversation": "nothing is stored here; send the whole conversation as input",
    "prompt": "no prompt templates are stored here; send instructions and input",
    "background": "answers are made while the client waits; leave it out or set it to false",
    "context_management": "the conversation is taken as it is; leave it out",
}


class _Part(BaseModel):
    """A part of a request; strict, and open to fields of later versions."""

    model_config = ConfigDict(strict=True, extra="allow")


class TextFormat(_Part):
    """What the text of the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(_Part):
    """How the answer's text is held."""

    format: TextFormat | None = None


class Reasoning(_Part):
    """Whether a thinking model thinks: "none" switches it off."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(SamplingFields):
    """A conversation as items. Unknown fields are ignored, and named in the header x-kiloq-ignored."""

    NO_OPS: ClassVar[frozenset[str]] = SamplingFields.NO_OPS | {"moderation", "prompt_cache_options", *_REFUSED}

    model: str
    input: Annotated[
        object,
        Field(json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1, description="Of built-in tools, so it changes nothing.")] | None = None
    tools: Annotated[list[dict[str, object]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: dict[str, object] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[bool, Field(description="Nothing is stored, whatever it says.")] | None = None
    truncation: (
        Annotated[Literal["auto", "disabled"], Field(description="Nothing is cut: too long is a 400.")] | None
    ) = None
    user: str | None = None

    @property
    def with_logprobs(self) -> bool:
        """Whether log probabilities were asked for, by either of the two ways."""
        return _LOGPROBS in (self.include or []) or bool(self.top_logprobs)

    def task(self, service: Service) -> ChatTask:
        """What is to be done; an error names the field that is wrong."""
        self._refuse_unsupported()
        tools = tools_of(self.tools or [])
        return ChatTask(
            messages=messages_of(self.input, self.instructions),
            params=sampling_params(
                self,
                service.llm.generation,
                max_tokens=self.max_output_tokens,
                logprobs=(self.top_logprobs or 0) if self.with_logprobs else None,
            ),
            tools=tools,
            tool_choice=tool_choice_of(self.tool_choice, tools),
            parallel_calls=self.parallel_tool_calls is not False,
            thinking=False if self.reasoning is not None and self.reasoning.effort == "none" else None,
            content=self._content(),
            adapter=service.adapter_of(self.model),
        )

    def head(self, params: SamplingParams) -> Json:
        """The response before it has begun, with everything that it repeats of the request."""
        form = self.text.format if self.text is not None else None
        return {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.reasoning and self.reasoning.effort, "summary": None},
            "service_tier": "default",
            "temperature": params.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": self.tool_choice or "auto",
            "tools": [{"strict": None, "parameters": None, **tool} for tool in self.tools or []],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": self.truncation or "disabled",
            "usage": None,
            "user": self.user,
        }

    def _refuse_unsupported(self) -> None:
        extra = self.model_extra or {}
        for name, reason in _REFUSED.items():
            if extra.get(name) not in (None, False, []):
                raise refuse(name, f"{name} is not supported: {reason}.")
        if (self.n or 1) > 1:
            raise refuse("n", f"n is {self.n}, but a response is one answer; leave it out.")

    @property
    def held_by(self) -> str:
        """The field that says what the answer must look like; tools beside it are read leniently."""
        return super().held_by or ("tools" if self._content() is None else "text.format")

    def _content(self) -> Constraint | None:
        form = self.text.format if self.text is not None else None
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return Constraint("json_object")
        if form.schema_ is None or form.name is None:
            raise refuse("text.format", "text.format is of type json_schema; it must have a name and a schema.")
        return Constraint("json_schema", json.dumps(form.schema_, ensure_ascii=False))


def routes(service: Service) -> APIRouter:
    """The route of responses."""
    router = json_router()

    @router.post("/v1/responses", tags=["OpenAI"], response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation of items, as a whole or as typed server-sent events, as OpenAI specifies it.

        Nothing is stored: `previous_response_id`, `conversation` and `background` are refused, as are built-in tools.
        `truncation` never cuts: a conversation that is too long is an error.
        """
        task = body.task(service)
        with told_of("input", body.held_by):
            dialogue = await Dialogue.open(service, task)
        record_of(request.scope).streams.append(dialogue.stream)
        writer = ResponseWriter(body.head(task.params))
        events = _events(dialogue, writer, service.llm.tokenizer)
        if body.stream:
            stream = (_sse(event) async for event in events)
            return EventStream(
                stream, dialogue.close, body.ignored(), lambda problem: b"".join(map(_sse, writer.fail(problem)))
            )
        await while_connected(request, _drain(events, dialogue))
        return JSONResponse(writer.response, headers=body.ignored())

    return router


async def _events(dialogue: Dialogue, writer: ResponseWriter, tokenizer: Tokenizer) -> AsyncIterator[Json]:
    for event in writer.begin():
        yield event
    async for deltas in dialogue:
        for one in deltas:
            for event in writer.write(one.delta, token_logprobs(one.logprobs, tokenizer)):
                yield event
            if one.finish_reason is not None and one.usage is not None:
                usage = usage_json(one.usage, dialogue.reasoning_tokens)
                for event in writer.end(one.finish_reason, usage):
                    yield event


async def _drain(events: AsyncIterator[Json], dialogue: Dialogue) -> None:
    """Go on to the end, or until the client goes."""
    try:
        async for _ in events:
            pass
    finally:
        dialogue.close()


def _sse(event: Json) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()

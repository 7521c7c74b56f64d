"""/api/v1: the HTTP API of the DashScope cloud service, as its clients speak it. Knows routes, not the model."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from kiloq.chat import render
from kiloq.engine import LLM

from .access_log import record_of
from .dashscope_events import Answer, Json, error_event, result_event, usage_of
from .dashscope_schema import GenerationRequest, Input, TokenizeRequest
from .dialogue import AnswerDelta, ChatTask, Dialogue
from .errors import ApiError
from .http import EventStream, json_router, while_connected
from .service import Service

_EVENT_STREAM = "text/event-stream"


def routes(service: Service) -> APIRouter:
    router = json_router("/api/v1", "DashScope")

    @router.post("/services/aigc/text-generation/generation", response_model=None)
    async def generation(
        http: Request,
        request: GenerationRequest,
        x_dashscope_sse: Annotated[str, Header()] = "",
        accept: Annotated[str, Header()] = "",
    ) -> Response:
        """Answer a conversation, whole or, with the header `X-DashScope-SSE: enable`, as a stream of events."""
        shape = _Shape(
            request_id=record_of(http.scope).id,
            as_message=request.parameters.as_message(thinks=service.llm.format.thinking != "none"),
            incremental=bool(request.parameters.incremental_output),
        )
        task = _task(service, request)
        dialogue = await Dialogue.open(service, task)
        headers = request.parameters.ignored()
        if x_dashscope_sse == "enable" or accept == _EVENT_STREAM:
            on_error = partial(error_event, request_id=shape.request_id)
            return EventStream(_events(dialogue, shape, task.params.n), dialogue.close, headers, on_error)
        try:
            body = await while_connected(http, _whole(dialogue, shape, task.params.n))
        finally:
            dialogue.close()
        return JSONResponse(body, headers=headers)

    @router.post("/tokenizer")
    async def tokenizer(http: Request, request: TokenizeRequest) -> Json:
        """Tokens of a prompt as it stands, or of a conversation as the model is shown it."""
        service.adapter_of(request.model)
        ids = await asyncio.to_thread(_token_ids, service.llm, request.input)
        tokens = [service.llm.tokenizer.decode([token_id]) for token_id in ids]
        output = {"token_ids": ids, "tokens": tokens}
        return {"output": output, "usage": {"input_tokens": len(ids)}, "request_id": record_of(http.scope).id}

    @router.get("/models")
    async def models(
        http: Request,
        model: str | None = None,
        page_no: Annotated[int, Query(ge=1)] = 1,
        page_size: Annotated[int, Query(ge=1, le=1000)] = 10,
    ) -> Json:
        """What is served here, or the one `model`; an unknown one leaves the list empty."""
        names = (service.name, *service.adapters) if model is None else _if_known(service, model)
        shown = names[(page_no - 1) * page_size : page_no * page_size]
        listed = [{"model": name, "name": name, "provider": "kiloq", "opensource": True} for name in shown]
        output = {"total": len(names), "page_no": page_no, "page_size": page_size, "models": listed}
        return {"output": output, "request_id": record_of(http.scope).id}

    return router


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """How one request wants to be answered."""

    request_id: str
    as_message: bool
    incremental: bool

    def body(self, answers: list[Answer], usage: Json) -> Json:
        output = {"choices": [one.choice() for one in answers]} if self.as_message else answers[0].output()
        return {"output": output, "usage": usage, "request_id": self.request_id}


def _task(service: Service, request: GenerationRequest) -> ChatTask:
    fields = request.parameters
    return ChatTask(
        messages=request.input.conversation(),
        params=fields.params(service.llm.generation, service.llm.tokenizer),
        tools=fields.known_tools(),
        tool_choice=fields.choice_of_tools(),
        parallel_calls=fields.parallel_tool_calls is not False,
        thinking=fields.enable_thinking,
        adapter=service.adapter_of(request.model),
    )


def _if_known(service: Service, model: str) -> tuple[str, ...]:
    try:
        service.adapter_of(model)
    except ApiError:
        return ()
    return (model,)


def _token_ids(llm: LLM, given: Input) -> list[int]:
    if given.prompt is not None and given.messages is None and given.history is None:
        return llm.tokenizer.encode(given.prompt)
    return list(render(given.conversation(), llm.tokenizer, llm.format).ids)


async def _whole(dialogue: Dialogue, shape: _Shape, n: int) -> Json:
    answers, usage = [Answer(i) for i in range(n)], None
    async for parts in dialogue:
        for part in parts:
            answers[part.index].add(part)
            usage = part.usage or usage
    return shape.body(answers, usage_of(dialogue.prompt_tokens, sum(dialogue.completion_tokens), usage))


async def _events(dialogue: Dialogue, shape: _Shape, n: int) -> AsyncIterator[bytes]:
    """Each event tells of one answer, and counts that answer's tokens."""
    answers, number = [Answer(i) for i in range(n)], 0
    async for parts in dialogue:
        for index, some in _by_answer(parts).items():
            answer = answers[index]
            for part in some:
                answer.add(part)
            usage = usage_of(dialogue.prompt_tokens, dialogue.completion_tokens[index], some[-1].usage)
            number += 1
            yield result_event(number, shape.body([answer], usage))
            if shape.incremental:
                answer.forget()


def _by_answer(parts: list[AnswerDelta]) -> dict[int, list[AnswerDelta]]:
    by_answer: dict[int, list[AnswerDelta]] = {}
    for part in parts:
        by_answer.setdefault(part.index, []).append(part)
    return by_answer

"""/api/v1: the HTTP API of the DashScope cloud service, as its clients speak it. Knows routes, not the model."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from kiloq.chat import parse_messages, render
from kiloq.engine import LLM
from kiloq.errors import RequestError
from kiloq.tokenizer import Tokenizer

from .access_log import record_of
from .dashscope_events import Answer, Json, error_event, result_event, usage_of
from .dashscope_schema import EmbeddingRequest, GenerationRequest, Input, TokenizeRequest
from .dialogue import AnswerDelta, Dialogue
from .errors import ApiError
from .http import EventStream, json_router, while_connected
from .openai_embeddings import embed
from .prompts import told_of
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
        x_dashscope_plugin: Annotated[str, Header(description="Not supported.")] = "",
    ) -> Response:
        """Answer a conversation, whole or, with the header `X-DashScope-SSE: enable`, as a stream of events."""
        if x_dashscope_plugin:
            raise RequestError("X-DashScope-Plugin is given, but there are no plug-ins here. Leave it out.")
        llm, fields, record = service.llm, request.parameters, record_of(http.scope)
        shape = _Shape(
            request_id=record.id,
            as_message=fields.as_message(thinks=llm.format.thinking != "none"),
            incremental=bool(fields.incremental_output),
            n=fields.n or 1,
            logprobs=llm.tokenizer if fields.logprobs else None,
        )
        task = request.task(llm.generation, llm.tokenizer, adapter=service.adapter_of(request.model))
        with told_of("input", f"parameters.{fields.held_by}"):
            dialogue = await Dialogue.open(service, task)
        record.streams.append(dialogue.stream)
        if x_dashscope_sse == "enable" or accept == _EVENT_STREAM:
            on_error = partial(error_event, request_id=record.id)
            return EventStream(_events(dialogue, shape), dialogue.close, fields.ignored(), on_error)
        try:
            body = await while_connected(http, _whole(dialogue, shape))
        finally:
            dialogue.close()
        return JSONResponse(body, headers=fields.ignored())

    @router.post("/tokenizer")
    async def tokenizer(http: Request, request: TokenizeRequest) -> Json:
        """Tokens of a prompt as it stands, or of a conversation as the model is shown it."""
        service.adapter_of(request.model)
        ids, tokens = await asyncio.to_thread(_tokenize, service.llm, request.input)
        output: Json = {"token_ids": ids, "tokens": tokens}
        return {"output": output, "usage": {"input_tokens": len(ids)}, "request_id": record_of(http.scope).id}

    @router.post("/services/embeddings/text-embedding/text-embedding")
    async def embeddings(http: Request, request: EmbeddingRequest) -> Json:
        """A vector for each text, as /v1/embeddings makes them."""
        vectors, count = await embed(
            service, http, request.input.texts, model=request.model, dimensions=request.parameters.dimension
        )
        listed: list[Json] = [{"text_index": i, "embedding": one} for i, one in enumerate(vectors)]
        usage = {"total_tokens": count}
        return {"output": {"embeddings": listed}, "usage": usage, "request_id": record_of(http.scope).id}

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
    n: int
    logprobs: Tokenizer | None

    def answers(self) -> list[Answer]:
        return [Answer(index, self.logprobs) for index in range(self.n)]

    def body(self, answers: list[Answer], usage: Json) -> Json:
        output = {"choices": [one.choice() for one in answers]} if self.as_message else answers[0].output()
        return {"output": output, "usage": usage, "request_id": self.request_id}


def _if_known(service: Service, model: str) -> tuple[str, ...]:
    try:
        service.adapter_of(model)
    except ApiError:
        return ()
    return (model,)


def _tokenize(llm: LLM, given: Input) -> tuple[list[int], list[str]]:
    if given.prompt is not None and given.messages is None and given.history is None:
        ids = llm.tokenizer.encode(given.prompt)
    else:
        ids = list(render(parse_messages(given.turns()), llm.tokenizer, llm.format).ids)
    return ids, [llm.tokenizer.decode([token_id]) for token_id in ids]


async def _whole(dialogue: Dialogue, shape: _Shape) -> Json:
    answers = shape.answers()
    async for parts in dialogue:
        for part in parts:
            answers[part.index].add(part)
    return shape.body(answers, usage_of(dialogue, sum(dialogue.completion_tokens), dialogue.stream.usage))


async def _events(dialogue: Dialogue, shape: _Shape) -> AsyncIterator[bytes]:
    """Each event tells of one answer, and counts that answer's tokens."""
    answers, number = shape.answers(), 0
    async for parts in dialogue:
        for index, some in _by_answer(parts).items():
            answer = answers[index]
            for part in some:
                answer.add(part)
            number += 1
            usage = usage_of(dialogue, dialogue.completion_tokens[index], some[-1].usage)
            yield result_event(number, shape.body([answer], usage))
            if shape.incremental:
                answer.forget()


def _by_answer(parts: list[AnswerDelta]) -> dict[int, list[AnswerDelta]]:
    by_answer: dict[int, list[AnswerDelta]] = {}
    for part in parts:
        by_answer.setdefault(part.index, []).append(part)
    return by_answer

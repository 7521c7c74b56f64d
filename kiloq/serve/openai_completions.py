"""/v1/completions: OpenAI's older API, which continues texts as they stand. Knows the wire format, not the model."""

import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from kiloq.engine import Usage
from kiloq.engine.score import score_parts

from .access_log import record_of
from .continuations import ChoicePiece, ChoiceWriter, Continuations, Scores, total
from .http import EventStream, json_router, while_connected
from .openai_chat_answer import usage_of
from .openai_chat_request import StreamOptions
from .prompts import PROMPTS_SCHEMA, Prompt, read_prompts, refuse, told_of
from .sampling import SamplingFields, sampling_params
from .service import Service

_MAX_ANSWERS = 128  # of one request; the bound of n


class CompletionRequest(SamplingFields):
    """OpenAI's fields for completions, and the usual extensions."""

    model: str
    prompt: object = Field(json_schema_extra=PROMPTS_SCHEMA)
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    suffix: Annotated[str, Field(description="Refused: these models do not fill in the middle.")] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_answers(self) -> int:
        """How many answers are made for each prompt; the best `n` are shown."""
        return max(self.best_of or 0, self.n or 1)


def routes(service: Service) -> APIRouter:
    router = json_router()

    @router.post("/v1/completions", tags=["OpenAI"], response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several, given as text or token ids; no chat template is applied.

        With `echo` and `logprobs` the prompt's own log probabilities come too; `max_tokens` 0 then adds nothing.
        """
        adapter = service.adapter_of(body.model)
        _check(body)
        vocab_size = service.llm.config.vocab_size
        prompts = await read_prompts(body.prompt, "prompt", service.llm.tokenizer, vocab_size)
        # What never fits at once is no matter of trying again.
        most = min(_MAX_ANSWERS, service.engine.config.max_queue + service.llm.engine.max_batch)
        if len(prompts) * body.num_answers > most:
            asked = f"{len(prompts):,} prompts with {body.num_answers} answers each"
            raise refuse("prompt", f"the request has {asked}; one request may ask for {most} answers here.")
        with told_of("prompt", body.held_by):
            job = await while_connected(request, _open(service, body, prompts, adapter))
        record_of(request.scope).streams += job.streams
        if body.stream:
            return EventStream(job.stream(), job.close, body.ignored())
        return JSONResponse(await while_connected(request, job.whole()), headers=body.ignored())

    return router


def _check(request: CompletionRequest) -> None:
    if request.suffix:
        raise refuse("suffix", "suffix is not supported: these models do not fill in the middle. Leave it out.")
    if request.stream_options is not None and not request.stream:
        raise refuse("stream_options", "stream_options is only for requests with stream true.")
    if request.best_of is not None and request.best_of < (request.n or 1):
        raise refuse("best_of", f"best_of is {request.best_of}; it must be at least n, which is {request.n}.")
    if request.num_answers > (request.n or 1) and request.stream:
        raise refuse("best_of", "best_of cannot be streamed: the best answers are known at the end. Set it to n.")


async def _open(service: Service, request: CompletionRequest, prompts: list[Prompt], adapter: str) -> "_Job":
    """Scored and admitted before anything is answered, so that a mistake is a 4xx even when streaming."""
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    ranked = request.num_answers > (request.n or 1)
    logprobs = 0 if ranked and request.logprobs is None else request.logprobs
    params = sampling_params(request, service.llm.generation, max_tokens=max(max_tokens, 1), logprobs=logprobs)
    params = dataclasses.replace(params, n=request.num_answers)
    scores: Sequence[Scores | None] = [None] * len(prompts)
    if request.echo and request.logprobs is not None:
        if adapter:
            message = f"logprobs with echo are those of {service.name} alone, and {request.model} is an adapter."
            raise refuse("logprobs", message)
        ids, top = [prompt.ids for prompt in prompts], request.logprobs
        scores = await service.engine.run_parts(
            lambda llm: score_parts(llm.model, ids, top, max_context=llm.engine.max_context)
        )
    generated = await Continuations.open(service, prompts, params, adapter=adapter) if max_tokens else None
    return _Job(service, request, prompts, scores, generated)


class _Job:
    """An admitted request on its way to JSON."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        prompts: list[Prompt],
        scores: Sequence[Scores | None],
        generated: Continuations | None,
    ) -> None:
        self._request = request
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._prompts = prompts
        self._scores = scores
        self._generated = generated
        self.streams = () if generated is None else generated.streams
        self._writers = [[ChoiceWriter(service.llm.tokenizer) for _ in range(request.num_answers)] for _ in prompts]
        self._usages: list[Usage] = []

    def close(self) -> None:
        if self._generated is not None:
            self._generated.close()

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk for each piece, the usage if it was asked for, and [DONE]."""
        options = self._request.stream_options
        with_usage = options is not None and options.include_usage
        more: dict[str, object] = {"usage": None} if with_usage else {}
        async for number, index, piece in self._pieces():
            if piece != ChoicePiece():
                choice = self._choice(number * self._request.num_answers + index, piece)
                yield _event({**self._head, "choices": [choice], **more})
        if with_usage:
            yield _event({**self._head, "choices": [], "usage": usage_of(total(self._usages), 0)})
        yield b"data: [DONE]\n\n"

    async def whole(self) -> dict[str, object]:
        """The completion as one object; of `best_of` answers the most likely ones, by their mean log probability."""
        answers = [[ChoicePiece() for _ in writers] for writers in self._writers]
        try:
            async for number, index, piece in self._pieces():
                answers[number][index] += piece
        finally:
            self.close()
        shown = self._request.n or 1
        choices: list[dict[str, object]] = []
        for some, writers in zip(answers, self._writers, strict=True):
            ranked = list(zip(some, writers, strict=True))
            if len(some) > shown:
                ranked.sort(key=lambda pair: -pair[1].mean_logprob)
            choices += [self._choice(len(choices) + rank, piece) for rank, (piece, _) in enumerate(ranked[:shown])]
        return {**self._head, "choices": choices, "usage": usage_of(total(self._usages), 0)}

    async def _pieces(self) -> AsyncIterator[tuple[int, int, ChoicePiece]]:
        for number, prompt in enumerate(self._prompts):
            for index, writer in enumerate(self._writers[number]):
                piece = writer.echo(prompt, self._scores[number]) if self._request.echo else ChoicePiece()
                if self._generated is None:
                    piece.finish_reason = "length"
                yield number, index, piece
        if self._generated is None:
            self._usages = [Usage(len(prompt.ids), 0, 0) for prompt in self._prompts]
            return
        async for number, events in self._generated:
            for event in events:
                yield number, event.index, self._writers[number][event.index].write(event)
                if event.usage is not None:
                    self._usages.append(event.usage)

    def _choice(self, index: int, piece: ChoicePiece) -> dict[str, object]:
        lists = None if self._request.logprobs is None else dataclasses.asdict(piece.lists)
        return {"index": index, "text": piece.text, "logprobs": lists, "finish_reason": piece.finish_reason}


def _event(body: dict[str, object]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()

"""/v1/chat/completions: OpenAI's chat API. Knows the wire format, not the model."""

import time
import uuid

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from .access_log import record_of
from .dialogue import Dialogue
from .http import EventStream, json_router, while_connected
from .openai_chat_answer import Style, whole_answer
from .openai_chat_chunks import ChunkWriter, chunks
from .openai_chat_request import ChatRequest, StreamOptions
from .prompts import told_of
from .service import Service


def routes(service: Service) -> APIRouter:
    """The route of chat completions."""
    router = json_router()

    @router.post("/v1/chat/completions", tags=["OpenAI"], response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, as a whole or as a stream of server-sent events, as OpenAI specifies it.

        Of OpenAI's fields, `audio`, `prediction`, `web_search_options` and image parts are refused. Fields that nobody
        knows are ignored, and the header `x-kiloq-ignored` names them.
        """
        task = body.task(service.llm.generation, adapter=service.adapter_of(body.model))
        with told_of("messages", body.held_by):
            dialogue = await Dialogue.open(service, task)
        record_of(request.scope).streams.append(dialogue.stream)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        logprobs = service.llm.tokenizer if body.logprobs else None
        style = Style(is_legacy=body.is_legacy, is_named=body.is_named)
        if not body.stream:
            try:
                answer = await while_connected(
                    request, whole_answer(dialogue, choices=task.params.n, style=style, logprobs=logprobs)
                )
            finally:
                dialogue.close()
            return JSONResponse({**head, "object": "chat.completion", **answer}, headers=body.ignored())
        options = body.stream_options or StreamOptions()
        writer = ChunkWriter(
            head,
            style=style,
            logprobs=logprobs,
            include_usage=bool(options.include_usage),
        )
        pieces = chunks(
            dialogue,
            writer,
            include_usage=bool(options.include_usage),
            continuous=bool(options.continuous_usage_stats),
        )
        return EventStream(pieces, dialogue.close, body.ignored())

    return router

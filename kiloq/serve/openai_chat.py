"""/v1/chat/completions: OpenAI's chat API. Knows the wire format, not the model."""

import json
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from kiloq.chat import parse_messages, parse_tools
from kiloq.engine import SamplingParams

from .dialogue import ChatTask, Dialogue
from .http import EventStream, json_router
from .service import Service


class ChatRequest(BaseModel):
    model: str
    messages: list[dict[str, object]]
    stream: bool = False
    temperature: float | None = None
    max_tokens: int | None = None
    tools: list[dict[str, object]] | None = None


def routes(service: Service) -> APIRouter:
    router = json_router()

    @router.post("/v1/chat/completions", tags=["OpenAI"], response_model=None)
    async def chat(request: ChatRequest) -> Response:
        """Answer a conversation."""
        given = {name: value for name in ("temperature", "max_tokens") if (value := getattr(request, name)) is not None}
        task = ChatTask(
            messages=parse_messages(request.messages),
            params=SamplingParams.for_model(service.llm.generation, **given),
            tools=parse_tools(request.tools),
            adapter=service.adapter_of(request.model),
        )
        dialogue = await Dialogue.open(service, task)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        if request.stream:
            return EventStream(_chunks(head, dialogue), dialogue.close, {})
        content, reason = "", None
        async for deltas in dialogue:
            for delta in deltas:
                content += delta.delta.content
                reason = delta.finish_reason or reason
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice]})

    return router


async def _chunks(head: dict[str, object], dialogue: Dialogue) -> AsyncIterator[bytes]:
    async for deltas in dialogue:
        for delta in deltas:
            choice = {
                "index": delta.index,
                "delta": {"content": delta.delta.content},
                "finish_reason": delta.finish_reason,
            }
            body = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            yield f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
    yield b"data: [DONE]\n\n"

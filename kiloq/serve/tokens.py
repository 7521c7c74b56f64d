"""/tokenize and /detokenize, in vLLM's shapes. Knows the tokenizer and the prompt's layout, no engine."""

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from kiloq.chat import parse_messages, parse_tools, render

from .http import json_router
from .prompts import check_ids, encode, refuse
from .service import Service


class TokenizeRequest(BaseModel):
    """Either `prompt`, a text as it stands, or `messages`, laid out as the model's prompt."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, object]] | None = None
    tools: list[dict[str, object]] | None = None
    add_generation_prompt: bool = Field(True, description="With messages: end where the answer begins.")
    add_special_tokens: bool = Field(True, description="Changes nothing: Qwen's tokenizers add none around a text.")
    parse_special: bool = Field(False, description="Read names such as <|im_end|> in a prompt as control tokens.")
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """Token ids, of which any number may be spare rows of the model."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: list[object] = Field(json_schema_extra={"items": {"type": "integer", "minimum": 0}})


def routes(service: Service) -> APIRouter:
    router = json_router()

    @router.post("/tokenize", tags=["Tokens"])
    async def tokenize(request: TokenizeRequest) -> dict[str, object]:
        """Token ids of a text or of a conversation's whole prompt, and how many the model can take."""
        if request.model is not None:
            service.adapter_of(request.model)
        return await asyncio.to_thread(_tokenize, service, request)

    @router.post("/detokenize", tags=["Tokens"])
    async def detokenize(request: DetokenizeRequest) -> dict[str, object]:
        """The text of some token ids, control tokens by their names."""
        if request.model is not None:
            service.adapter_of(request.model)
        ids = check_ids(request.tokens, "tokens", service.llm.config.vocab_size)
        return {"prompt": await asyncio.to_thread(service.llm.tokenizer.decode, ids)}

    return router


def _tokenize(service: Service, request: TokenizeRequest) -> dict[str, object]:
    tokenizer = service.llm.tokenizer
    ids: tuple[int, ...] | list[int]
    if (request.prompt is None) == (request.messages is None):
        raise refuse("prompt", "give either prompt or messages: one of them, and not both.")
    if request.prompt is None:
        ids = render(
            parse_messages(request.messages),
            tokenizer,
            service.llm.format,
            tools=parse_tools(request.tools),
            add_generation_prompt=request.add_generation_prompt,
            recall=service.memory.recall,
        ).ids
    elif request.parse_special:
        ids = tokenizer.encode(request.prompt, allowed_special="all")
    else:
        ids = encode(request.prompt, "prompt", tokenizer).ids if request.prompt else ()
    strings = [tokenizer.decode([i]) for i in ids] if request.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": service.llm.engine.max_context,
        "tokens": list(ids),
        "token_strs": strings,
    }

"""/v1/embeddings: texts as vectors, the mean of a model's hidden states. Knows the wire format, not the model."""

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from kiloq.engine.score import embed_parts

from .http import json_router, while_connected
from .prompts import PROMPTS_SCHEMA, Prompt, read_prompts, refuse, told_of
from .service import Service

Json = dict[str, object]


class EmbeddingRequest(BaseModel):
    """OpenAI's fields for embeddings."""

    model_config = ConfigDict(strict=True)

    model: str
    input: object = Field(json_schema_extra=PROMPTS_SCHEMA)
    encoding_format: (
        Annotated[Literal["float", "base64"], Field(description="base64 is of little-endian float32.")] | None
    ) = None
    dimensions: (
        Annotated[int, Field(ge=1, description="Only the model's own: its vectors cannot be shortened.")] | None
    ) = None
    user: str | None = None


def routes(service: Service) -> APIRouter:
    """The route of embeddings."""
    router = json_router()

    @router.post("/v1/embeddings", tags=["OpenAI"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> Json:
        """A vector for each input, text or token ids: the mean of the last layer's states over its tokens, of length 1.

        Language models are not trained for this: such vectors tell topics apart, and are no match for those of a model
        made for search.
        """
        vectors, count = await embed(service, request, body.input, model=body.model, dimensions=body.dimensions)
        shown: list[object] = [_packed(one) if body.encoding_format == "base64" else one for one in vectors]
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(shown)],
            "model": body.model,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }

    return router


async def embed(
    service: Service, request: Request, given: object, *, model: str, dimensions: int | None
) -> tuple[list[list[float]], int]:
    """A vector for each input, and the number of their tokens."""
    if service.adapter_of(model):
        raise refuse("model", f"{model} is an adapter; embeddings are made by {service.name} alone.")
    size, vocab_size = service.llm.config.hidden_size, service.llm.config.vocab_size
    if dimensions is not None and dimensions != size:
        message = f"dimensions is {dimensions}; this model's vectors have {size} and cannot be shortened."
        raise refuse("dimensions", message)
    prompts = await read_prompts(given, "input", service.llm.tokenizer, vocab_size)
    with told_of("input"):
        vectors = await while_connected(request, _embed(service, prompts))
    return vectors, sum(len(prompt.ids) for prompt in prompts)


async def _embed(service: Service, prompts: Sequence[Prompt]) -> list[list[float]]:
    """Between steps of the answers that are being made, so that neither waits for all of the other."""
    ids = [prompt.ids for prompt in prompts]
    return await service.engine.run_parts(lambda llm: embed_parts(llm.model, ids, max_context=llm.engine.max_context))


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

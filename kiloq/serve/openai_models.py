"""/v1/models: what is served here, as OpenAI lists models."""

from fastapi import APIRouter

from .service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, object]:
        """The served model and its adapters. `parent` is the model that an adapter changes."""
        return {"object": "list", "data": [_model(service, name) for name in (service.name, *service.adapters)]}

    @router.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> dict[str, object]:
        """One of them, by any name that requests may use, such as `qwen-turbo`."""
        service.adapter_of(name)
        return _model(service, name)

    return router


def _model(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "kiloq",
        "parent": service.name if name in service.adapters else None,
        "max_model_len": service.llm.engine.max_context,
    }

"""/docs and /openapi.json: the APIs described, without a file from elsewhere. Knows the routes, not the model."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi

from .errors import DASHSCOPE
from .service import Service

_PAGE = Path(__file__).parent / "web" / "docs" / "index.html"

# Apart from the chat page's: this page styles itself in place. It runs nothing but its own files either.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TAGS = [
    {"name": "OpenAI", "description": "The API of OpenAI's clients. Base URL: `/v1`."},
    {"name": "DashScope", "description": "The cloud service's own API. Base URL: `/api/v1`."},
    {"name": "Tokens", "description": "Texts and token ids."},
    {"name": "Operations", "description": "Health and metrics."},
]
_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERRORS = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL},
            }
        },
    },
    "DashScopeError": {
        "type": "object",
        "required": ["code", "message", "request_id"],
        "properties": {"code": _TEXT, "message": _TEXT, "request_id": _TEXT},
    },
}
_QUESTION = {"role": "user", "content": "What is the capital of France?"}
_EXAMPLES: dict[str, dict[str, object]] = {  # bodies that work as they stand
    "/v1/chat/completions": {"messages": [_QUESTION], "max_tokens": 40},
    "/v1/completions": {"prompt": "The capital of France is", "max_tokens": 10},
    "/v1/responses": {"input": "What is the capital of France?", "max_output_tokens": 40},
    "/v1/embeddings": {"input": ["Paris", "Berlin"]},
    "/tokenize": {"prompt": "Hello, 世界"},
    "/detokenize": {"tokens": [72, 105]},
    "/api/v1/services/aigc/text-generation/generation": {
        "input": {"messages": [_QUESTION]},
        "parameters": {"result_format": "message", "max_tokens": 40},
    },
    "/api/v1/tokenizer": {"input": {"prompt": "Hello, 世界"}},
}


def routes(service: Service) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    page = _PAGE.read_bytes()

    @router.get("/docs")
    async def docs() -> Response:
        """The APIs, to read and to try."""
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(page, headers=headers, media_type="text/html")

    return router


def described(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI description of all routes; errors are told in the shapes that they really have."""
    found = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        routes=app.routes,
        tags=_TAGS,
        separate_input_output_schemas=False,
    )
    schemas: dict[str, Any] = found.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(_ERRORS)
    for path, operations in found["paths"].items():
        shape = "DashScopeError" if path.startswith(DASHSCOPE) else "Error"
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
        for operation in operations.values():
            if path in _EXAMPLES and "requestBody" in operation:
                body = operation["requestBody"]["content"]["application/json"]
                body["example"] = {"model": "Qwen", **_EXAMPLES[path]}
            answers = operation["responses"]
            answers.pop("422", None)
            answers["4XX"] = {"description": "The request has a mistake; the message names it.", "content": content}
            answers["5XX"] = {"description": "Not now (503), or the server failed (500).", "content": content}
    if has_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found

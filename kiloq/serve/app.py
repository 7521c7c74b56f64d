"""The web application: routes put together, guarded, errors in the shape of the API that was called. Knows no model."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from kiloq.errors import KiloqError

from . import (
    api_docs,
    dashscope,
    health,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_models,
    openai_responses,
    pages,
    tokens,
)
from .access_log import AccessLog, record_of, writer
from .auth import KeyCheck
from .errors import error_response, problem_of
from .http import ClientGoneError
from .limits import BodyLimit, HostCheck, is_loopback
from .service import Service

Routes = Callable[[Service], APIRouter]

OPENAI: tuple[Routes, ...] = (
    openai_chat.routes,
    openai_completions.routes,
    openai_responses.routes,
    openai_models.routes,
    openai_embeddings.routes,
)
ROUTES: tuple[Routes, ...] = (
    tokens.routes,
    dashscope.routes,
    health.routes,
    pages.routes,
    api_docs.routes,
)

_CLOUD_OPENAI = "/compatible-mode"  # where DashScope's cloud has OpenAI's API: the same routes answer there

_OPEN = ("/", "/health", "/health/live", "/ping", "/docs", "/openapi.json", "/favicon.ico")
_OPEN_BELOW = ("/web/", "/docs/")  # files that say nothing of the model and cost nothing

_log = logging.getLogger("kiloq.serve")


def create_app(service: Service) -> FastAPI:
    """The application; the engine's thread runs as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()

    app = _App(
        title="kiloq",
        version=version("kiloq"),
        summary=f"{service.name}, served to OpenAI and DashScope clients.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name http:// behind a proxy that speaks TLS; OpenAI answers 404 too
    )
    for router in (routes(service) for routes in OPENAI):
        app.include_router(router)
        app.include_router(router, prefix=_CLOUD_OPENAI, include_in_schema=False)
    for routes in ROUTES:
        app.include_router(routes(service))
    for kind in (KiloqError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refuse)
    app.has_keys = bool(service.config.api_keys)
    _guard(app, service)
    return app


class _App(FastAPI):
    """FastAPI, with its own words about errors left out of the description."""

    has_keys = False

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = api_docs.described(self, has_keys=self.has_keys)
        return self.openapi_schema


def _guard(app: FastAPI, service: Service) -> None:
    """What every request passes; added from the inside out."""
    config = service.config
    app.add_middleware(BodyLimit, max_body=config.max_body)
    if config.api_keys:
        app.add_middleware(KeyCheck, keys=config.api_keys, is_open=_is_open)
    elif is_loopback(config.host):
        app.add_middleware(HostCheck, allowed=config.allowed_hosts)
    app.add_middleware(_Guard)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # what the page asks for; keys travel in headers, not in cookies
            expose_headers=("x-request-id", "retry-after"),
        )
    write = None if config.log_format == "none" else writer(config.log_format)
    app.add_middleware(AccessLog, count=service.engine.metrics.http, write=write)


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_BELOW)


async def _refuse(request: Request, error: Exception) -> Response:
    headers = error.headers if isinstance(error, HTTPException) else None
    return error_response(problem_of(error), request.scope, headers)


class _Guard:
    """An error that nobody expected becomes a 500 without details; the log has them, and the server goes on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientGoneError:
            record_of(scope).end = "gone"
        except Exception as error:
            if scope["type"] != "http" or record_of(scope).status is not None:
                raise
            _log.error("%s %s failed (request %s)", scope["method"], scope["path"], record_of(scope).id, exc_info=error)
            await error_response(problem_of(error), scope)(scope, receive, send)

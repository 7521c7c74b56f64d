"""The web application: routes put together, errors in the shape of the API that was called. Knows no model."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from kiloq.errors import KiloqError

from . import dashscope, openai_chat, openai_completions, openai_models, tokens
from .errors import Problem, problem_of
from .service import Service

ROUTES: tuple[Callable[[Service], APIRouter], ...] = (
    openai_chat.routes,
    openai_completions.routes,
    openai_models.routes,
    tokens.routes,
    dashscope.routes,
)


def create_app(service: Service) -> FastAPI:
    """The application; the engine's thread runs as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.drain(service.config.drain_seconds)
        service.engine.stop()

    app = FastAPI(title="kiloq", lifespan=lifespan)
    for routes in ROUTES:
        app.include_router(routes(service))
    app.add_exception_handler(KiloqError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    return _response(problem_of(error))


async def _refuse_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"][1:])
    return _response(Problem(status=400, message=f"{where or 'the body'}: {first['msg']}.", param=where or None))


def _response(problem: Problem) -> Response:
    headers = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    return JSONResponse(json.loads(json.dumps(problem.openai())), problem.status, headers)

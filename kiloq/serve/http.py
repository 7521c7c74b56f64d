"""Strict JSON in, server-sent events out, and noticing that a client has gone. Knows nothing of what is sent."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .access_log import record_of
from .errors import ApiError, Problem, problem_of

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
_KEEP_ALIVE_SECONDS = 15.0  # proxies and clients give up after 30 to 60 silent ones
_DEEPEST = 64  # nested lists and objects; schemas of real tools stay below 20
_MOST_NESTED = 20_000  # in one body: each is looked at several times on the event loop, most as messages or as errors
_HALF_CHARACTER = re.compile(rb"\\u[dD][89abABcdefCDEF]")

_log = logging.getLogger("kiloq.serve")


class ClientGoneError(Exception):
    """The client closed the connection: there is nobody to answer."""


def json_router(prefix: str = "", tag: str | None = None) -> APIRouter:
    """A router whose routes read strict JSON only; every module with a body to read uses it."""
    return APIRouter(prefix=prefix, tags=[tag] if tag else None, route_class=_JsonRoute)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, for answers in one piece; cancelled, with ClientGoneError, when the client goes."""
    with _Watch(request.receive):
        return await work
    raise ClientGoneError


class EventStream(Response):
    """Sends bytes as they come; `close` is called at the end, and at once when the client goes.

    An error after the headers becomes the last event, made by `on_error`. Silence is broken by comments, which clients
    skip; data never waits for them.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        close: Callable[[], None],
        headers: dict[str, str],
        on_error: Callable[[Problem], bytes] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close
        self._on_error = on_error or openai_error
        self._last = 0.0  # when something was sent, by the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, clock = record_of(scope), asyncio.get_running_loop().time
        beats: asyncio.Task[None] | None = None
        try:
            with _Watch(receive):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                beats = asyncio.create_task(self._beat(send))
                try:
                    async for chunk in self._chunks:
                        self._last = clock()
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                except Exception as error:
                    record.end = "failed"
                    await send({"type": "http.response.body", "body": self._failure(error), "more_body": True})
                beats.cancel()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            record.end = "gone"
        finally:
            if beats is not None:
                beats.cancel()
            self._close()
            if isinstance(self._chunks, AsyncGenerator):
                await self._chunks.aclose()

    async def _beat(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._last = clock()
        while True:
            silent = clock() - self._last
            if silent >= _KEEP_ALIVE_SECONDS:
                self._last, silent = clock(), 0.0
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            await asyncio.sleep(_KEEP_ALIVE_SECONDS - silent)

    def _failure(self, error: Exception) -> bytes:
        problem = problem_of(error)
        if problem.status == 500:
            _log.error("a stream failed", exc_info=error)
        return self._on_error(problem)


def openai_error(problem: Problem) -> bytes:
    """How OpenAI's APIs tell of an error after the headers; clients raise it."""
    return f"data: {json.dumps(problem.openai(), ensure_ascii=False)}\n\n".encode()


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Watch:
    """Cancels its block when the client goes, and swallows that cancellation."""

    def __init__(self, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._has_gone = False
        self._watch = asyncio.create_task(gone(receive))

    def __enter__(self) -> None:
        self._watch.add_done_callback(self._cancel)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._watch.remove_done_callback(self._cancel)
        self._watch.cancel()
        # Another's cancellation, such as the server's own end, goes on its way.
        return isinstance(error, asyncio.CancelledError) and self._has_gone and self._task.uncancel() == 0

    def _cancel(self, watch: "asyncio.Task[None]") -> None:
        if not watch.cancelled():
            self._has_gone = True
            self._task.cancel()


class _StrictRequest(Request):
    """A request whose JSON is checked once, before anything walks through it."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = _parsed(await self.body())
        return self._json


class _JsonRoute(APIRoute):
    """Reads the body before FastAPI does, which would answer in its own words."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handler(request: Request) -> Response:
            strict = _StrictRequest(request.scope, request.receive)
            if await strict.body():
                _check_type(request.headers.get("content-type"))
                await strict.json()
            return await handle(strict)

        return handler


def _check_type(content_type: str | None) -> None:
    name = (content_type or "").split(";")[0].strip().lower()
    # A page of another origin may send forms and plain text unasked, but not JSON: this is a lock, not pedantry.
    if name != "application/json" and not (name.startswith("application/") and name.endswith("+json")):
        message = (
            f"Content-Type is {content_type!r:.80}; send application/json."
            if content_type
            else ("There is no Content-Type; send application/json.")
        )
        raise ApiError(Problem(status=415, message=message, code="unsupported_media_type"))


def _parsed(body: bytes) -> object:
    if body.count(b"[") + body.count(b"{") > _MOST_NESTED and _count_nested(body) > _MOST_NESTED:
        raise _invalid(f"The body holds more than {_MOST_NESTED:,} lists and objects.")
    try:
        value: object = json.loads(body.decode(), parse_constant=_refuse_constant)
        if _depth_exceeds(value, _DEEPEST):
            raise RecursionError
        # Half a surrogate pair is no text: it would fail wherever it is written as UTF-8.
        if _HALF_CHARACTER.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _invalid(f"The body is not valid JSON: {error.msg} at {where}.") from None
    except UnicodeDecodeError as error:
        raise _invalid(f"The body is not UTF-8: byte {error.start:,} is 0x{body[error.start]:02x}.") from None
    except UnicodeEncodeError:
        raise _invalid("The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no text.") from None
    except RecursionError:
        raise _invalid(f"The body nests more than {_DEEPEST} lists and objects.") from None
    except ValueError as error:  # a number of thousands of digits
        raise _invalid(f"The body holds a number that cannot be read: {error}.") from None
    return value


def _count_nested(body: bytes) -> int:
    """Opening brackets outside of strings, before anything is made of them."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    return sum(part.count(b"[") + part.count(b"{") for part in plain)


def _depth_exceeds(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid(f"The body holds {name}, which is no JSON number.")


def _invalid(message: str) -> ApiError:
    return ApiError(Problem(status=400, message=message, code="invalid_json"))

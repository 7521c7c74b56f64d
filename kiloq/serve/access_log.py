"""One line for each request: who asked for what, how long it took, how it ended. Knows no prompts and no answers."""

import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .bridge import AnswerStream

End = Literal["done", "refused", "failed", "gone"]
Write = Callable[[dict[str, object]], None]

_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f]+")  # a value that a line of key=value can hold as it is
_LONGEST_PATH = 200
_GONE = 499  # what nginx counts a client as that left before it was answered
_QUIET_PATHS = ("/health", "/health/live", "/ping", "/metrics")  # asked every few seconds; logged only if they fail


@dataclass(kw_only=True)
class Record:
    """What is known of one request; routes add the streams that they open."""

    id: str
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None  # None until something was answered
    streams: list[AnswerStream] = field(default_factory=list)
    end: End = "done"


def record_of(scope: Scope) -> Record:
    """The record of the request that `scope` (or `request.scope`) belongs to."""
    record: Record = scope["state"]["record"]
    return record


class AccessLog:
    """Gives each request its id and its record, puts the id into the answer, and counts and logs it when it is over.

    A client's own x-request-id is kept if it is short and plain: it ends up in a log and in a header.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None], write: Write | None) -> None:
        self._app = app
        self._count = count
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        record = Record(id=asked if _SANE_ID.fullmatch(asked) else str(uuid.uuid4()))
        scope.setdefault("state", {})["record"] = record

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except BaseException:
            record.end = "failed"
            raise
        finally:
            self._count(_pattern(scope), record.status or _GONE)
            if self._write is not None and not (scope["path"] in _QUIET_PATHS and record.status == 200):
                self._write(_line(scope, record))


def writer(form: Literal["text", "json"]) -> Write:
    """Writes lines to stderr: key=value pairs, or a JSON object each."""
    return _write_json if form == "json" else _write_text


def _pattern(scope: Scope) -> str:
    """The route's own pattern: paths that clients make up would fill the metrics without end."""
    path: str = getattr(scope.get("route"), "path", "none")
    return path


def _line(scope: Scope, record: Record) -> dict[str, object]:
    client, end, streams = scope.get("client"), record.end, record.streams
    if end == "done" and record.status is not None and record.status >= 400:
        end = "failed" if record.status >= 500 else "refused"
    usages = [stream.usage for stream in streams if stream.usage is not None]
    first = min([stream.first_token for stream in streams if stream.first_token is not None], default=None)
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": record.id,
        "client": f"{client[0]}:{client[1]}" if client else None,
        "method": scope["method"],
        "path": scope["path"][:_LONGEST_PATH],
        "status": record.status,
        "prompt_tokens": sum(usage.prompt_tokens for usage in usages) if usages else None,
        "cached_tokens": sum(usage.cached_tokens for usage in usages) if usages else None,
        "completion_tokens": sum(usage.completion_tokens for usage in usages) if usages else None,
        "ttft_ms": None if first is None else round((first - record.started) * 1000, 1),
        "total_ms": round((time.perf_counter() - record.started) * 1000, 1),
        "end": end,
    }


def _write_json(line: dict[str, object]) -> None:
    print(json.dumps(line), file=sys.stderr, flush=True)


def _write_text(line: dict[str, object]) -> None:
    pairs = [f"{name}={_shown(value)}" for name, value in line.items() if value is not None]
    print(" ".join(pairs), file=sys.stderr, flush=True)


def _shown(value: object) -> str:
    # A path is the client's own text: quoted where it could look like more of the line, or like another line.
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)

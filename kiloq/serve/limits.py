"""What the server takes in: hosts, sizes and speeds of requests. Knows no routes."""

import asyncio
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, Problem, error_response

BODY_SECONDS = 30.0  # for a whole body to arrive


class BodyLimit:
    """Refuses a body that is too long before it is in memory, and one that does not come."""

    def __init__(self, app: ASGIApp, max_body: int, seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._max_body = max_body
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = int(Headers(scope=scope).get("content-length", "0"))
        if declared > self._max_body:
            response = error_response(_too_long(self._max_body, f"{declared:,} bytes"), scope, {"Connection": "close"})
            await response(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        got, is_whole, deadline = 0, False, asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal got, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    Problem(status=408, message=f"The body did not arrive within {self._seconds:g} seconds.")
                ) from None
            got += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if got > self._max_body:
                raise ApiError(_too_long(self._max_body, "longer"))
            return message

        return limited


class HostCheck:
    """Refuses requests for a host that nobody here is called.

    A page of evil.example may point its own name at 127.0.0.1 and so ask a server on loopback as if it were its own;
    only the Host header tells. Not needed where keys are: such a page has none.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is None or self._knows(host):  # a browser always sends one
            await self._app(scope, receive, send)
            return
        message = (
            f"Host is {host!r:.80}; without an API key only this machine's own names are answered to. "
            f"Start the server with an API key, or with --allow-host."
        )
        problem = Problem(status=403, message=message, type="permission_error", code="unknown_host")
        await error_response(problem, scope)(scope, receive, send)

    def _knows(self, host: str) -> bool:
        name = host_name(host)
        return is_loopback(name) or name in self._allowed or "*" in self._allowed


def host_name(host: str) -> str:
    """A Host header without its port: "[::1]:80" is ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def is_loopback(name: str) -> bool:
    """Whether a name or an address can only mean this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _too_long(limit: int, found: str) -> Problem:
    message = f"The body is {found}; at most {limit:,} bytes are taken (--max-body)."
    return Problem(status=413, message=message, code="request_too_large")

"""What happens when nothing happens: heads and bodies that do not come, and streams that have nothing to say yet."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from kiloq.serve import http, protocol
from kiloq.serve.access_log import Record
from kiloq.serve.errors import ApiError
from kiloq.serve.http import KEEP_ALIVE, EventStream
from kiloq.serve.limits import BodyLimit
from kiloq.serve.protocol import BoundedProtocol


def scope() -> dict[str, Any]:
    return {"type": "http", "headers": [], "path": "/", "state": {"record": Record(id="x")}}


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def refused(_first: object, *_: object) -> None:
    raise AssertionError("nothing should be sent")


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def read(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()

    with pytest.raises(ApiError, match="did not arrive") as caught:
        asyncio.run(BodyLimit(read, max_body=10, seconds=0)(scope(), never, refused))
    assert caught.value.problem.status == 408


def test_waiting_for_the_client_to_go_has_no_limit_once_the_body_is_there() -> None:
    async def read(_scope: Any, receive: Any, _send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        assert (await receive())["type"] == "http.disconnect"

    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> dict[str, Any]:
        return messages.pop()

    asyncio.run(BodyLimit(read, max_body=2, seconds=0.5)(scope(), receive, refused))


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
def test_a_head_that_does_not_come_is_given_up(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.01)

    async def answer() -> bytes:
        config = uvicorn.Config(refused, interface="asgi3", lifespan="off", log_level="error")
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: BoundedProtocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(sent)
            got = await reader.read()
            writer.close()
        return got

    got = asyncio.run(answer())
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b'"error"' in got


def test_a_silent_stream_is_kept_alive_and_data_is_not_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_KEEP_ALIVE_SECONDS", 0.01)
    sent: list[bytes] = []

    async def run() -> None:
        was_kept_alive = asyncio.Event()

        async def chunks() -> AsyncIterator[bytes]:
            await was_kept_alive.wait()
            yield b"data: 1\n\n"

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                sent.append(message["body"])
                if message["body"] == KEEP_ALIVE:
                    was_kept_alive.set()

        await EventStream(chunks(), lambda: None, {})(scope(), never, send)

    asyncio.run(run())
    assert sent[0] == KEEP_ALIVE
    assert [chunk for chunk in sent if chunk != KEEP_ALIVE] == [b"data: 1\n\n", b""]


def test_an_error_in_a_stream_is_its_last_event_and_without_details(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[bytes] = []
    closed: list[bool] = []

    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise RuntimeError("secret detail")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message.get("body", b""))

    asyncio.run(EventStream(chunks(), lambda: closed.append(True), {})(scope(), never, send))
    assert sent[1] == b"data: 1\n\n"
    assert b'"internal_error"' in sent[2]
    assert b"secret" not in sent[2]
    assert sent[3] == b""
    assert closed
    assert "secret detail" in caplog.text

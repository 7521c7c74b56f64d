"""Bytes that no client sends, straight into the socket: a clear answer or a closed door, and the server goes on."""

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

CHAT = "/v1/chat/completions"
HELLO = {"model": "Qwen", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
MEGABYTE = 1_000_000


@pytest.fixture
def connection(server: Any) -> Iterator[socket.socket]:
    """A bare connection; afterwards the server must answer as if nothing had been."""
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
        yield connection
    assert server.process.poll() is None
    answer = httpx.post(server.url + CHAT, json=HELLO, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"]


def head(*lines: str, request: str = f"POST {CHAT} HTTP/1.1") -> bytes:
    return "\r\n".join((request, "Host: localhost", *lines, "", "")).encode()


def whole(connection: socket.socket) -> bytes:
    """All until the server closes."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def is_hung_up(connection: socket.socket, data: bytes) -> bool:
    """Whether the server ends the connection, while we send or after; what it said may be lost with it."""
    try:
        connection.sendall(data)
        whole(connection)
    except ConnectionError:
        pass
    return True


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
        b"\x00" * 4096,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"HELLO / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nx: a\r\n\tb\x00\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(connection: socket.socket, garbage: bytes) -> None:
    connection.sendall(garbage)
    connection.shutdown(socket.SHUT_WR)
    answer = whole(connection)
    assert not answer or 400 <= status_of(answer) < 500
    if b"application/json" in answer:
        error_of(answer)


def test_a_body_that_says_it_is_too_long_is_refused_unread(connection: socket.socket) -> None:
    connection.sendall(head("Content-Type: application/json", f"Content-Length: {10**15}"))
    answer = whole(connection)  # no byte of the body was sent
    assert status_of(answer) == 413
    assert "1,000,000,000,000,000 bytes" in str(error_of(answer)["message"])


def test_a_body_that_grows_too_long_is_refused_on_the_way(connection: socket.socket) -> None:
    connection.sendall(head("Content-Type: application/json", "Transfer-Encoding: chunked"))
    piece = b"%x\r\n" % MEGABYTE + b" " * MEGABYTE + b"\r\n"
    for _ in range(5):
        connection.sendall(piece)
    answer = connection.recv(1 << 16)
    assert status_of(answer) == 413


def test_a_prompt_of_ten_megabytes_is_refused(server: Any) -> None:
    long = HELLO | {"messages": [{"role": "user", "content": "x" * 10 * MEGABYTE}]}
    answer = httpx.post(server.url + CHAT, json=long, timeout=60)
    assert answer.status_code == 413


def test_a_prompt_just_under_the_limit_is_refused_by_its_tokens(server: Any) -> None:
    for text in ("x" * 3_900_000, "a b" * 1_290_000, "\n" * 1_900_000):
        long = HELLO | {"messages": [{"role": "user", "content": text}]}
        answer = httpx.post(server.url + CHAT, json=long, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_that_breaks_off_frees_the_connection(connection: socket.socket) -> None:
    connection.sendall(head("Content-Type: application/json", "Content-Length: 500") + b'{"model": "Qw')
    connection.shutdown(socket.SHUT_WR)


def test_a_head_that_never_ends_is_refused(connection: socket.socket) -> None:
    assert is_hung_up(connection, head()[:-2] + (b"x-more: " + b"y" * 1000 + b"\r\n") * 10_000)


def test_a_path_of_a_megabyte_is_refused(connection: socket.socket) -> None:
    assert is_hung_up(connection, b"GET /" + b"a" * MEGABYTE)


def test_requests_in_a_row_on_one_connection_are_all_answered(connection: socket.socket) -> None:
    body = json.dumps(HELLO).encode()
    one = head("Content-Type: application/json", f"Content-Length: {len(body)}") + body
    last = head("Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close") + body
    connection.sendall(one * 3 + last)
    assert whole(connection).count(b"HTTP/1.1 200 OK") == 4


def test_garbage_after_a_request_ends_the_connection_after_its_answer(connection: socket.socket) -> None:
    body = json.dumps(HELLO).encode()
    connection.sendall(head("Content-Type: application/json", f"Content-Length: {len(body)}") + body)
    connection.sendall(b"\x00\x01garbage\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    answer = whole(connection)
    assert not answer or status_of(answer) in (200, 400)


def test_an_upgrade_is_not_taken(connection: socket.socket) -> None:
    connection.sendall(
        head(
            "Connection: upgrade, close",
            "Upgrade: websocket",
            "Sec-WebSocket-Key: eA==",
            request="GET /v1/models HTTP/1.1",
        )
    )
    assert not connection.recv(1 << 16).startswith(b"HTTP/1.1 101")


def test_headers_of_a_client_cannot_write_into_the_log(server: Any) -> None:
    forged = 'x" status=200 end=done'
    httpx.get(server.url + "/%0Atime=2000-01-01 id=forged", headers={"x-request-id": forged}, timeout=60)
    log = server.log.read_text()
    assert "\ntime=2000" not in log
    assert forged not in log

"""One connection to a server, and what becomes of each request on it.

Bytes are looked at, not parsed: an event of a stream is searched for text, for its ending and for counts.
"""

import asyncio
import json
import re
import time
from array import array
from dataclasses import dataclass, field
from typing import Literal

State = Literal["waiting", "done", "refused", "lost", "left"]

# A quotation mark inside a text is escaped, so no text can look like a field.
_TEXT = re.compile(rb'"(?:content|text|reasoning_content|reasoning|arguments)":\s*"[^"]')
_ENDING = re.compile(rb'"finish_reason":\s*"(\w+)"')
_USAGE = re.compile(rb'"usage":\s*\{')
_ERROR = re.compile(rb'\{\s*"error":')
_LONGEST_HEAD = 1 << 16


@dataclass(frozen=True)
class Ask:
    """One request. `patience` and `enough` make its client hang up: after so many seconds, or pieces of the answer."""

    path: str
    body: bytes
    max_tokens: int  # the answer's length, if the server keeps to it
    is_streamed: bool = True
    patience: float | None = None
    enough: int | None = None


@dataclass
class Outcome:
    """What became of one request. Times are seconds since the load began."""

    ask: Ask
    began: float = 0.0
    times: "array[float]" = field(default_factory=lambda: array("d"))  # of the pieces that had text
    ended: float = 0.0
    state: State = "waiting"
    status: int = 0
    endings: list[str] = field(default_factory=list)
    message: str = ""  # of an error
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """As the server counts them; pieces where it does not say."""
        return len(self.times) if self.answer_tokens is None else self.answer_tokens

    @property
    def first_token(self) -> float | None:
        return self.times[0] - self.began if self.times else None


class Clock:
    """Seconds since the load began."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._zero


class Exchange(asyncio.Protocol):
    """One connection, which carries one request after the other."""

    def __init__(self, clock: Clock) -> None:
        self.is_closed = True
        self.was_idle = False  # closed by the server instead of an answer, as if no request had come
        self.whole = b""  # the body of an answer that is no stream
        self._clock = clock
        self._done: asyncio.Future[None] | None = None

    async def carry_out(self, message: bytes, outcome: Outcome, timeout: float) -> None:
        """Send, and listen until the answer has ended, the connection is lost or the client has had enough."""
        loop = asyncio.get_running_loop()
        self._outcome, self._done = outcome, loop.create_future()
        self._buffer, self._events, self._left = b"", b"", -1
        self._is_silent = True
        self._is_chunked = self._is_stream = self._in_body = self._is_last = False
        self._transport.write(message)
        patience = outcome.ask.patience
        timers = [loop.call_later(timeout, self._finish, "lost", f"no end within {timeout:g} s")]
        if patience is not None:
            timers.append(loop.call_later(patience, self._finish, "left"))
        try:
            await self._done
        finally:
            for timer in timers:
                timer.cancel()

    def close(self) -> None:
        if not self.is_closed:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_closed = self._is_used = False

    def connection_lost(self, _: Exception | None) -> None:
        self.is_closed = True
        # A body without a length ends with the connection.
        if self._done is not None and self._in_body and not self._is_chunked and self._left < 0:
            self._end_of_body()
        self.was_idle = self._is_used and self._is_silent
        self._finish("lost", "the connection was closed")

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            return
        try:
            self._read(data, self._clock())
        except (ValueError, IndexError) as error:
            self._finish("lost", f"this is not what an HTTP server sends: {error}")

    def _read(self, data: bytes, now: float) -> None:
        assert self._done is not None
        self._is_silent = False
        self._buffer = self._buffer + data if self._buffer else data
        if not self._in_body and not self._read_head():
            return
        while self._buffer and not self._done.done():
            body = self._next_part()
            if body is None:
                return
            if self._is_stream:
                self._read_events(body, now)
            else:
                self.whole += body
        if self._left == 0 and not self._is_chunked:
            self._end_of_body()

    def _read_head(self) -> bool:
        head, mark, rest = self._buffer.partition(b"\r\n\r\n")
        if not mark:
            if len(head) > _LONGEST_HEAD:
                self._finish("lost", "the answer's head has no end")
            return False
        lines = head.decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        self._outcome.status = int(lines[0].split()[1])
        self._is_last = headers.get("connection") == "close"
        self._is_chunked = headers.get("transfer-encoding") == "chunked"
        self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        self._left = int(headers.get("content-length", -1))
        self._buffer, self._in_body, self.whole = rest, True, b""
        return True

    def _next_part(self) -> bytes | None:
        """The next piece of the body; None: it is not here yet, or the body has ended."""
        if not self._is_chunked:
            part, self._buffer = self._buffer, b""
            if self._left > 0:
                self._left -= len(part)
            return part
        mark = self._buffer.find(b"\r\n")
        if mark < 0:
            return None
        size = int(self._buffer[:mark].partition(b";")[0], 16)
        end = mark + 2 + size
        if len(self._buffer) < end + 2:
            return None
        part, self._buffer = self._buffer[mark + 2 : end], self._buffer[end + 2 :]
        if size == 0:
            self._end_of_body()
            return None
        return part

    def _read_events(self, body: bytes, now: float) -> None:
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
        *events, self._events = (self._events + body).split(b"\n\n")
        outcome = self._outcome
        for event in events:
            if _TEXT.search(event):
                outcome.times.append(now)
                if outcome.ask.enough is not None and len(outcome.times) >= outcome.ask.enough:
                    self._finish("left")
                    return
            ending = _ENDING.search(event)
            if ending:
                outcome.endings.append(ending[1].decode())
            if _USAGE.search(event):
                _count(outcome, json.loads(event.partition(b"data:")[2]))
            if _ERROR.search(event):
                outcome.message = event.decode(errors="replace")[:300]

    def _end_of_body(self) -> None:
        outcome = self._outcome
        if outcome.status >= 400:
            self._finish("refused", self.whole.decode(errors="replace")[:300])
        elif outcome.message:
            self._finish("refused", outcome.message)
        elif self._is_stream:
            # Whatever else came: without an ending, the client does not know that this is all.
            self._finish(*(("done", "") if outcome.endings else ("lost", "the stream has no finish_reason")))
        else:
            if outcome.ask.body:
                answer = json.loads(self.whole)
                outcome.endings = [str(choice.get("finish_reason")) for choice in answer.get("choices", ())]
                _count(outcome, answer)
                outcome.times.append(self._clock())  # all of it is here at once
            self._finish("done")

    def _finish(self, state: State, message: str = "") -> None:
        if self._done is None or self._done.done():
            return
        outcome = self._outcome
        outcome.state, outcome.message, outcome.ended = state, message, self._clock()
        self._is_used = True
        if state in ("left", "lost") or self._is_last:
            self.is_closed = True
            self._transport.abort()
        self._done.set_result(None)


def _count(outcome: Outcome, answer: object) -> None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return
    outcome.prompt_tokens = usage.get("prompt_tokens")
    outcome.answer_tokens = usage.get("completion_tokens")
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        outcome.cached_tokens = details.get("cached_tokens")

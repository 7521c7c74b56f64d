"""Many clients of one OpenAI-compatible server, in one thread and few instructions: they share its processor.

Knows HTTP, not what is asked or what the times mean.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from kiloq.errors import ConfigError

from .serve_exchange import Ask, Clock, Exchange, Outcome


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to ask."""

    url: str  # without /v1
    api_key: str = ""
    timeout: float = 600.0  # seconds for one answer; one that takes longer is lost

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the server is {self.url!r}; give it as http://127.0.0.1:8000")

    @property
    def place(self) -> tuple[str, int, ssl.SSLContext | None]:
        parts = urlsplit(self.url)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        return parts.hostname or "", parts.port or (443 if context else 80), context

    def message(self, method: str, path: str, body: bytes = b"") -> bytes:
        """An HTTP request."""
        parts = urlsplit(self.url)
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


Told = Callable[[Outcome], None]


async def closed_loop(target: Target, asked: Sequence[Ask], clients: int, told: Told) -> list[Outcome]:
    """So many clients, each of which asks again as soon as it is answered. `told` hears of every beginning and end."""
    clock = Clock()
    outcomes = [Outcome(ask) for ask in asked]
    waiting = iter(outcomes)
    await asyncio.gather(*(_client(target, waiting, clock, told) for _ in range(min(clients, len(asked)))))
    return outcomes


async def open_loop(target: Target, asked: Sequence[Ask], times: Sequence[float], told: Told) -> list[Outcome]:
    """Requests at their times, whether earlier ones are answered or not."""
    clock = Clock()
    outcomes = [Outcome(ask) for ask in asked]

    async def come(outcome: Outcome, at: float) -> None:
        await asyncio.sleep(at - clock())
        await _client(target, iter((outcome,)), clock, told)

    await asyncio.gather(*(come(outcome, at) for outcome, at in zip(outcomes, times, strict=True)))
    return outcomes


async def fetch(target: Target, path: str) -> tuple[int, bytes]:
    """Status and body of a GET."""
    outcome = Outcome(Ask(path, b"", 0, is_streamed=False))
    exchange = await _connect(target, Clock())
    try:
        await exchange.carry_out(target.message("GET", path), outcome, target.timeout)
    finally:
        exchange.close()
    if outcome.state == "lost":
        raise ConnectionError(f"{target.url}{path}: no whole answer")
    return outcome.status, exchange.whole


async def _client(target: Target, waiting: Iterator[Outcome], clock: Clock, told: Told) -> None:
    exchange: Exchange | None = None
    for outcome in waiting:
        outcome.began = clock()
        told(outcome)
        message = target.message("POST", outcome.ask.path, outcome.ask.body)
        try:
            if exchange is not None and not exchange.is_closed:
                await exchange.carry_out(message, outcome, target.timeout)
            # A server may close an idle connection while the next request is on its way: that one goes out again.
            if outcome.state == "waiting" or exchange is None or exchange.was_idle:
                outcome.state, outcome.message = "waiting", ""
                exchange = await _connect(target, clock)
                await exchange.carry_out(message, outcome, target.timeout)
        except OSError as error:
            outcome.state, outcome.message, outcome.ended = "lost", str(error), clock()
        told(outcome)
    if exchange is not None:
        exchange.close()


async def _connect(target: Target, clock: Clock) -> Exchange:
    host, port, context = target.place
    _, exchange = await asyncio.get_running_loop().create_connection(lambda: Exchange(clock), host, port, ssl=context)
    return exchange

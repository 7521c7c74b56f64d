"""Runs the application on a port until it is told to stop. Knows uvicorn, sockets and signals."""

import asyncio
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from kiloq.engine import LLM
from kiloq.errors import ConfigError

from .app import create_app
from .bridge import BridgeConfig, EngineThread
from .protocol import BoundedProtocol
from .service import ServeConfig, Service

_LAST_BYTES_SECONDS = 5  # for clients to read the ends of their answers


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds the port but takes no connection yet: the model is loaded before anyone is answered."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address[0] == "::":
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        raise _no_port(host, port, error) from None
    return listening


def serve(
    llm: LLM,
    config: ServeConfig,
    bridge: BridgeConfig | None = None,
    *,
    ready: Callable[[str], None],
    listening: socket.socket | None = None,
) -> int | None:
    """Serve until SIGTERM or Ctrl-C, and let running requests end first; a second signal cuts them, and is returned.

    `ready` is told the URL once the port answers.
    """
    adapters = tuple(name for name, _ in config.adapters)
    engine = EngineThread(llm, bridge)
    service = Service(llm=llm, engine=engine, config=config, adapters=adapters, created=int(time.time()))
    listening = listening or listen(config.host, config.port)
    settings = uvicorn.Config(
        create_app(service),
        http=BoundedProtocol,
        loop="asyncio",
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        backlog=1024,
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
    )
    server = _Server(settings, service, ready)
    gc.collect()
    gc.freeze()  # model and modules stay: looked through again, they would hold everything up for 0.09 s at a time
    try:
        server.run(sockets=[listening])
    except OSError as error:  # taken by another between bind and listen
        raise _no_port(config.host, config.port, error) from None
    return server.cut_by


class _Server(uvicorn.Server):
    """uvicorn's server, but it goes on answering "not now" while it drains, and ends with exit code 0."""

    def __init__(self, settings: uvicorn.Config, service: Service, ready: Callable[[str], None]) -> None:
        super().__init__(settings)
        self.cut_by: int | None = None
        self._service = service
        self._ready = ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets, "the server is given its socket"
        host, port = sockets[0].getsockname()[:2]
        self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def handle(number: int, _frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._stop, number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        seconds = self._service.config.drain_seconds
        if self._draining is not None:  # told a second time: cut what runs, but tell its clients
            self._draining.cancel()
            self.cut_by, seconds = number, 0
        self._draining = asyncio.get_running_loop().create_task(self._drain(seconds))

    async def _drain(self, seconds: float) -> None:
        await self._service.engine.drain(seconds)
        self.should_exit = True


def _no_port(host: str, port: int, error: Exception) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ConfigError(f"cannot listen on {host} port {port}: {reason}. Choose others with --host and --port.")

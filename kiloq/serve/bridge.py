"""Between the event loop and the engine's thread: requests go in, lists of events come out. Knows no HTTP, no JSON."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kiloq.engine import LLM, Event, SamplingParams
from kiloq.engine.events import EngineStats
from kiloq.errors import KiloqError

T = TypeVar("T")
Command = Callable[[], None]


class BusyError(KiloqError):
    """The server takes no more requests now; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Limits of the queue in front of the engine."""

    max_queue: int = 256  # requests that wait besides those that run
    request_timeout: float | None = None  # seconds from arrival to the last token


class AnswerStream:
    """The events of one request, in lists as the engine's steps make them. Closing it ends the request."""

    def __init__(self, request_id: str, close: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._close = close
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._is_done = False

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return self

    async def __anext__(self) -> list[Event]:
        """What has come since the last call; raises the error that ended the request, if one did."""
        if not self._events:
            if self._is_done:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        events, self._events = self._events, []
        for event in events:
            if event.error is not None:
                raise event.error
        return events

    def deliver(self, events: Sequence[Event]) -> None:
        """Called on the event loop."""
        self._events += events
        self._is_done = self._is_done or any(event.usage is not None or event.error is not None for event in events)
        self._arrived.set()

    def close(self) -> None:
        """End the request, if it has not ended; may be called again."""
        if not self._is_done:
            self._is_done = True
            self._close(self.request_id)


class EngineThread:
    """Owns an LLM: its engine runs in this thread alone, and everything that needs it is sent here."""

    def __init__(self, llm: LLM, config: BridgeConfig | None = None) -> None:
        self.llm = llm
        self.config = config or BridgeConfig()
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, AnswerStream] = {}  # touched on the event loop only
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._number = 0
        self._is_draining = False

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        """Whether no new requests are taken, for good."""
        return self._is_draining

    @property
    def stats(self) -> EngineStats:
        return self.llm.engine.stats

    def start(self) -> None:
        """Call it on the event loop that will be served."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def open(self, prompt_ids: Sequence[int], params: SamplingParams, *, adapter: str = "") -> AnswerStream:
        """Admit a request before anything is answered: RequestError if it cannot be served, BusyError if not now."""
        if self._is_draining:
            raise BusyError("the server is shutting down.", retry_after=5)
        if len(self._streams) >= self.llm.engine.max_batch + self.config.max_queue:
            raise BusyError(f"{len(self._streams):,} requests are running or waiting already; try again soon.")
        self._number += 1
        stream = AnswerStream(f"r{self._number}", self._cancel)
        self._streams[stream.request_id] = stream
        try:
            await self.run(lambda llm: llm.engine.add(prompt_ids, params, request_id=stream.request_id))
        except BaseException:
            del self._streams[stream.request_id]
            raise
        return stream

    async def run(self, job: Callable[[LLM], T]) -> T:
        """Do a job on the engine's thread, between two steps."""
        assert self._loop is not None, "the engine's thread was not started"
        loop, done = self._loop, self._loop.create_future()

        def command() -> None:
            try:
                result = job(self.llm)
            except Exception as error:
                loop.call_soon_threadsafe(_settle, done, None, error)
            else:
                loop.call_soon_threadsafe(_settle, done, result, None)

        self._commands.put(command)
        result: T = await done
        return result

    async def drain(self, seconds: float) -> None:
        """Take no new requests, and give those that run so long to end."""
        self._is_draining = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self._streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        self._commands.put(None)
        self._thread.join()

    def _cancel(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._commands.put(lambda: self.llm.engine.cancel(request_id))

    def _run(self) -> None:
        engine = self.llm.engine
        while True:
            while not engine.has_work or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command()
            events = engine.step()
            if events and self._loop is not None:
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Sequence[Event]) -> None:
        by_request: dict[str, list[Event]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        for request_id, some in by_request.items():
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.deliver(some)
                if stream._is_done:
                    del self._streams[request_id]


def _settle(done: "asyncio.Future[T]", result: T, error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)

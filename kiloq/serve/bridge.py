"""Between the event loop and the engine's thread: requests go in, lists of events come out. Knows no HTTP, no JSON.

What is here runs on the event loop, which never waits for the engine; what runs on the thread is in worker.py.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kiloq.engine import LLM, Event, SamplingParams, Usage
from kiloq.engine.events import EngineStats
from kiloq.engine.score import Parts
from kiloq.errors import KiloqError

from .metrics import Metrics
from .worker import EngineError, Part, Unfinished, Worker

T = TypeVar("T")
_RECENT = 32  # ended requests, by which the speed of the queue is guessed

logger = logging.getLogger(__name__)


class BusyError(KiloqError):
    """The server takes no more requests now; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestTimeoutError(KiloqError):
    """A request took longer than requests may."""


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Limits of the queue in front of the engine."""

    max_queue: int = 256  # answers that wait besides those that run
    request_timeout: float | None = None  # seconds from arrival to the last token
    check_integrity: bool = False  # assert, whenever the engine has nothing to do, that no block is lost; for tests


class AnswerStream:
    """The events of one request, in lists as the engine's steps make them. Closing it ends the request."""

    def __init__(self, request_id: str, num_answers: int, close: Callable[["AnswerStream"], None]) -> None:
        self.request_id = request_id
        self.opened = time.perf_counter()
        self.latest = [0.0] * num_answers  # when each answer had its latest token; 0 before the first
        self.is_done = False
        self.first_token: float | None = None  # when it came
        self.usage: Usage | None = None  # once it is over
        self.timer: asyncio.TimerHandle | None = None
        self._close = close
        self._events: list[Event] = []
        self._error: KiloqError | None = None
        self._reader: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return self

    async def __anext__(self) -> list[Event]:
        """What has come since the last call; after all that, the error that ended the request, if one did."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if self.is_done:
                raise StopAsyncIteration
            assert self._reader is None, "two readers of one stream"
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """End the request, if it has not ended, and whoever reads it; may be called again."""
        if not self.is_done:
            self.end(None)
            self._events.clear()
            self._close(self)

    def deliver(self, event: Event) -> None:
        """Called on the event loop."""
        if event.error is None:
            self._events.append(event)
        if event.usage is not None:
            self.usage = event.usage
            self.end(event.error)
        else:
            self._wake()

    def end(self, error: KiloqError | None) -> None:
        """No more will come."""
        self.is_done, self._error = True, error
        if self.timer is not None:
            self.timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class EngineThread:
    """Owns an LLM: its engine runs in a thread of its own, and everything that needs it is sent there."""

    def __init__(self, llm: LLM, config: BridgeConfig | None = None) -> None:
        self.llm = llm
        self.config = config or BridgeConfig()
        self.metrics = Metrics(lambda: self.stats, lambda: self.healthy)
        self._worker = Worker(llm.engine, self._deliver, self._cut_all, checks=self.config.check_integrity)
        self._streams: dict[str, AnswerStream] = {}
        self._ends: deque[float] = deque(maxlen=_RECENT)  # when requests ended, since it was last idle
        self._num_opened = 0
        self._num_answers = 0  # that run or wait; a job counts as one
        self._idle = asyncio.Event()
        self._is_draining = False

    @property
    def is_draining(self) -> bool:
        """Whether no new requests are taken, for good."""
        return self._is_draining

    @property
    def stats(self) -> EngineStats:
        """As of the engine's latest step."""
        return self._worker.stats

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered: the thread lives, and its latest steps did not all fail."""
        return self._worker.is_healthy

    def start(self) -> None:
        """Call it on the event loop that will be served."""
        self._worker.start()

    async def open(self, prompt_ids: Sequence[int], params: SamplingParams, *, adapter: str = "") -> AnswerStream:
        """Admit a request before anything is answered: RequestError if it cannot be served, BusyError if not now."""
        self._claim(params.n)
        self._num_opened += 1
        stream = AnswerStream(f"r{self._num_opened}", params.n, self._cancel)
        self._streams[stream.request_id] = stream
        if self.config.request_timeout is not None:
            loop = asyncio.get_running_loop()
            stream.timer = loop.call_later(self.config.request_timeout, self._time_out, stream)
        engine = self.llm.engine
        add = partial(engine.add, prompt_ids, params, request_id=stream.request_id, adapter=adapter)
        try:
            if params.constraint is not None:  # up to seconds, which neither the loop nor a step may take
                await asyncio.to_thread(engine.compile, params.constraint)
            if stream.is_done:  # its time was over meanwhile: nobody would end it in the engine
                return stream
            await self._worker.call(add)
        except BaseException:
            stream.close()  # its client may be gone while the engine has it already
            raise
        return stream

    async def run(self, job: Callable[[LLM], T]) -> T:
        """Do a short job on the engine's thread, between two steps."""
        return await self._take_turns(partial(job, self.llm))

    async def run_parts(self, job: Callable[[LLM], Parts[T]]) -> T:
        """Do a long job there, one part between two steps; a part takes no longer than a step may."""
        parts = job(self.llm)

        def part() -> T | Unfinished:
            try:
                next(parts)
            except StopIteration as end:
                result: T = end.value
                return result
            return Unfinished.UNFINISHED

        return await self._take_turns(part)

    async def drain(self, seconds: float) -> None:
        """Take no new requests, give those that run so long to end, and cut what is left."""
        self._is_draining = True
        if self._num_answers:
            try:
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
            except TimeoutError:
                logger.warning("%d answers are cut: they did not end in %.0f s", self._num_answers, seconds)
        self._cut_all(BusyError("the server is shutting down.", retry_after=5))

    def stop(self) -> None:
        """End the thread, after the step that it is in; may be called again."""
        self._is_draining = True
        self._cut_all(BusyError("the server is shutting down.", retry_after=5))
        self._worker.stop()

    def _claim(self, count: int) -> None:
        """Take the places of `count` answers. A request that is larger than the queue is served when it is alone."""
        if self._is_draining:
            raise BusyError("the server is shutting down.", retry_after=5)
        if not self._worker.is_alive:
            raise EngineError("the engine has stopped; restart the server.")
        places = self.llm.engine.max_batch + self.config.max_queue
        if self._num_answers and self._num_answers + count > places:
            self.metrics.refused()
            seconds = self._retry_after()
            found = f"{self._num_answers:,} answers are running or waiting, and at most {places:,} may"
            raise BusyError(f"{found}; try again in {seconds} s.", retry_after=seconds)
        self._num_answers += count
        self._idle.clear()

    def _release(self, count: int) -> None:
        self._num_answers -= count
        if not self._num_answers:
            self._ends.clear()  # what comes next has its own speed
            self._idle.set()

    def _retry_after(self) -> int:
        """Seconds until a quarter of the queue is gone, if requests go on to end as they did."""
        if not self._ends:
            return 1
        each = (time.perf_counter() - self._ends[0]) / len(self._ends)
        return min(60, max(1, math.ceil(each * self.config.max_queue / 4)))

    async def _take_turns(self, part: "Part[T]") -> T:
        self._claim(1)
        try:
            async with asyncio.timeout(self.config.request_timeout):
                return await self._worker.call(part, in_turn=True)
        except TimeoutError:
            raise self._late() from None
        finally:
            self._release(1)

    def _deliver(self, events: Sequence[Event]) -> None:
        """One step's events to their streams, and to the metrics, in one go."""
        now, streams, gaps = time.perf_counter(), self._streams, dict[float, int]()
        for event in events:
            stream = streams.get(event.request_id)
            if stream is not None:
                before = stream.latest[event.index]
                stream.latest[event.index] = now
                if before:
                    gaps[now - before] = gaps.get(now - before, 0) + 1
                elif stream.first_token is None:
                    stream.first_token = now
                    self.metrics.first_token(now - stream.opened)
                stream.deliver(event)
            if event.usage is not None:
                self._end(event, stream, now)
        self.metrics.tokens(gaps)

    def _end(self, event: Event, stream: AnswerStream | None, now: float) -> None:
        assert event.usage is not None
        assert event.finish_reason is not None
        self._ends.append(now)
        self.metrics.ended(event.finish_reason, event.usage, None if stream is None else now - stream.opened)
        if stream is not None:
            self._forget(stream)

    def _forget(self, stream: AnswerStream) -> None:
        del self._streams[stream.request_id]
        self._release(len(stream.latest))

    def _cancel(self, stream: AnswerStream) -> None:
        self._forget(stream)
        self._worker.do(partial(self.llm.engine.cancel, stream.request_id))

    def _time_out(self, stream: AnswerStream) -> None:
        self.metrics.timed_out()
        stream.end(self._late())
        self._cancel(stream)

    def _late(self) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"the request was not done within {self.config.request_timeout:,.0f} s, the limit of this server; "
            "ask for fewer tokens, or try again when it is less busy."
        )

    def _cut_all(self, error: KiloqError) -> None:
        for stream in list(self._streams.values()):
            stream.end(error)
            self._cancel(stream)
        self._worker.abandon(error)

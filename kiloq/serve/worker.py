"""The thread that alone touches the engine. Knows steps, commands and jobs; not who asked for them.

Between two steps it does what was asked of it until then; with nothing to do it sleeps. It tells the event loop once a
step what came of it: each telling wakes the loop, which costs more than a token's work.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from kiloq.engine import Engine, Event
from kiloq.engine.events import EngineStats
from kiloq.errors import KiloqError

T = TypeVar("T")

_MAX_FAILURES = 3  # steps that failed one after another, until the engine counts as broken

logger = logging.getLogger(__name__)


class EngineError(KiloqError):
    """The engine failed; not the fault of who asked. The log says why."""


class Unfinished(Enum):
    """What a part of a job returns that is not the last."""

    UNFINISHED = 0


Part = Callable[[], T | Unfinished]


class Worker:
    """`told` and `died` are called on the event loop: with a step's events, and with why there will be none any more.

    `checks`: assert, whenever there is nothing to do, that no block of the cache is lost.
    """

    def __init__(
        self,
        engine: Engine,
        told: Callable[[Sequence[Event]], None],
        died: Callable[[KiloqError], None],
        *,
        checks: bool = False,
    ) -> None:
        self.stats: EngineStats = engine.stats  # as of the latest step
        self._engine = engine
        self._told = told
        self._died = died
        self._checks = checks
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # None: it is over
        self._jobs: deque[Callable[[], bool]] = deque()  # each call does a part, and returns whether more is to do
        self._awaited: set[asyncio.Future[Any]] = set()  # touched on the event loop only
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failures = 0
        self._is_over = False  # nothing that is asked will be done; touched on the event loop only

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_over

    @property
    def is_healthy(self) -> bool:
        """Whether it lives and its latest steps did not all fail."""
        return self.is_alive and self._failures < _MAX_FAILURES

    def start(self) -> None:
        """Call it on the event loop that is to be told."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Return when the step that runs is done; may be called again."""
        if self.is_alive:
            self._inbox.put(None)
            self._thread.join()
        self.abandon(EngineError("the server has shut down."))

    def do(self, command: Callable[[], object]) -> None:
        """Before the next step; nobody waits for it, and it must not fail."""
        self._inbox.put(command)

    async def call(self, part: "Part[T]", *, in_turn: bool = False) -> T:
        """What `part` returns, or raises, on the thread.

        Before the next step; `in_turn`: only one such is done between two steps, until it is no longer unfinished.
        """
        assert self._loop is not None, "the thread was not started"
        done: asyncio.Future[T] = self._loop.create_future()

        def attempt() -> bool:
            if done.done():  # nobody waits any more
                return False
            try:
                result = part()
            except Exception as error:
                self._post(partial(_settle, done, error))
                return False
            if isinstance(result, Unfinished):
                return True
            self._post(partial(_settle, done, None, result))
            return False

        self._inbox.put(partial(self._jobs.append, attempt) if in_turn else attempt)
        self._awaited.add(done)
        try:
            return await done
        finally:
            self._awaited.discard(done)

    def abandon(self, error: KiloqError) -> None:
        """All who wait for a call get this error."""
        for done in self._awaited:
            if not done.done():
                done.set_exception(error)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            if self._loop is None or self._loop.is_closed():  # nobody listens any more
                return
            logger.exception("the engine's thread died")
            why = EngineError(f"the engine has stopped ({type(error).__name__}); the log says why.")
            self._post(partial(self._end, why))

    def _turn(self) -> bool:
        """What was asked until now, a part of one job, a step. False: it is over."""
        engine = self._engine
        must_wait = not (engine.has_work or self._jobs)
        for _ in range(max(must_wait, self._inbox.qsize())):
            command = self._inbox.get()
            if command is None:
                return False
            command()
        if self._jobs:
            job = self._jobs.popleft()
            if job():
                self._jobs.append(job)
        if engine.has_work:
            self._step()
        elif self._checks:
            engine.check_integrity()
        self.stats = engine.stats
        return True

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:
            self._failures += 1
            logger.exception("a step of the engine failed")
            why = f"the engine failed while it worked on this request ({type(error).__name__}); the log says why."
            self._engine.fail_abandoned(error if isinstance(error, KiloqError) else EngineError(why))
            return
        if self._engine.stats.steps > self.stats.steps:  # not only news of a failed one
            self._failures = 0
        if events:
            self._post(partial(self._told, events))

    def _end(self, why: KiloqError) -> None:
        self._is_over = True  # the thread may take a moment to be gone
        self.abandon(why)
        self._died(why)

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(callback)


def _settle(done: "asyncio.Future[T]", error: Exception | None, result: T | None = None) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)  # type: ignore[arg-type]  # None is a result too

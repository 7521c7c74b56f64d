"""Who waits for which request: an engine's events go to whoever steps it, and from here to whom they concern."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from kiloq.errors import KiloqError, RequestError

from .engine import Engine
from .events import Event
from .params import SamplingParams
from .results import Answers, Piece, Result, joined

Prompt = tuple[Sequence[int], SamplingParams]


class Readers:
    """Several readers of one engine, in one thread; each steps it when it has nothing to read."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._readers: dict[str, Callable[[Event], None]] = {}

    @property
    def are_waiting(self) -> bool:
        """Whether any answer is in the making."""
        return bool(self._readers)

    def completed(self, prompts: Iterable[Prompt], adapter: str) -> Iterator[tuple[int, Result | KiloqError]]:
        """Each prompt's number and its result, or why it has none, in the order they finish."""
        coming = enumerate(prompts)
        running: dict[str, Answers] = {}
        try:
            while True:
                # Enough to keep the engine busy, and not all of a file that may be long; a refused one takes no place.
                while len(running) < 4 * self.engine.max_batch and (one := next(coming, None)) is not None:
                    number, (prompt_ids, params) = one
                    answers = Answers(number, tuple(prompt_ids), params)
                    try:
                        running[self._open(answers.prompt_ids, params, answers.add, adapter)] = answers
                    except RequestError as error:
                        yield number, error
                if not running:
                    return
                if all(answers.outcome is None for answers in running.values()):  # `prompts` may have used the engine
                    self._step()
                for request_id, answers in list(running.items()):
                    if answers.outcome is not None:
                        self._close(request_id)
                        del running[request_id]
                        yield answers.number, answers.outcome
        finally:
            for request_id in running:
                self._close(request_id)

    def pieces(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str) -> Generator[Piece]:
        """An answer as it is made, after an empty piece as soon as it is queued. Closing this ends it."""
        events: deque[Event] = deque()
        request_id = self._open(prompt_ids, params, events.append, adapter)
        held: dict[int, list[Event]] = {}  # by answer: what has shown no text yet
        usage = None
        try:
            yield Piece(text="", token_ids=(), index=0)
            while usage is None:
                while not events:
                    self._step()
                event = events.popleft()
                if event.error is not None:
                    raise event.error
                usage = event.usage
                waiting = held.setdefault(event.index, [])
                waiting.append(event)
                if event.text or event.finish_reason:
                    yield joined(held.pop(event.index))
        finally:
            self._close(request_id)

    def _open(
        self, prompt_ids: Sequence[int], params: SamplingParams, reader: Callable[[Event], None], adapter: str
    ) -> str:
        request_id = self.engine.add(prompt_ids, params, adapter=adapter)
        self._readers[request_id] = reader
        return request_id

    def _close(self, request_id: str) -> None:
        del self._readers[request_id]
        self.engine.cancel(request_id)

    def _step(self) -> None:
        # Without this, a reader whose last event went elsewhere waits for ever.
        assert self.engine.has_work, "an answer is awaited, but the engine has none: its events were taken elsewhere"
        for event in self.engine.step():
            reader = self._readers.get(event.request_id)
            if reader is not None:  # nobody listens to what was closed
                reader(event)

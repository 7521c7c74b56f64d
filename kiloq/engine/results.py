"""What an LLM hands out, put together from the engine's events. Knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass

from kiloq.errors import KiloqError

from .events import Event, FinishReason, Usage
from .params import SamplingParams
from .sampler import Sampled


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One answer. `token_ids` and `text` are without the token or string that ended it; `stop_id` names the token."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_id: int | None
    logprobs: tuple[Sampled, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """All answers to one prompt."""

    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first answer."""
        return self.choices[0].text


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next part of answer `index`; the last one of an answer has its reason, the last of all has the usage."""

    text: str
    token_ids: tuple[int, ...]
    index: int
    logprobs: tuple[Sampled, ...] = ()
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    usage: Usage | None = None


class Answers:
    """The events of one request, until it has its outcome."""

    def __init__(self, number: int, prompt_ids: tuple[int, ...], params: SamplingParams) -> None:
        self.number = number
        self.prompt_ids = prompt_ids
        self.outcome: Result | KiloqError | None = None
        self._with_logprobs = params.logprobs is not None
        self._events: list[list[Event]] = [[] for _ in range(params.n)]

    def add(self, event: Event) -> None:
        self._events[event.index].append(event)
        if event.error is not None:
            self.outcome = event.error
        elif event.usage is not None:
            choices = tuple(self._choice(joined(events)) for events in self._events)
            self.outcome = Result(prompt_ids=self.prompt_ids, choices=choices, usage=event.usage)

    def _choice(self, whole: Piece) -> Choice:
        assert whole.finish_reason is not None
        return Choice(
            text=whole.text,
            token_ids=whole.token_ids,
            finish_reason=whole.finish_reason,
            stop_id=whole.stop_id,
            logprobs=whole.logprobs if self._with_logprobs else None,
        )


def joined(events: Sequence[Event]) -> Piece:
    """Consecutive events of one answer as one."""
    last = events[-1]
    return Piece(
        text="".join(event.text for event in events),
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        index=last.index,
        logprobs=tuple(one for event in events for one in event.logprobs),
        finish_reason=last.finish_reason,
        stop_id=last.stop_id,
        usage=last.usage,
    )

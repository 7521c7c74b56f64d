"""One answer, from the engine's events to deltas: parsed, its log probabilities and tokens counted. Knows no wire."""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from kiloq.chat import Delta, ReplyParser
from kiloq.engine import Event, Usage
from kiloq.engine.sampler import Sampled
from kiloq.tokenizer import Tokenizer

from .answer_memory import AnswerMemory

Ending = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What became certain of answer `index`. The last of an answer has its ending, the last of all the usage.

    `logprobs` are those of the tokens that its content is made of.
    """

    index: int
    delta: Delta = field(default_factory=Delta)
    logprobs: tuple[Sampled, ...] = ()
    finish_reason: Ending | None = None
    usage: Usage | None = None


class AnswerReader:
    """Reads the events of one answer; `spans` is given if log probabilities were asked for."""

    def __init__(self, index: int, parser: ReplyParser, memory: AnswerMemory, spans: "TokenSpans | None") -> None:
        self.index = index
        self.completion_tokens = 0  # drawn so far, the stop token included
        self._ids: list[int] = []
        self._num_chars = 0
        self._memory = memory
        self._parser = parser
        self._spans = spans
        self._thought_tokens = 0
        self._has_thought = self._has_calls = False

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thoughts and their markers, so far."""
        return self._thought_tokens if self._has_thought else 0

    def read(self, event: Event) -> list[AnswerDelta]:
        """What an event makes certain."""
        self.completion_tokens += len(event.token_ids) + (event.stop_id is not None)
        self._ids += event.token_ids
        self._num_chars += len(event.text)
        if self._parser.is_thinking:
            self._thought_tokens += len(event.token_ids)
        if self._spans is not None:
            for sampled in event.logprobs:
                self._spans.push(sampled)
        deltas = self._parser.push(event.text)
        if event.finish_reason is not None:
            deltas += self._parser.finish()
            if self._spans is not None:
                self._spans.flush()
        parts = [self._part(delta) for delta in deltas]
        if event.finish_reason is not None:
            self._memory.remember(self._ids, self._num_chars)
            parts.append(AnswerDelta(self.index, finish_reason=self._ending(event), usage=event.usage))
        return parts

    def _part(self, delta: Delta) -> AnswerDelta:
        self._has_thought = self._has_thought or bool(delta.reasoning)
        self._has_calls = self._has_calls or delta.call is not None
        shown = self._spans is not None and delta.content
        logprobs = self._spans.within(delta.start, delta.start + len(delta.content)) if shown and self._spans else ()
        return AnswerDelta(self.index, delta, logprobs)

    def _ending(self, event: Event) -> Ending:
        if event.finish_reason == "length":
            return "length"
        # A call that a stop string cut off is none that a client could make.
        return "tool_calls" if self._has_calls and not self._parser.in_call else "stop"


class TokenSpans:
    """Which tokens some piece of an answer's text is made of; places are in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._control_ids = tokenizer.control_ids
        self._length = 0
        self._open: list[Sampled] = []  # tokens of a character that is not complete
        self._tokens: deque[tuple[int, int, Sampled]] = deque()  # start, end, token

    def push(self, sampled: Sampled) -> None:
        if sampled.token_id not in self._control_ids:  # those have no text
            self._open.append(sampled)
            self._place(self._decoder.push(sampled.token_id))

    def flush(self) -> None:
        """The answer has ended."""
        self._place(self._decoder.flush())

    def within(self, start: int, end: int) -> tuple[Sampled, ...]:
        """Tokens of this piece that no earlier piece had; pieces are asked for from left to right."""
        found = []
        while self._tokens and self._tokens[0][0] < end:
            _, stop, sampled = self._tokens.popleft()
            if stop > start:
                found.append(sampled)
        return tuple(found)

    def _place(self, text: str) -> None:
        if text:
            self._tokens += [(self._length, self._length + len(text), sampled) for sampled in self._open]
            self._length += len(text)
            self._open.clear()

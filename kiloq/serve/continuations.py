"""Texts continued as they stand: what /v1/completions does, from prompts to the pieces of its choices.

Knows the engine's events and the legacy form of log probabilities; no HTTP.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from kiloq.engine import Event, SamplingParams, Usage
from kiloq.engine.sampler import Sampled
from kiloq.tokenizer import Tokenizer

from .bridge import AnswerStream
from .prompts import Prompt
from .service import Service

Scores = Sequence[Sampled]

_LEAST = -9999.0  # OpenAI's word for a probability of nothing; JSON has no infinity


@dataclass(slots=True)
class TokenLists:
    """Log probabilities as completions list them; a token's offset is that of its first character in the text."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def __iadd__(self, other: "TokenLists") -> "TokenLists":
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset
        return self


@dataclass(slots=True)
class ChoicePiece:
    """What became certain of a choice; pieces add up to the choice."""

    text: str = ""
    lists: TokenLists = field(default_factory=TokenLists)
    finish_reason: str | None = None

    def __iadd__(self, other: "ChoicePiece") -> "ChoicePiece":
        self.text += other.text
        self.lists += other.lists
        self.finish_reason = other.finish_reason or self.finish_reason
        return self


class ChoiceWriter:
    """Makes pieces of one choice. Tokens wait for their text, so that those of a stop string are never shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sum, self._count = 0.0, 0  # of the log probabilities
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder()
        self._offset = 0  # where the next token's text begins
        self._shown = 0  # characters
        self._waiting: list[tuple[int, Sampled]] = []

    @property
    def mean_logprob(self) -> float:
        """How likely the model finds a token of this choice, on average; 0 for none."""
        return self._sum / max(self._count, 1)

    def echo(self, prompt: Prompt, scores: Scores | None) -> ChoicePiece:
        """The prompt itself, as the beginning of the choice."""
        piece = ChoicePiece(self._tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text)
        decoder = self._tokenizer.stream_decoder(skip_special=False)
        offset = 0
        for score in scores or ():
            self._list(piece.lists, offset, score)
            offset += len(decoder.push(score.token_id))
        self._offset = self._shown = len(piece.text)
        return piece

    def write(self, event: Event) -> ChoicePiece:
        """What one event adds."""
        piece = ChoicePiece(event.text, finish_reason=event.finish_reason)
        self._shown += len(event.text)
        for sampled in event.logprobs:
            self._waiting.append((self._offset, sampled))
            self._offset += len(self._decoder.push(sampled.token_id))
            self._sum += sampled.logprob or 0.0
            self._count += 1
        if event.finish_reason is None or (event.finish_reason == "stop" and event.stop_id is None):
            ready = sum(offset < self._shown for offset, _ in self._waiting)
        else:
            ready = len(self._waiting)
        for offset, sampled in self._waiting[:ready]:
            self._list(piece.lists, offset, sampled)
        del self._waiting[:ready]
        return piece

    def _list(self, lists: TokenLists, offset: int, sampled: Sampled) -> None:
        lists.tokens.append(token_text(self._tokenizer, sampled.token_id))
        lists.text_offset.append(offset)
        if sampled.logprob is None:  # of a prompt's first token
            lists.token_logprobs.append(None)
            lists.top_logprobs.append(None)
            return
        lists.token_logprobs.append(_finite(sampled.logprob))
        top = {token_text(self._tokenizer, i): _finite(logprob) for i, logprob in reversed(sampled.top_logprobs)}
        top.setdefault(lists.tokens[-1], _finite(sampled.logprob))
        lists.top_logprobs.append(dict(sorted(top.items(), key=lambda item: -item[1])))


class Continuations:
    """The answers to several prompts, in lists of (number of the prompt, events). `close` ends them all."""

    def __init__(self, streams: Sequence[AnswerStream]) -> None:
        self.streams = streams
        self._arrived: asyncio.Queue[tuple[int, list[Event]] | Exception | None] = asyncio.Queue()
        self._readers = [asyncio.create_task(self._read(number, one)) for number, one in enumerate(streams)]

    @classmethod
    async def open(
        cls, service: Service, prompts: Sequence[Prompt], params: SamplingParams, *, adapter: str
    ) -> "Continuations":
        """All admitted, or none."""
        streams: list[AnswerStream] = []
        try:
            for prompt in prompts:
                streams.append(await service.engine.open(prompt.ids, params, adapter=adapter))  # noqa: PERF401  # what is open must be known
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return cls(streams)

    async def __aiter__(self) -> AsyncIterator[tuple[int, list[Event]]]:
        for _ in self.streams:
            while (arrived := await self._arrived.get()) is not None:
                if isinstance(arrived, Exception):
                    raise arrived
                yield arrived

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        for reader in self._readers:
            reader.cancel()

    async def _read(self, number: int, stream: AnswerStream) -> None:
        try:
            async for events in stream:
                self._arrived.put_nowait((number, events))
        except Exception as error:
            self._arrived.put_nowait(error)
        finally:
            self._arrived.put_nowait(None)


def total(usages: Sequence[Usage]) -> Usage:
    """The usage of several prompts together."""
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
    )


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; one that is no whole character is shown by its bytes, as OpenAI does."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST

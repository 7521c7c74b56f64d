"""What the engine tells of its requests. Plain data."""

from dataclasses import dataclass, field
from typing import Literal

from kiloq.errors import KiloqError

from .sampler import Sampled

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request; `cached_tokens` of the prompt were found computed."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # all that were drawn, stop tokens included
    queue_seconds: float = field(default=0.0, kw_only=True, compare=False)  # from the request to its first step

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What one step added to one answer; the last event of a request carries its usage.

    `token_ids` leaves out a stop token, which `stop_id` names, and `text` leaves out a stop string. An `error` ends the
    whole request, with the reason "error".
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Sampled, ...] = ()
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    usage: Usage | None = None
    error: KiloqError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What the engine is doing and has done since it was made."""

    running: int
    waiting: int
    blocks: int
    blocks_available: int
    blocks_cached: int
    steps: int
    computed_tokens: int
    generated_tokens: int
    preempted: int
    guessed: int  # tokens, by speculation
    guessed_right: int

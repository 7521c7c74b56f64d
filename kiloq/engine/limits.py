"""What an engine can serve, and what is checked when a request comes. Knows numbers of tokens, not blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from kiloq.errors import ContextLengthError, RequestError

from .params import SamplingParams

_WHOLE_STEP = 512  # more make prompts no faster
# Weights times tokens that a thread gets through in about 0.6 s. Measured in int4 on two cores with AMX: 512 tokens of
# 0.5B take 0.38 s, 256 of 1.8B 0.57 s (512: 1.05 s, 7 % faster per token), 64 of 7B 0.71 s (192: 1.67 s, 28 %).
_SHORT_STEP = 2.5e11


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine. None lets it choose: the model's own length, and what the device digests well."""

    max_context: int | None = None  # tokens of one sequence, prompt and answer together
    max_batch: int | None = None  # sequences that run at once
    step_tokens: int | None = None  # tokens that go through the model in one step
    short_steps: bool = False  # for a server: nobody waits long for a step of others' prompts, or to be cancelled
    kv_dtype: str = "auto"
    kv_memory: int | None = None  # bytes
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """`max_context` tokens of one sequence; fewer than `asked_context` if the cache could not be that large."""

    vocab_size: int
    max_context: int
    asked_context: int

    def length_of(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """How long the sequence may become; RequestError for a prompt that cannot be served."""
        length, limit = len(prompt_ids), self.max_context
        if length == 0:
            raise RequestError("the prompt is empty; give at least one token.")
        asked = length + (params.max_tokens or 1)
        if asked > limit:
            adds = f"max_tokens adds {params.max_tokens:,}" if params.max_tokens else "an answer needs at least 1"
            remedy = (
                f"raise max_context to {asked:,}"
                if limit == self.asked_context
                else f"raise kv_memory, which holds {limit:,} of the {self.asked_context:,} tokens of max_context"
            )
            raise ContextLengthError(
                f"the prompt has {length:,} tokens and {adds}, but the limit is {limit:,}. Shorten it, or {remedy}.",
                limit=limit,
            )
        check_ids(prompt_ids, self.vocab_size)
        return asked if params.max_tokens else limit


def check_ids(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """RequestError for an id that the model has no row for."""
    wrong = next((token_id for token_id in prompt_ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"the prompt holds token {wrong}; the model knows 0 to {vocab_size - 1:,}.")


def step_tokens(num_parameters: int, num_threads: int, *, short: bool) -> int:
    """How many tokens a processor takes in one step; a power of two, because kernels work in tiles."""
    most = max(1, int(_SHORT_STEP * num_threads / num_parameters)) if short else _WHOLE_STEP
    return min(_WHOLE_STEP, max(32, 1 << (most.bit_length() - 1)))

"""One request and the answers in the making. Knows its own tokens, not the other requests."""

import time
from dataclasses import dataclass, field

from kiloq.cache import KeyChain

from .events import Usage
from .lookup import Guesser
from .params import SamplingParams
from .sampler import RowSampler
from .stops import TextStream


@dataclass(kw_only=True, eq=False, slots=True)
class Request:
    """What was asked, once for all of its `params.n` sequences."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    max_length: int  # prompt and answer together
    adapter: str = ""  # of the engine's adapters; "": the model as it is
    sequences: list["Sequence"] = field(default_factory=list)
    cached_tokens: int | None = None  # of the prompt, found in the cache when the first sequence began; None before
    completion_tokens: int = 0  # drawn so far, stop tokens included
    added: float = field(default_factory=time.perf_counter)
    admitted: float | None = None  # when the first sequence first ran

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def usage(self) -> Usage:
        return Usage(
            len(self.prompt_ids),
            self.cached_tokens or 0,
            self.completion_tokens,
            queue_seconds=(self.admitted or time.perf_counter()) - self.added,
        )


@dataclass(kw_only=True, eq=False, slots=True)
class Sequence:
    """A prompt and one answer to it so far. `chain`, `alpha`, `table` and `num_computed` are the scheduler's."""

    request: Request
    index: int
    order: tuple[int, int]  # number of the request, index: smaller came first
    ids: list[int]
    sampler: RowSampler
    text: TextStream
    guesser: Guesser | None = None  # None: no token of it is guessed
    is_finished: bool = False
    alpha: float = 0.0  # the NTK factor of the cached keys; 0 before they are computed
    chain: KeyChain | None = None
    table: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are cached

    @property
    def num_pending(self) -> int:
        """Tokens that must go through the model before the next one can be drawn."""
        return len(self.ids) - self.num_computed

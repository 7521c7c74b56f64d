"""What a request becomes before it runs, or why it is refused. Knows no other request, no blocks and no scores."""

import hashlib
from collections.abc import Collection
from collections.abc import Sequence as Items

from kiloq.errors import RequestError
from kiloq.tokenizer import Tokenizer

from .constrain import Grammars
from .limits import Limits
from .params import Constraint, SamplingParams
from .sampler import RowSampler
from .sequence import Request, Sequence
from .speculate import Speculation
from .stops import NoText, TextStream


class Intake:
    """Makes the requests of one engine. `stop_ids` are the model's own; `seed` serves those that bring none."""

    def __init__(
        self,
        limits: Limits,
        speculation: Speculation,
        *,
        tokenizer: Tokenizer | None,
        stop_ids: Collection[int],
        adapters: Collection[str],
        seed: int,
    ) -> None:
        self._limits = limits
        self._speculation = speculation
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._adapters = frozenset(adapters)
        self._seed = seed
        self._grammars = None if tokenizer is None else Grammars(tokenizer, limits.vocab_size)

    def compile(self, constraint: Constraint) -> None:
        """Prepare a constraint; any thread may call this at any time."""
        self._known_grammars().compile(constraint)

    def request(
        self, prompt_ids: Items[int], params: SamplingParams, *, request_id: str, number: int, adapter: str
    ) -> Request:
        """With all its sequences; the engine has had `number` requests before."""
        if adapter and adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise RequestError(f"adapter is {adapter!r}; the engine has {known}.")
        request = Request(
            id=request_id,
            prompt_ids=tuple(prompt_ids),
            params=params,
            stop_ids=frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self._stop_ids),
            max_length=self._limits.length_of(prompt_ids, params),
            adapter=adapter,
        )
        request.sequences += [self._sequence(request, number, index) for index in range(params.n)]
        return request

    def _sequence(self, request: Request, number: int, index: int) -> Sequence:
        params = request.params
        if self._tokenizer is None and params.stop:
            raise RequestError("stop strings need a tokenizer, and this engine has none; use stop_ids.")
        decoder = self._tokenizer.stream_decoder(skip_special=params.skip_special) if self._tokenizer else NoText()
        seed = _derived_seed(self._seed, number, index) if params.seed is None else params.seed + index
        constraint = params.constraint
        matcher = None if constraint is None else self._known_grammars().matcher(constraint, request.stop_ids)
        return Sequence(
            request=request,
            index=index,
            order=(number, index),
            ids=list(request.prompt_ids),
            sampler=RowSampler(params, request.prompt_ids, self._limits.vocab_size, seed, matcher),
            text=TextStream(decoder, params.stop),
            guesser=self._speculation.guesser(params.speculation, is_held=constraint is not None),
        )

    def _known_grammars(self) -> Grammars:
        if self._grammars is None:
            raise RequestError("a constraint needs a tokenizer, and this engine has none.")
        return self._grammars


def _derived_seed(engine_seed: int, number: int, index: int) -> int:
    """The seed of one answer to a request that brings none."""
    digest = hashlib.blake2b(repr((engine_seed, number, index)).encode(), digest_size=7).digest()
    return int.from_bytes(digest)

"""Speculative decoding: several tokens a step, none of them other than it would have been.

Guesses go through the model behind the last token, all in one step. Each row's token is then drawn as always, by the
sequence's own random number; as long as it is what was guessed, the guess's row was computed from the right past and
is drawn from next. So a guess x is kept with probability p(x), and what stands in its place otherwise is distributed
as p without x: the rule of Leviathan et al. (arXiv 2211.17192) for guesses that are certain, and with the same seed not
only the distribution but the tokens are those of plain decoding. A draft guesses by the same random numbers: it draws
what the model draws as far as their cumulative probabilities overlap.

What this file knows: who guesses for whom, and what it costs. Not: models' insides, blocks, stop rules.
"""

from collections.abc import Sequence as Items

from kiloq.errors import RequestError
from kiloq.model import ModelConfig, Transformer

from .draft import Draft
from .lookup import Guesser, Kind
from .sequence import Sequence

_ROW_COST = 0.1  # of a further row in a step, in steps; measured in docs/decisions/0018
_LARGE = 100_000_000  # weights of a model whose steps are mostly the reading of them: there further rows are cheap


class Speculation:
    """The guessing of one engine: by default with its draft; by lookup where rows are cheap; else not at all."""

    def __init__(
        self,
        config: ModelConfig,
        draft: Transformer | None,
        *,
        rows_are_cheap: bool,
        max_batch: int,
        max_context: int,
    ) -> None:
        self.num_guessed = self.num_right = 0
        self._draft = None if draft is None else Draft(draft, config, max_batch=max_batch, max_context=max_context)
        self._rows_are_cheap = rows_are_cheap
        by_lookup = rows_are_cheap and config.num_parameters >= _LARGE
        self._default: Kind | None = "draft" if draft is not None else "prompt-lookup" if by_lookup else None
        self._draft_cost = 0.0 if draft is None else draft.config.num_parameters / config.num_parameters

    def guesser(self, wanted: str, *, is_held: bool = False) -> Guesser | None:
        """For a new sequence whose request wants this, and perhaps a form; RequestError for a draft that is not there.

        What a form leaves no choice about is guessed by any guesser, and by default where nothing else is.
        """
        default = self._default or ("grammar" if is_held and self._rows_are_cheap else None)
        kind = default if wanted == "auto" else wanted
        if kind == "draft" and self._draft is None:
            raise RequestError("speculation is 'draft', but the engine has no draft model; give it one, or use 'auto'.")
        if kind == "prompt-lookup":
            return Guesser("prompt-lookup", _ROW_COST)
        if kind == "grammar":
            return Guesser("grammar", _ROW_COST)
        return Guesser("draft", _ROW_COST + self._draft_cost) if kind == "draft" else None

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """Guesses of the next tokens of each sequence, at most so many."""
        found: dict[Sequence, tuple[int, ...]] = {}
        drafted: list[tuple[Sequence, int]] = []
        for sequence, most in wanted:
            guesser = sequence.guesser
            assert guesser is not None
            if guesser.is_silent(len(sequence.ids)):
                continue
            matcher = sequence.sampler.matcher
            forced = () if matcher is None else matcher.forced(most)
            if forced:
                found[sequence] = forced
            elif guesser.kind == "draft":
                drafted.append((sequence, most))
            elif guesser.kind == "prompt-lookup":
                found[sequence] = guesser.lookup.guess(sequence.ids, most)
        if self._draft is not None and drafted:
            found |= self._draft.propose(drafted)
        return [found.get(sequence, ()) for sequence, _ in wanted]

    def learn(self, sequence: Sequence, guesses: Items[int], num_right: int) -> None:
        """How good a step's guesses were."""
        self.num_guessed += len(guesses)
        self.num_right += num_right
        if guesses and sequence.guesser is not None:
            sequence.guesser.learn(len(sequence.ids), len(guesses), num_right)

    def release(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        if self._draft is not None:
            self._draft.release(sequence)

    def check_integrity(self) -> None:
        """Assert that no block of the draft's cache is lost."""
        if self._draft is not None:
            self._draft.check_integrity()

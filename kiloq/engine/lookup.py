"""Guesses from a sequence's own past, and how many to make. Knows token ids, not models.

A guess costs a row of the next step, less than a step because the weights are read once for all rows. `Guesser` counts
what guesses cost and bring, and pauses, longer each time, while they cost more.
"""

from collections.abc import Sequence as Items
from typing import Literal

_MOST = 8  # guesses a step
_KEEP = 0.75  # of what was learned, a step later
_SHORT_PAUSE, _LONG_PAUSE = 8, 256  # tokens
_LONG, _SHORT = 3, 2  # tokens that must agree before what follows them is guessed

Kind = Literal["prompt-lookup", "draft", "grammar"]


class Guesser:
    """One sequence's way of guessing. `cost` is that of one guess, in steps."""

    def __init__(self, kind: Kind, cost: float) -> None:
        self.kind = kind
        self.most = 2  # at the next step
        self.lookup = PromptLookup()
        self._cost = cost
        self._right, self._made = 1.0, 0.0  # decaying sums; the first guesses are on credit
        self._pause = _SHORT_PAUSE
        self._silent_until = 0  # tokens of the sequence

    def is_silent(self, num_tokens: int) -> bool:
        """Whether nothing is to be guessed while the sequence has this many tokens."""
        return num_tokens < self._silent_until

    def learn(self, num_tokens: int, made: int, right: int) -> None:
        """Of `made` guesses the first `right` were right; the sequence now has `num_tokens`."""
        self._right = _KEEP * self._right + right
        self._made = _KEEP * self._made + made
        self.most = min(2 * made, _MOST) if right == made else right + 1
        if right:
            self._pause = _SHORT_PAUSE
        if self._right < self._cost * self._made:
            self._silent_until = num_tokens + self._pause
            self._pause = min(2 * self._pause, _LONG_PAUSE)
            self.most = 1


class PromptLookup:
    """What followed the newest tokens when they last stood together; O(1) per token."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}  # short runs of ids -> where what followed them begins
        self._indexed = _SHORT

    def guess(self, ids: Items[int], most: int) -> tuple[int, ...]:
        """At most so many tokens that may follow `ids`, which only grows from call to call."""
        for end in range(self._indexed, len(ids)):
            for length in (_LONG, _SHORT):
                if end >= length:
                    self._behind[tuple(ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(ids))
        for length in (_LONG, _SHORT):
            at = self._behind.get(tuple(ids[-length:]))
            if at is not None:
                period = len(ids) - at  # a repetition is guessed to go on
                return tuple(ids[at + i % period] for i in range(most))
        return ()

"""What penalties and biases do to one row's scores. Knows token ids, not logits."""

from collections.abc import Iterable
from copy import copy

import numpy as np
from numpy.typing import NDArray

from .params import SamplingParams

Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

_COUNTS_NOTHING = SamplingParams()


class Shifts:
    """How seen and biased tokens change a row's scores, kept per distinct token and updated in O(1) per draw."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self._params = params
        self._slot: dict[int, int] = {}
        self._counted: set[int] = set()
        self._ids: Ids = np.empty(64, np.int64)
        self._divide: Doubles = np.empty(64)
        self._add: Doubles = np.empty(64)
        for token_id, bias in params.logit_bias.items():
            slot = self._find(token_id)
            self._add[slot] += bias
        if params.repetition_penalty != 1:
            for token_id in dict.fromkeys(prompt_ids):
                slot = self._find(token_id)  # before the arrays are named: it may replace them
                self._divide[slot] = params.repetition_penalty

    def __len__(self) -> int:
        return len(self._slot)

    def count(self, token_id: int) -> None:
        """One more of this token is in the output."""
        params = self._params
        if not params.has_penalties:
            return
        slot = self._find(token_id)
        self._divide[slot] = params.repetition_penalty
        self._add[slot] -= params.frequency_penalty
        if token_id not in self._counted:
            self._counted.add(token_id)
            self._add[slot] -= params.presence_penalty

    def frozen(self) -> "Shifts":
        """The same shifts, which count nothing more."""
        other = copy(self)
        other._params = _COUNTS_NOTHING
        return other

    def arrays(self) -> tuple[Ids, Doubles, Doubles]:
        """Distinct token ids, their divisors and addends."""
        n = len(self._slot)
        return self._ids[:n], self._divide[:n], self._add[:n]

    def _find(self, token_id: int) -> int:
        slot = self._slot.get(token_id)
        if slot is None:
            slot = self._slot[token_id] = len(self._slot)
            if slot == len(self._ids):
                self._ids = np.resize(self._ids, 2 * slot)
                self._divide = np.resize(self._divide, 2 * slot)
                self._add = np.resize(self._add, 2 * slot)
            self._ids[slot], self._divide[slot], self._add[slot] = token_id, 1.0, 0.0
        return slot

"""An interpolated Kneser-Ney trigram model over token ids: the baseline that a neural model has to beat.

Kneser and Ney 1995, in the interpolated form of Chen and Goodman 1999, with one fixed discount for all orders.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
DISCOUNT = 0.75


class _Counts:
    """How often each key occurs; keys are n-grams written as one number."""

    def __init__(self, keys: Ids, weights: Ids | None = None) -> None:
        if weights is None:
            self.keys, self.counts = np.unique(keys, return_counts=True)
        else:
            self.keys, inverse = np.unique(keys, return_inverse=True)
            self.counts = np.bincount(inverse, weights=weights).astype(np.int64)

    def of(self, keys: Ids) -> npt.NDArray[np.float64]:
        """Counts of these keys; zero for those never seen."""
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.counts[at], 0).astype(np.float64)


class Trigram:
    """P(w | u v) from documents of ids below `size`; no n-gram crosses a document."""

    def __init__(self, documents: Iterable[Sequence[int]], size: int) -> None:
        self.size = size
        grams = [np.empty(0, np.int64)]
        for document in documents:
            ids = np.asarray(document, np.int64)
            if len(ids) > 2:
                grams.append((ids[:-2] * size + ids[1:-1]) * size + ids[2:])
        self.three = _Counts(np.concatenate(grams))
        keys, counts = self.three.keys, self.three.counts
        self.pairs = _Counts(keys // size, counts)  # c(u v .)
        self.after_pair = _Counts(keys // size)  # N1+(u v .)
        two = np.unique(keys % (size * size))  # distinct (v, w), each counted by its distinct u below
        self.before_two = _Counts(keys % (size * size))  # N1+(. v w)
        before = self.before_two.of(two).astype(np.int64)
        self.middle = _Counts(two // size, before)  # N1+(. v .)
        self.after_one = _Counts(two // size)  # distinct w after v
        self.before_one = _Counts(two % size)  # N1+(. w)
        self.num_two = len(two)

    def log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Natural log P of tokens 1.. of a document given up to two before each: [len(ids) - 1]."""
        w = np.asarray(ids, np.int64)
        two = w[:-1] * self.size + w[1:]
        p = self._two(two)
        if len(w) > 2:
            pair, three = two[:-1], two[:-1] * self.size + w[2:]
            seen = np.maximum(self.pairs.of(pair), 1)
            known = self.pairs.of(pair) > 0
            rest = DISCOUNT * self.after_pair.of(pair) / seen
            high = np.maximum(self.three.of(three) - DISCOUNT, 0) / seen + rest * p[1:]
            p[1:] = np.where(known, high, p[1:])
        return np.log(p)

    def _two(self, keys: Ids) -> npt.NDArray[np.float64]:
        v, w = keys // self.size, keys % self.size
        total = np.maximum(self.middle.of(v), 1)
        low = self._one(w)
        high = np.maximum(self.before_two.of(keys) - DISCOUNT, 0) / total
        rest = DISCOUNT * self.after_one.of(v) / total
        return np.where(self.middle.of(v) > 0, high + rest * low, low)

    def _one(self, w: Ids) -> npt.NDArray[np.float64]:
        spread = DISCOUNT * len(self.before_one.keys) / self.num_two
        return np.maximum(self.before_one.of(w) - DISCOUNT, 0) / self.num_two + spread / self.size

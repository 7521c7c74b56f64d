"""One token from each row of logits on the host: what it means, in numpy, and the call that does it natively.

The order is that of transformers: repetition penalty (divides or multiplies), presence and frequency penalties and bias
(added); what is not allowed falls away; then temperature, top_k, top_p over what top_k left, min_p.

No row is sorted whole. Only a weight of at least (1 - top_p) * total / V can belong to the nucleus, because all smaller
ones together weigh less than (1 - top_p) * total: a comparison leaves a short list. A uniform number becomes a token by
the inverse of the cumulative weights, heaviest first where there are filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from . import cpu
from .structs import Draw

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

BAD_LOGITS, NOTHING_ALLOWED = -1, -2
COLDEST = 1e-6  # below this, fp32 cannot tell a temperature from greedy
_FEW = 1024  # tokens that a nucleus rarely exceeds
DEPTH = 64  # weights per block of the two-level inverse, about the square root of the cost of one level


class Filters(Protocol):
    """Which tokens are left out before drawing."""

    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of one row. `shifts` are ids, divisors and addends of scores; `allowed` [V] says which tokens may
    be drawn; `temperature` 0 takes the first of the largest.
    """

    temperature: float
    uniform: float = 0.0  # in [0, 1)
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    shifts: tuple[Ids, Doubles, Doubles] | None = None
    allowed: Flags | None = None

    @property
    def has_filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def draw(logits: Floats, wishes: Sequence[Wish]) -> list[int]:
    """A token for each row of logits [N, V], which stay as they are; BAD_LOGITS for a row that holds NaN or +inf or
    nothing finite, NOTHING_ALLOWED for one that has no finite score among those allowed.
    """
    library = cpu.library()
    if library is not None and logits.flags.c_contiguous:
        draws, tokens = (Draw * len(wishes))(), np.empty(len(wishes), np.int64)
        for i, (wish, into) in enumerate(zip(wishes, draws, strict=True)):
            _describe(wish, logits[i], into)
        if library.kq_draw_tokens(draws, len(wishes), logits.shape[1], tokens.ctypes.data) == 0:
            return tokens.tolist()
    return [draw_one(row, wish) for row, wish in zip(logits, wishes, strict=True)]


def _describe(wish: Wish, row: Floats, into: Draw) -> None:
    into.logits = row.__array_interface__["data"][0]
    if wish.shifts is not None:
        ids, divide, add = wish.shifts
        into.num_shifts, into.shift_ids = len(ids), ids.__array_interface__["data"][0]
        into.divide, into.add = divide.__array_interface__["data"][0], add.__array_interface__["data"][0]
    if wish.allowed is not None:
        assert wish.allowed.size == row.size, (wish.allowed.size, row.size)
        into.allowed = wish.allowed.__array_interface__["data"][0]
    into.temperature, into.uniform = wish.temperature, wish.uniform
    into.top_k, into.top_p, into.min_p = wish.top_k, wish.top_p, wish.min_p


def draw_one(logits: Floats, wish: Wish) -> int:
    """The slow twin: a token from one row of logits [V]."""
    if not np.isfinite(logits.max()):
        return BAD_LOGITS
    scores = _shifted(logits, wish.shifts)
    if wish.allowed is not None:
        scores = np.where(wish.allowed, scores, np.float32(-np.inf))
        if not np.isfinite(scores.max()):
            return NOTHING_ALLOWED
    if wish.temperature == 0:
        return int(scores.argmax())
    if not wish.has_filters:
        return _choose_any(scores, wish.temperature, wish.uniform)
    if 0 < wish.top_k < scores.size:
        ids = largest(scores, wish.top_k)
        weights = _tempered(scores[ids], scores[ids[0]], wish.temperature)
        total = float(weights.sum())
    else:
        weights = _tempered(scores, scores.max(), wish.temperature)
        total = float(weights.sum())
        ids = _nucleus(weights, total, wish)
        weights = weights[ids]
    mass = kept_mass(weights, total, wish)
    return int(ids[invert(mass, wish.uniform * mass[-1])])


def _shifted(logits: Floats, shifts: tuple[Ids, Doubles, Doubles] | None) -> Floats:
    if shifts is None:
        return logits
    ids, divide, add = shifts
    scores, seen, divisor = logits.copy(), logits[ids], divide.astype(np.float32)
    scores[ids] = np.where(seen > 0, seen / divisor, seen * divisor) + add.astype(np.float32)
    return scores


def _nucleus(weights: Floats, total: float, wish: Wish) -> Ids:
    """Ids, heaviest first, of a short list that holds all that top_p and min_p keep."""
    # The bound of the module's docstring, tried first as if no more than _FEW tokens mattered.
    for spread in (_FEW, weights.size):
        light = 0.999 * (1 - wish.top_p) * total / spread  # 0.999 covers rounding
        ids = np.flatnonzero(weights >= min(max(wish.min_p, light), 1.0))
        if wish.min_p >= light or weights[ids].sum() >= wish.top_p * total:
            break
    return ids[weights[ids].argsort()[::-1]]


def _choose_any(scores: Floats, temperature: float, uniform: float) -> int:
    """From the whole distribution: find the block by the sums of blocks, then the token inside it."""
    columns = -(-scores.size // DEPTH)
    weights = np.empty(DEPTH * columns, np.float32)
    weights[scores.size :] = 0
    _tempered(scores, scores.max(), temperature, out=weights[: scores.size])
    blocks = weights.reshape(DEPTH, columns)
    column, rest = find_block(blocks.sum(0), uniform)
    return invert(blocks[:, column].cumsum(dtype=np.float64), rest) * columns + column


def find_block(sums: Floats, uniform: float) -> tuple[int, float]:
    """The block that the uniform number falls into, and how far into it."""
    mass = sums.cumsum(dtype=np.float64)
    column = invert(mass, uniform * mass[-1])
    return column, uniform * mass[-1] - (mass[column - 1] if column else 0.0)


def kept_mass(weights: Floats, total: float, params: Filters) -> Doubles:
    """Cumulative weights, heaviest first, of what top_p and min_p keep; at least one."""
    mass = weights.cumsum(dtype=np.float64)
    keep = len(mass)
    if params.top_p < 1:
        keep = min(keep, 1 + int(mass.searchsorted(params.top_p * total)))
    if params.min_p > 0:
        keep = min(keep, int(np.count_nonzero(weights >= params.min_p)))
    return mass[:keep]


def invert(mass: Doubles, target: float) -> int:
    """The place where the cumulative mass passes the target; never one of weight zero, however the sums round."""
    return int(min(mass.searchsorted(target, "right"), mass.searchsorted(mass[-1], "left")))


def _tempered(scores: Floats, peak: np.float32, temperature: float, out: Floats | None = None) -> Floats:
    """Weights, not yet divided by their sum; the heaviest is 1."""
    with np.errstate(over="ignore"):  # a masked score may be the lowest fp32 number
        weights: Floats = np.subtract(scores, peak, out=out)
        if temperature != 1:
            weights /= np.float32(max(temperature, COLDEST))
        np.exp(weights, out=weights)
    return weights


def largest(scores: Floats, count: int) -> Ids:
    """Ids of the largest scores, best first, less those of -inf; the maxima of blocks bound the search."""
    depth = min(DEPTH, scores.size // (4 * count)) if count else 1
    floor = np.finfo(np.float32).min
    if depth > 1:
        blocks = scores.size // depth
        maxima = scores[: depth * blocks].reshape(depth, blocks).max(0)
        # At least `count` scores (one per block) reach the count-th largest of the maxima.
        floor = max(floor, np.partition(maxima, blocks - count)[blocks - count])
    ids = np.flatnonzero(scores >= floor)
    return ids[scores[ids].argsort()[::-1][:count]]

"""One token from each row of logits on the host: what it means, in numpy, and the call that does it natively.

The order is that of transformers: repetition penalty (divides or multiplies), presence and frequency penalties and bias
(added); what is not allowed falls away; then temperature, top_k, top_p over what top_k left, min_p.

No row is sorted whole. Only a weight of at least (1 - top_p) * total / V can belong to the nucleus, because all smaller
ones together weigh less than (1 - top_p) * total: a comparison leaves a short list. A uniform number becomes a token by
the inverse of the cumulative weights, heaviest first where there are filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import cpu
from .structs import Draw

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]
Words = NDArray[np.uint32]

BAD_LOGITS, NOTHING_ALLOWED = -1, -2
COLDEST = 1e-6  # below this, fp32 cannot tell a temperature from greedy
_FEW = 1024  # tokens that a nucleus rarely exceeds
_DEPTH = 64  # weights per block of the two-level inverse, about the square root of the cost of one level


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of one row. `shifts` are ids, divisors and addends of scores; bit i % 32 of word i // 32 of `allowed`
    says whether token i may be drawn; `temperature` 0 takes the first of the largest.
    """

    temperature: float
    uniform: float = 0.0  # in [0, 1)
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    shifts: tuple[Ids, Doubles, Doubles] | None = None
    allowed: Words | None = None


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
        assert wish.allowed.size * 32 >= row.size, (wish.allowed.size, row.size)
        into.allowed = wish.allowed.__array_interface__["data"][0]
    into.temperature, into.uniform = wish.temperature, wish.uniform
    into.top_k, into.top_p, into.min_p = wish.top_k, wish.top_p, wish.min_p

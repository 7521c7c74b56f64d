"""What a model reads while it is measured: token rows, chosen by a seed and cut to a budget. Knows no text."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kiloq.errors import DataError

_FEW_ROWS = 128
_TOKENS_PER_INPUT = 4  # below this, damping has to hold what the data does not


@dataclass(frozen=True)
class CalibrationData:
    """Rows of tokens laid end to end; each sees only itself."""

    ids: Tensor  # [T] int64
    starts: tuple[int, ...]  # 0, n0, n0 + n1, ..., T

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def chunks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows, each of about so many tokens, at least one row."""
        first = 0
        for row in range(1, self.rows + 1):
            if row == self.rows or self.starts[row + 1] - self.starts[first] > tokens:
                yield first, row
                first = row


def choose_rows(rows: Sequence[Sequence[int]], *, samples: int, max_length: int, seed: int) -> CalibrationData:
    """At most `samples` rows in a random but repeatable choice, each cut after `max_length` tokens, long ones first.

    Rows of one length run as one batch; that is all their order is for.
    """
    if samples < 1 or max_length < 2:
        raise DataError(f"calibration wants {samples} rows of {max_length} tokens; at least 1 row of 2 is needed.")
    usable = [row for row in rows if len(row) > 1]
    if not usable:
        raise DataError("the calibration data holds no row of two tokens or more.")
    chosen = random.Random(seed).sample(usable, min(samples, len(usable)))
    cut = sorted((list(row[:max_length]) for row in chosen), key=len, reverse=True)
    starts = [0]
    for row in cut:
        starts.append(starts[-1] + len(row))
    return CalibrationData(torch.tensor([token for row in cut for token in row]), tuple(starts))


def windows(documents: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Plain text as rows: documents end to end, cut every `length` tokens; the last row may be shorter."""
    flat = [token for document in documents for token in document]
    return [flat[start : start + length] for start in range(0, len(flat), length)]


def shortcomings(data: CalibrationData, hidden_size: int) -> list[str]:
    """What a person should know about data that is too small for a model."""
    notes = []
    tokens, wanted = len(data.ids), _TOKENS_PER_INPUT * hidden_size
    if tokens < wanted:
        notes.append(f"{tokens:,} tokens are few for {hidden_size:,} inputs; {wanted:,} or more are better.")
    if data.rows < _FEW_ROWS:
        notes.append(f"{data.rows:,} rows are few; {_FEW_ROWS} or more tell better what the model will read.")
    return notes

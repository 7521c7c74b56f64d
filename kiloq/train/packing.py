"""What an epoch looks like: items shuffled, then packed into rows or whole micro-batches. Knows lengths, not ids."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from kiloq.errors import DataError

Unit = TypeVar("Unit")
_WINDOW = 1024  # items that are packed together: enough to fill rows, few enough to stay in shuffled order


class Epochs(Generic[Unit]):
    """An endless stream of packed units, shuffled and packed anew each epoch; its place is a small state.

    `repeats[i]` is how often an epoch holds item i; of a fraction, another part every epoch. `pack` makes units of
    items that stand close together in the shuffled order; the units are shuffled again.
    """

    def __init__(
        self,
        repeats: npt.NDArray[np.float64],
        pack: Callable[[list[int]], list[Unit]],
        *,
        seed: int,
        fingerprint: int,
    ) -> None:
        self.repeats, self.pack, self.seed, self.fingerprint = repeats, pack, seed, fingerprint
        self.epoch, self.index = 0, 0
        self.plan = self._plan()

    def next(self) -> Unit:
        """The next unit."""
        if self.index == len(self.plan):
            self.epoch, self.index = self.epoch + 1, 0
            self.plan = self._plan()
        self.index += 1
        return self.plan[self.index - 1]

    def state(self) -> dict[str, Any]:
        """Where the stream stands; give it to `restore`."""
        return {"epoch": self.epoch, "index": self.index, "fingerprint": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly after the unit at which `state` was taken; refused if the data is not the same."""
        if state["fingerprint"] != self.fingerprint:
            raise DataError("the training data is not what this run began with; use another out folder.")
        self.epoch, self.index = state["epoch"], state["index"]
        self.plan = self._plan()

    def rewind(self) -> None:
        """Go back to the very beginning."""
        self.restore({"epoch": 0, "index": 0, "fingerprint": self.fingerprint})

    def _plan(self) -> list[Unit]:
        random = np.random.default_rng([self.seed, self.epoch])
        whole = self.repeats.astype(np.int64)
        times = whole + (random.random(len(whole)) < self.repeats - whole)
        order = random.permutation(np.repeat(np.arange(len(times)), times)).tolist()
        if not order:
            raise DataError("the data sources hold no samples; check their files and repeats.")
        units = [unit for at in range(0, len(order), _WINDOW) for unit in self.pack(order[at : at + _WINDOW])]
        return [units[i] for i in random.permutation(len(units)).tolist()]


def into_rows(items: list[int], lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Longest first, each item into the fullest row that it fits."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (places left, row), ascending
    for at in sorted(items, key=lambda i: -lengths[i]):
        fit = bisect.bisect_left(room, (lengths[at], 0))
        if fit == len(room):
            rows.append([])
            left, row = seq_len, len(rows) - 1
        else:
            left, row = room.pop(fit)
        rows[row].append(at)
        bisect.insort(room, (left - lengths[at], row))
    return rows


Group = list[list[tuple[int, int]]]
"""Rows of a micro-batch; in each the pieces (item, number of the piece within it) that lie in it."""


def into_groups(items: list[int], lengths: Sequence[Sequence[int]], *, rows: int, seq_len: int) -> list[Group]:
    """Items of several pieces into micro-batches of `rows` rows: all pieces of an item in one, whole, in any row.

    Longest item first, into the fullest micro-batch that it fits. An empty one must hold any item.
    """
    groups: list[Group] = []
    rooms: list[list[int]] = []  # places left in each row of each group
    for at in sorted(items, key=lambda i: -sum(lengths[i])):
        size = sum(lengths[at])
        fullest = sorted((i for i, room in enumerate(rooms) if sum(room) >= size), key=lambda i: sum(rooms[i]))
        chosen = next((i for i in fullest if _places(lengths[at], rooms[i]) is not None), len(groups))
        if chosen == len(groups):
            groups.append([[] for _ in range(rows)])
            rooms.append([seq_len] * rows)
        places = _places(lengths[at], rooms[chosen])
        assert places is not None, (at, lengths[at], rows, seq_len)
        for number, row in enumerate(places):
            rooms[chosen][row] -= lengths[at][number]
            groups[chosen][row].append((at, number))
    return groups


def _places(lengths: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """A row for each piece, the fullest that has room for it; longest first. None where they do not fit."""
    left = list(room)
    places = [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, free in enumerate(left) if free >= lengths[number]]
        if not fitting:
            return None
        places[number] = min(fitting, key=lambda row: left[row])
        left[places[number]] -= lengths[number]
    return places

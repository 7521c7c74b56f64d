"""Training data as ids: token files on disk, and endless packed batches from them. Knows no text and no model.

A token folder holds `tokens.npy` (uint16 or uint32, all documents end to end) and `starts.npy` (int64, where each
document begins, and the end). A batch is a fixed number of flat tokens in rows of `seq_len`; a row is filled to the
last token with whole documents or pieces of them.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kiloq.errors import DataError

from .losses import IGNORE

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Batch:
    """T flat tokens. `pieces` are the offsets [0, n0, ..., T] of what attends only to itself."""

    ids: Tensor  # [T] int64
    targets: Tensor  # [T] int64, IGNORE where nothing is trained
    positions: Tensor  # [T] int64, from 0 in each piece
    pieces: list[int]

    @property
    def count(self) -> int:
        """How many tokens carry a loss."""
        return int((self.targets != IGNORE).sum())

    @property
    def size(self) -> int:
        """T."""
        return len(self.ids)


class TokenFolder:
    """Documents of ids, read from disk as they are needed."""

    def __init__(self, folder: Path) -> None:
        try:
            self.tokens: Ids = np.load(folder / "tokens.npy", mmap_mode="r")
            self.starts: npt.NDArray[np.int64] = np.load(folder / "starts.npy")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} is not a folder of tokens (tokens.npy and starts.npy): {error}.") from error
        if self.starts[-1] != len(self.tokens):
            raise DataError(f"{folder}: starts.npy ends at {self.starts[-1]:,}, tokens.npy at {len(self.tokens):,}.")

    def __len__(self) -> int:
        return len(self.starts) - 1


def write_tokens(folder: Path, documents: Iterable[Sequence[int] | Ids], vocab_size: int) -> int:
    """Write documents (each with its own end token) as a token folder; how many tokens there are."""
    kind = np.uint16 if vocab_size <= 2**16 else np.uint32
    arrays = [np.asarray(document, dtype=kind) for document in documents if len(document)]
    if not arrays:
        raise DataError(f"{folder}: there are no documents to write.")
    starts = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", np.concatenate(arrays))
    np.save(folder / "starts.npy", starts)
    return int(starts[-1])


class PackedBatches:
    """Endless batches over several sources, shuffled by epoch; the place in the stream is a small state.

    Documents longer than a row are cut into rows. A piece that fills a row gets its own; shorter ones share rows end
    to end, and the one that overflows is cut, so that no place is padding. The last token before a cut is still
    trained on the token after it.
    """

    def __init__(self, sources: Sequence[tuple[TokenFolder, float]], *, seq_len: int, tokens: int, seed: int) -> None:
        self.sources, self.seq_len, self.rows, self.seed = sources, seq_len, tokens // seq_len, seed
        self.table = _piece_table(sources, seq_len)  # [N, 4]: source, start, stop, document end
        self.epoch, self.index = 0, 0
        self.open: list[list[int]] = []  # pieces of the row that is being filled: [table row, start, stop]
        self.order = self._shuffle()
        self.fingerprint = zlib.crc32(self.table.tobytes())

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one pass over all sources, repeats counted."""
        return int((self.table[:, 2] - self.table[:, 1]).sum())

    def state(self) -> dict[str, Any]:
        """Where the stream stands; give it to `restore`."""
        place = {"epoch": self.epoch, "index": self.index, "open": [list(piece) for piece in self.open]}
        return {**place, "fingerprint": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state` was taken; refused if the data is not the same."""
        if state["fingerprint"] != self.fingerprint:
            raise DataError("the training data is not what this run began with; use another out folder.")
        self.epoch, self.index = state["epoch"], state["index"]
        self.open = [list(piece) for piece in state["open"]]
        self.order = self._shuffle()

    def next_batch(self) -> Batch:
        """The next `tokens` tokens."""
        return self._assemble([piece for _ in range(self.rows) for piece in self._next_row()])

    def _next_row(self) -> list[list[int]]:
        while True:
            at = self._next_piece()
            start, stop = int(self.table[at, 1]), int(self.table[at, 2])
            if stop - start == self.seq_len:
                return [[at, start, stop]]
            room = self.seq_len - sum(piece[2] - piece[1] for piece in self.open)
            cut = min(stop, start + room)
            self.open.append([at, start, cut])
            if cut - start == room:
                row, self.open = self.open, [[at, cut, stop]] if cut < stop else []
                return row

    def _next_piece(self) -> int:
        if self.index == len(self.order):
            self.epoch, self.index = self.epoch + 1, 0
            self.order = self._shuffle()
        self.index += 1
        return int(self.order[self.index - 1])

    def _shuffle(self) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.table))

    def _assemble(self, pieces: list[list[int]]) -> Batch:
        ids, targets, positions, starts = [], [], [], [0]
        for at, start, stop in pieces:
            source, _, _, end = self.table[at]
            span = self.sources[source][0].tokens[start : min(stop + 1, end)].astype(np.int64)
            ids.append(span[: stop - start])
            targets.append(span[1:] if stop < end else np.append(span[1:], IGNORE))
            positions.append(np.arange(stop - start))
            starts.append(starts[-1] + stop - start)
        return Batch(flat(ids), flat(targets), flat(positions), starts)


def held_out_batches(folders: Sequence[TokenFolder], *, seq_len: int, tokens: int, limit: int) -> Iterator[Batch]:
    """About `limit` tokens of these folders, always the same ones: for evaluation."""
    stream = PackedBatches([(folder, 1.0) for folder in folders], seq_len=seq_len, tokens=tokens, seed=0)
    for _ in range(max(1, min(limit, stream.epoch_tokens) // tokens)):
        yield stream.next_batch()


def piece_of_tokens(batch: Batch) -> Tensor:
    """The piece that each token lies in, [T]."""
    lengths = torch.tensor(batch.pieces).diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def flat(parts: Sequence[npt.NDArray[np.integer[Any]]]) -> Tensor:
    """Arrays end to end as one tensor, [T] int64."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))


def _piece_table(sources: Sequence[tuple[TokenFolder, float]], seq_len: int) -> npt.NDArray[np.int64]:
    parts = []
    for number, (folder, repeat) in enumerate(sources):
        begins, ends = folder.starts[:-1], folder.starts[1:]
        counts = -(-(ends - begins) // seq_len)
        end = np.repeat(ends, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        start = np.repeat(begins, counts) + within * seq_len
        table = np.stack([np.full_like(start, number), start, np.minimum(start + seq_len, end), end], axis=1)
        whole = int(repeat)
        parts += [table] * whole
        # A fraction takes evenly spaced pieces, so that 0.5 is every other one.
        share = round((repeat - whole) * len(table))
        parts.append(table[np.linspace(0, len(table), share, endpoint=False).astype(np.int64)])
    pieces = np.concatenate(parts)
    if not len(pieces):
        raise DataError("the data sources hold no tokens; check their paths and repeats.")
    return pieces

"""Preferences as batches: which piece of a batch is whose answer. Knows no loss and no network."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kiloq.errors import ConfigError, DataError

from .data import Batch
from .losses import IGNORE
from .packing import Epochs, Group, into_groups
from .preferences import Judged, Pair, judged, pair
from .rows import good_rows
from .samples import Sample, Samples, assemble, filler_lengths, repeats_of
from .settings import BatchConfig


@dataclass(frozen=True)
class Compared:
    """The better and the worse answer to one question; `margin` is by how much, 0 where nobody said."""

    samples: tuple[Sample, Sample]
    margin: float = 0.0
    good: bool = True


@dataclass(frozen=True)
class PairBatch:
    """n comparisons. `places` are the pieces that hold their two samples, [n, 2].

    Of answers with a label the first sample is the answer and the second another one under the same question, which is
    only measured: those lie in `others`.
    """

    flat: Batch
    others: Batch | None
    items: npt.NDArray[np.int64]  # [n] which comparisons of the stream they are
    places: Tensor  # [n, 2] int64
    lengths: Tensor  # [n, 2] trained tokens of each sample, fp32
    margins: Tensor  # [n] fp32
    good: Tensor  # [n] bool
    reference: Tensor  # [n, 2] log-probabilities under the reference, fp32; zeros where there is none

    @property
    def count(self) -> int:
        """How many comparisons there are."""
        return len(self.items)

    @property
    def size(self) -> int:
        """Tokens that go through the network."""
        return self.flat.size + (self.others.size if self.others else 0)


class PackedPairs:
    """Endless micro-batches of comparisons, both samples of each in one; shuffled and packed anew every epoch.

    `apart` puts the second samples in a batch of their own, which lies like the first. `reference` [N, 2] may be set
    before the first batch is drawn.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[Compared], float]],
        *,
        batch: BatchConfig,
        seed: int,
        filler: int,
        apart: bool = False,
    ) -> None:
        self.compared = [one for some, _ in sources for one in some]
        self.seq_len, self.rows, self.filler, self.apart = batch.seq_len, batch.tokens // batch.seq_len, filler, apart
        sizes = [tuple(len(sample.ids) for sample in one.samples) for one in self.compared]
        self.sizes = [(max(size),) if apart else size for size in sizes]
        if self.rows == 1 and max(map(sum, self.sizes)) > self.seq_len:
            raise ConfigError(
                f"the two answers of a pair take up to {max(map(sum, self.sizes)):,} tokens, but a micro-batch is one "
                f"row of {self.seq_len:,}. Set batch.tokens to {2 * self.seq_len:,} or more."
            )
        self.reference = np.zeros((len(self.compared), 2), dtype=np.float32)
        labels = np.array([(one.margin, one.good) for one in self.compared], dtype=np.float32)
        ids = [sample.ids.tobytes() for one in self.compared for sample in one.samples]
        self.epochs: Epochs[Group] = Epochs(
            repeats_of(sources), self._pack, seed=seed, fingerprint=zlib.crc32(b"".join([*ids, labels.tobytes()]))
        )

    def __len__(self) -> int:
        """Micro-batches of this epoch."""
        return len(self.epochs.plan)

    @property
    def filled(self) -> float:
        """The share of this epoch's places that hold samples."""
        used = sum(sum(self.sizes[at]) for group in self.epochs.plan for at in _items(group))
        return used / (len(self) * self.rows * self.seq_len)

    def state(self) -> dict[str, Any]:
        """Where the stream stands; give it to `restore`."""
        return self.epochs.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state` was taken; refused if the data is not the same."""
        self.epochs.restore(state)

    def next_batch(self) -> PairBatch:
        """The next micro-batch."""
        return self._assemble(self.epochs.next())

    def one_pass(self, limit: int | None = None) -> Iterator[PairBatch]:
        """Every comparison once, or about `limit` tokens of them, always in the same micro-batches."""
        groups = self._pack(list(range(len(self.compared))))
        most = len(groups) if limit is None else max(1, limit // (self.rows * self.seq_len))
        for group in groups[:: -(-len(groups) // most)]:
            yield self._assemble(group)

    def _pack(self, items: list[int]) -> list[Group]:
        return into_groups(items, self.sizes, rows=self.rows, seq_len=self.seq_len)

    def _assemble(self, group: Group) -> PairBatch:
        items = _items(group)
        found = [self.compared[at] for at in items]
        number = {at: i for i, at in enumerate(items)}
        places = torch.zeros(len(items), 2, dtype=torch.int64)
        batches = []
        for side in (0, 1) if self.apart else (None,):
            piece = 0
            rows = [[self.compared[at].samples[part if side is None else side] for at, part in row] for row in group]
            for row, samples in zip(group, rows, strict=True):
                for at, part in row:
                    places[number[at], part if side is None else side] = piece
                    piece += 1
                piece += len(filler_lengths(samples, self.seq_len))
            batches.append(assemble(rows, self.seq_len, self.filler))
        return PairBatch(
            flat=batches[0],
            others=batches[1] if self.apart else None,
            items=np.array(items),
            places=places,
            lengths=torch.tensor([[(s.targets != IGNORE).sum() for s in one.samples] for one in found]).float(),
            margins=torch.tensor([one.margin for one in found]),
            good=torch.tensor([one.good for one in found]),
            reference=torch.from_numpy(self.reference[items]),
        )


def read_compared(path: Path, samples: Samples) -> list[Compared]:
    """Pairs of a file of preferences. Samples count what was cut and left out."""
    return samples.read_rows(
        good_rows(path, pair), lambda one: [Compared(both, one.margin) for both in samples.pair(one)]
    )


def read_labelled(path: Path, samples: Samples, seed: int) -> list[Compared]:
    """Answers of a file with labels, or of one of pairs, whose two sides are a good and a bad answer.

    The second sample of each is the answer to another question in place of its own (KTO measures the policy's drift
    on them); which one it is stays the same for the whole run.
    """
    rows = samples.read_rows(good_rows(path, _pair_or_judged), lambda one: _labelled(samples, one))
    if len(rows) < 2:
        raise DataError(f"{path} holds one answer; KTO compares with answers to other questions.")
    order = np.random.default_rng(seed).permutation(len(rows))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [
        Compared((sample, _answered(sample, rows[other[i]][0], samples.seq_len)), good=good)
        for i, (sample, good) in enumerate(rows)
    ]


def _pair_or_judged(row: Mapping[str, Any], where: str) -> Pair | Judged:
    return pair(row, where) if "chosen" in row or "preferred_output" in row else judged(row, where)


def _labelled(samples: Samples, one: Pair | Judged) -> list[tuple[Sample, bool]]:
    if isinstance(one, Judged):
        return samples.judged(one)
    return [(sample, good) for both in samples.pair(one) for sample, good in zip(both, (True, False), strict=True)]


def _answered(question: Sample, answer: Sample, seq_len: int) -> Sample:
    """One sample's prompt with another's answer, cut where it is too long: it is measured, not learned."""
    ends, begins = (int(np.argmax(one.targets != IGNORE)) for one in (question, answer))
    ids = np.concatenate([question.ids[: ends + 1], answer.ids[begins + 1 :]])[:seq_len]
    targets = np.concatenate([question.targets[:ends], answer.targets[begins:]])[:seq_len].copy()
    targets[-1] = IGNORE  # what followed the cut is gone
    return Sample(ids, targets)


def _items(group: Group) -> list[int]:
    return sorted({at for row in group for at, _ in row})

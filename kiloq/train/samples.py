"""Conversations become samples (ids and what of them is trained), and samples become packed batches."""

import bisect
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kiloq.chat import ChatFormat, Rendered, qwen1_mask, render
from kiloq.errors import DataError, RequestError
from kiloq.tokenizer import Tokenizer

from .conversations import Conversation
from .data import Batch, flat
from .losses import IGNORE

Mask = Literal["assistant", "qwen1"]
Long = Literal["cut", "drop", "error"]

_WINDOW = 1024  # samples that are packed together: enough to fill rows, few enough to stay in shuffled order


@dataclass(frozen=True)
class Sample:
    """One conversation: [n] ids, and the [n] targets, the next id or IGNORE."""

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


@dataclass
class Tally:
    """What became of the rows of the data."""

    kept: int = 0
    cut: int = 0
    dropped: int = 0
    tokens: int = 0
    trained: int = 0

    def __str__(self) -> str:
        share = 100 * self.trained / max(1, self.tokens)
        return (
            f"{self.kept:,} samples ({self.cut:,} cut, {self.dropped:,} more dropped as too long), "
            f"{self.tokens:,} tokens, {share:.0f} % trained"
        )


class Samples:
    """Turns conversations into samples of at most `seq_len` tokens under one format, mask and policy for long ones."""

    def __init__(
        self, tokenizer: Tokenizer, fmt: ChatFormat, *, seq_len: int, mask: Mask = "assistant", long: Long = "cut"
    ) -> None:
        self.tokenizer, self.format, self.seq_len, self.mask, self.long = tokenizer, fmt, seq_len, mask, long
        self.tally = Tally()

    def read(self, conversations: Iterable[Conversation]) -> list[Sample]:
        """Samples of all conversations; `tally` counts what was cut and dropped. DataError if nothing is left."""
        samples = [sample for one in conversations if (sample := self._sample(one)) is not None]
        if not samples:
            raise DataError(f"no token would be trained: {self.tally}. Raise batch.seq_len ({self.seq_len:,}).")
        return samples

    def render(self, conversation: Conversation, rounds: int | None = None) -> Rendered:
        """Ids and mask of the first `rounds` rounds, up to an assistant's turn."""
        messages = conversation.messages
        ends = [i + 1 for i, message in enumerate(messages) if _ends_round(messages, i)]
        end = ends[-1 if rounds is None else rounds - 1]
        try:
            rendered = render(
                messages[:end], self.tokenizer, self.format, tools=conversation.tools, add_generation_prompt=False
            )
        except RequestError as error:
            raise DataError(f"{conversation.where}: {error}") from error
        return Rendered(rendered.ids, qwen1_mask(rendered, self.tokenizer)) if self.mask == "qwen1" else rendered

    def _sample(self, conversation: Conversation) -> Sample | None:
        rendered = self.render(conversation)
        if len(rendered.ids) > self.seq_len:
            shorter = self._shorter(conversation, len(rendered.ids))
            if shorter is None:
                self.tally.dropped += 1
                return None
            self.tally.cut += 1
            rendered = shorter
        ids = np.asarray(rendered.ids, dtype=np.int64)
        following = np.append(np.where(rendered.trained, ids, IGNORE)[1:], IGNORE)
        trained = int((following != IGNORE).sum())
        assert trained, conversation.where  # each has an assistant turn, whose end token is trained
        self.tally.kept += 1
        self.tally.tokens += len(ids)
        self.tally.trained += trained
        return Sample(ids, following)

    def _shorter(self, conversation: Conversation, length: int) -> Rendered | None:
        """The longest beginning that fits and ends with an answer: a cut answer would not learn to end."""
        if self.long == "error":
            raise DataError(
                f"{conversation.where}: the conversation has {length:,} tokens, but batch.seq_len is {self.seq_len:,}. "
                "Raise it, or set long to cut or drop."
            )
        count = sum(_ends_round(conversation.messages, i) for i in range(len(conversation.messages)))
        for rounds in range(count - 1, 0, -1) if self.long == "cut" else ():
            rendered = self.render(conversation, rounds)
            if len(rendered.ids) <= self.seq_len:
                return rendered
        return None


class PackedSamples:
    """Endless batches of whole samples, several to a row, each seeing only itself; shuffled and repacked by epoch.

    A source's `repeat` is how often an epoch holds each of its samples; of a fraction, another part every epoch. What
    is left of a row is filled with `filler`, untrained and a piece of its own.
    """

    def __init__(
        self, sources: Sequence[tuple[Sequence[Sample], float]], *, seq_len: int, tokens: int, seed: int, filler: int
    ) -> None:
        self.samples = [sample for samples, _ in sources for sample in samples]
        self.repeats = np.concatenate([np.full(len(samples), repeat) for samples, repeat in sources])
        self.seq_len, self.rows, self.seed, self.filler = seq_len, tokens // seq_len, seed, filler
        self.epoch, self.index = 0, 0
        self.plan = self._pack()
        self.fingerprint = zlib.crc32(b"".join(sample.ids.tobytes() for sample in self.samples))

    def __len__(self) -> int:
        """Rows of this epoch."""
        return len(self.plan)

    @property
    def filled(self) -> float:
        """The share of this epoch's places that hold samples."""
        used = sum(len(self.samples[i].ids) for row in self.plan for i in row)
        return used / (len(self.plan) * self.seq_len)

    def state(self) -> dict[str, Any]:
        """Where the stream stands; give it to `restore`."""
        return {"epoch": self.epoch, "index": self.index, "fingerprint": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state` was taken; refused if the data is not the same."""
        if state["fingerprint"] != self.fingerprint:
            raise DataError("the training data is not what this run began with; use another out folder.")
        self.epoch, self.index = state["epoch"], state["index"]
        self.plan = self._pack()

    def next_batch(self) -> Batch:
        """The next rows."""
        return self._assemble([self._next_row() for _ in range(self.rows)])

    def _next_row(self) -> list[int]:
        if self.index == len(self.plan):
            self.epoch, self.index = self.epoch + 1, 0
            self.plan = self._pack()
        self.index += 1
        return self.plan[self.index - 1]

    def _pack(self) -> list[list[int]]:
        """Shuffle, then fill rows with the samples of one window after another; the rows are shuffled again."""
        random = np.random.default_rng([self.seed, self.epoch])
        whole = self.repeats.astype(np.int64)
        times = whole + (random.random(len(whole)) < self.repeats - whole)
        order = random.permutation(np.repeat(np.arange(len(times)), times)).tolist()
        if not order:
            raise DataError("the data sources hold no samples; check their files and repeats.")
        rows = [row for at in range(0, len(order), _WINDOW) for row in self._best_fit(order[at : at + _WINDOW])]
        return [rows[i] for i in random.permutation(len(rows)).tolist()]

    def _best_fit(self, window: list[int]) -> list[list[int]]:
        """Longest first, each into the fullest row that it fits."""
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (places left, row), ascending
        for at in sorted(window, key=lambda i: -len(self.samples[i].ids)):
            length = len(self.samples[at].ids)
            fit = bisect.bisect_left(room, (length, 0))
            if fit == len(room):
                rows.append([])
                left, row = self.seq_len, len(rows) - 1
            else:
                left, row = room.pop(fit)
            rows[row].append(at)
            bisect.insort(room, (left - length, row))
        return rows

    def _assemble(self, rows: list[list[int]]) -> Batch:
        ids, targets, positions, pieces = [], [], [], [0]
        for row in rows:
            samples = [self.samples[at] for at in row]
            left = self.seq_len - sum(len(sample.ids) for sample in samples)
            if left:
                samples.append(Sample(np.full(left, self.filler), np.full(left, IGNORE)))
            for sample in samples:
                ids.append(sample.ids)
                targets.append(sample.targets)
                positions.append(np.arange(len(sample.ids)))
                pieces.append(pieces[-1] + len(sample.ids))
        return Batch(flat(ids), flat(targets), flat(positions), pieces)


def _ends_round(messages: Sequence[Any], at: int) -> bool:
    """True for the last assistant turn before a user's, or at the end: where a conversation may be cut."""
    here = messages[at].role == "assistant"
    return here and (at + 1 == len(messages) or messages[at + 1].role == "user")

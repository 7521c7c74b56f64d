"""Rows become samples (ids and what of them is trained), and samples become packed batches."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kiloq.chat import ChatFormat, Rendered, qwen1_mask, render
from kiloq.errors import DataError, RequestError
from kiloq.tokenizer import Tokenizer

from .conversations import Conversation, round_ends
from .data import Batch, flat
from .losses import IGNORE
from .packing import Epochs, into_rows
from .preferences import Judged, Pair
from .rows import Fault, refuse_faults
from .texts import Document

Mask = Literal["assistant", "qwen1"]
Long = Literal["cut", "drop", "error"]

_FILLER = 256  # tokens

Ids = npt.NDArray[np.integer[Any]]
Made = TypeVar("Made")


class Placed(Protocol):
    """A row that knows its file and line."""

    @property
    def where(self) -> str: ...


Row = TypeVar("Row", bound=Placed)


@dataclass(frozen=True)
class Sample:
    """One conversation: [n] ids, and the [n] targets, the next id or IGNORE."""

    ids: Ids
    targets: Ids


@dataclass
class Tally:
    """What became of the rows of the data. `lengths` are the tokens of whole rows, before any is cut."""

    kept: int = 0
    cut: int = 0
    dropped: int = 0
    tokens: int = 0
    trained: int = 0
    lengths: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kept:,} samples ({self.cut:,} cut, {self.dropped:,} more dropped as too long), "
            f"{self.tokens:,} tokens, {100 * self.share:.0f} % trained"
        )

    @property
    def share(self) -> float:
        """Trained tokens of all."""
        return self.trained / max(1, self.tokens)


class Samples:
    """Turns rows into samples of at most `seq_len` tokens under one format, mask and policy for long ones.

    A conversation that is too long is cut after the last answer that fits (`long` "cut"), left out ("drop") or a
    fault ("error"). Of answers that are judged the oldest rounds of the prompt are cut instead. A text is never cut
    short: it becomes several samples.
    """

    def __init__(
        self, tokenizer: Tokenizer, fmt: ChatFormat, *, seq_len: int, mask: Mask = "assistant", long: Long = "cut"
    ) -> None:
        self.tokenizer, self.format, self.seq_len, self.mask, self.long = tokenizer, fmt, seq_len, mask, long
        self.tally = Tally()

    def read(self, conversations: Iterable[Conversation]) -> list[Sample]:
        """Samples of all conversations; `tally` counts what was cut and dropped. DataError tells all faults at once,
        and if nothing is left."""
        return self.read_rows(conversations, self.conversation)

    def conversation(self, conversation: Conversation) -> list[Sample]:
        """One sample, or none where it is too long."""
        rendered = self.render(conversation)
        self.tally.lengths.append(len(rendered.ids))
        if len(rendered.ids) > self.seq_len:
            count = len(round_ends(conversation.messages))
            shorter = (self.render(conversation, rounds) for rounds in range(count - 1, 0, -1))
            fitting = self._first_fitting(([one] for one in shorter), len(rendered.ids))
            if fitting is None:
                return []
            (rendered,) = fitting
        return [self._sample(rendered, kept=1)]

    def pair(self, pair: Pair) -> list[tuple[Sample, Sample]]:
        """Both sides, or nothing where one is too long."""
        return [(chosen, rejected) for chosen, rejected in self._answers(pair.chosen, pair.rejected)]

    def judged(self, row: Judged) -> list[tuple[Sample, bool]]:
        """One answer with its label, or nothing where it is too long."""
        return [(sample, row.good) for (sample,) in self._answers(row.conversation)]

    def document(self, document: Document) -> list[Sample]:
        """The text in samples of seq_len; the last token of each is trained on what follows it."""
        ids = np.array([*self.tokenizer.encode(document.text), self.tokenizer.end_of_text_id], dtype=np.int32)
        targets = np.append(ids[1:], np.int32(IGNORE))
        self.tally.kept += 1
        self.tally.tokens += len(ids)
        self.tally.trained += len(ids) - 1
        self.tally.lengths.append(len(ids))
        starts = range(0, len(ids), self.seq_len)
        return [Sample(ids[at : at + self.seq_len], targets[at : at + self.seq_len]) for at in starts]

    def render(self, conversation: Conversation, rounds: int | None = None) -> Rendered:
        """Ids and mask of the first `rounds` rounds, up to an assistant's turn."""
        ends = round_ends(conversation.messages)
        messages = conversation.messages[: ends[-1 if rounds is None else rounds - 1]]
        try:
            rendered = render(
                messages, self.tokenizer, self.format, tools=conversation.tools, add_generation_prompt=False
            )
        except RequestError as error:
            raise DataError(str(error)) from error
        return Rendered(rendered.ids, qwen1_mask(rendered, self.tokenizer)) if self.mask == "qwen1" else rendered

    def read_rows(self, rows: Iterable[Row], make: Callable[[Row], list[Made]]) -> list[Made]:
        """What `make` makes of all rows. DataError tells all faults at once, and if nothing is left."""
        made: list[Made] = []
        faults: list[Fault] = []
        for row in rows:
            try:
                made += make(row)
            except DataError as error:
                faults.append(Fault(row.where, str(error)))
        refuse_faults("the data", faults)
        if not made:
            raise DataError(f"no token would be trained: {self.tally}. Raise batch.seq_len ({self.seq_len:,}).")
        return made

    def _answers(self, *conversations: Conversation) -> list[list[Sample]]:
        """Samples of conversations with one prompt, of which the oldest rounds are left out if they must be."""
        messages = conversations[0].messages
        begin = next(i for i, message in enumerate(messages) if message.trained)
        questions = [i for i in range(begin) if messages[i].role == "user"]
        head = messages[:1] if messages[0].role == "system" else ()

        def since(question: int) -> list[Rendered]:
            return [self.render(replace(one, messages=(*head, *one.messages[question:]))) for one in conversations]

        rendered = [self.render(one) for one in conversations]
        longest = max(len(one.ids) for one in rendered)
        self.tally.lengths += [len(one.ids) for one in rendered]
        if longest > self.seq_len:
            fitting = self._first_fitting(map(since, questions[1:]), longest)
            if fitting is None:
                return []
            rendered = fitting
        return [[self._sample(one, kept=int(i == 0)) for i, one in enumerate(rendered)]]

    def _first_fitting(self, shorter: Iterable[list[Rendered]], length: int) -> list[Rendered] | None:
        """The first of some cuts that fits whole, or None for a row that is left out."""
        if self.long == "error":
            raise DataError(
                f"the conversation has {length:,} tokens, but batch.seq_len is {self.seq_len:,}. "
                "Raise it, or set long to cut or drop."
            )
        for cut in shorter if self.long == "cut" else ():
            if all(len(one.ids) <= self.seq_len for one in cut):
                self.tally.cut += 1
                return cut
        self.tally.dropped += 1
        return None

    def _sample(self, rendered: Rendered, *, kept: int) -> Sample:
        ids = np.asarray(rendered.ids, dtype=np.int32)
        targets = np.append(np.where(rendered.trained, ids, IGNORE)[1:], IGNORE).astype(np.int32)
        trained = int((targets != IGNORE).sum())
        if not trained:
            raise DataError("no token of it is trained; each answer has weight 0, or what is trained was cut away.")
        self.tally.kept += kept
        self.tally.tokens += len(ids)
        self.tally.trained += trained
        return Sample(ids, targets)


class PackedSamples:
    """Endless batches of whole samples, several to a row, each seeing only itself; shuffled and repacked by epoch.

    A source's `repeat` is how often an epoch holds each of its samples; of a fraction, another part every epoch. What
    is left of a row is filled with `filler`, untrained and a piece of its own.
    """

    def __init__(
        self, sources: Sequence[tuple[Sequence[Sample], float]], *, seq_len: int, tokens: int, seed: int, filler: int
    ) -> None:
        self.samples = [sample for samples, _ in sources for sample in samples]
        self.seq_len, self.rows, self.filler = seq_len, tokens // seq_len, filler
        self.lengths = [len(sample.ids) for sample in self.samples]
        self.epochs = Epochs(
            repeats_of(sources),
            lambda items: into_rows(items, self.lengths, seq_len),
            seed=seed,
            fingerprint=zlib.crc32(b"".join(sample.ids.tobytes() for sample in self.samples)),
        )

    def __len__(self) -> int:
        """Rows of this epoch."""
        return len(self.epochs.plan)

    @property
    def filled(self) -> float:
        """The share of this epoch's places that hold samples."""
        used = sum(self.lengths[i] for row in self.epochs.plan for i in row)
        return used / (len(self) * self.seq_len)

    def state(self) -> dict[str, Any]:
        """Where the stream stands; give it to `restore`."""
        return self.epochs.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state` was taken; refused if the data is not the same."""
        self.epochs.restore(state)

    def next_batch(self) -> Batch:
        """The next rows."""
        return self._batch([self.epochs.next() for _ in range(self.rows)])

    def one_pass(self, limit: int) -> Iterator[Batch]:
        """Each row once, or so many as hold `limit` tokens; always the same ones: for evaluation."""
        self.epochs.rewind()
        rows = self.epochs.plan[: max(1, limit // self.seq_len)]
        for at in range(0, len(rows), self.rows):
            some = rows[at : at + self.rows]
            yield self._batch([*some, *[[]] * (self.rows - len(some))])  # compiled steps know one shape

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        return assemble([[self.samples[at] for at in row] for row in rows], self.seq_len, self.filler)


def repeats_of(sources: Sequence[tuple[Sequence[object], float]]) -> npt.NDArray[np.float64]:
    """Of each item of all sources, how often an epoch holds it."""
    return np.concatenate([np.full(len(items), repeat) for items, repeat in sources])


def assemble(rows: Sequence[Sequence[Sample]], seq_len: int, filler: int) -> Batch:
    """Samples of each row end to end, each a piece; what is left of a row are untrained pieces of `filler`."""
    ids, targets, positions, pieces = [], [], [], [0]
    for row in rows:
        rest = [Sample(np.full(n, filler), np.full(n, IGNORE)) for n in filler_lengths(row, seq_len)]
        for sample in (*row, *rest):
            ids.append(sample.ids)
            targets.append(sample.targets)
            positions.append(np.arange(len(sample.ids)))
            pieces.append(pieces[-1] + len(sample.ids))
    return Batch(flat(ids), flat(targets), flat(positions), pieces)


def filler_lengths(row: Sequence[Sample], seq_len: int) -> list[int]:
    """Of the pieces that fill a row up; short ones, since a long one would attend to all of itself for nothing."""
    left = seq_len - sum(len(sample.ids) for sample in row)
    return [min(_FILLER, left - at) for at in range(0, left, _FILLER)]

"""A file of training data as a report: what it holds, what is wrong with it, how long it is in tokens. No weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kiloq.chat import chat_format_for
from kiloq.checkpoint import Checkpoint, open_checkpoint
from kiloq.errors import ConfigError, DataError

from .conversations import Conversation
from .kinds import PARSERS, Kind, Parsed, conversations_in, kind_of
from .preferences import Judged, Pair
from .rows import Fault, kinds_of, parse_rows
from .samples import Samples
from .texts import Document


@dataclass
class Report:
    """What a file holds. `turns` are the turns of each conversation."""

    path: Path
    kind: Kind
    rows: int = 0
    turns: list[int] = field(default_factory=list)
    with_tools: int = 0
    with_thoughts: int = 0
    good: int = 0  # of labels, how many are true
    faults: list[Fault] = field(default_factory=list)
    samples: Samples | None = None

    def lines(self) -> Iterator[str]:
        """For people: what it holds, what its tokens are, and how many rows have each kind of fault."""
        labels = f", {self.good:,} of them good answers" if self.kind == "labels" else ""
        yield f"{self.path}: {self.kind}, {self.rows:,} good rows{labels}, {len(self.faults):,} bad rows"
        if self.turns:
            yield (
                f"turns: {sum(self.turns):,}, {min(self.turns):,} to {max(self.turns):,} a conversation; "
                f"{self.with_tools:,} conversations with tools, {self.with_thoughts:,} with thoughts"
            )
        if self.samples is not None and self.samples.tally.lengths:
            yield from self._token_lines(self.samples)
        for line in kinds_of(self.faults):
            yield f"bad: {line}"

    def _token_lines(self, samples: Samples) -> Iterator[str]:
        tally = samples.tally
        middle, most, nearly_all = (
            int(x) for x in np.percentile(tally.lengths, [50, 90, 99], method="higher").tolist()
        )
        yield f"tokens: {sum(tally.lengths):,}; {tally.tokens:,} are kept, {100 * tally.share:.1f} % of them trained"
        yield (
            f"length: half of all have up to {middle:,}, 90 % {most:,}, 99 % {nearly_all:,}, "
            f"the longest {max(tally.lengths):,}"
        )
        if self.kind == "texts":
            yield f"at seq_len {samples.seq_len:,}: texts are cut into samples, nothing is lost"
        else:
            yield f"at seq_len {samples.seq_len:,}: {tally.cut:,} rows would be cut, {tally.dropped:,} dropped"


def check_data(path: Path, model: str | None = None, *, seq_len: int | None = None) -> Report:
    """Read the whole file, row by row; with a `model`, as that would see it (`seq_len` None: as long as it allows)."""
    if seq_len is not None and seq_len < 2:
        raise ConfigError(f"seq_len is {seq_len}; it must be at least 2.")
    report = Report(path, kind_of(path))
    if model is not None:
        report.samples = _samples(open_checkpoint(model), seq_len)
    for row in parse_rows(path, PARSERS[report.kind], report.faults):
        try:
            if report.samples is not None:
                _encode(row, report.samples)
        except DataError as error:
            report.faults.append(Fault(row.where, str(error)))
            continue
        report.rows += 1
        report.good += isinstance(row, Judged) and row.good
        _count_turns(conversations_in(row), report)
    return report


def _samples(checkpoint: Checkpoint, seq_len: int | None) -> Samples:
    fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
    return Samples(checkpoint.tokenizer, fmt, seq_len=seq_len or checkpoint.config.max_length)


def _encode(row: Parsed, samples: Samples) -> None:
    match row:
        case Conversation():
            samples.conversation(row)
        case Pair():
            samples.pair(row)
        case Judged():
            samples.judged(row)
        case Document():
            samples.document(row)


def _count_turns(conversations: Sequence[Conversation], report: Report) -> None:
    for conversation in conversations:
        messages = conversation.messages
        report.turns.append(len(messages))
        report.with_tools += bool(conversation.tools or any(message.tool_calls for message in messages))
        report.with_thoughts += any(message.reasoning for message in messages)

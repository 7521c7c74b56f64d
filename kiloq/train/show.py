"""Training data as the trainer sees it, token by token: the look before a run. Knows no weights."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import get_args

from kiloq.chat import chat_format_for
from kiloq.checkpoint import bundled, open_checkpoint
from kiloq.errors import ConfigError, DataError
from kiloq.tokenizer import Tokenizer

from .kinds import PARSERS, Parsed, conversations_in, kind_of
from .preferences import Judged, Pair
from .rows import Fault, parse_rows, refuse_faults
from .samples import Mask, Samples
from .texts import Document

_TRAINED, _PLAIN = "\033[32m", "\033[0m"


def show_samples(data: Path, model: str | None, *, count: int, mask: str, colour: bool) -> Iterator[str]:
    """Lines for people: a trained token ends in * or is green, its neighbours are parted by |."""
    masks: dict[str, Mask] = {name: name for name in get_args(Mask)}
    if mask not in masks:
        raise ConfigError(f"mask is {mask}; it is one of {', '.join(masks)}.")
    if count < 1:
        raise ConfigError(f"count is {count}; it must be at least 1.")
    checkpoint = open_checkpoint(model or bundled())
    fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
    samples = Samples(checkpoint.tokenizer, fmt, seq_len=checkpoint.config.max_length, mask=masks[mask])
    faults: list[Fault] = []
    for row in islice(parse_rows(data, PARSERS[kind_of(data)], faults), count):
        try:
            for name, ids, marks in _sides(row, samples):
                yield f"{row.where}{name}: {len(ids):,} tokens, {sum(marks):,} trained"
                yield from token_lines(ids, marks, checkpoint.tokenizer, colour=colour)
        except DataError as error:
            faults.append(Fault(row.where, str(error)))
    refuse_faults(data, faults)


def token_lines(ids: Sequence[int], marks: Sequence[bool], tokenizer: Tokenizer, *, colour: bool) -> Iterator[str]:
    """The tokens, a line for each line of the text; those that are marked end in * or are green."""
    line: list[str] = []
    for token_id, marked in zip(ids, marks, strict=True):
        text = tokenizer.decode([token_id])
        word = repr(text)[1:-1]
        line.append(f"{_TRAINED}{word}{_PLAIN}" if marked and colour else f"{word}*" if marked else word)
        if text.endswith("\n"):
            yield "|".join(line)
            line = []
    if line:
        yield "|".join(line)


def _sides(row: Parsed, samples: Samples) -> Iterator[tuple[str, list[int], list[bool]]]:
    """(what to call it, ids, whether each is trained) of all that a row trains."""
    if isinstance(row, Document):
        ids = [*samples.tokenizer.encode(row.text), samples.tokenizer.end_of_text_id]
        yield "", ids, [False, *[True] * (len(ids) - 1)]
        return
    names = [""]
    if isinstance(row, Pair):
        names = [", chosen", ", rejected"]
    elif isinstance(row, Judged):
        names = [", good" if row.good else ", bad"]
    for name, conversation in zip(names, conversations_in(row), strict=True):
        rendered = samples.render(conversation)
        yield name, rendered.ids, rendered.trained

"""Which kind of training data a file holds, told by its first row. Knows no tokens."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from kiloq.errors import DataError

from .conversations import Conversation, conversation, judgement_in
from .preferences import Judged, Pair, judged, pair
from .rows import Fault, parse_rows, refuse_faults
from .texts import Document, document

Kind = Literal["conversations", "pairs", "labels", "texts"]
Parsed = Conversation | Pair | Judged | Document

PARSERS: dict[Kind, Callable[[Mapping[str, Any], str], Parsed]] = {
    "conversations": conversation,
    "pairs": pair,
    "labels": judged,
    "texts": document,
}


def kind_of(path: Path) -> Kind:
    """The kind of the first row that can be read at all; DataError if there is none."""
    faults: list[Fault] = []
    kind = next(parse_rows(path, lambda row, _: _kind_of_row(row), faults), None)
    if kind is None:
        refuse_faults(path, faults)
        raise DataError(f"{path} holds no rows.")
    return kind


def conversations_in(row: Parsed) -> list[Conversation]:
    """The conversations of a row: two of a pair, none of a text."""
    match row:
        case Conversation():
            return [row]
        case Pair():
            return [row.chosen, row.rejected]
        case Judged():
            return [row.conversation]
        case Document():
            return []


def _kind_of_row(row: Mapping[str, Any]) -> Kind:
    judgement = judgement_in(row)
    if judgement in ("label", "kto_tag"):
        return "labels"
    if judgement or "chosen" in row or "rejected" in row:
        return "pairs"
    others = ("messages", "conversations", "instruction", "prompt")
    return "texts" if "text" in row and not any(name in row for name in others) else "conversations"

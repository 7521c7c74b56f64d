"""Rows become documents: {"text"} in files of rows, and a plain text file as one document. Knows no tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kiloq.errors import DataError


@dataclass(frozen=True)
class Document:
    """A text to continue; `where` is its file and line."""

    text: str
    where: str


def document(row: Mapping[str, Any], where: str) -> Document:
    """Read one row of plain text."""
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError(f"text is {'missing' if text is None else f'of type {type(text).__name__}'}; it must be text.")
    if not text.strip():
        raise DataError("text is empty.")
    return Document(text, where)

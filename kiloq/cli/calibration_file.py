"""Calibration files become rows of ids: plain text, rows with `text`, or conversations as training takes them.

What a model answers is marked as scored, by which it is compared; of plain text, everything.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from kiloq.chat import ChatFormat, chat_format_for, render
from kiloq.checkpoint import Checkpoint
from kiloq.errors import DataError
from kiloq.evals.perplexity import Row
from kiloq.quant.calibration_data import windows
from kiloq.tokenizer.train import read_texts
from kiloq.train.conversations import Conversation, read_conversations


def own_files() -> list[Path]:
    """The calibration text that kiloq brings along."""
    folder = Path(__file__).parents[1] / "assets" / "calibration"
    return [folder / "chat.jsonl", folder / "text.jsonl"]


def read_rows(files: Iterable[Path], checkpoint: Checkpoint, max_length: int) -> tuple[list[Row], list[str]]:
    """Rows from all files, and what a person should know about rows that were left out."""
    rows: list[Row] = []
    notes: list[str] = []
    for file in files:
        if not file.is_file():
            raise DataError(f"there is no calibration file {file}.")
        if _is_conversation_file(file):
            found, faults = read_conversations(file)
            if faults:
                notes.append(f"{len(faults):,} rows of {file} are left out, the first because of: {faults[0]}")
            rows += [_row(row, checkpoint) for row in found]
        else:
            end = [checkpoint.tokenizer.end_of_text_id]
            cut = windows([checkpoint.tokenizer.encode(text) + end for text in read_texts([file])], max_length)
            rows += map(_plain, cut)
    return rows, notes


def _is_conversation_file(path: Path) -> bool:
    """By name, and for JSON lines by whether the first row is text."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".json"):
        return True
    if not name.endswith(".jsonl"):
        return False
    try:
        next(iter(read_texts([path])), None)
    except DataError:
        return True  # if it is neither, that reader says so
    return False


def _row(row: Conversation, checkpoint: Checkpoint) -> Row:
    if checkpoint.generation.chat_format == "chatml":
        fmt: ChatFormat = chat_format_for(checkpoint.config.family, checkpoint.folder)
        found = render(row.messages, checkpoint.tokenizer, fmt, tools=row.tools, add_generation_prompt=False)
        return Row(found.ids, found.trained)
    # A base model has never seen the control tokens of a conversation.
    text = "\n".join(message.content or "" for message in row.messages)
    return _plain([*checkpoint.tokenizer.encode(text), checkpoint.tokenizer.end_of_text_id])


def _plain(ids: Sequence[int]) -> Row:
    return Row(ids, [True] * len(ids))

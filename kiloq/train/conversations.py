"""Conversation files become messages: the reference's `conversations`, OpenAI `messages` and alpaca rows.

Every fault of a file is found in one pass and told with file, line and field. Knows no tokens.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiloq.chat import Message, Tool, parse_messages, parse_tools
from kiloq.errors import DataError, RequestError

# Whose words a turn of `conversations` holds; the reference writes user and assistant, others write the rest.
_SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """One row; `where` is its file and line, for messages to people."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    where: str


def read_conversations(path: Path) -> tuple[list[Conversation], list[str]]:
    """All rows of a .json or .jsonl file (or .gz of one) that can be used, and the faults of the others."""
    rows: list[Conversation] = []
    faults: list[str] = []
    for number, row in _rows(_text(path)):
        where = f"{path}, line {number}"
        try:
            rows.append(_conversation(row, where))
        except (RequestError, DataError) as error:
            faults.append(f"{where}: {error}")
    return rows, faults


def refuse_faults(path: Path, faults: Sequence[str], *, shown: int = 20) -> None:
    """DataError with the faults of a file, if there are any."""
    if faults:
        more = [f"... and {len(faults) - shown:,} more"] if len(faults) > shown else []
        raise DataError("\n".join([f"{path} has {len(faults):,} bad rows:", *faults[:shown], *more]))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _rows(text: str) -> Iterator[tuple[int, object]]:
    """(line, row) of JSON lines or of one JSON list; a row that is not JSON comes as the error it raised."""
    if text.lstrip().startswith("["):
        yield from _list_rows(text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, error


def _list_rows(text: str) -> Iterator[tuple[int, object]]:
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text):
            yield line, json.JSONDecodeError("the list has no end", text, at)
            return
        if text[at] == "]":
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, error
            return
        yield line, row


def _conversation(row: object, where: str) -> Conversation:
    if isinstance(row, json.JSONDecodeError):
        raise DataError(f"not valid JSON: {row.msg} at column {row.colno}.")
    if not isinstance(row, dict):
        raise DataError(f"the row is of type {type(row).__name__}; it must be an object.")
    for key, read in _READERS.items():
        if key in row:
            messages = read(row)
            break
    else:
        raise DataError(
            f"the row has {', '.join(row) or 'no fields'}; it needs messages, conversations or instruction."
        )
    _check(messages)
    return Conversation(messages, _tools(row.get("tools")), where)


def _check(messages: Sequence[Message]) -> None:
    if not any(message.role == "assistant" for message in messages):
        raise DataError("there is no assistant turn, so nothing to learn.")
    for number, message in enumerate(messages):
        if not (message.content or message.tool_calls) and message.role in ("user", "assistant"):
            raise DataError(f"turn {number} ({message.role}) has no text.")
        if message.role == "system" and number:
            raise DataError(f"turn {number} is a system turn; only the first may be one.")
    if next(message.role for message in messages if message.role != "system") != "user":
        raise DataError("the first turn after the system turn is not a user turn.")


def _from_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return parse_messages(row["messages"])


def _from_conversations(row: Mapping[str, Any]) -> tuple[Message, ...]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError("conversations is not a list of turns.")
    raw: list[dict[str, object]] = []
    if row.get("system"):
        raw.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(turns):
        at = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{at} is of type {type(turn).__name__}; it must be an object.")
        speaker, value = turn.get("from"), turn.get("value")
        if speaker not in _SPEAKERS:
            raise DataError(f"{at}.from is {speaker!r}; it must be one of {', '.join(_SPEAKERS)}.")
        if not isinstance(value, str):
            raise DataError(f"{at}.value is {'missing' if value is None else type(value).__name__}; it must be text.")
        if speaker == "function_call":
            raw.append({"role": "assistant", "function_call": _call(value, at)})
        else:
            raw.append({"role": _SPEAKERS[speaker], "content": value})
    return parse_messages(raw)


def _from_alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str):
            raise DataError(f"{name} is {'missing' if row.get(name) is None else 'not text'}; it must be text.")
    raw = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for number, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{number}] is not a pair of question and answer.")
        raw += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return parse_messages(
        [*raw, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Message, ...]]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "instruction": _from_alpaca,
}


def _call(value: str, at: str) -> object:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{at}.value is a function_call but not valid JSON: {error.msg}.") from error


def _tools(raw: object) -> tuple[Tool, ...]:
    """Tool definitions, as a list or as JSON text of one."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"tools is text but not valid JSON: {error.msg}.") from error
    return parse_tools(raw)

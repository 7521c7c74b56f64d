"""Files of rows, one at a time: JSON lines, one JSON list, plain text, each also as .gz, and Parquet.

Every fault of a file is found in one pass and told with file and line. Knows no meaning of a row.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from kiloq.errors import DataError, MissingExtraError, RequestError

Parsed = TypeVar("Parsed")
Parse = Callable[[Mapping[str, Any], str], Parsed]
"""(row, where it stands) -> what it means; RequestError or DataError says what is wrong with it."""

_CHUNK = 1 << 20  # characters of a JSON list that are read at a time
_TAIL = 6  # a JSON error this close to the end of what was read may be a word or escape that is not complete
_SHOWN = 20
_HALF = re.compile(r"\\ud[89a-f]", re.IGNORECASE)  # an escape that is half of a character, or one of two halves


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row; `where` is its file and line."""

    where: str
    said: str

    def __str__(self) -> str:
        return f"{self.where}: {self.said}"

    @property
    def kind(self) -> str:
        """The same for rows that differ only in numbers and quoted values."""
        return re.sub(r"\d[\d,]*", "N", re.sub(r"'(?:[^'\\]|\\.)*'", "'...'", re.sub(r"\[\d+\]", "[]", self.said)))


@dataclass(frozen=True)
class _Row:
    place: str
    value: object = None
    fault: str = ""


def parse_rows(path: Path, parse: Parse[Parsed], faults: list[Fault]) -> Iterator[Parsed]:
    """What `parse` makes of each row of a file; mutates `faults`, to which the rows that it refuses are added."""
    for row in _rows(path):
        where = f"{path}, {row.place}"
        if row.fault:
            faults.append(Fault(where, row.fault))
        elif not isinstance(row.value, dict):
            faults.append(Fault(where, f"the row is of type {type(row.value).__name__}; it must be an object."))
        else:
            try:
                # Tables have every column in every row: a null is a field that is not there.
                yield parse({key: value for key, value in row.value.items() if value is not None}, where)
            except (RequestError, DataError) as error:
                faults.append(Fault(where, str(error)))


def good_rows(path: Path, parse: Parse[Parsed], left_out: list[Fault] | None = None) -> Iterator[Parsed]:
    """The same for a file that must be without faults: after the last row, DataError tells all of them.

    Where some may be left out, they are added to `left_out` instead; DataError if nothing else is there.
    """
    faults: list[Fault] = []
    count = 0
    for parsed in parse_rows(path, parse, faults):
        count += 1
        yield parsed
    if left_out is None or not count:
        refuse_faults(path, faults)
    else:
        left_out += faults
    if not count:
        raise DataError(f"{path} holds no rows.")


def refuse_faults(path: Path | str, faults: Sequence[Fault]) -> None:
    """DataError with the faults of a file, if there are any: the first of them, and how many there are of each kind."""
    if not faults:
        return
    lines = [f"{path} has {len(faults):,} bad rows:", *map(str, faults[:_SHOWN])]
    if len(faults) > _SHOWN:
        lines += [f"... and {len(faults) - _SHOWN:,} more. Of each kind:", *kinds_of(faults)]
    raise DataError("\n".join(lines))


def kinds_of(faults: Sequence[Fault]) -> list[str]:
    """One line for each kind of fault: how many rows have it, and what the first says; the commonest first."""
    first: dict[str, Fault] = {}
    for fault in faults:
        first.setdefault(fault.kind, fault)
    counts = Counter(fault.kind for fault in faults)
    return [f"{count:,} row{'s' * (count > 1)}, first {first[kind]}" for kind, count in counts.most_common()]


def _rows(path: Path) -> Iterator[_Row]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            if name.endswith(".txt"):
                yield _Row("line 1", {"text": file.read().decode("utf-8-sig")})
                return
            head = file.readline().removeprefix(codecs.BOM_UTF8)
            while head.isspace():
                head = file.readline()
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            yield from _list_rows(file) if head.lstrip().startswith(b"[") else _line_rows(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error.reason} at byte {error.start}.") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(f"{path} cannot be read: {reason}.") from error


def _line_rows(file: IO[bytes]) -> Iterator[_Row]:
    """A row a line. Only a newline ends one: JSON text may hold U+2028 and the like."""
    for number, raw in enumerate(file, 1):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if not line.strip():
            continue
        try:
            yield _checked(f"line {number}", json.loads(text := line.decode("utf-8")), text)
        except UnicodeDecodeError as error:
            yield _Row(f"line {number}", fault=f"cannot be read as UTF-8 text: {error.reason} at byte {error.start}.")
        except json.JSONDecodeError as error:
            yield _Row(f"line {number}", fault=f"not valid JSON: {error.msg} at column {error.colno}.")
        except (ValueError, RecursionError) as error:  # a number of too many digits; too many brackets
            yield _Row(f"line {number}", fault=f"not valid JSON: {error}.")


def _list_rows(file: IO[bytes]) -> Iterator[_Row]:
    """Rows of one list, of which only what one row needs is held. What follows a fault cannot be told apart."""
    read = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    decoder = json.JSONDecoder()
    text, line, more = "", 1, True
    while "[" not in text:
        text += read.read(_CHUNK)
    at = text.index("[") + 1
    line += text.count("\n", 0, at)
    while True:
        start = at
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line += text.count("\n", start, at)
        try:
            if at < len(text) and text[at] == "]":
                rest = text[at + 1 :].strip()
                while not rest and (new := read.read(_CHUNK)):
                    rest = new.strip()
                if rest:
                    yield _Row(f"line {line}", fault=f"behind the list stands {rest[:40]!r}, which has not been read.")
                return
            if at == len(text):
                raise json.JSONDecodeError("the list has no end", text, at)
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(text) - _TAIL or error.msg.startswith("Unterminated string")
            if more and cut:
                new = read.read(max(_CHUNK, len(text) - at))
                text, at, more = text[at:] + new, 0, bool(new)
                continue
            line += text.count("\n", at, error.pos)
            column = error.pos - text.rfind("\n", 0, error.pos)
            said = f"not valid JSON: {error.msg} at column {column}. What follows in the file has not been read."
            yield _Row(f"line {line}", fault=said)
            return
        except (ValueError, RecursionError) as error:
            yield _Row(f"line {line}", fault=f"not valid JSON: {error}. What follows in the file has not been read.")
            return
        yield _checked(f"line {line}", value, text[at:end])
        line += text.count("\n", at, end)
        at = end


def _checked(place: str, value: object, text: str) -> _Row:
    """A row whose characters are all whole: JSON may write half of one, which no tokenizer knows."""
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            return _Row(place, fault=f"the text has half of a character ({half!r}, an unpaired surrogate).")
    return _Row(place, value)


def _parquet_rows(path: Path) -> Iterator[_Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a Parquet file; reading it needs pyarrow: pip install 'kiloq[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield _Row(f"row {number}", row)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error

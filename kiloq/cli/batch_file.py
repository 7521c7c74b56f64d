"""Prompts and answers as JSON lines: reading, checking, resuming. Knows no engine."""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from kiloq.chat import Message, parse_messages
from kiloq.engine import SamplingParams
from kiloq.errors import DataError, RequestError

JobId = str | int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One line of the input: a prompt or a conversation, and what it samples differently from the rest."""

    id: JobId
    line: int
    prompt: str | None
    messages: tuple[Message, ...]
    sampling: Mapping[str, object] = field(hash=False)


def read_jobs(lines: Iterable[bytes], name: str) -> tuple[list[Job], list[DataError]]:
    """The jobs of a JSONL file and one error for each line that is none; `name` is the file's, for the messages."""
    jobs: list[Job] = []
    faults: list[DataError] = []
    seen: dict[JobId, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            job = _parse_job(line, number)
            if job.id in seen:
                raise RequestError(f'"id" {json.dumps(job.id)} is used on line {seen[job.id]:,} already.')
        except (RequestError, ValueError) as error:
            faults.append(DataError(f"{name}:{number}: {error}"))
        except RecursionError:
            faults.append(DataError(f"{name}:{number}: its values are nested too deeply."))
        else:
            seen[job.id] = number
            jobs.append(job)
    return jobs, faults


class Answers(Protocol):
    """Where answers go, in whatever order they come. `done` holds the ids that need none any more."""

    @property
    def done(self) -> Collection[JobId]: ...

    def write(self, row: Mapping[str, object]) -> None: ...

    def skip(self, job_id: JobId) -> None:
        """No answer will come for this job."""

    def finish(self) -> None:
        """All have come or been skipped: the answers now stand in the order of the jobs."""

    def close(self) -> None: ...


class AnswerFile:
    """The output file: answers are appended as they come and survive a kill; `finish` puts them in the jobs' order.

    Opening it again finds the answers that are there, cuts a half-written last line, and goes on behind it; `digests`
    tells for every job what an answer to it has in "job". A file that is not there yet begins with the first answer.
    """

    def __init__(self, path: Path, digests: Mapping[JobId, str]) -> None:
        self.path = path
        self.digests = digests
        self.done: dict[JobId, tuple[int, int]] = {}  # where each answer lies in the file: start, length
        self._file: BinaryIO | None = None
        try:
            nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
            if nearest != path and not (nearest.is_dir() and os.access(nearest, os.W_OK)):  # tell it before the work
                raise DataError(f"cannot write the answers to {path}: {nearest} is no folder that can be written to.")
        except OSError as error:
            raise DataError(f"cannot write the answers to {path}: {error.strerror}.") from error
        if nearest == path:
            self._read_done()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Mapping[str, object]) -> None:
        line = as_line(row)
        file = self._opened()
        self.done[id_of(row)] = (file.seek(0, os.SEEK_END), len(line))
        file.write(line)
        file.flush()

    def skip(self, job_id: JobId) -> None:
        """Nothing was written for it, and nothing will be."""

    def finish(self) -> None:
        """Replace the file by one in the order of the input, in one step."""
        answers = self._opened()  # an empty one where nothing was asked
        spans = [self.done[job_id] for job_id in self.digests if job_id in self.done]
        if spans == sorted(spans):
            return
        part = self.path.with_name(self.path.name + ".part")
        with part.open("wb") as file:
            for start, length in spans:
                answers.seek(start)
                file.write(answers.read(length))
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def _opened(self) -> BinaryIO:
        if self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a+b")
            except OSError as error:
                raise DataError(f"cannot write the answers to {self.path}: {error.strerror}.") from error
        return self._file

    def _read_done(self) -> None:
        file = self._opened()
        file.seek(0)
        end = 0
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                self.done[self._id_of(line, number)] = (end, len(line))
                end += len(line)
        if end < file.tell():
            file.truncate(end)

    def _id_of(self, line: bytes, number: int) -> JobId:
        otherwise = "remove the file or give another name with -o."
        try:
            row = json.loads(line)
            job_id = id_of(row)
            asked = self.digests[job_id]
        except (ValueError, TypeError, KeyError, RecursionError):  # what stands there is none of ours either
            raise DataError(f"{self.path}:{number} is not an answer to this input; {otherwise}") from None
        if row.get("job") != asked:
            raise DataError(
                f'{self.path}:{number} answers "id" {json.dumps(job_id)} as another prompt, sampling or model asked it '
                f'("job" is {json.dumps(row.get("job"))}, now {json.dumps(asked)}); {otherwise}'
            )
        return job_id


class AnswerStream:
    """Answers on a pipe, in the order of the jobs: an early one waits for those before it."""

    def __init__(self, out: BinaryIO, jobs: Sequence[Job]) -> None:
        self.out = out
        self.waiting = [job.id for job in reversed(jobs)]
        self.rows: dict[JobId, bytes] = {}
        self.done: frozenset[JobId] = frozenset()

    def close(self) -> None:
        """Standard output is not ours to close."""

    def finish(self) -> None:
        assert not self.waiting, self.waiting

    def write(self, row: Mapping[str, object]) -> None:
        self.rows[id_of(row)] = as_line(row)
        self._write_ready()

    def skip(self, job_id: JobId) -> None:
        """No answer will come for this job."""
        self.waiting.remove(job_id)
        self._write_ready()

    def _write_ready(self) -> None:
        while self.waiting and self.waiting[-1] in self.rows:
            self.out.write(self.rows.pop(self.waiting.pop()))
        self.out.flush()


def as_line(row: Mapping[str, object]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def is_unicode(text: str) -> bool:
    """Whether text can be written: a JSON escape can name half of a surrogate pair, which no encoding holds."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def id_of(row: Mapping[str, object]) -> JobId:
    job_id = row["id"]
    if not isinstance(job_id, JobId):
        raise TypeError(f"id is {job_id!r}")
    return job_id


def _parse_job(line: bytes, number: int) -> Job:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(raw, dict):
        raise RequestError('a line must be a JSON object, such as {"prompt": "你好"}.')
    sampling = dict(raw)
    job_id = sampling.pop("id", number)
    prompt = sampling.pop("prompt", None)
    messages = sampling.pop("messages", None)
    if not isinstance(job_id, JobId) or isinstance(job_id, bool):
        raise RequestError(f'"id" is {json.dumps(job_id)}; it must be text or a whole number.')
    if isinstance(job_id, str) and not is_unicode(job_id):
        raise RequestError(f'"id" is {json.dumps(job_id)}, which holds half a character; it must be whole text.')
    if (prompt is None) == (messages is None):
        raise RequestError('a line needs either "prompt" or "messages".')
    if prompt is not None and not (isinstance(prompt, str) and prompt):
        raise RequestError(f'"prompt" is {json.dumps(prompt)}; it must be text that is not empty.')
    if isinstance(sampling.get("logit_bias"), dict):  # JSON has no numbers for keys
        sampling["logit_bias"] = {int(token_id): bias for token_id, bias in sampling["logit_bias"].items()}
    SamplingParams.for_model(SamplingParams(), **sampling)  # names and values, before any model is loaded
    parsed = () if messages is None else tuple(parse_messages(messages))
    return Job(id=job_id, line=number, prompt=prompt, messages=parsed, sampling=sampling)

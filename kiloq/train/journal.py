"""A run's log: JSONL and TensorBoard files for machines, one line at a time on stderr for people."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Writes to `folder`/log.jsonl and, where TensorBoard is installed, to `folder`/tensorboard.

    Lines after `step` are dropped first: they belong to a run that was killed before it saved.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        self.path = folder / "log.jsonl"
        self.path.touch()
        lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        unfinished.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = _tensorboard(folder, step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record; flushed, so that a killed run has told all."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def note(self, step: int, text: str) -> None:
        """Something about the run that is worth keeping, told and recorded."""
        self.file.write(json.dumps({"step": step, "note": text}, ensure_ascii=False) + "\n")
        self.file.flush()
        self.say(text)

    def say(self, text: str) -> None:
        """One line for people."""
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # half a line from a killed run


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

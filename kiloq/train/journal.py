"""A run's log: JSONL, TensorBoard and Weights & Biases for machines, one line at a time on stderr for people."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

from kiloq.errors import ConfigError

Report = Literal["tensorboard", "wandb"]
_Sink = Callable[[int, dict[str, float]], None]


class Journal:
    """Writes to `folder`/log.jsonl and to what `report` names: TensorBoard's files lie in `folder`/tensorboard.

    Lines after `step` are dropped first: they belong to a run that was killed before it saved. On a terminal a line
    below the log shows how far the run of `steps` steps is. Of several processes one `writes`; the others keep silent.
    """

    def __init__(
        self, folder: Path, *, step: int, steps: int = 0, report: Sequence[Report] = (), writes: bool = True
    ) -> None:
        self.path = folder / "log.jsonl" if writes else Path(os.devnull)
        if writes:
            _drop_after(self.path, step)
        with ExitStack() as opening:
            self.file = opening.enter_context(self.path.open("a", encoding="utf-8"))
            makers = {"tensorboard": _tensorboard, "wandb": _wandb}
            wanted = report if writes else ()
            self.sinks = [sink for name in wanted if (sink := makers[name](folder, step, opening)) is not None]
            live, told = writes and sys.stderr.isatty(), _line if writes else _nothing
            self.say, self.advance = _terminal(step, steps, opening) if live else (told, _nothing)
            self.closing = opening.pop_all()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record; flushed, so that a killed run has told all."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink(step, values)

    def note(self, step: int, text: str) -> None:
        """Something about the run that is worth keeping, told and recorded."""
        self.file.write(json.dumps({"step": step, "note": text}, ensure_ascii=False) + "\n")
        self.file.flush()
        self.say(text)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.close()


def _drop_after(path: Path, step: int) -> None:
    path.touch()
    # A kill or a full disk may have cut a line, or a character; a note may hold U+2028, which splitlines would take.
    told = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line for line in told if _step_of(line) <= step]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    unfinished.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line from a killed run


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _nothing(_what: object) -> None:
    pass


def _terminal(step: int, steps: int, opening: ExitStack) -> tuple[Callable[[str], None], Callable[[int], None]]:
    """How to tell a line above the live one, and how to move that."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True)
    opening.enter_context(bar)
    task = bar.add_task("", total=steps, completed=step)
    return (
        lambda text: console.print(text, markup=False, soft_wrap=True),
        lambda at: bar.update(task, completed=at),
    )


def _tensorboard(folder: Path, step: int, opening: ExitStack) -> _Sink | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # it is what a recipe has without asking
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
    opening.callback(board.close)

    def write(at: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, at)

    return write


def _wandb(folder: Path, _step: int, opening: ExitStack) -> _Sink:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("loop.report names wandb, which is not installed: pip install 'kiloq[wandb]'.") from error
    # One folder is one run there too: what goes on after a stop is drawn into the same curves.
    own = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    try:
        run = wandb.init(project="kiloq", name=folder.name, id=own, dir=str(folder), resume="allow")
    except wandb.Error as error:
        raise ConfigError(
            f"loop.report names wandb, which does not start: {error} Set WANDB_MODE=offline to keep its files in "
            f"{folder} alone."
        ) from error
    opening.callback(run.finish)
    return lambda at, values: run.log(values, step=at)

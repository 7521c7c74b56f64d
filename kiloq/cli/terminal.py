"""Text to a person or a pipe: results to stdout, talk to stderr, Ctrl-C, progress. Knows no command."""

import atexit
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn


def mend_streams() -> None:
    """A closed standard stream becomes an empty one; bytes and characters that do not fit are replaced, not fatal."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # it lives as long as the program
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write(text: str) -> None:
    """A piece of a result, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """Talk: what is not the result."""
    print(text, file=sys.stderr, flush=True)


def clear_screen() -> None:
    """An empty terminal with the cursor at the top; nothing elsewhere."""
    if sys.stdout.isatty():
        write("\x1b[H\x1b[2J")


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`, so that no step of the engine is cut in two; a second one raises KeyboardInterrupt."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        stop()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """Call what this gives once for each piece of work done: a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def end_process(code: int) -> NoReturn:
    """What is registered for the end is done, and the interpreter is not taken apart.

    A thread that lets go of a tensor meanwhile would abort it, and gloo's do so a moment after whoever waited for the
    message went on: about one torchrun in 25 failed after its work was done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

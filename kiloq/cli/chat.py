"""`kiloq chat`: reads lines from a terminal or a pipe and hands them to the session. Knows no commands or models."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kiloq.cli.options import DEMONSTRATION, ModelOptions, SamplingOptions, System
from kiloq.cli.terminal import clear_screen, on_interrupt, say, write
from kiloq.errors import KiloqError


def chat(
    *,
    model: ModelOptions = ModelOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    system: System = None,
    continued: Annotated[
        Path | None, Parameter(name=["--continue", "-c"], help="A conversation that `:save` wrote, to go on with.")
    ] = None,
) -> int:
    """Talk with a model; lines from a pipe are answered one by one."""
    from kiloq.cli.chat_session import ChatSession, read_conversation

    say(greeting(model.model))
    saved_system, messages = read_conversation(continued) if continued else (None, [])
    session = ChatSession(
        llm=model.load(),
        write=write,
        say=say,
        clear_screen=clear_screen,
        conf=sampling.given(),
        system=saved_system if system is None else system,
        messages=messages,
        path=continued,
    )
    if sys.stdin.isatty() and sys.stdout.isatty():
        return talk_in_terminal(_terminal_reader(), handle=session.handle, stop=session.stop)
    return _answer_lines(session.handle)


def greeting(model: str | None) -> str:
    """The first line of a chat: what answers, and where help is."""
    return f"{DEMONSTRATION if model is None else model}  (:help shows the commands)"


def talk_in_terminal(read: Callable[[], str], *, handle: Callable[[str], bool], stop: Callable[[], None]) -> int:
    """Hand each line over until the person leaves. No Ctrl-C ends the talk: the first one asks, a second one cuts."""
    going_on = True
    while going_on:
        try:
            line = read()
        except KeyboardInterrupt:
            say("(:quit or Ctrl-D leaves)")
            continue
        except EOFError:
            return 0
        try:
            with on_interrupt(stop):
                going_on = handle(line)
        except KeyboardInterrupt:
            say("(interrupted; the conversation goes on)")
        except KiloqError as error:
            say(f"kiloq: {error}")
    return 0


def _terminal_reader() -> Callable[[], str]:
    """Reads one message: Enter sends, Alt-Enter or a backslash before Enter begins a new line, arrows recall."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _send_or_continue(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ", history=InMemoryHistory(), multiline=True, key_bindings=keys, prompt_continuation=". "
    )
    return session.prompt


def _answer_lines(handle: Callable[[str], bool]) -> int:
    """Every line of a pipe in turn; a fault in one is told and does not keep the others from their answers."""
    faults = 0
    for line in joined_lines(sys.stdin):
        try:
            if not handle(line):
                break
        except KiloqError as error:
            faults += 1
            say(f"kiloq: {error}")
    return min(faults, 1)


def joined_lines(lines: Iterator[str]) -> Iterator[str]:
    """Lines without their ends; one that ends with a backslash goes on with the next."""
    parts: list[str] = []
    for line in lines:
        text = line.rstrip("\r\n")
        parts.append(text.removesuffix("\\"))
        if not text.endswith("\\"):
            yield "\n".join(parts)
            parts = []
    if parts:
        yield "\n".join(parts)

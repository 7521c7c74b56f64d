"""What a typed line of the chat means: a message, or a command with its arguments. Knows no model or terminal."""

import json
from dataclasses import dataclass
from difflib import get_close_matches

from kiloq.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of the chat: its names (the first is shown in full), its argument and what it does."""

    names: tuple[str, ...]
    argument: str = ""
    does: str

    @property
    def name(self) -> str:
        return self.names[0]


COMMANDS = (
    Command(names=("help", "h"), does="show this help"),
    Command(names=("quit", "q", "exit"), does="leave (Ctrl-D does too)"),
    Command(names=("clear", "cl"), does="clear the screen; the conversation is kept"),
    Command(names=("clear-history", "clh", "clear-his"), does="forget the conversation"),
    Command(names=("history", "his"), does="show the conversation"),
    Command(names=("seed",), argument="[N]", does="show or set the random seed"),
    Command(names=("conf",), argument="[KEY=VALUE ...]", does="show or change how answers are sampled"),
    Command(names=("reset-conf",), does="sample as at the start again"),
    Command(names=("system",), argument="[TEXT]", does="show or set the system prompt; - removes it"),
    Command(names=("save",), argument="[FILE]", does="save the conversation; continue it with -c FILE"),
)
_BY_NAME = {name: command for command in COMMANDS for name in command.names}


@dataclass(frozen=True)
class Line:
    """A parsed line: `command` is None for a message, whose words are `text`."""

    command: str | None
    text: str = ""


def parse_line(line: str) -> Line:
    """A line that begins with a colon and a letter is a command, whichever of its names was used."""
    stripped = line.strip()
    if not (stripped.startswith(":") and stripped[1:2].isalpha()):
        return Line(None, line)
    word, _, rest = stripped[1:].partition(" ")
    command = _BY_NAME.get(word.lower())
    if command is None:
        near = get_close_matches(word.lower(), _BY_NAME, n=1)
        raise RequestError(f"there is no command :{word}. " + (f"Did you mean :{near[0]}?" if near else "Try :help."))
    if rest.strip() and not command.argument:
        raise RequestError(f":{command.name} takes no argument, but got {rest.strip()!r}.")
    return Line(command.name, rest.strip())


def parse_settings(text: str) -> dict[str, object]:
    """`temperature=0.5 stop=["\\n"]` as a dict; values are JSON, and what is not JSON is text."""
    settings: dict[str, object] = {}
    for pair in text.split():
        key, equals, value = pair.partition("=")
        if not key or not equals or not value:
            raise RequestError(f"{pair!r} is not KEY=VALUE, such as temperature=0.5.")
        settings[key.replace("-", "_")] = _parse_value(value)
    return settings


def parse_seed(text: str) -> int:
    """A whole number; its range is the sampler's to check."""
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"the seed is {text!r}; it must be a whole number, such as :seed 1234.") from None


def help_text() -> str:
    """The table of commands, with the short forms in brackets."""
    rows = []
    for command in COMMANDS:
        others = ", ".join(f":{name}" for name in command.names[1:])
        usage = f":{command.name} {command.argument}".strip() + (f" ({others})" if others else "")
        rows.append((usage, command.does))
    width = max(len(usage) for usage, _ in rows)
    lines = [f"  {usage.ljust(width)}  {does}" for usage, does in rows]
    keys = "  Alt-Enter, or a backslash at the end of a line, continues on the next line. Ctrl-C stops an answer."
    return "\n".join([*lines, keys])


def _parse_value(text: str) -> object:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
    except ValueError as error:  # Python reads no whole number of thousands of digits
        raise RequestError(f"{text:.20}... is a number of too many digits.") from error
    except RecursionError as error:
        raise RequestError(f"{text:.20}... is nested too deeply for a setting.") from error

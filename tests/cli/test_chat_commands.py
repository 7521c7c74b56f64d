"""A typed line is a message or a command; nothing in it is ever evaluated."""

import pytest

from kiloq.cli.chat import joined_lines
from kiloq.cli.chat_commands import COMMANDS, Line, help_text, parse_line, parse_seed, parse_settings
from kiloq.errors import RequestError


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        (":h", "help"),
        (":HELP", "help"),
        (":q", "quit"),
        (":exit", "quit"),
        ("  :quit ", "quit"),
        (":cl", "clear"),
        (":clh", "clear-history"),
        (":his", "history"),
    ],
)
def test_the_short_forms_of_the_reference_demo_work(typed: str, command: str) -> None:
    assert parse_line(typed) == Line(command)


@pytest.mark.parametrize("typed", ["你好", ":)", ": hello", ":-( help", "say :quit", "12:30", ":"])
def test_what_is_no_command_is_a_message(typed: str) -> None:
    assert parse_line(typed) == Line(None, typed)


def test_an_unknown_command_names_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"no command :histry. Did you mean :history"):
        parse_line(":histry")


def test_an_argument_where_none_belongs_is_refused() -> None:
    with pytest.raises(RequestError, match=":clear takes no argument"):
        parse_line(":clear everything")


def test_settings_are_json_or_text_and_never_code() -> None:
    typed = 'temperature=0.5 top-k=3 max_tokens=none ignore_eos=True stop=["a","b"] seed=__import__(\'os\')'
    assert parse_settings(typed) == {
        "temperature": 0.5,
        "top_k": 3,
        "max_tokens": None,
        "ignore_eos": True,
        "stop": ["a", "b"],
        "seed": "__import__('os')",
    }


@pytest.mark.parametrize("typed", ["temperature", "=1", "temperature=", "temperature 0.5"])
def test_a_setting_without_key_or_value_is_refused(typed: str) -> None:
    with pytest.raises(RequestError, match="is not KEY=VALUE"):
        parse_settings(typed)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000], ids=["long", "deep"])
def test_a_value_that_is_too_large_to_read_is_refused_in_few_words(value: str) -> None:
    with pytest.raises(RequestError, match="too") as caught:
        parse_settings(f"top_k={value}")
    assert len(str(caught.value)) < 100


def test_a_seed_is_a_whole_number() -> None:
    assert parse_seed("-3") == -3
    with pytest.raises(RequestError, match="it must be a whole number"):
        parse_seed("1.5")


def test_help_names_every_command_and_every_short_form() -> None:
    shown = help_text()
    assert all(f":{name}" in shown for command in COMMANDS for name in command.names)


def test_a_backslash_joins_lines_and_the_end_of_input_completes_them() -> None:
    assert list(joined_lines(iter(["a\\\n", "b\n", "c\r\n", "d\\\n"]))) == ["a\nb", "c", "d"]

"""The command table, the exit codes, and what opening the program costs."""

import os
import subprocess
import sys

import pytest

from kiloq.cli.main import BROKEN_PIPE, COMMANDS, GROUPS, run


def test_help_imports_neither_torch_nor_a_command() -> None:
    script = "import sys; from kiloq.cli.main import run; code = run(['--help']); print(code, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    page, _, modules = done.stdout.rpartition("\n0 ")
    assert "Usage" in page
    loaded = set(modules.split())
    assert not loaded & {"torch", "numpy", "tiktoken", "transformers", "huggingface_hub", "prompt_toolkit"}
    assert not loaded & {"kiloq.cli.chat", "kiloq.cli.info", "kiloq.engine", "kiloq.model"}


@pytest.mark.parametrize(("name", "example"), [(name, row[2]) for name, row in (COMMANDS | GROUPS).items()])
def test_every_help_page_shows_an_example_before_the_options(
    name: str, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    before_options, _, _ = capsys.readouterr().out.partition("╭")
    assert f"Example: {example}" in before_options


def test_no_arguments_show_the_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert 'Usage: kiloq "' in capsys.readouterr().out


def test_a_wrong_flag_is_a_usage_error_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "Qwen-7B", "--jason"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kiloq: ")
    assert err.count("\n") == 1


def test_a_mistyped_command_is_not_asked_as_a_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chta"]) == 2
    assert 'did you mean "chat"' in capsys.readouterr().err


@pytest.mark.parametrize("command", [["info", "/nowhere"], ["chat", "-m", "/nowhere"], ["generate", "/nowhere"]])
def test_a_mistake_of_a_person_is_one_line_and_exit_code_1(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "/nowhere" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("kiloq: ")


def test_a_name_from_outside_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "check", "\x1b[2Jméchant.jsonl"]) == 1
    assert "\\x1b[2Jméchant.jsonl" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        assert run(["info", "Qwen-7B"]) == BROKEN_PIPE
    assert capsys.readouterr().err == ""

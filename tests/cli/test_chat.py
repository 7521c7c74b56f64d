"""The chat as a person meets it, through a terminal and through a pipe, with a tiny random model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect

from kiloq.cli.chat import greeting
from kiloq.cli.chat_commands import COMMANDS

ENVIRONMENT = os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
# A prompt is open between these two (bracketed paste on and off); what the program prints lies outside.
READY = r"\x1b\[\?2004h"
SENT = r"\x1b\[\?2004l"


class Terminal:
    """A running `kiloq chat` behind a pseudo-terminal; every call returns what was printed before the next prompt."""

    def __init__(self, *arguments: str) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "kiloq", "chat", *arguments],
            env=ENVIRONMENT,
            encoding="utf-8",
            timeout=120,
            dimensions=(40, 200),
        )
        self.greeting = self.printed()

    def printed(self) -> str:
        self.child.expect(READY)
        return str(self.child.before)

    def type(self, line: str) -> str:
        self.press(line + "\r")
        return self.printed()

    def press(self, keys: str) -> None:
        self.child.send(keys)
        self.child.expect(SENT)

    def leave(self, keys: str) -> int:
        self.child.send(keys)
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)


def piped(text: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kiloq", "chat", *arguments]
    return subprocess.run(command, input=text, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_the_first_line_says_it_is_a_demonstration_and_names_the_flag() -> None:
    assert "demonstration" in greeting(None)
    assert "-m Qwen/" in greeting(None)
    assert "\n" not in greeting(None)


def test_every_command_through_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    chat = Terminal("-m", str(tiny_model))
    assert str(tiny_model) in chat.greeting
    assert all(f":{command.name}" in chat.type(":help") for command in COMMANDS)
    assert "Nothing has been said" in chat.type(":history")

    # The seed and the settings change what is really sampled.
    assert chat.type(":seed 7") == "seed=7\r\n"
    first = chat.type("hello")
    assert "Forgot 2 messages" in chat.type(":clear-history")
    assert chat.type("hello") == first
    chat.type(":clh")
    chat.type(":seed 8")
    assert chat.type("hello") != first
    chat.type(":clh")
    assert "temperature=0.0\r\n" in chat.type(":conf temperature=0 max_tokens=9")
    greedy = chat.type("hello")
    chat.type(":clh")
    chat.type(":seed 9")
    assert chat.type("hello") == greedy

    # A wrong setting changes nothing.
    assert "Did you mean 'temperature'" in chat.type(":conf temprature=1")
    assert "top_p is 7" in chat.type(":conf top_p=7 temperature=1")
    assert "temperature=0.0\r\n" in chat.type(":conf")
    reset = chat.type(":reset-conf")
    assert "temperature=1.0" in reset
    assert "seed=null" in reset

    assert chat.type(":system Be brief.") == "system: Be brief.\r\n"
    history = chat.type(":his")
    assert "system: Be brief." in history
    assert "user: hello" in history
    saved = tmp_path / "talk.json"
    assert f"kiloq chat -c {saved}" in chat.type(f":save {saved}")
    rows = json.loads(saved.read_text(encoding="utf-8"))
    assert [row["role"] for row in rows] == ["system", "user", "assistant"]
    assert rows[1]["content"] == "hello"
    assert "\x1b[2J" in chat.type(":clear")
    assert "user: hello" in chat.type(":history")
    assert "Did you mean :quit" in chat.type(":qiut")
    assert chat.leave(":quit\r") == 0

    # A pipe without faults ends with 0.
    continued = piped(":history\n", "-m", str(tiny_model), "-c", str(saved))
    assert continued.returncode == 0
    assert "system: Be brief." in continued.stderr
    assert "user: hello" in continued.stderr


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(tiny_model: Path) -> None:
    chat = Terminal("-m", str(tiny_model), "--seed", "1")
    chat.type(":conf max_tokens=900 ignore_eos=true")
    chat.press("go on\r")
    chat.child.expect(r"\w")
    chat.child.sendintr()
    assert "(stopped" in chat.printed()
    assert re.search(r"user: go on\r\nassistant: .*\w", chat.type(":history"))
    chat.type(":conf max_tokens=4")
    chat.type("and then?")
    assert chat.type(":his").count("user: ") == 2

    chat.press("\x03")
    assert "Ctrl-D leaves" in chat.printed()
    chat.type("one\x1b\rtwo\\\rthree")  # Alt-Enter, and a backslash before Enter
    assert "user: one\r\ntwo\r\nthree" in chat.type(":his")
    assert chat.leave("\x04") == 0


def test_a_pipe_gets_an_answer_to_every_line_and_a_fault_does_not_end_it(tiny_model: Path) -> None:
    lines = "你好\n\n:conf top_p=2\nhello\\\nworld\n:history\n:quit\nnever\n"
    done = piped(lines, "-m", str(tiny_model), "--max-tokens", "4", "--seed", "3")
    assert done.returncode == 1
    assert "kiloq: top_p is 2" in done.stderr
    assert "user: 你好" in done.stderr
    assert "user: hello\nworld" in done.stderr
    assert "never" not in done.stderr
    assert done.stdout.count("\n") >= 2
    assert "user" not in done.stdout

"""`kiloq web` as a person starts it: a real server, and a browser that only notes what it is asked to open."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

KILOQ = [sys.executable, "-m", "kiloq"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose browser writes the address into a pipe that a test reads."""
    os.mkfifo(tmp_path / "opened")
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\nprintf %s "$1" > {tmp_path}/opened\n')
    script.chmod(0o755)
    bare = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
    return bare | {"BROWSER": f"{script} %s", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Running:
    """A `kiloq web`: what it printed, and what it made the browser open."""

    page: str
    opened: str


@pytest.fixture
def running(environment: dict[str, str], tmp_path: Path) -> Iterator[Running]:
    command = [*KILOQ, "web"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    page = process.stdout.readline().strip()
    yield Running(page, (tmp_path / "opened").read_text())
    process.terminate()
    process.communicate(timeout=30)


def test_a_server_is_started_on_the_next_free_port_and_its_page_printed_and_opened(
    request: pytest.FixtureRequest,
) -> None:
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # another has it: as good
            held.enter_context(socket.create_server(("127.0.0.1", 8000)))
        running: Running = request.getfixturevalue("running")
    assert running.opened == running.page
    assert not running.page.endswith(":8000/")
    with urllib.request.urlopen(running.page) as answer:
        assert b"kiloq" in answer.read()


def test_a_running_server_is_opened_and_without_a_screen_only_named(
    running: Running, environment: dict[str, str]
) -> None:
    page = running.page
    headless = {name: value for name, value in environment.items() if name != "BROWSER"}
    for given in (page, page.removeprefix("http://"), f"{page}v1"):
        command = [*KILOQ, "web", "--url", given]
        shown = subprocess.run(command, capture_output=True, text=True, env=headless, check=True)
        assert shown.stdout == f"{page}\n"


@pytest.mark.parametrize("address", ["ftp://127.0.0.1", "http://", "127.0.0.1:{closed}"])
def test_an_address_without_a_page_is_refused_with_what_to_do(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        closed = held.getsockname()[1]
    given = address.format(closed=closed)
    shown = subprocess.run([*KILOQ, "web", "--url", given], capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert re.search(r"such as http://127|starts a server", shown.stderr)

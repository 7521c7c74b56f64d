"""`kiloq serve`: its flags, and what it refuses before a model is loaded."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kiloq.cli.main import run
from kiloq.serve.auth import gathered_keys, readable_by_others
from kiloq.serve.limits import host_name, is_loopback
from kiloq.serve.service import ServeConfig


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    port = [] if "--port" in arguments else ["--port", "0"]
    assert run(["serve", "-m", "no-such-folder/model", *port, *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


def test_help_opens_with_an_example_and_loads_no_torch() -> None:
    program = (
        "import sys; from kiloq.cli.main import run; code = run(['serve', '--help']); "
        "assert 'torch' not in sys.modules and 'fastapi' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kiloq serve -m" in done.stdout.split("Usage")[0].split("Parameters")[0]
    for flag in ("--host", "--port", "--api-key", "--api-key-file", "--max-queue", "--lora", "--seed", "--cors-origin"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "65536"], "--port is 65536"),
        (["--port", "-1"], "--port is -1"),
        (["--host", "no such host"], "no such host"),
        (["--host", "203.0.113.7"], "203.0.113.7"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--max-batch", "0"], "--max-batch"),
        (["--max-body", "0"], "--max-body"),
        (["--max-body", "nan"], "--max-body"),
        (["--max-body", "inf"], "--max-body"),
        (["--request-timeout", "0"], "--request-timeout"),
        (["--request-timeout", "nan"], "--request-timeout"),
        (["--drain-timeout", "-1"], "--drain-timeout"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "two words"], "--api-key"),
        (["--api-key-file", "/no/such/file"], "/no/such/file"),
        (["--cors-origin", "*"], "--cors-origin"),
        (["--cors-origin", "https://chat.example.com/"], "--cors-origin"),
        (["--cors-origin", "chat.example.com"], "--cors-origin"),
        (["--lora", "style"], "--lora"),
        (["--lora", "=dir"], "--lora"),
        (["--lora", "a=x", "--lora", "a=y"], "'a'"),
        (["--served-model-name", "a", "--lora", "a=x"], "'a'"),
        (["--served-model-name", ""], "a name that is empty"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KILOQ_API_KEY", raising=False)
    assert named in refusal(arguments, capsys)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_told_before_the_model_is_loaded(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in refusal(["--host", host, "--port", str(port)], capsys)


def test_beyond_loopback_without_a_key_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warned = []
    for arguments in (["--host", "0.0.0.0"], ["--host", "0.0.0.0", "--api-key", "k"], ["--host", "localhost"]):
        assert run(["serve", "-m", "no-such-folder/model", "--port", "0", *arguments]) == 1
        warned.append("warning" in capsys.readouterr().err)
    assert warned == [True, False, False]


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the team\n\n  one \ntwo\n")
    assert gathered_keys(("flag",), file, {"KILOQ_API_KEY": "three, four"}) == ("flag", "one", "two", "three", "four")
    assert gathered_keys((), None, {"KILOQ_API_KEY": ""}) == ()


def test_a_refused_key_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    file.write_text("sécret-key\n")
    assert "cret" not in refusal(["--api-key-file", str(file)], capsys)
    file.write_text("# nothing\n")
    assert "no key" in refusal(["--api-key-file", str(file)], capsys)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_file_that_others_can_read_is_known(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("k")
    file.chmod(0o600)
    assert not readable_by_others(file)
    file.chmod(0o644)
    assert readable_by_others(file)


@pytest.mark.parametrize(
    ("header", "name"),
    [("localhost:80", "localhost"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("A.example.", "a.example"), ("", "")],
)
def test_a_host_without_its_port(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize(
    ("name", "loopback"),
    [
        ("localhost", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.255.0.3", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.evil.example", False),
        ("2130706433", False),
        ("", False),
    ],
)
def test_what_can_only_mean_this_machine(name: str, loopback: bool) -> None:
    assert is_loopback(name) == loopback


def test_the_defaults_are_good() -> None:
    assert is_loopback(ServeConfig(names=("m",)).host)

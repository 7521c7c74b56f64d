"""`kiloq generate`: order, resuming and faults, with a tiny random model."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from kiloq.cli.main import run


def write_prompts(path: Path, number: int, **sampling: object) -> list[int]:
    rows = [{"id": 7 * i, "prompt": f"line {i}", "seed": i, **sampling} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [7 * i for i in range(number)]


def read_rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_stand_in_the_order_of_the_prompts_whatever_the_batch(
    tiny_model: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = write_prompts(prompts, 9)
    with prompts.open("a", encoding="utf-8") as file:  # a short answer, a conversation, several answers
        file.write('{"id": "one", "prompt": "x", "max_tokens": 1, "seed": 1}\n')
        file.write('{"id": "talk", "messages": [{"role": "user", "content": "hi"}], "seed": 1}\n')
        file.write('{"id": "two", "prompt": "x", "n": 2, "seed": 1}\n')
    assert run(["generate", str(prompts), "-o", str(out), "-m", str(tiny_model), "--batch-size", "3"]) == 0
    rows = read_rows(out)
    assert [row["id"] for row in rows] == [*ids, "one", "talk", "two"]
    assert rows[9]["completion_tokens"] == 1
    choices = rows[11]["choices"]
    assert isinstance(choices, list)
    assert len(choices) == 2

    capsysbinary.readouterr()
    assert run(["generate", str(prompts), "-m", str(tiny_model), "--batch-size", "1"]) == 0
    assert [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()] == rows


def test_a_killed_run_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    prompts, out, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    ids = write_prompts(prompts, 60, max_tokens=40)
    command = ["generate", str(prompts), "-m", str(tiny_model), "--batch-size", "2", "-o"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "kiloq", *command, str(out)], env=environment) as process:
        while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"it ended by itself with {process.wait(0.02)}")
        process.send_signal(signal.SIGKILL)
    kept = out.read_bytes().split(b"\n")[:-1]
    assert 3 <= len(kept) < 60
    with out.open("ab") as file:
        file.write(b'{"id": 7, "te')  # as a kill in the middle of a write leaves it
    assert run([*command, str(out)]) == 0
    assert run([*command, str(whole)]) == 0
    assert [row["id"] for row in read_rows(out)] == ids
    assert out.read_bytes() == whole.read_bytes()
    assert set(kept) <= set(out.read_bytes().split(b"\n"))


def test_a_finished_run_is_left_alone(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(prompts, 2, max_tokens=1)
    command = ["generate", str(prompts), "-m", str(tiny_model), "-o", str(out)]
    assert run(command) == 0
    before = out.stat()
    assert run(command) == 0
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "2 answers are in" in capsys.readouterr().err


def test_what_was_asked_otherwise_is_not_taken_for_an_answer(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = '{"prompt": "a", "max_tokens": 1}\n{"messages": [{"role": "user", "content": "b"}], "max_tokens": 1}\n'
    prompts.write_text(text, encoding="utf-8")
    command = ["generate", str(prompts), "-m", str(tiny_model), "-o", str(out), "--temperature", "0"]
    assert run(command) == 0
    kept = out.read_bytes()
    capsys.readouterr()
    assert run([*command[:-1], "0.0"]) == 0  # the same in other words
    elsewhere = [str(tiny_model.parent) if word == str(tiny_model) else word for word in command]
    for other in ([*command[:-1], "1"], [*command, "--top-k", "3"], [*command, "-s", "Be brief."], elsewhere):
        assert run(other) == 1
        assert "as another prompt, sampling or model" in capsys.readouterr().err
    prompts.write_text(text.replace('"a"', '"other"'), encoding="utf-8")
    assert run(command) == 1
    assert f"{out}:1 answers" in capsys.readouterr().err
    assert out.read_bytes() == kept


def test_a_model_that_is_not_there_leaves_no_file(tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    write_prompts(prompts, 2)
    assert run(["generate", str(prompts), "-m", str(tmp_path / "none"), "-o", str(out)]) == 1
    assert not out.parent.exists()


def test_prompts_of_nobody_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "~nobody-of-this-name/in.jsonl"]) == 1
    assert "cannot read the prompts ~nobody-of-this-name/in.jsonl" in capsys.readouterr().err


def test_a_faulty_line_stops_the_run_or_is_skipped(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    long = json.dumps({"prompt": "word " * 3000})
    prompts.write_text('{"prompt": "a", "max_tokens": 1}\n{"promt": "b"}\n[]\n' + long + "\n", encoding="utf-8")
    command = ["generate", str(prompts), "-m", str(tiny_model), "-o", str(out)]
    assert run(command) == 1
    error = capsys.readouterr().err
    assert f"kiloq: {prompts}:2: " in error
    assert "1 more line" in error
    assert not out.exists()

    assert run([*command, "--skip-bad"]) == 0
    told = capsys.readouterr().err
    assert all(f"skipped {prompts}:{line}: " in told for line in (2, 3, 4))
    assert [row["id"] for row in read_rows(out)] == [1]

    prompts.write_text(long + "\n", encoding="utf-8")
    out.unlink()
    assert run(command) == 1
    assert f"{prompts}:1: the prompt has" in capsys.readouterr().err

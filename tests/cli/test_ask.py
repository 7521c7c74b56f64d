"""`kiloq "question"`: the answer and nothing else on stdout."""

import io
from pathlib import Path

import pytest

from kiloq.cli.main import run
from kiloq.engine import LLM, SamplingParams


def test_the_answer_is_that_of_the_engine(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(tiny_model)
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    expected = llm.chat(conversation, SamplingParams.for_model(llm.generation, seed=4, max_tokens=8)).text
    flags = ["-m", str(tiny_model), "-s", "Be brief.", "--seed", "4", "--max-tokens", "8"]
    assert run(["你好", *flags]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (expected + "\n", "")


def test_a_dash_reads_the_question_from_stdin(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["-m", str(tiny_model), "--seed", "4", "--max-tokens", "8"]
    assert run(["two\nlines", "and words", *flags]) == 0
    typed = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines and words\n")))
    assert run(["-", *flags]) == 0
    assert capsys.readouterr().out == typed


def test_an_empty_question_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([" "]) == 1
    assert "the question is empty" in capsys.readouterr().err


def test_closed_streams_and_bytes_that_are_no_text_are_not_fatal(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert run(["-", "-m", str(tiny_model)]) == 1
    assert "the question is empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff hi\n"), encoding="utf-8"))
    assert run(["chat", "-m", str(tiny_model), "--max-tokens", "3"]) == 0

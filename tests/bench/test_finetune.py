import json
from pathlib import Path

import pytest

from kiloq.bench.finetune import Cell, fill, table
from kiloq.cli.main import run


def test_what_does_not_fit_is_predicted_and_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    cells = [Cell(shape="qwen2.5-0.1b", method="LoRA", length=length) for length in (256, 512)]
    known = tmp_path / "cells.json"
    first = fill(cells[:1], known, 0.0, lambda: None)
    assert "peak_bytes" not in first[0]
    written = json.loads(known.read_text())
    written[0] |= {"peak_bytes": 3 << 30, "seconds": 1.25}
    known.write_text(json.dumps(written))
    both = fill(cells, known, 0.0, lambda: None)
    assert both[0] == written[0]
    shown = table(both)
    assert "| Model Size   | Method |" in shown
    assert "3.0G / 1.2s/it" in shown
    assert "(0." in shown


ASKED = ["bench", "finetune", "--shape", "qwen2.5-0.1b", "--methods", "LoRA", "--lengths", "64", "--memory", "0.1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shape", "qwen2.5-0.1"], "Did you mean qwen2.5-0.1b?"),
        (["--lengths", "0"], "--lengths has 0; qwen2.5-0.1b takes 1 to 32,768 tokens."),
        (["--lengths", "64,99999"], "--lengths has 99,999; qwen2.5-0.1b takes 1 to 32,768 tokens."),
        (["--lengths", "long"], "it takes whole numbers"),
        (["--methods", "lora"], "it takes LoRA, LoRA (emb), Q-LoRA, Full-parameter"),
        (["--accumulate", "0"], "a step has at least 1 sequence"),
        (["--checkpointing", "some"], "selective"),
        (["--memory", "-1"], "it must be above 0"),
        (["--json", "nowhere/at/all.json"], "there is no folder nowhere/at"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = words[0]
    place = ASKED.index(name) if name in ASKED else len(ASKED)
    assert run([*ASKED[:place], *words, *ASKED[place + 2 :]]) != 0
    out, err = capsys.readouterr()
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


def test_a_file_of_something_else_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    for text in ('{"a": ', "[3]", '{"a": 1}'):
        other.write_text(text)
        assert run([*ASKED, "--json", str(other)]) == 1
        assert "is not what `kiloq bench finetune --json` wrote" in capsys.readouterr().err
        assert other.read_text() == text


def test_too_little_memory_is_told_beside_the_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ASKED) == 0
    out, err = capsys.readouterr()
    assert "(0." in out
    assert "1 of 1 are only predicted; they need more than 0.1 GiB" in err


def test_a_cell_that_was_only_predicted_is_measured_once_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(shape="qwen2.5-0.1b", method="LoRA", length=64, accumulate=1)
    known = tmp_path / "cells.json"
    assert "peak_bytes" not in fill([cell], known, 0.0, lambda: None)[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "peak_bytes" in fill([cell], known, 2.0**40, lambda: None)[0]

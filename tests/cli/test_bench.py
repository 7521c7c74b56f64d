"""`kiloq bench` prints tables, writes every figure, draws pictures, and refuses nonsense before it measures."""

import builtins
import json
from pathlib import Path

import pytest

from kiloq.cli.main import run


def test_speed_shows_every_cell_and_the_table_of_the_first_readme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "new" / "speed.json", tmp_path / "speed.png"
    words = ["--prompt", "16", "--tokens", "2,3", "--batch", "1,2", "--precision", "int8", "--repeats", "1"]
    assert run(["bench", "speed", *words, "--json", str(file), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    record = json.loads(file.read_text())["speed"]
    assert [(r["cell"]["batch"], r["cell"]["new_tokens"]) for r in record] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    details, readme = (part.splitlines() for part in shown.split("\n\n") if part.startswith("| "))
    assert len(details) == 2 + 4
    assert [cell.strip() for cell in readme[0].split("|")[1:4]] == ["Model Size", "Precision", "Attention"]
    assert f"{record[0]['average_tok_s']:.2f}" in readme[2]
    assert len(readme) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))


def test_memory_is_measured_beside_what_weights_and_cache_must_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "memory", "--prompt", "32", "--tokens", "3", "--precision", "int8"]) == 0
    header, _rule, row = capsys.readouterr().out.split("\n\n")[-1].strip().splitlines()
    assert [cell.strip() for cell in header.split("|")[2:6]] == ["Precision", "KV cache", "32 + 1", "1 + 3"]
    assert row.count("GB (") == 2


def test_the_cache_table_has_both_caches(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "1,2", "--batch-length", "20", "--lengths", "24", "--tokens", "3"]
    assert run(["bench", "kv-cache", *sizes, "--precision", "int8"]) == 0
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 4
    for table in tables:
        assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["no", "yes"]
    assert "bs=1" in tables[0]
    assert "sl=24" in tables[2]


def test_a_quantised_checkpoint_is_measured_as_it_is(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eight"
    assert run(["quantize", "-m", str(tiny_model), "--bits", "8", "--method", "rtn", "-o", str(out)]) == 0
    capsys.readouterr()
    file = tmp_path / "figures.json"
    words = ["-m", str(out), "--batch", "1", "--batch-length", "20", "--lengths", "24", "--tokens", "3"]
    assert run(["bench", "kv-cache", *words, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert {one["precision"] for one in record["by_batch"] + record["by_length"]} == {"int8"}
    capsys.readouterr()
    assert run(["bench", "speed", "-m", str(out), "--precision", "int4"]) == 1
    assert "quantised to int8" in capsys.readouterr().err


def test_the_cache_is_measured_at_int4_unless_a_precision_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    words = ["--batch", "1", "--batch-length", "20", "--lengths", "24", "--tokens", "3", "--json", str(file)]
    assert run(["bench", "kv-cache", *words]) == 0
    assert {one["precision"] for one in json.loads(file.read_text())["by_length"]} == {"int4"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["speed", "--precision", "int3"], "int3"),
        (["speed", "--kv", "int2"], "int2"),
        (["speed", "--tokens", "0"], "--tokens"),
        (["speed", "--batch", "1,x"], "--batch"),
        (["speed", "--repeats", "0"], "--repeats"),
        (["speed", "--threads", "-1"], "--threads"),
        (["speed", "--shape", "qwen-7"], "Did you mean qwen-7b"),
        (["speed", "--shape", "qwen-7b", "-m", "x"], "one at a time"),
        (["memory", "--tokens", "0"], "--tokens"),
        (["kv-cache", "--tokens", "600"], "shortest"),
        (["kv-cache", "--precision", "int8,int4"], "one --precision"),
        (["speed", "--device", "tpu", "--precision", "bf16"], "tpu"),
    ],
)
def test_what_makes_no_sense_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *words]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_missing_matplotlib_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run(["bench", "speed", "--plot", str(tmp_path / "x.png")]) == 1
    assert "kiloq[bench]" in capsys.readouterr().err

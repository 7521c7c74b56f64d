"""`kiloq quantize` and `kiloq eval perplexity` on a tiny random model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kiloq.checkpoint import load_dense, open_checkpoint, save_checkpoint
from kiloq.cli.main import run
from kiloq.quant import calibrate

TEXT = "The cat sat on the mat. 你好，世界！ " * 60


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("kiloq: ")
    return err


@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_the_output_answers_and_is_reported(
    layout: str, tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    quantize = ["quantize", "-m", str(tiny_model), "--calibration", str(text), "--max-length", "64", "-o", str(out)]
    assert run([*quantize, "--bits", "4", "--group-size", "32", "--format", layout]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(out)
    assert "layer 2 of 2" in shown.err
    assert "mlp.down keeps 8 bits" in shown.err
    assert "held rows" in shown.err
    report = json.loads((out / "quantize_report.json").read_text())
    assert report["settings"]["gptq"]["order"] == "static"
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert report["layers"][1]["matrices"]["attn.qkv"]["error"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    assert run(["eval", "perplexity", str(text), "-m", str(out), "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert run(["eval", "perplexity", str(text), "-m", str(tiny_model), "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["tokens"] == after["tokens"]
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=0.05)
    assert run(["hello", "-m", str(out), "--max-tokens", "4"]) == 0
    assert "quantised already" in error_of(["quantize", "-m", str(out), "-o", str(tmp_path / "again")], capsys)


def test_a_chat_model_is_compared_by_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "How are you? " * 9}, {"role": "assistant", "content": "Well."}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 20, encoding="utf-8")
    out = str(tmp_path / "out")
    assert run(["quantize", "-m", "kiloq-mini-chat", "--calibration", str(chats), "-o", out, "--method", "rtn"]) == 0
    checkpoint = open_checkpoint("kiloq-mini-chat")
    answer = len(checkpoint.tokenizer.encode("Well.")) + 1  # and the token that ends it
    assert f"on {2 * answer:,} tokens of answers or text in 2 held rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--bits", "8"], ["--bits", "8", "--format", "compressed-tensors"], ["--order", "act"], ["--asymmetric"]]
)
def test_other_kinds_answer_too(
    flags: list[str], tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["quantize", "-m", str(tiny_model), "--calibration", str(text), "-o", str(out), *flags]) == 0
    settings = json.loads((out / "quantize_report.json").read_text())["settings"]
    assert settings["gptq"]["correction"] == (0.0 if "8" in flags else 0.5)
    assert run(["hello", "-m", str(out), "--max-tokens", "4"]) == 0


@pytest.mark.parametrize("bits", ["4", "8"])
def test_codes_are_chosen_for_the_scales_that_the_files_keep(
    bits: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row of int8 whose scale is rounded to bf16 afterwards is wrong by up to 0.4 % as a whole."""
    checkpoint = open_checkpoint(tiny_model)
    exact = load_dense(checkpoint, dtype="bfloat16")
    sixteen = tmp_path / "bf16"
    save_checkpoint(
        sixteen,
        model_state=exact.state_dict(),
        config=replace(checkpoint.config, dtype="bfloat16"),
        tokenizer=checkpoint.tokenizer,
        generation=checkpoint.generation,
    )
    errors = {}
    for layout in ("gptq", "compressed-tensors"):
        out = tmp_path / layout
        flags = ["--method", "rtn", "--bits", bits, "--format", layout, "-o", str(out)]
        assert run(["quantize", "-m", str(sixteen), *flags]) == 0
        found = load_dense(open_checkpoint(out), dtype="float32").blocks[0].attn.qkv.weight
        weight = exact.blocks[0].attn.qkv.weight.float()
        errors[layout] = float((found - weight).norm() / weight.norm())
    assert errors["compressed-tensors"] < 1.03 * errors["gptq"]


def test_rounding_needs_no_calibration(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "-m", str(tiny_model), "--method", "rtn", "-o", str(tmp_path / "out")]) == 0
    assert "calibrat" not in capsys.readouterr().err


def test_conversations_as_the_reference_takes_them(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "user", "value": "hello"}, {"from": "assistant", "value": "The cat sat on the mat."}]
    rows = [{"id": str(i), "conversations": turns * (1 + i % 3)} for i in range(20)] + [
        {"id": "x", "conversations": []}
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    quantize = ["quantize", "-m", str(tiny_model), "--calibration", str(path), "-o", str(tmp_path / "out")]
    assert run([*quantize, "--samples", "10"]) == 0
    err = capsys.readouterr().err
    assert "1 rows of" in err
    assert "are left out" in err
    assert "calibration: 10 rows" in err
    assert "10 rows are few" in err


def test_a_stopped_run_goes_on(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["quantize", "-m", str(tiny_model), "--calibration", str(text), "-o", str(tmp_path / "out")]
    whole = calibrate.quantize_matrix
    calls = 0

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(calibrate, "quantize_matrix", interrupted)
    assert run(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(calibrate, "quantize_matrix", whole)
    assert "unfinished work of another job" in error_of([*command, "--seed", "1"], capsys)
    assert run(command) == 0
    err = capsys.readouterr().err
    assert "layer 1 of 2" not in err
    assert "layer 2 of 2" in err


def test_errors_are_one_line(tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    quantize = ["quantize", "-m", str(tiny_model), "--calibration", str(text), "-o", str(out)]
    assert "bits is 3; weights can have 4 or 8" in error_of([*quantize, "--bits", "3"], capsys)
    assert "group_size is 16; " in error_of([*quantize, "--group-size", "16"], capsys)
    wrong = error_of([*quantize, "--group-size", "128"], capsys)
    assert "attn.qkv has 32 inputs, which groups of 128 do not divide; --group-size 32 would" in wrong
    assert "correction is 2" in error_of([*quantize, "--correction", "2"], capsys)
    early = error_of([*quantize, "--bits", "8", "--group-size", "32", "--format", "compressed-tensors"], capsys)
    assert "one scale a row" in early
    assert early.count("\n") == 1, "refused before any work"
    missing = ["quantize", "-m", str(tiny_model), "--calibration", "nowhere.txt", "-o", str(out)]
    assert "no calibration file nowhere.txt" in error_of(missing, capsys)
    text.write_text("", encoding="utf-8")
    assert "no usable row" in error_of(quantize, capsys)
    out.mkdir()
    (out / "kept").touch()
    assert "is not empty" in error_of(quantize, capsys)
    shutil.rmtree(out)


def test_perplexity_says_what_is_missing(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in error_of(["eval", "perplexity", str(tmp_path / "no.txt"), "-m", str(tiny_model)], capsys)
    (tmp_path / "a.txt").write_text("")
    assert "no two tokens" in error_of(["eval", "perplexity", str(tmp_path / "a.txt"), "-m", str(tiny_model)], capsys)

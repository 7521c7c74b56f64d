"""`kiloq convert --merge` on a tiny random model: a folder that answers, and what a person is told."""

import json
import re
from pathlib import Path

import pytest
import torch

from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.checkpoint.adapter_writer import write_adapter
from kiloq.checkpoint.fingerprint import Base
from kiloq.cli.main import run
from kiloq.train.adapters import AdapterConfig, attach, stored

SHORT = ("--max-length", "64")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat. 你好，世界！ " * 60, encoding="utf-8")
    return path


def write_random_adapter(folder: Path, base: Path) -> Path:
    checkpoint = open_checkpoint(base)
    model, config = load_dense(checkpoint, dtype="float32"), AdapterConfig(rank=2, dropout=0.0)
    attach(model, checkpoint, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    write_adapter(folder, stored(model, config), model.config, base=Base.of(base))
    return folder


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return write_random_adapter(tmp_path / "adapter", tiny_model)


def differences(err: str) -> tuple[float, float, float]:
    """The change of perplexity in per cent, the largest difference of a logit, and the share of rounding."""
    change = re.search(r"base alone .* base and adapter .* merged .* \(([-+][\d.]+)(?: ± [\d.]+)? %\)", err)
    logits = re.search(r"largest difference of a logit: (\S+), of which rounding the weights is (\S+); ", err)
    assert change, err
    assert logits, err
    return float(change[1]), float(logits[1]), float(logits[2])


def test_the_base_is_found_and_the_folder_answers(
    tiny_model: Path, adapter: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = tmp_path / "moved"  # beside the adapter, under another name
    near.symlink_to(tiny_model)
    command = ["convert", "--merge", str(adapter), "-o", str(tmp_path / "out"), "--calibration", str(text), *SHORT]
    assert run(command) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'}\n"
    change, largest, rounding = differences(shown.err)
    assert abs(change) < 0.01
    assert largest < 1e-4
    assert rounding == 0
    assert run(["hello", "-m", str(tmp_path / "out"), "--max-tokens", "4"]) == 0
    assert run(command) == 1
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "most"), [("bfloat16", 0.05), ("int8", 0.05), ("int4", 0.5)])
def test_what_rounding_costs_is_told(
    form: str,
    most: float,
    tiny_model: Path,
    adapter: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["-m", str(tiny_model), "--merge", str(adapter), "-o", str(out), "--calibration", str(text), *SHORT]
    assert run(["convert", *arguments, "--to", form]) == 0
    _, largest, rounding = differences(capsys.readouterr().err)
    assert 0 < largest < most
    assert rounding == pytest.approx(largest, rel=0.05)
    config = json.loads((out / "config.json").read_text())
    if form == "bfloat16":
        assert open_checkpoint(out).config.dtype == "bfloat16"
    else:
        assert config["quantization_config"]["bits"] == int(form[-1])
        assert (out / "quantize_report.json").is_file()
    assert run(["hello", "-m", str(out), "--max-tokens", "4"]) == 0
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_of_codes_goes_into_the_weights_that_they_were_made_of(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, out = tmp_path / "codes", tmp_path / "out"
    quantize = [
        "quantize",
        "-m",
        str(tiny_model),
        "--group-size",
        "32",
        "-o",
        str(codes),
        "--calibration",
        str(text),
        *SHORT,
    ]
    assert run(quantize) == 0
    adapter = write_random_adapter(tmp_path / "adapter", codes)
    capsys.readouterr()
    merge = ["convert", "--merge", str(adapter), "-o", str(out), "--calibration", str(text), *SHORT]
    assert run([*merge, "-m", str(tiny_model)]) == 0
    told = capsys.readouterr().err
    assert f"was trained on {codes}; it is merged into {tiny_model}" in told
    _, largest, rounding = differences(told)
    assert largest > 1e-3 > rounding == 0  # the base itself is another one


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--merge", "{adapter}"], "name the new folder"),
        (["--merge", "{adapter}", "-o", "{out}", "--dtype", "float16"], "by --to"),
        (["--merge", "{adapter}", "-o", "{out}"], "was not found"),
        (["--merge", "{out}", "-o", "{out}"], "adapter"),
        (["-o", "{out}", "--to", "qwen2"], "no model is given"),
        (["-m", "{model}", "-o", "{out}", "--to", "int4"], "goes with --merge"),
        (["-m", "{model}", "-o", "{out}"], "nothing is asked for"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    said: str,
    tiny_model: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"adapter": adapter, "out": tmp_path / "out", "model": tiny_model}
    assert run(["convert", *(one.format(**places) for one in arguments)]) != 0
    err = capsys.readouterr().err
    assert err.startswith("kiloq: ")
    assert said in err
    assert not (tmp_path / "out").exists()

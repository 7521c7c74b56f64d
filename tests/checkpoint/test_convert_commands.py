"""`kiloq convert` and `kiloq download` as a person types them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kiloq.checkpoint import open_checkpoint
from kiloq.cli.main import run
from kiloq.model import Transformer


def test_convert_prints_the_new_folder_and_refuses_the_second_time(
    write: Callable[..., tuple[Path, Transformer]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = write("qwen")
    command = ["convert", str(folder), "-o", str(tmp_path / "out"), "--to", "qwen2", "--dtype", "bfloat16"]
    assert run(command) == 0
    assert capfd.readouterr().out == f"{tmp_path / 'out'}\n"
    assert open_checkpoint(tmp_path / "out").config.dtype == "bfloat16"
    assert run(command) == 1
    assert "exists and is not empty" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["no/such/place", "out", "--to", "qwen2"], ["x", "out", "--to", "gguf"]])
def test_a_mistake_is_one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", *arguments]) != 0
    assert capfd.readouterr().err.startswith("kiloq: ")


def test_download_without_a_network_says_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["download", "nobody/nothing-here"]) == 1
    assert "kiloq download nobody/nothing-here" in capfd.readouterr().err

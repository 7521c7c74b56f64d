"""`kiloq info` gives the published counts, without weights."""

import json
from pathlib import Path

import pytest

from kiloq.cli.info import LINEAR_BITS, config_of, weight_bytes
from kiloq.cli.known_models import known_config
from kiloq.cli.main import run

PUBLISHED = [
    ("Qwen/Qwen-1_8B-Chat", 1_836_828_672, 196_608),
    ("Qwen/Qwen-7B", 7_721_324_544, 524_288),
    ("qwen/Qwen-14B-Chat-Int4", 14_167_290_880, 819_200),
    ("Qwen-72B", 72_287_920_128, 2_621_440),
]


@pytest.mark.parametrize(("name", "parameters", "bytes_per_token"), PUBLISHED)
def test_the_counts_of_qwen_v1_are_the_published_ones(
    name: str, parameters: int, bytes_per_token: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", name, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["parameters"], shown["kv_bytes_per_token"]) == (parameters, bytes_per_token)
    assert run(["info", name]) == 0
    text = capsys.readouterr().out
    assert f"{parameters:,}" in text
    assert f"{bytes_per_token:,} bytes per token" in text


def test_a_config_without_weights_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(known_config("Qwen-7B")))
    assert run(["info", str(tmp_path), "--json", "--context", "100"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["memory_bytes"]["bfloat16"] == 7_721_324_544 * 2 + 100 * 524_288


@pytest.mark.parametrize("name", ["Qwen/Qwen2-7B", "Qwen/Qwen-7B-Chat-GGUF", "someone/Qwen-7B", "Qwen-8B"])
def test_only_the_published_names_are_known(name: str) -> None:
    assert known_config(name) is None


def test_16_bit_weights_take_two_bytes_each_and_fewer_bits_less() -> None:
    config = config_of("Qwen-1_8B")
    sizes = [weight_bytes(config, bits) for bits in LINEAR_BITS.values()]
    assert sizes[1] == 2 * config.num_parameters
    assert sizes == sorted(sizes, reverse=True)


def test_a_damaged_config_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert run(["info", str(tmp_path)]) == 1
    assert str(tmp_path / "config.json") in capsys.readouterr().err


def test_a_quantised_folder_says_how_it_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = known_config("Qwen-7B")
    assert config is not None
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    assert run(["info", str(tmp_path)]) == 0
    assert "stored as     int4, groups of 128 (gptq)" in capsys.readouterr().out

import json
from pathlib import Path

import pytest

from kiloq.checkpoint import GenerationDefaults
from kiloq.cli.main import run
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.run_folder import export

RECIPE = """
out = "{folder}/run"
tokenizer = "{vocabulary}"
[model]
hidden_size = 16
num_layers = 1
num_heads = 2
intermediate_size = 16
[[data]]
name = "text"
path = "{folder}/text.txt"
[batch]
seq_len = 16
tokens = 32
[optim]
lr = 1e-3
steps = 2
[loop]
device = "cpu"
compile = "off"
"""


@pytest.fixture
def recipe(tmp_path: Path, byte_vocabulary: Path) -> Path:
    (tmp_path / "text.txt").write_text("The owl sat still. " * 10, encoding="utf-8")
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path, vocabulary=byte_vocabulary), encoding="utf-8")
    return path


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"instruction": "hi", "output": "hello"}) + "\n", encoding="utf-8")
    return path


def test_pretraining_ends_with_the_folder_of_the_model_on_stdout(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "pretrain", str(recipe), "--set", "optim.steps=1", "--set", "loop.log_every=1"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{recipe.parent}/run/model\n"
    assert "step 1/1  loss " in err


def test_a_misspelt_setting_is_one_line_with_the_nearest_name(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "pretrain", str(recipe), "--set", "optim.wamup_steps=3"]) == 1
    assert capsys.readouterr().err == "kiloq: optim.wamup_steps is not a setting. Did you mean warmup_steps?\n"


def test_check_names_the_bad_rows_and_fails(chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "check", str(chat)]) == 0
    assert capsys.readouterr().err == f"{chat}: 1 good rows with 2 turns, 0 bad rows\n"
    with chat.open("a", encoding="utf-8") as file:
        file.write('{"instruction": "hi"}\n')
    assert run(["train", "check", str(chat)]) == 1
    assert capsys.readouterr().out == f"{chat}, line 2: output is missing; it must be text.\n"


def test_show_marks_what_is_trained(
    chat: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    end = tokenizer.end_of_text_id
    model = Transformer(qwen1_config(ShapeConfig(hidden_size=16, num_layers=1, num_heads=2), tokenizer.size))
    for parameter in model.parameters():
        parameter.data.zero_()
    export(tmp_path / "m", model, tokenizer, GenerationDefaults((end,), end, "chatml", 512))
    assert run(["train", "show", str(chat), "-m", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert "h*|e*|l*|l*|o*|<|im_end|>*|\\n" in shown
    assert shown.count("*") == 6
    assert run(["train", "show", str(chat), "-m", str(tmp_path / "m"), "--mask", "qwen1"]) == 0
    assert "<|im_start|>*|u|s|e|r|\\n" in capsys.readouterr().out

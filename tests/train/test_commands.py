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
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"{chat}: conversations, 1 good rows, 0 bad rows"
    assert second == "turns: 2, 2 to 2 a conversation; 0 conversations with tools, 0 with thoughts"
    with chat.open("a", encoding="utf-8") as file:
        file.write('{"instruction": "hi"}\n')
    assert run(["train", "check", str(chat)]) == 1
    told = capsys.readouterr()
    assert told.out == f"{chat}, line 2: output is missing; it must be text.\n"
    assert told.err.endswith(f"\nbad: 1 row, first {chat}, line 2: output is missing; it must be text.\n")


@pytest.fixture
def small(tmp_path: Path, tokenizer: Tokenizer) -> str:
    """A checkpoint whose weights do not matter."""
    end = tokenizer.end_of_text_id
    model = Transformer(qwen1_config(ShapeConfig(hidden_size=16, num_layers=1, num_heads=2), tokenizer.size))
    for parameter in model.parameters():
        parameter.data.zero_()
    export(tmp_path / "m", model, tokenizer, GenerationDefaults((end,), end, "chatml", 512))
    return str(tmp_path / "m")


PAIR = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
HISTORY = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]


@pytest.mark.parametrize(
    ("row", "seq_len", "said"),
    [
        ({**PAIR, "prompt": HISTORY}, 80, ["pairs, 3 good rows, 0 bad", "turns: 24, 4 to 4", "3 rows would be cut, 0"]),
        (
            {"prompt": "hi", "completion": "yes", "label": True},
            60,
            ["labels, 3 good rows, 3 of them good answers", "0 rows would be cut, 3 dropped"],
        ),
        ({"text": "abcdefg"}, 60, ["texts, 3 good rows", "tokens: 24; 24 are kept, 87.5 % of them trained"]),
        ({"messages": []}, 60, ["conversations, 0 good rows, 3 bad", "bad: 3 rows, first "]),
    ],
)
def test_check_finds_the_kind_of_the_data_by_itself(
    row: dict[str, object], seq_len: int, said: list[str], tmp_path: Path, small: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    exit_code = run(["train", "check", str(path), "-m", small, "--seq-len", str(seq_len)])
    told = capsys.readouterr().err
    assert exit_code == int("messages" in row)
    assert all(one in told for one in said), told


def test_show_marks_what_is_trained_on_both_sides_of_a_pair(
    tmp_path: Path, small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR), encoding="utf-8")
    assert run(["train", "show", str(tmp_path / "pairs.jsonl"), "-m", small]) == 0
    shown = capsys.readouterr().out
    assert "line 1, chosen: " in shown
    assert "y*|e*|s*|<|im_end|>*|\\n" in shown
    assert "n*|o*|<|im_end|>*|\\n" in shown
    (tmp_path / "text.jsonl").write_text('{"text": "abc"}', encoding="utf-8")
    assert run(["train", "show", str(tmp_path / "text.jsonl"), "-m", small]) == 0
    assert "a|b*|c*|<|endoftext|>*" in capsys.readouterr().out


def test_show_marks_what_is_trained(chat: Path, small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "show", str(chat), "-m", small]) == 0
    shown = capsys.readouterr().out
    assert "h*|e*|l*|l*|o*|<|im_end|>*|\\n" in shown
    assert shown.count("*") == 6
    assert run(["train", "show", str(chat), "-m", small, "--mask", "qwen1"]) == 0
    assert "<|im_start|>*|u|s|e|r|\\n" in capsys.readouterr().out


def test_of_several_processes_the_first_one_names_the_result(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(["train", "pretrain", str(recipe)]) == 0
    assert capsys.readouterr().out == ""


def test_a_plan_is_found_under_both_names(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for name in ("plan", "--plan"):
        assert run(["train", name, str(recipe), "-m", "qwen2.5-0.5b", "--memory", "64"]) == 0
        told.append(capsys.readouterr())
    assert told[0] == told[1]
    assert "| as it is |" in told[0].out


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "ppo", "grpo"])
def test_a_plan_asked_of_a_run_begins_none_and_names_the_command(
    method: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", method, str(recipe), "--plan"]) == 2
    assert "kiloq train plan RECIPE" in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()

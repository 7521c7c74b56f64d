"""The five scripts of the first Qwen, by the flags they passed to finetune.py."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from kiloq.cli.main import run
from kiloq.compat.finetune import translate
from kiloq.errors import ConfigError
from kiloq.train.recipe import load_recipe
from kiloq.train.sft import SftConfig

RECIPES = Path(__file__).parents[2] / "recipes" / "finetune"
ALWAYS = (
    "--model_name_or_path MODEL --data_path DATA --output_dir OUT --num_train_epochs 5 --per_device_eval_batch_size 1"
    " --evaluation_strategy no --save_strategy steps --save_steps 1000 --save_total_limit 10 --weight_decay 0.1"
    " --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 --report_to none"
    " --model_max_length 512 --gradient_checkpointing True --lazy_preprocess True"
)
FULL = "--bf16 True --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --learning_rate 1e-5"
LORA = "--bf16 True --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 3e-4 --use_lora"
QLORA = LORA.replace("--bf16", "--fp16") + " --q_lora"


@pytest.mark.parametrize(
    ("recipe", "flags", "processes"),
    [
        ("full_multi", FULL, 8),
        ("lora", LORA, 1),
        ("lora_multi", LORA, 2),
        ("qlora", f"{QLORA} --deepspeed finetune/ds_config_zero2.json", 1),
        ("qlora_multi", QLORA, 2),
    ],
)
def test_the_flags_of_a_script_are_its_recipe(recipe: str, flags: str, processes: int) -> None:
    path = RECIPES / f"{recipe}.toml"
    wanted = load_recipe(SftConfig, path, ["model=MODEL", "data=[{path='DATA'}]", "seed=42", "loop.log_every=1"])
    got = translate(f"{ALWAYS} {flags}".split(), world=processes).config
    # Where the run lies and what gets its figures is no part of what is learned.
    loop = dataclasses.replace(got.loop, report=wanted.loop.report, checkpointing=wanted.loop.checkpointing)
    assert got.loop.recompute == wanted.loop.recompute
    assert dataclasses.replace(got, out=wanted.out, loop=loop, parallel=wanted.parallel) == wanted


def test_what_a_flag_does_not_change_is_said() -> None:
    flags = "--model_name_or_path m --data_path d --output_dir o --fp16 --save_total_limit 3 --eval_data_path e"
    run = translate([*flags.split(), "--evaluation_strategy", "no"])
    assert not run.config.held
    for told in ("--fp16: ", "--save_total_limit changes", "--eval_data_path is not", "falls by a cosine"):
        assert any(told in note for note in run.notes), told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora_rank 8", "--lora_rank is not a flag of finetune.py"),
        ("--lr_scheduler_type linear", "lr_scheduler_type: invalid choice: 'linear'"),
        ("--use_lora maybe", "'maybe' is neither True nor False"),
        ("--q_lora", "--q_lora is set and --use_lora is not"),
        ("--learning_rate -1", "lr -1.0"),
        ("--lora_r 0 --use_lora", "rank 0"),
        ("--optim lion_8bit", "invalid choice: 'lion_8bit'"),
    ],
)
def test_what_cannot_be_done_is_one_error(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(["--model_name_or_path=m", "--data-path=d", "--output_dir=o", *flags.split()])


def test_a_script_trains_an_adapter(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]
    data = tmp_path / "chat.json"
    data.write_text(json.dumps([{"id": "1", "conversations": turns}]), encoding="utf-8")
    flags = f"--model_name_or_path {chat_folder} --data_path {data} --output_dir {tmp_path}/run --use_lora --lora_r 2"
    batch = "--model_max_length 64 --per_device_train_batch_size 1 --max_steps 2 --report_to none --logging_steps 1"
    assert run(["train", "finetune", *flags.split(), *batch.split()]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/run/adapter\n"
    assert "step 2/2  loss " in err
    recipe = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8"))
    assert recipe["adapter"]["rank"] == 2

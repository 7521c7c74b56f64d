import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.errors import ConfigError, DataError
from kiloq.model import Transformer
from kiloq.train.optim import OptimConfig
from kiloq.train.parallel import Alone
from kiloq.train.pretrain import PretrainConfig, ShapeConfig, TextSource, pretrain
from kiloq.train.recipe import load_recipe, to_toml
from kiloq.train.settings import BatchConfig, LoopConfig
from kiloq.train.state import load_state

TEXT = ["The fox ran home. ", "The owl sat still. ", "狐狸回家了。", "여우가 집에 갔다. "]


@pytest.fixture
def config(tmp_path: Path, byte_vocabulary: Path) -> PretrainConfig:
    rows = [json.dumps({"text": text * 3}, ensure_ascii=False) for text in TEXT * 3]
    path = tmp_path / "text.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return PretrainConfig(
        out=str(tmp_path / "run"),
        tokenizer=str(byte_vocabulary),
        model=ShapeConfig(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, trained_length=32),
        data=(TextSource(name="text", path=str(path), holdout_every=4, group="en"),),
        batch=BatchConfig(seq_len=32, tokens=128),
        optim=OptimConfig(lr=1e-2, steps=10, warmup_steps=2),
        loop=LoopConfig(device="cpu", precision="fp32", compile="off", log_every=1, save_every=3, eval_every=5),
    )


def losses(folder: str) -> dict[int, float]:
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_finished_run_leaves_a_checkpoint_of_qwen_v1(config: PretrainConfig) -> None:
    assert pretrain(config) == "finished"
    checkpoint = open_checkpoint(Path(config.out) / "model")
    assert checkpoint.config.family == "qwen"
    assert checkpoint.generation.stop_ids == (checkpoint.tokenizer.end_of_text_id,)
    trained = Transformer(checkpoint.config)
    load_state(Path(config.out), module=trained, optimizer=torch.optim.AdamW(trained.parameters()), parallel=Alone())
    model = load_dense(checkpoint)
    same = zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    assert all(torch.equal(written, exact.bfloat16()) for written, exact in same)


def test_a_run_is_repeated_from_its_own_folder(config: PretrainConfig, tmp_path: Path) -> None:
    pretrain(config)
    kept = load_recipe(PretrainConfig, Path(config.out) / "recipe.toml")
    assert kept == config
    pretrain(replace(kept, out=str(tmp_path / "again")))
    assert losses(str(tmp_path / "again")) == losses(config.out)


def test_a_run_may_start_from_the_weights_of_another(config: PretrainConfig, tmp_path: Path) -> None:
    pretrain(config)
    start = Path(config.out) / "model"
    still = replace(config.optim, lr=1e-9, steps=1)  # moves no bf16 weight
    further = replace(config, out=str(tmp_path / "further"), start=str(start), optim=still)
    pretrain(further)
    before, after = (load_dense(open_checkpoint(folder)) for folder in (start, Path(further.out) / "model"))
    assert all(torch.equal(value, after.get_parameter(name)) for name, value in before.named_parameters())
    other = replace(further, out=str(tmp_path / "other"), model=replace(config.model, num_layers=1))
    with pytest.raises(ConfigError, match="another num_layers"):
        pretrain(other)


def test_kill_minus_nine_loses_nothing_that_a_new_start_does_not_bring_back(
    config: PretrainConfig, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config), encoding="utf-8")
    killed_at_step_8 = """
import os, signal, sys
from pathlib import Path
from kiloq.train import pretrain, recipe
asked = 0
following = pretrain.PackedBatches.next_batch
def next_batch(self):
    global asked
    asked += sys._getframe(1).f_code.co_name != "held_out_batches"
    if asked == 30:  # of four rows a step
        os.kill(os.getpid(), signal.SIGKILL)
    return following(self)
pretrain.PackedBatches.next_batch = next_batch
pretrain.pretrain(recipe.load_recipe(pretrain.PretrainConfig, Path(sys.argv[1])))
"""
    killed = subprocess.run(
        [sys.executable, "-c", killed_at_step_8, str(recipe)], check=False, capture_output=True, env=os.environ
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert max(losses(config.out)) == 7  # it told more than it saved
    assert pretrain(config) == "finished"
    straight = replace(config, out=str(tmp_path / "straight"))
    pretrain(straight)
    assert losses(config.out) == losses(straight.out)


def test_a_begun_run_refuses_other_settings_but_may_go_further(config: PretrainConfig) -> None:
    pretrain(config)
    with pytest.raises(ConfigError, match=r"holds a run with other settings: batch\.tokens was 128, is 64"):
        pretrain(replace(config, batch=BatchConfig(seq_len=32, tokens=64)))
    longer = replace(config, optim=replace(config.optim, steps=12), loop=replace(config.loop, log_every=2))
    assert pretrain(longer) == "finished"
    assert '"note": "optim.steps was 10, is 12"' in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8")


def test_changed_text_is_read_again(config: PretrainConfig, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("short", encoding="utf-8")
    small = replace(config, data=(TextSource(name="text", path=str(source)),), optim=replace(config.optim, steps=1))
    pretrain(small)
    source.write_text("a longer text", encoding="utf-8")
    with pytest.raises(DataError, match="not what this run began with"):
        pretrain(small)


def test_half_a_note_of_what_tokens_were_made_from_means_that_they_are_made_again(config: PretrainConfig) -> None:
    pretrain(config)
    note = Path(config.out) / "tokens/text/made_from.json"
    told = note.read_text(encoding="utf-8")
    note.write_text(told[: len(told) // 2], encoding="utf-8")
    pretrain(config)
    assert note.read_text(encoding="utf-8") == told


def test_tokens_that_are_being_made_again_have_no_note_beside_them(config: PretrainConfig, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("short", encoding="utf-8")
    pretrain(replace(config, data=(TextSource(name="text", path=str(source)),), optim=replace(config.optim, steps=1)))
    folder = Path(config.out) / "tokens/text"
    source.write_bytes(b"longer, and broken off by what is no text: \xff")
    with pytest.raises(DataError, match="UTF-8"):
        pretrain(replace(config, data=(TextSource(name="text", path=str(source)),)))
    assert (folder / "tokens.npy").exists()
    assert not (folder / "made_from.json").exists()


def test_steps_may_be_counted_from_epochs(config: PretrainConfig) -> None:
    pretrain(replace(config, epochs=2.0, optim=replace(config.optim, steps=0)))
    tokens = 2 * sum(len((text * 3).encode()) + 1 for text in (TEXT * 3)) * 3 / 4
    assert abs(max(losses(config.out)) - tokens / 128) <= 3


def test_missing_text_is_one_clear_error(config: PretrainConfig) -> None:
    with pytest.raises(DataError, match=r"data source gone: nowhere\.txt cannot be read"):
        pretrain(replace(config, data=(TextSource(name="gone", path="nowhere.txt"),)))


def test_heads_must_divide_the_width(config: PretrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"hidden_size 32 is not a multiple of num_heads 5"):
        pretrain(replace(config, model=replace(config.model, num_heads=5)))

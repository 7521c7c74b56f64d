"""DeepSpeed trains in two processes what one process trains; a file that contradicts the recipe is refused."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
import torch

from kiloq.checkpoint import GenerationDefaults
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.optim import OptimConfig
from kiloq.train.parallel import join
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.recipe import load_recipe
from kiloq.train.run_folder import export
from kiloq.train.settings import BatchConfig, LoopConfig, ParallelConfig, TrainConfig
from kiloq.train.sft import SftConfig, sft
from kiloq.train.state import newest_state
from kiloq.train.zero import refuse_stale_locks
from kiloq.train.zero_config import filled, read_zero_config
from tests.train.test_ranks import corpus, log, torchrun, trained

RECIPES = Path(__file__).parents[2] / "recipes" / "finetune"
FILES = {stage: RECIPES / f"ds_config_zero{stage}.json" for stage in (2, 3)}
CONFIG = TrainConfig(
    batch=BatchConfig(seq_len=16, tokens=32, accumulate=8), optim=OptimConfig(lr=1e-3, clip=0.5), loop=LoopConfig()
)

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'kiloq[deepspeed]'"
)


@pytest.mark.parametrize("stage", [2, 3])
def test_auto_is_what_the_recipe_says(stage: int) -> None:
    found = filled(read_zero_config(FILES[stage]), FILES[stage], CONFIG, world=2, hidden=64)
    assert found["zero_optimization"]["stage"] == stage
    assert found["gradient_accumulation_steps"] == 4
    assert found["train_batch_size"] == 8
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["reduce_bucket_size"] == (200_000_000 if stage == 2 else 64 * 64)
    assert "auto" not in json.dumps(found)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("zero_optimization", {"stage": 1}, "must be 2 or 3"),
        ("zero_optimization", {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "only none"),
        ("zero_optimization", {"stage": 2, "zero_quantized_weights": True}, "zero_quantized_weights is not supported"),
        ("zero_optimization", {"stage": 2, "overlap_comm": "auto"}, "overlap_comm is auto"),
        ("bf16", {"enabled": True}, "loop.precision"),
        ("optimizer", {"type": "Lamb"}, "must be AdamW"),
        ("optimizer", {"type": "AdamW", "params": {"lr": 3e-4}}, "the recipe has 0.001"),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}, "how rates move"),
        ("gradient_clipping", 1.0, "the recipe has 0.5"),
        ("tensor_parallel", {"autotp_size": 2}, "tensor_parallel is not supported"),
    ],
)
def test_what_contradicts_the_recipe_or_is_unknown_is_refused(
    tmp_path: Path, key: str, value: object, told: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**json.loads(FILES[2].read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        filled(read_zero_config(path), path, CONFIG, world=2, hidden=64)


def test_a_file_belongs_to_deepspeed_alone() -> None:
    for kind, config in (("deepspeed", ""), ("fsdp", "ds.json")):
        with pytest.raises(ConfigError, match="belongs to kind deepspeed"):
            ParallelConfig(kind=kind, config=config)


def test_deepspeed_does_not_train_models_in_shares() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 2 with kind deepspeed"):
        ParallelConfig(kind="deepspeed", config="ds.json", tensor=2)


def test_the_lock_of_a_killed_build_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    refuse_stale_locks(tmp_path)
    assert "waiting for another process's build" in capsys.readouterr().err
    os.utime(lock, (time.time() - 7200, time.time() - 7200))
    with pytest.raises(ConfigError, match="120 minutes old"):
        refuse_stale_locks(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_the_extra_is_named_where_deepspeed_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"pip install 'kiloq\[deepspeed\]'"):
        join(ParallelConfig(kind="deepspeed", config=str(FILES[2])), "cpu")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "adapter", ["", "rank = 4", "rank = 4, quantization = 'int4'", "rank = 4, quantization = 'nf4'"]
)
def test_two_processes_learn_what_one_learns_and_go_on_exactly(
    tmp_path: Path, tokenizer: Tokenizer, stage: int, adapter: str
) -> None:
    shape = ShapeConfig(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, trained_length=128)
    model = Transformer(qwen1_config(shape, tokenizer.size))
    model.init_weights(torch.Generator().manual_seed(0))
    end = tokenizer.end_of_text_id
    raw = GenerationDefaults(stop_ids=(end,), pad_id=end, chat_format="raw", max_window=512)
    export(tmp_path / "base", model, tokenizer, raw)
    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(16)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    runs = {"one": 'kind = "auto"', "two": f'kind = "deepspeed", config = "{FILES[stage]}"'}
    runs["paused"] = runs["two"]
    for name, sharing in runs.items():
        (tmp_path / f"{name}.toml").write_text(
            f"""
            out = "{tmp_path / name}"
            model = "{tmp_path / "base"}"
            data = [{{ path = "{tmp_path / "chat.jsonl"}" }}]
            held = [{{ name = "same", path = "{tmp_path / "chat.jsonl"}" }}]
            {f"adapter = {{ {adapter}, dropout = 0.0 }}" if adapter else ""}
            batch = {{ seq_len = 160, tokens = 160, accumulate = 4 }}
            optim = {{ lr = 1e-2, steps = 2, warmup_steps = 1 }}
            parallel = {{ {sharing} }}
            [loop]
            device = "cpu"
            precision = "fp32"
            compile = "off"
            checkpointing = "full"
            log_every = 1
            eval_every = 2
            save_every = 2
            report = []
            {"max_minutes = 0.0" if name == "paused" else ""}
            """,
            encoding="utf-8",
        )
    sft(load_recipe(SftConfig, tmp_path / "one.toml"))
    train = ("-m", "kiloq", "train", "sft")
    for name in ("two", "paused", "paused"):  # that stops after each step
        done = torchrun(tmp_path / f"{name}.toml", script=train)
        assert done.returncode == 0, done.stderr[-3000:]
    assert log(tmp_path / "two") == pytest.approx(log(tmp_path / "one"), abs=1e-5)
    assert log(tmp_path / "paused") == log(tmp_path / "two")
    saved = "adapter/adapter_model.safetensors" if adapter else "model/model.safetensors"
    one, two, paused = (tmp_path / name / saved for name in ("one", "two", "paused"))
    assert one.stat().st_size == two.stat().st_size
    assert paused.read_bytes() == two.read_bytes()


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("stage", "moment", "rank"), [(2, "amid", 0), (3, "begun", 1)])
def test_a_kill_while_a_state_is_written_leaves_a_whole_one(tmp_path: Path, stage: int, moment: str, rank: int) -> None:
    out, sharing = corpus(tmp_path), f"kind=deepspeed config={FILES[stage]}"
    straight = torchrun(out, f"straight {sharing}")
    assert straight.returncode == 0, straight.stderr[-3000:]
    killed = torchrun(out, f"run {sharing} die={moment} rank={rank}")
    assert killed.returncode != 0
    state = newest_state(out / "run")
    assert state is not None
    assert state.name == "step-000000002"
    resumed = torchrun(out, f"run {sharing}")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert log(out / "run") == log(out / "straight")
    assert all(torch.equal(trained(out / "run")[key], one) for key, one in trained(out / "straight").items())

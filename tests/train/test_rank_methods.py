"""Methods over two gloo processes: what their commands learn and write is what one process learns and writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kiloq.checkpoint import GenerationDefaults
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.grpo import GrpoConfig, grpo
from kiloq.train.optim import OptimConfig
from kiloq.train.ppo import PpoConfig, ppo
from kiloq.train.preference import PreferenceConfig, prefer
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.recipe import load_recipe
from kiloq.train.reward import RewardConfig, reward
from kiloq.train.run_folder import export
from kiloq.train.settings import ParallelConfig
from kiloq.train.sft import SftConfig, sft
from tests.train.test_ranks import log, torchrun


def chat_base(folder: Path, tokenizer: Tokenizer) -> None:
    """A tiny base model in `folder`/base."""
    shape = ShapeConfig(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, trained_length=128)
    model = Transformer(qwen1_config(shape, tokenizer.size))
    model.init_weights(torch.Generator().manual_seed(0))
    end = tokenizer.end_of_text_id
    raw = GenerationDefaults(stop_ids=(end,), pad_id=end, chat_format="raw", max_window=512)
    export(folder / "base", model, tokenizer, raw)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sharing"),
    [
        ("dpo", 'kind = "ddp"'),
        ("dpo", 'kind = "fsdp"'),
        ("dpo", "tensor = 2"),
        ("reward", 'kind = "ddp"'),
        ("reward", 'kind = "fsdp"'),
        ("reward", "tensor = 2"),
    ],
)
def test_preferences_teach_several_processes_what_they_teach_one(
    tmp_path: Path, tokenizer: Tokenizer, method: str, sharing: str
) -> None:
    chat_base(tmp_path, tokenizer)
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("one", "two", "paused"):
        (tmp_path / f"{name}.toml").write_text(
            f"""
            out = "{tmp_path / name}"
            model = "{tmp_path / "base"}"
            data = [{{ path = "{tmp_path / "pairs.jsonl"}" }}]
            held = [{{ name = "same", path = "{tmp_path / "pairs.jsonl"}" }}]
            batch = {{ seq_len = 160, tokens = 320, accumulate = 4 }}
            optim = {{ lr = 2e-3, steps = 4, warmup_steps = 1 }}
            parallel = {{ {sharing} }}
            [loop]
            device = "cpu"
            precision = "fp32"
            compile = "off"
            log_every = 1
            eval_every = 2
            save_every = 2
            report = []
            {"max_minutes = 0.0" if name == "paused" else ""}
            """,
            encoding="utf-8",
        )
    if method == "dpo":
        prefer(load_recipe(PreferenceConfig, tmp_path / "one.toml"))
    else:
        reward(load_recipe(RewardConfig, tmp_path / "one.toml"))
    for name in ("two", *["paused"] * 4):  # that stops after each step
        done = torchrun(tmp_path / f"{name}.toml", script=("-m", "kiloq", "train", method))
        assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = log(tmp_path / "two"), log(tmp_path / "one")
    assert found.keys() == wanted.keys()
    for (step, name), value in wanted.items():
        # A key's bias has no gradient but rounding, of which AdamW makes a whole step.
        assert found[step, name] == pytest.approx(value, abs=1e-4 if name == "grad_norm" else 1e-5)
    assert log(tmp_path / "paused") == log(tmp_path / "two")
    one, two, paused = (tmp_path / name / "model/model.safetensors" for name in ("one", "two", "paused"))
    assert paused.read_bytes() == two.read_bytes()
    found, wanted = load_file(two), load_file(one)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0.01, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "kind"),
    [
        ("adapter = { rank = 4, dropout = 0.0 }", "adamw"),
        ("adapter = { rank = 4, dropout = 0.0, dora = true }", "adamw"),
        ("adapter = { rank = 4, dropout = 0.0, quantization = 'int4' }", "adamw"),
        ("adapter = { rank = 4, dropout = 0.0, quantization = 'nf4' }", "adamw"),
        ("", "adamw8bit"),
    ],
)
def test_a_model_in_parts_learns_the_same_and_goes_on_exactly(
    tmp_path: Path, tokenizer: Tokenizer, table: str, kind: str
) -> None:
    chat_base(tmp_path, tokenizer)
    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(16)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, sharing in (("one", "auto"), ("two", "fsdp"), ("paused", "fsdp")):
        (tmp_path / f"{name}.toml").write_text(
            f"""
            out = "{tmp_path / name}"
            model = "{tmp_path / "base"}"
            data = [{{ path = "{tmp_path / "chat.jsonl"}" }}]
            {table}
            batch = {{ seq_len = 160, tokens = 160, accumulate = 4 }}
            optim = {{ lr = 2e-3, steps = 2, warmup_steps = 1, kind = "{kind}" }}
            parallel = {{ kind = "{sharing}" }}
            [loop]
            device = "cpu"
            precision = "fp32"
            compile = "off"
            log_every = 1
            report = []
            {"max_minutes = 0.0" if name == "paused" else ""}
            """,
            encoding="utf-8",
        )
    sft(load_recipe(SftConfig, tmp_path / "one.toml"))
    for name in ("two", "paused", "paused"):  # that stops after each step
        done = torchrun(tmp_path / f"{name}.toml", script=("-m", "kiloq", "train", "sft"))
        assert done.returncode == 0, done.stderr[-3000:]
    assert log(tmp_path / "two") == pytest.approx(log(tmp_path / "one"), abs=1e-5)
    assert log(tmp_path / "paused") == log(tmp_path / "two")
    saved = "adapter/adapter_model.safetensors" if "adapter" in table else "model/model.safetensors"
    one, two, paused = (tmp_path / name / saved for name in ("one", "two", "paused"))
    assert paused.read_bytes() == two.read_bytes()
    found, wanted = load_file(two), load_file(one)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0.01, atol=5e-4 if kind == "adamw8bit" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_processes_that_share_a_round_learn_what_one_learns_from_it(
    tmp_path: Path, tokenizer: Tokenizer, method: str
) -> None:
    chat_base(tmp_path, tokenizer)
    rows = [{"instruction": f"say {i}", "output": str(i)} for i in range(9)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("one", "two", "paused"):
        (tmp_path / f"{name}.toml").write_text(
            f"""
            out = "{tmp_path / name}"
            model = "{tmp_path / "base"}"
            data = [{{ path = "{tmp_path / "sums.jsonl"}" }}]
            held = [{{ name = "same", path = "{tmp_path / "sums.jsonl"}" }}]
            reward = [{{ check = "short", tokens = 8 }}, {{ check = "matches", pattern = ".*a.*" }}]
            rollout = {{ prompts = 5, answers = 4, max_tokens = 8, seq_len = 128, accumulate = 2, minibatches = 2 }}
            optim = {{ lr = 2e-3, steps = 4, warmup_steps = 0 }}
            {"value_warmup = 1" if method == "ppo" else ""}
            [loop]
            device = "cpu"
            precision = "fp32"
            log_every = 1
            eval_every = 2
            save_every = 2
            report = []
            {"max_minutes = 0.0" if name == "paused" else ""}
            """,
            encoding="utf-8",
        )
    recipe = tmp_path / "one.toml"
    if method == "grpo":
        grpo(load_recipe(GrpoConfig, recipe))
    else:
        ppo(load_recipe(PpoConfig, recipe))
    for name in ("two", *["paused"] * 4):
        done = torchrun(tmp_path / f"{name}.toml", script=("-m", "kiloq", "train", method))
        assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = log(tmp_path / "two"), log(tmp_path / "one")
    assert found.keys() == wanted.keys()
    for (step, name), value in wanted.items():
        assert found[step, name] == pytest.approx(value, abs=1e-4), (step, name)
    assert log(tmp_path / "paused") == log(tmp_path / "two")
    one, two, paused = (tmp_path / name / "model/model.safetensors" for name in ("one", "two", "paused"))
    assert paused.read_bytes() == two.read_bytes()
    found_weights = load_file(two)
    for key, tensor in load_file(one).items():
        torch.testing.assert_close(found_weights[key], tensor, rtol=0.01, atol=1e-5)


def test_rollouts_in_parts_of_a_model_are_refused(tmp_path: Path) -> None:
    for sharing in (ParallelConfig(kind="fsdp"), ParallelConfig(tensor=2)):
        with pytest.raises(ConfigError, match="rollouts take whole weights"):
            GrpoConfig(out="out", model="model", data=(), optim=OptimConfig(lr=1e-3, steps=1), parallel=sharing)

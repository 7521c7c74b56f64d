"""The recipes of fine-tuning and alignment are what the commands read, and the demonstration does what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kiloq.train.grpo import GrpoConfig
from kiloq.train.ppo import PpoConfig
from kiloq.train.preference import PreferenceConfig
from kiloq.train.recipe import load_recipe
from kiloq.train.reward import RewardConfig
from kiloq.train.sft import SftConfig

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
FLAGS = ['model="some"', 'data=[{path="chat.jsonl"}]']
METHODS = {"grpo": GrpoConfig, "ppo": PpoConfig, "dpo": PreferenceConfig, "reward": RewardConfig}


@pytest.mark.parametrize("path", sorted((RECIPES / "finetune").glob("*.toml")), ids=lambda path: path.stem)
def test_the_reference_scripts_are_recipes_with_its_settings(path: Path) -> None:
    config = load_recipe(SftConfig, path, FLAGS)
    assert (config.epochs, config.optim.weight_decay, config.optim.betas[1]) == (5.0, 0.1, 0.95)
    assert (config.optim.warmup_ratio, config.optim.floor, config.batch.seq_len) == (0.01, 0.0, 512)
    assert config.loop.recompute == "full"
    rows = config.batch.step_tokens // config.batch.seq_len
    if "lora" in path.stem:
        assert config.adapter is not None
        assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (64, 16, 0.05)
        assert (config.optim.lr, rows) == (3e-4, 32 if "multi" in path.stem else 16)
        assert (config.adapter.quantization is not None) == path.stem.startswith("qlora")
    else:
        assert config.adapter is None
        assert (config.optim.lr, rows) == (1e-5, 128 if "multi" in path.stem else 16)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_recipes_of_alignment_are_read(name: str) -> None:
    assert load_recipe(METHODS[name], RECIPES / "align" / f"{name}.toml").out.startswith("runs/align/")


@pytest.mark.slow
def test_the_demonstration_gives_the_bundled_model_a_new_identity(tmp_path: Path) -> None:
    shutil.copytree(RECIPES, tmp_path / "recipes")
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(tmp_path / "recipes" / "finetune" / "demo" / "run.sh")],
        env=os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(int, re.findall(r"(\d+) of 27 questions", done.stdout))
    assert before == 0
    assert after >= 20
    assert "Nabi" in done.stdout.splitlines()[-1]

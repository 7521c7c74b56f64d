"""What recipes/align tells of its runs is what their logs say."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from kiloq.errors import ConfigError

ALIGN = Path(__file__).parents[2] / "recipes" / "align"


@pytest.fixture
def ablate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablate", ALIGN / "ablate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_curve_counts_from_where_the_policy_moves_and_has_rewards_not_losses(
    ablate: ModuleType, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    records = [
        {"step": 0, "note": "begins"},
        {"step": 0, "eval/sums": -0.5, "eval/sums/reward": 0.5},
        {"step": 10, "eval/sums": -0.5, "eval/sums/reward": 0.5},
        {"step": 10, "eval/chat": math.log(3)},
        {"step": 12, "reward": 0.75, "kl": 0.25, "explained": 0.5, "entropy": 1.0, "lr": 1e-4},
        {"step": 14, "reward": 0.25, "kl": 0.5, "explained": 0.5, "entropy": 1.0},
        {"step": 20, "eval/sums/reward": 1.0, "eval/chat": math.log(4)},
        {"step": 30, "eval/sums/reward": 0.75, "eval/chat": math.log(5)},
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    curve = ablate.curve(log, 10)
    assert [(row["step"], row["held"]) for row in curve if "held" in row] == [(0, 0.5), (10, 1.0), (20, 0.75)]
    found = ablate.summary(curve)
    assert (found["held_first"], found["held"], found["held_mean"], found["fall"]) == (0.5, 0.75, 0.75, 0.25)
    assert (found["perplexity_first"], found["perplexity"], found["jitter"]) == (3.0, 5.0, 0.5)
    assert (found["kl"], found["reward_first"]) == (0.5, 0.75)


def test_every_variation_is_a_recipe_whose_policy_can_be_told_from_its_start(ablate: ModuleType) -> None:
    for name, changes in ablate.VARIATIONS.items():
        config = ablate.load_recipe(ablate.PpoConfig, ablate.RECIPE, changes)
        assert config.kl > 0, name  # at 0 no reference is kept, and no KL is logged


def test_a_folder_of_runs_is_not_taken_for_those_of_another_model(ablate: ModuleType, tmp_path: Path) -> None:
    first, second = ({"weights": ablate.weights(name), "steps": 40} for name in ("kiloq-mini", "kiloq-mini-chat"))
    assert first != second
    ablate.claim(tmp_path, first)
    ablate.claim(tmp_path, first)
    with pytest.raises(ConfigError, match="--out"):
        ablate.claim(tmp_path, second)

"""The bundled models' recipes are what the commands read today."""

from pathlib import Path

import pytest

from kiloq.train.preference import PreferenceConfig
from kiloq.train.pretrain import PretrainConfig
from kiloq.train.recipe import load_recipe
from kiloq.train.sft import SftConfig

MINI = Path(__file__).parents[2] / "recipes" / "mini"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pretrain", PretrainConfig), ("sft", SftConfig), ("dpo", PreferenceConfig)],
)
def test_the_recipes_are_read(name: str, kind: type) -> None:
    config = load_recipe(kind, MINI / f"{name}.toml")
    assert config.out.startswith("runs/mini/")
    assert all(source.path.startswith("runs/mini/") for source in config.data)

"""`kiloq train`: recipes to runs, and a look at the data first. Thin: the work is in kiloq.train."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

app = App(name="train", help="Pre-train, fine-tune, and look at training data.")

Overrides = Annotated[tuple[str, ...], Parameter(name="--set", negative=())]


@app.command
def pretrain(recipe: Path, /, *, overrides: Overrides = ()) -> None:
    """Train a base model from random weights; the same command goes on after a stop.

    Example: kiloq train pretrain recipes/mini/pretrain.toml --set loop.max_minutes=10

    Parameters
    ----------
    recipe
        A TOML file; the fields of kiloq.train.pretrain.PretrainConfig.
    overrides
        A setting of the recipe to change, a.b=value; may be repeated.
    """
    from kiloq.train.pretrain import PretrainConfig, pretrain
    from kiloq.train.recipe import load_recipe

    pretrain(load_recipe(PretrainConfig, recipe, overrides))

"""`kiloq train`: recipes to runs, and a look at the data first. Thin: the work is in kiloq.train."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from kiloq.cli.options import Model

app = App(name="train", help="Train a model from a recipe; look at training data.")

Overrides = Annotated[
    tuple[str, ...],
    Parameter(name="--set", negative=(), help="Change a setting of the recipe, a.b=value; may be repeated."),
]


@app.command(help_prologue="Example: `kiloq train pretrain recipes/mini/pretrain.toml --set loop.max_minutes=10`")
def pretrain(recipe: Path, /, *, overrides: Overrides = ()) -> None:
    """Train a base model from random weights. After a stop, the same command goes on where it was."""
    from kiloq.train.pretrain import PretrainConfig, pretrain
    from kiloq.train.recipe import load_recipe

    config = load_recipe(PretrainConfig, recipe, overrides)
    _say_outcome(pretrain(config), config.out)


@app.command(help_prologue="Example: `kiloq train sft recipes/mini/sft.toml --set optim.lr=2e-4`")
def sft(recipe: Path, /, *, overrides: Overrides = ()) -> None:
    """Fine-tune a model on conversations. After a stop, the same command goes on where it was."""
    from kiloq.train.recipe import load_recipe
    from kiloq.train.sft import SftConfig, sft

    config = load_recipe(SftConfig, recipe, overrides)
    _say_outcome(sft(config), config.out)


@app.command(help_prologue="Example: `kiloq train check chat.jsonl`")
def check(data: Path, /) -> int:
    """Read a file of conversations and name every bad row; exits with 1 if there are any."""
    from kiloq.train.conversations import read_conversations

    rows, faults = read_conversations(data)
    for fault in faults:
        print(fault)
    turns = sum(len(row.messages) for row in rows)
    print(f"{data}: {len(rows):,} good rows with {turns:,} turns, {len(faults):,} bad rows", file=sys.stderr)
    return 1 if faults else 0


@app.command(help_prologue="Example: `kiloq train show chat.jsonl --count 2`")
def show(
    data: Path,
    /,
    *,
    model: Model = None,
    count: Annotated[int, Parameter(help="How many conversations.")] = 1,
    mask: Annotated[str, Parameter(help="assistant, or qwen1 as the first Qwen's script trained.")] = "assistant",
) -> None:
    """Print conversations as the model will see them, token by token; what is trained is marked with *."""
    from kiloq.train.show import show_samples

    for line in show_samples(data, model, count=count, mask=mask, colour=sys.stdout.isatty()):
        print(line)


def _say_outcome(outcome: str, out: str) -> None:
    if outcome == "finished":
        print(f"{out}/model")

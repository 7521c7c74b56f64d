"""`kiloq train`: recipes to runs, and a look at the data first. Thin: the work is in kiloq.train."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from kiloq.cli.options import Model

app = App(name="train", help="Train a model from a recipe; look at training data.")
app.command(
    "kiloq.cli.train_plan:plan",
    name=["plan", "--plan"],  # it is looked for as either
    help="Predict the memory of a recipe before anything is loaded.",
    help_prologue="Example: `kiloq train plan recipes/finetune/lora.toml -m qwen-7b --device cuda --memory 80`",
)

Overrides = Annotated[
    tuple[str, ...],
    Parameter(name="--set", negative=(), help="Change a setting of the recipe, a.b=value; may be repeated."),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What of a recipe changes from run to run."""

    model: Annotated[str | None, Parameter(name=["--model", "-m"], help="Start from this folder or hub id.")] = None
    data: Annotated[
        list[Path] | None, Parameter(negative="", help="Learn from this file; may be repeated. Replaces the recipe's.")
    ] = None
    held: Annotated[
        list[Path] | None, Parameter(negative="", help="Only score this file now and then; may be repeated.")
    ] = None
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], help="The run's folder.")] = None
    overrides: Overrides = ()
    plan: Annotated[bool, Parameter(negative="", show=False)] = False

    def settings(self) -> list[str]:
        """As `a.b=value`, the later ones winning."""
        if self.plan:
            raise CycloptsError(
                msg="--plan is a command of its own, which trains nothing: kiloq train plan RECIPE, with the same "
                "--model and --set."
            )
        found = []
        if self.model is not None:
            found.append(f"model={json.dumps(self.model)}")
        if self.data is not None:
            found.append(f"data=[{', '.join(f'{{path={json.dumps(str(path))}}}' for path in self.data)}]")
        if self.held is not None:
            stems = [path.stem for path in self.held]
            names = (stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, self.held, strict=True))
            rows = (
                f"{{name={json.dumps(name)}, path={json.dumps(str(path))}}}"
                for name, path in zip(names, self.held, strict=True)
            )
            found.append(f"held=[{', '.join(rows)}]")
        if self.out is not None:
            found.append(f"out={json.dumps(str(self.out))}")
        return [*found, *self.overrides]


@app.command(help_prologue="Example: `kiloq train pretrain recipes/mini/pretrain.toml --set loop.max_minutes=10`")
def pretrain(recipe: Path, /, *, overrides: Overrides = ()) -> None:
    """Train a base model from random weights. After a stop, the same command goes on where it was."""
    from kiloq.train.pretrain import PretrainConfig, pretrain
    from kiloq.train.recipe import load_recipe

    config = load_recipe(PretrainConfig, recipe, overrides)
    _say_outcome(pretrain(config), Path(config.out) / "model")


@app.command(help_prologue="Example: `kiloq train sft recipes/finetune/lora.toml -m Qwen/Qwen3-0.6B --data chat.jsonl`")
def sft(
    recipe: Path,
    /,
    *,
    options: RunOptions = RunOptions(),  # frozen
    preflight: Annotated[
        bool, Parameter(negative="", help="First learn two samples by heart on a copy; the answer must end by itself.")
    ] = False,
) -> None:
    """Fine-tune a model on conversations. After a stop, the same command goes on where it was."""
    from kiloq.train.network import trained_folder
    from kiloq.train.recipe import load_recipe
    from kiloq.train.sft import SftConfig, sft

    config = load_recipe(SftConfig, recipe, options.settings())
    _say_outcome(sft(config, try_first=preflight), trained_folder(config))


@app.command(
    help_prologue="Example: `kiloq train finetune --model_name_or_path Qwen/Qwen-7B-Chat --data_path chat.json "
    "--output_dir runs/chat --use_lora --bf16 True --learning_rate 3e-4 --lr_scheduler_type cosine`"
)
def finetune(*flags: Annotated[str, Parameter(allow_leading_hyphen=True, help="As finetune.py took them.")]) -> None:
    """Fine-tune with the flags of the first Qwen's finetune.py; the run's folder then holds the same as a recipe."""
    from kiloq.compat.finetune import translate
    from kiloq.train.network import trained_folder
    from kiloq.train.sft import sft

    run = translate(flags, world=int(os.environ.get("WORLD_SIZE", "1")))
    for note in run.notes if _is_first() else ():
        print(note, file=sys.stderr)
    _say_outcome(sft(run.config), trained_folder(run.config))


@app.command(help_prologue="Example: `kiloq train ppo recipes/align/ppo.toml`")
def ppo(recipe: Path, /, *, options: RunOptions = RunOptions()) -> None:  # frozen
    """Learn from rewards for answers of one's own, with a value network. Goes on where it was stopped."""
    from kiloq.train.network import trained_folder
    from kiloq.train.ppo import PpoConfig, ppo
    from kiloq.train.recipe import load_recipe

    config = load_recipe(PpoConfig, recipe, options.settings())
    _say_outcome(ppo(config), trained_folder(config))


@app.command(help_prologue="Example: `kiloq train grpo recipes/align/grpo.toml`")
def grpo(recipe: Path, /, *, options: RunOptions = RunOptions()) -> None:  # frozen
    """Learn from comparing answers of one's own by rewards that can be checked. Goes on where it was stopped."""
    from kiloq.train.grpo import GrpoConfig, grpo
    from kiloq.train.network import trained_folder
    from kiloq.train.recipe import load_recipe

    config = load_recipe(GrpoConfig, recipe, options.settings())
    _say_outcome(grpo(config), trained_folder(config))


@app.command(help_prologue="Example: `kiloq train reward recipes/align/reward.toml -o runs/judge`")
def reward(recipe: Path, /, *, options: RunOptions = RunOptions()) -> None:  # frozen
    """Learn to score answers from pairs of which one is better. The same command goes on after a stop."""
    from kiloq.train.network import trained_folder
    from kiloq.train.recipe import load_recipe
    from kiloq.train.reward import RewardConfig, reward

    config = load_recipe(RewardConfig, recipe, options.settings())
    _say_outcome(reward(config), trained_folder(config))


@app.command(help_prologue="Example: `kiloq train dpo recipes/align/dpo.toml --set beta=0.3`")
def dpo(recipe: Path, /, *, options: RunOptions = RunOptions()) -> None:  # frozen
    """Learn from answers that people prefer (DPO, IPO or KTO). The same command goes on after a stop."""
    from kiloq.train.network import trained_folder
    from kiloq.train.preference import PreferenceConfig, prefer
    from kiloq.train.recipe import load_recipe

    config = load_recipe(PreferenceConfig, recipe, options.settings())
    _say_outcome(prefer(config), trained_folder(config))


@app.command(help_prologue="Example: `kiloq train check chat.jsonl -m Qwen/Qwen3-0.6B --seq-len 2048`")
def check(
    data: Path,
    /,
    *,
    model: Annotated[
        str | None, Parameter(name=["--model", "-m"], help="Count tokens as this folder or hub id sees them.")
    ] = None,
    seq_len: Annotated[int | None, Parameter(help="Longest sample; default: what the model allows.")] = None,
) -> int:
    """Name every bad row of a file of conversations, preferences or texts, and say what it holds.

    Exits with 1 if there are bad rows.
    """
    from kiloq.train.check import check_data

    report = check_data(data, model, seq_len=seq_len)
    for fault in report.faults:
        print(fault)
    for line in report.lines():
        print(line, file=sys.stderr)
    return 1 if report.faults else 0


@app.command(help_prologue="Example: `kiloq train show chat.jsonl --count 2`")
def show(
    data: Path,
    /,
    *,
    model: Model = None,
    count: Annotated[int, Parameter(help="How many rows.")] = 1,
    mask: Annotated[str, Parameter(help="assistant, or qwen1 as the first Qwen's script trained.")] = "assistant",
) -> None:
    """Print training data as the model will see it, token by token; what is trained is green, or marked with *."""
    from kiloq.train.show import show_samples

    for line in show_samples(data, model, count=count, mask=mask, colour=sys.stdout.isatty()):
        print(line)


def _say_outcome(outcome: str, folder: Path) -> None:
    if outcome == "finished" and _is_first():
        print(folder)


def _is_first() -> bool:
    """Of the processes that torchrun may have started, the one that talks."""
    return os.environ.get("RANK", "0") == "0"

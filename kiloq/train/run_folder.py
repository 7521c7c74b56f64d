"""A run's folder: the recipe that it belongs to, and the checkpoint that it ends with. Knows no step of training."""

import fcntl
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from kiloq.checkpoint import GenerationDefaults, save_checkpoint
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer

from .state import newest_state

# What a run that has begun may change: where it lies and how it goes about its steps, which nobody need be told ...
_SILENT = ("out", "loop.", "parallel.")
# ... and how far and fast it still moves, which its log tells.
_TOLD = ("epochs", "optim.steps", "optim.lr", "optim.floor")


def claim_folder(folder: Path, recipe: str) -> list[str]:
    """Put the whole recipe in the run's folder; what of a run that has begun is changed by it, for the log.

    ConfigError where the folder holds a run of which something else differs.
    """
    path = folder / "recipe.toml"
    changes: list[str] = []
    if path.exists() and newest_state(folder) is not None:
        before, now = (_flat(tomllib.loads(text)) for text in (path.read_text(encoding="utf-8"), recipe))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not key.startswith(_SILENT):
                changes.append(f"{key} was {before.get(key)}, is {now.get(key)}")
                if key not in _TOLD:
                    raise ConfigError(
                        f"{folder} holds a run with other settings: {changes[-1]}. "
                        "Use another out folder, or remove this one."
                    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out is {folder}, which cannot be a folder: {error.strerror}.") from error
    unfinished = path.with_suffix(".part")
    unfinished.write_text(recipe, encoding="utf-8")
    unfinished.replace(path)
    return changes


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Around the steps of a run: ConfigError where another process takes steps in the same folder."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is training in {folder}. Wait until it ends, or use another out folder."
            ) from error
        yield


def export(folder: Path, model: Transformer, tokenizer: Tokenizer, generation: GenerationDefaults) -> None:
    """Write the trained weights, in the dtype of the model's configuration, as a checkpoint of its family.

    Replaces what an earlier end of the same run left there.
    """
    if folder.exists():
        shutil.rmtree(folder)
    dtype = getattr(torch, model.config.dtype)
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    save_checkpoint(folder, model_state=state, config=model.config, tokenizer=tokenizer, generation=generation)


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings under dotted names."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            flat |= {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{prefix}{key}[{i}].").items()}
        else:
            flat[f"{prefix}{key}"] = value
    return flat

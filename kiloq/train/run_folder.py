"""A run's folder: the recipe that it belongs to, and the checkpoint that it ends with. Knows no step of training."""

import fcntl
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from safetensors import SafetensorError

from kiloq.checkpoint import GenerationDefaults, save_checkpoint
from kiloq.errors import CheckpointError, ConfigError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer

from .state import newest_state

P = ParamSpec("P")
T = TypeVar("T")

RESULTS = ("model", "adapter")
"""What a run may end with, in its folder."""


class RunRecipe(Protocol):
    """What any method's recipe says of its folder."""

    @property
    def out(self) -> str: ...


R = TypeVar("R", bound=RunRecipe)

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
    if not path.exists():
        _refuse_results(folder)
    elif newest_state(folder) is not None:
        before, now = _flat(_recipe_in(path)), _flat(tomllib.loads(recipe))
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
        unfinished = path.with_suffix(".part")
        unfinished.write_text(recipe, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise _unfit(folder, error) from error
    return changes


def alone(run: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """A whole run of a recipe, refused where another process is at one in the same folder: from the look at what the
    folder holds to the last file. Of several processes that share a run the first one asks."""

    @wraps(run)
    def guarded(recipe: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with only_run_in(Path(recipe.out)) if os.environ.get("RANK", "0") == "0" else nullcontext():
            return run(recipe, *args, **kwargs)

    return guarded


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """ConfigError where another process is in here with the same folder. A run that leaves nothing leaves no folder."""
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except (OSError, ValueError) as error:  # ValueError: a name with the character NUL
        raise _unfit(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is training in {folder}. Wait until it ends, or use another out folder."
            ) from error
        try:
            yield
        finally:
            if all(path == lock for path in folder.iterdir()):
                lock.unlink()
                folder.rmdir()


def _unfit(folder: Path, error: OSError | ValueError) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ConfigError(f"out is {folder}, where nothing can be written: {reason}. Use another out folder.")


def _refuse_results(folder: Path) -> None:
    """In a folder that no run has claimed, what has the name of a result is someone else's."""
    for name in RESULTS:
        if (folder / name).exists():
            raise ConfigError(
                f"{folder / name} is there already, but no recipe.toml of a run: this run's end would replace it. "
                "Use another out folder, or move it away."
            )


def _recipe_in(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}, the recipe of the run there, cannot be read: {error}. Mend it.") from error


def export(folder: Path, model: Transformer, tokenizer: Tokenizer, generation: GenerationDefaults) -> None:
    """Write the trained weights, in the dtype of the model's configuration, as a checkpoint of its family.

    Replaces what an earlier end of the same run left there.
    """
    dtype = getattr(torch, model.config.dtype)
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    with replacing(folder) as new:
        save_checkpoint(new, model_state=state, config=model.config, tokenizer=tokenizer, generation=generation)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A name beside the folder for what shall stand there; when that is whole, it takes the place of what an earlier
    end of the same run left. A kill leaves the one, the other or nothing under the folder's name, never a part."""
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for left in (new, old, *folder.parent.glob(f".{new.name}.*.unfinished")):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
    try:
        yield new
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. What was trained is in the run's state; make room, and the same "
            "command writes it."
        ) from error
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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

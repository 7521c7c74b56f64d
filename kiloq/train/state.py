"""A run's state on disk: all that the next step depends on, replaced in one move so that a kill never harms it.

Only what is trained is kept: a frozen base is in its own checkpoint.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kiloq.errors import CheckpointError


@dataclass
class Progress:
    """How far a run is; saved with its state. `recent` is what the watchdog compares a step with."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent: dict[str, list[float]] = field(default_factory=dict)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimiser moves, by name; a tied matrix once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_state(
    path: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, stream: dict[str, Any]
) -> None:
    """Write beside `path`, flush to the disk, then rename: a reader sees the old state or the new one, whole."""
    state = {
        "model": {name: parameter.detach() for name, parameter in trained_parameters(module).items()},
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
        "stream": stream,
        "rng": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_state(
    path: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Any]] | None:
    """Fill parameters, optimiser and random generators from `path`; progress and stream state. None: no state yet."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        _fill(trained_parameters(module), state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, KeyError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"the saved state {path} does not fit this run: {error}. Use another run folder, or remove the file."
        ) from error
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return Progress(**state["progress"]), state["stream"]


def _fill(parameters: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copy the saved values; ValueError where names or shapes differ."""
    if differing := sorted(parameters.keys() ^ saved.keys()):
        raise ValueError(f"{differing[0]} is only in one of the two")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != saved[name].shape:
                raise ValueError(f"{name} is {list(saved[name].shape)} there and {list(parameter.shape)} here")
            parameter.copy_(saved[name])

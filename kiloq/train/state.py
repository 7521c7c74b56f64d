"""A run's state on disk: all that the next step depends on, in a folder that appears whole, so that no kill harms it.

One format for one process and many: each writes its parts of the tensors (torch.distributed.checkpoint), and any number
of processes reads them back. Only what is trained is kept: a frozen base is in its own checkpoint.
"""

import io
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from kiloq.errors import CheckpointError

from .offload import Offloaded
from .parallel import Alone, Parallel
from .pieces import PieceReader, Pieces, PieceWriter, local_of
from .state_index import IndexReader

STATE_FOLDER = "state"

_PLAIN = "run.pt"  # what is no tensor; written last
_OLD_FILE = "state.pt"
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError)


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


def in_one_line(error: BaseException) -> str:
    """An error in short; of a save or load of many processes, the first that failed."""
    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    first = failures[0][0] if failures else error
    # torch's writer fails once more on a full disk, and says less.
    cause = first.__context__ if isinstance(first.__context__, OSError) else first
    return str(cause).split("\n", 1)[0].rstrip(".")


def newest_state(folder: Path) -> Path | None:
    """The folder of the last whole state below a run's folder."""
    return max((folder / STATE_FOLDER).glob("step-*"), default=None)


def save_state(
    folder: Path,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    stream: dict[str, Any],
    parallel: Parallel,
) -> None:
    """Write all files beside, flush them, then rename their folder: a reader finds the one before or this one."""
    target = folder / STATE_FOLDER / f"step-{progress.step:09d}"
    unfinished = target.with_name("unfinished")
    if parallel.any(target.exists()):
        return  # a run that is done, or stopped right after it saved
    if parallel.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir(parents=True)
    parallel.wait()
    parallel.settle(module)
    tensors, values = _parts(module, optimizer, parallel)
    with _quietly():
        planner = PieceWriter(flatten_state_dict=False, flatten_sharded_tensors=False)
        save(tensors, storage_writer=FileSystemWriter(unfinished), planner=planner, no_dist=isinstance(parallel, Alone))
    if parallel.is_first:
        plain = {"progress": vars(progress), "stream": stream, "optimizer": values}
        memory = io.BytesIO()  # a full disk is an OSError then, which torch would make a RuntimeError of
        torch.save(plain, memory)
        with (unfinished / _PLAIN).open("wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        _flush(unfinished)
        unfinished.rename(target)
        _flush(target.parent)
        for older in target.parent.glob("step-*"):
            if older != target:
                shutil.rmtree(older)
    parallel.wait()


def load_state(
    folder: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> tuple[Progress, dict[str, Any]] | None:
    """Fill parameters, optimiser and random generators from the last state below `folder`; progress and stream state.

    None: no state yet. Any number of processes may have written it.
    """
    path = newest_state(folder)
    if path is None:
        if (folder / _OLD_FILE).exists():
            raise CheckpointError(
                f"{folder / _OLD_FILE} was written by another version of kiloq. Finish the run with that version, use "
                "another run folder, or remove the file to begin again."
            )
        return None
    parallel.settle(module)
    if parallel.local_state() is None:
        _make_moments(optimizer)
    tensors, _ = _parts(module, optimizer, parallel)
    reader = IndexReader(path)
    try:
        saved = reader.read_metadata().state_dict_metadata
        for name in [name for name in tensors if name.startswith("random") and name not in saved]:
            del tensors[name]  # there were fewer processes, or no GPU
        _leave_unmoved(module, optimizer, tensors, saved)
        _compare(tensors, {name: one for name, one in saved.items() if not _of_another(name, parallel)})
        with _quietly():
            planner = PieceReader(flatten_state_dict=False, flatten_sharded_tensors=False)
            load(tensors, storage_reader=reader, planner=planner, no_dist=isinstance(parallel, Alone))
        progress, stream, values = _read_plain(path / _PLAIN)
        _set_values(module, optimizer, values)
    except (*_DAMAGE, CheckpointException) as error:
        raise CheckpointError(
            f"the saved state {path} does not fit this run: {in_one_line(error)}. Use another run folder, or remove "
            f"{path}."
        ) from error
    parallel.refill()
    if isinstance(optimizer, Offloaded):
        optimizer.refill()
    _set_random(tensors, parallel.rank)
    return progress, stream


def _parts(
    module: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Every tensor of the state as far as it is here, and the optimiser's plain values by parameter."""
    local = parallel.local_state()
    tensors: dict[str, Any] = dict(local or {})
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in (trained_parameters(module) if local is None else {}).items():
        layout = parallel.layout(name, parameter)
        tensors[f"model/{name}"] = Pieces(layout, local_of(parameter.detach()))
        for key, value in optimizer.state.get(parameter, {}).items():
            place = f"optimizer/{name}/{key}"
            if not isinstance(value, Tensor):
                values.setdefault(name, {})[key] = value
            elif value.shape == parameter.shape:
                tensors[place] = Pieces(layout, local_of(value))
            elif value.numel() == 1 or parallel.world == 1 or not isinstance(parameter, DTensor):
                tensors[place] = value
            else:  # codes of a part of the parameter, which no other number of processes can cut anew
                tensors[f"{place} {parallel.rank + 1} of {parallel.world}"] = local_of(value)
    tensors[f"random/{parallel.rank}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"random_cuda/{parallel.rank}"] = torch.cuda.get_rng_state()
    return tensors, values


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's state as its first step makes it, at a rate of zero: places to load into."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _leave_unmoved(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Any], saved: dict[str, Any]
) -> None:
    """What no step had touched when the state was saved has no moments yet: PPO's policy, while its values learn."""
    for name, parameter in trained_parameters(module).items():
        place = f"optimizer/{name}/"
        if not any(one.startswith(place) for one in saved):
            optimizer.state.get(parameter, {}).clear()  # not popped: an offloaded one shares it
            for one in [one for one in tensors if one.startswith(place)]:
                del tensors[one]


def _of_another(name: str, parallel: Parallel) -> bool:
    """Whether it is what another of equally many processes alone can use."""
    found = re.fullmatch(r"(?:zero|optimizer/).* (\d+) of (\d+)", name)
    return found is not None and int(found[2]) == parallel.world and int(found[1]) != parallel.rank + 1


def _compare(tensors: dict[str, Any], saved: dict[str, Any]) -> None:
    """ValueError where names or shapes differ."""
    if differing := sorted(name for name in tensors.keys() ^ saved.keys() if not name.startswith("random")):
        raise ValueError(f"{differing[0]} is only in one of the two")
    for name, tensor in tensors.items():
        there = saved[name]
        if not isinstance(there, TensorStorageMetadata) or there.size != tensor.size():
            raise ValueError(f"{name} is {list(getattr(there, 'size', ()))} there and {list(tensor.size())} here")


def _read_plain(path: Path) -> tuple[Progress, dict[str, Any], dict[str, dict[str, Any]]]:
    """What is no tensor; ValueError where a run would not have written it so."""
    try:
        plain = torch.load(path, map_location="cpu", weights_only=True)
        progress, stream, values = Progress(**plain["progress"]), plain["stream"], plain["optimizer"]
        is_ours = progress.step >= 0 and progress.tokens >= 0 and progress.seconds >= 0.0
    except Exception as error:  # a broken pickle raises whatever its codes stumble over
        raise ValueError(f"{path.name} cannot be read ({in_one_line(error)})") from error
    if not is_ours or not isinstance(stream, dict) or not isinstance(values, dict):
        raise ValueError(f"{path.name} does not hold the progress of a run")
    return progress, stream, values


def _set_values(module: nn.Module, optimizer: torch.optim.Optimizer, values: dict[str, dict[str, Any]]) -> None:
    parameters = trained_parameters(module)
    for name, plain in values.items():
        optimizer.state[parameters[name]].update(plain)


def _set_random(tensors: dict[str, Any], rank: int) -> None:
    if (state := tensors.get(f"random/{rank}")) is not None:
        torch.set_rng_state(state)
    if (state := tensors.get(f"random_cuda/{rank}")) is not None:
        torch.cuda.set_rng_state(state)


def _flush(folder: Path) -> None:
    """The folder's own entries to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _quietly() -> Iterator[None]:
    """One process is what we mean, not a mistake that wants a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process")
        yield

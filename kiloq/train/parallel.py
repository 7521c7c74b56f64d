"""How the processes of a run work together. One process alone is the simplest way of it; the others are in ranks.py."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kiloq.model import Transformer

from .forward import Runtime
from .optim import clip_gradients
from .pieces import Layout, whole
from .settings import ParallelConfig


class Parallel(Protocol):
    """What a run asks of the processes that train one model together."""

    @property
    def rank(self) -> int:
        """Which share of a step's micro-batches is read here, of `world` shares."""
        ...

    @property
    def world(self) -> int: ...

    @property
    def is_first(self) -> bool:
        """Whether this process writes: the log, the exported model."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the weights."""
        ...

    def spread(self, model: Transformer, runtime: Runtime) -> Transformer:
        """Put the model, or this process's part of it, where it is trained. Mutates it; before any optimiser."""
        ...

    def gather(self, model: Transformer) -> bool:
        """Undo `spread`: plain whole weights on the CPU in the first process, where it is True. Ends the training."""
        ...

    def gathering(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        """Around a micro-batch's forward and one backward: gradients meet on the last one of a step only."""
        ...

    def total(self, values: Sequence[float] | Tensor) -> list[float]:
        """Each value summed over all shares."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process: what stops one stops all."""
        ...

    def clip(self, module: nn.Module, limit: float) -> float:
        """Scale the joint gradient of all ranks to a norm of at most `limit`; the norm before."""
        ...

    def first_goes_ahead(self) -> AbstractContextManager[object]:
        """Around what makes files: the first process does it alone, the others find it done."""
        ...

    def wait(self) -> None:
        """Until all processes are here."""
        ...

    def settle(self, module: nn.Module) -> None:
        """Free what was gathered for a forward pass, so that parameters are what the optimiser moves."""
        ...

    def layout(self, name: str, parameter: Tensor) -> Layout:
        """Where in the whole parameter the part lies that is here."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    world: int = 1
    is_first: bool = True
    is_sharded: bool = False

    def spread(self, model: Transformer, runtime: Runtime) -> Transformer:
        return model

    def gather(self, model: Transformer) -> bool:
        return True

    def gathering(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def total(self, values: Sequence[float] | Tensor) -> list[float]:
        return torch.as_tensor(values, dtype=torch.float64).tolist()

    def any(self, flag: bool) -> bool:
        return flag

    def clip(self, module: nn.Module, limit: float) -> float:
        return clip_gradients(module.parameters(), limit)

    def first_goes_ahead(self) -> AbstractContextManager[object]:
        return nullcontext()

    def wait(self) -> None:
        pass

    def settle(self, module: nn.Module) -> None:
        pass

    def layout(self, name: str, parameter: Tensor) -> Layout:
        return whole(parameter)


def join(config: ParallelConfig, device: str) -> Parallel:
    """The processes that torchrun (or a launcher with its variables) started; without one, this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        return Alone()
    from .ranks import Ranks

    return Ranks(config, device)

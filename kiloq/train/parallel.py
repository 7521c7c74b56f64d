"""How the processes of a run work together. One process alone is the simplest way of it; the others are in ranks.py."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from kiloq.model import Transformer

from .forward import Runtime, share_tied_gradient
from .objective import B, Objective
from .optim import clip_gradients
from .pieces import Layout, whole
from .settings import ParallelConfig, TrainConfig

T = TypeVar("T")


class Parallel(Protocol):
    """What a run asks of the processes that train one model together."""

    @property
    def rank(self) -> int:
        """Which share of a step's micro-batches is read here, of `world` shares."""
        ...

    @property
    def world(self) -> int: ...

    @property
    def processes(self) -> int:
        """All that work for the run: more than `world` where several share one model."""
        ...

    @property
    def is_first(self) -> bool:
        """Whether this process writes: the log, the exported model."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the weights."""
        ...

    def noticing(self) -> AbstractContextManager[object]:
        """Around what all do together: where one of them is gone the others say so, LostProcessError."""
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

    def adopt(
        self, module: nn.Module, objective: Objective[B], optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> tuple[Objective[B], torch.optim.Optimizer]:
        """What the loop calls in place of the two; once, before any step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of this process's share of a step's loss."""
        ...

    def total(self, values: Sequence[float] | Tensor) -> list[float]:
        """Each value summed over all shares."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process: what stops one stops all."""
        ...

    def collect(self, own: T) -> list[T]:
        """What each of the `world` shares hands in, in their order; the same everywhere."""
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

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """All of a tensor of which each process has a part, as of the parameter of that name; all must ask."""
        ...

    def local_state(self) -> dict[str, Tensor] | None:
        """Weights and moments as they lie here, to be saved and filled in place; None where `layout` says it."""
        ...

    def refill(self) -> None:
        """After `local_state` was filled: the weights of the model are those."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    world: int = 1
    processes: int = 1
    is_first: bool = True
    is_sharded: bool = False

    def noticing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def spread(self, model: Transformer, runtime: Runtime) -> Transformer:
        return share_tied_gradient(model, runtime)

    def gather(self, model: Transformer) -> bool:
        return True

    def gathering(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def adopt(
        self, module: nn.Module, objective: Objective[B], optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> tuple[Objective[B], torch.optim.Optimizer]:
        return objective, optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def total(self, values: Sequence[float] | Tensor) -> list[float]:
        return torch.as_tensor(values, dtype=torch.float64).tolist()

    def any(self, flag: bool) -> bool:
        return flag

    def collect(self, own: T) -> list[T]:
        return [own]

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

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def local_state(self) -> dict[str, Tensor] | None:
        return None

    def refill(self) -> None:
        pass


def join(config: ParallelConfig, device: str) -> Parallel:
    """The processes that torchrun (or a launcher with its variables) started; without one, this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        return Alone()
    if config.kind == "deepspeed":
        from .zero import Zero

        return Zero(config, device)
    from .ranks import Ranks

    return Ranks(config, device)

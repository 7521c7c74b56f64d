"""How the processes of a run work together. One process alone is the simplest way of it."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .optim import clip_gradients


class Parallel(Protocol):
    """What the loop asks of the processes that train one model together."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gathering(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        """Around a micro-batch's forward and backward: gradients meet on the last one of a step only."""
        ...

    def total(self, values: Sequence[float] | Tensor) -> list[float]:
        """Each value summed over all ranks."""
        ...

    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        """Scale the joint gradient of all ranks to a norm of at most `limit`; the norm before."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    world: int = 1

    def gathering(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def total(self, values: Sequence[float] | Tensor) -> list[float]:
        return torch.as_tensor(values, dtype=torch.float64).tolist()

    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        return clip_gradients(parameters, limit)

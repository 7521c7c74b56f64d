"""An optimiser whose state, and fp32 copies of what it moves, are in the CPU's memory. Knows no method of moving."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn


class Offloaded(torch.optim.Optimizer):
    """The steps of the optimiser that `make` builds, taken on copies: gradients go there, moved parameters come back.

    The arithmetic is the same; a GPU holds 8 bytes a value less, and each step waits for two transfers.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        make: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self._here = list(parameters.values())
        self._copies = [nn.Parameter(one.detach().to("cpu", torch.float32, copy=True)) for one in self._here]
        self._inner = make(dict(zip(parameters, self._copies, strict=True)))
        super().__init__(self._inner.param_groups, {})
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters with a gradient."""
        loss = None if closure is None else closure()
        for here, copy in zip(self._here, self._copies, strict=True):
            copy.grad = None if here.grad is None else here.grad.to("cpu", torch.float32)
        self._inner.step()
        for here, copy in zip(self._here, self._copies, strict=True):
            here.copy_(copy)
            copy.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the parameters, not of the copies, which hold none between steps."""
        for here in self._here:
            here.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's: a run may go on with or without copies."""
        return self._inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, after the parameters have been filled."""
        self._inner.load_state_dict(state_dict)
        self.param_groups, self.state = self._inner.param_groups, self._inner.state
        for here, copy in zip(self._here, self._copies, strict=True):
            copy.copy_(here)

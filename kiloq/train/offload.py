"""An optimiser whose state, and fp32 copies of what it moves, are in the CPU's memory. Knows no method of moving."""

from collections.abc import Callable
from typing import overload

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
        # Groups and state are told of the parameters themselves, as any optimiser's: what saves a run reads them.
        here_of = dict(zip(self._copies, self._here, strict=True))
        groups = [{**group, "params": [here_of[p] for p in group["params"]]} for group in self._inner.param_groups]
        super().__init__(groups, {})
        for here, copy in zip(self._here, self._copies, strict=True):
            self.state[here] = self._inner.state[copy]  # one dictionary, filled by the inner optimiser's first step

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
        for ours, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
        self._inner.step()
        for here, copy in zip(self._here, self._copies, strict=True):
            here.copy_(copy)
            copy.grad = None
        return loss

    @torch.no_grad()
    def refill(self) -> None:
        """After the parameters were filled from elsewhere: the copies are those."""
        for here, copy in zip(self._here, self._copies, strict=True):
            copy.copy_(here)

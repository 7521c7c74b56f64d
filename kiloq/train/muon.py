"""Muon for the matrices of a network and AdamW for the rest of it, as one optimiser. Knows no recipe."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from .pieces import Layout, local_of, take

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that brings singular values near 1, by its author's search
_ROUNDS = 5
_SMALLEST = 1e-7


class Cutting(Protocol):
    """How parameters are cut over processes."""

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """All of a tensor that is laid out as the parameter of that name."""
        ...

    def layout(self, name: str, parameter: Tensor) -> Layout:
        """Which part of it is here."""
        ...


class MuonAdamW(torch.optim.Optimizer):
    """Steps of orthogonalised momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for 2-D weights.

    Each step of a matrix has the size that AdamW's would have (0.2 * sqrt(max(rows, columns)), equation 4 of "Muon is
    Scalable for LLM Training", arXiv 2502.16982), so that one learning rate serves both. Of a matrix in parts the
    momentum is gathered, each process orthogonalises it and moves its own part: the step of one process.
    """

    def __init__(
        self,
        matrices: Mapping[str, nn.Parameter],
        others: list[list[nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        cutting: Cutting | None = None,
    ) -> None:
        self._matrices, self._cutting = dict(matrices), cutting
        # Nothing but embeddings, norms and biases is left here; none of them decays.
        rest = [{"params": some} for some in others]
        self._adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        muon = {"params": list(matrices.values()), "lr": lr, "weight_decay": weight_decay}
        super().__init__([muon, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, parameter in self._matrices.items():
            if parameter.grad is not None:
                self._move(name, parameter, parameter.grad)
        self._adamw.step()
        return loss

    def _move(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        rate, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - _MOMENTUM)
        direction = gradient.lerp(average, _MOMENTUM)  # Nesterov's
        here = local_of(parameter)
        if self._cutting is None:
            step, longest = orthogonalized(direction), max(parameter.shape)
        else:
            whole = orthogonalized(self._cutting.whole(name, direction))
            step, longest = take(self._cutting.layout(name, parameter), whole, here), max(whole.shape)
        here.mul_(1 - rate * decay)
        here.add_(step, alpha=-rate * 0.2 * math.sqrt(longest))


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, roughly, in bf16: rounds of X <- a X + (b A + c A^2) X with A = X X^T."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=_SMALLEST)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x

"""Muon for the matrices of a network and AdamW for the rest of it, as one optimiser. Knows no recipe."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Steps of orthogonalised momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for 2-D weights.

    Each step of a matrix has the size that AdamW's would have (0.2 * sqrt(max(rows, columns)), equation 4 of "Muon is
    Scalable for LLM Training", arXiv 2502.16982), so that one learning rate serves both. torch's two optimisers do the
    work on this one's groups and state.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._inner: list[torch.optim.Optimizer] = []  # none for an empty list, which torch's refuse
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._inner.append(muon)
        if others:
            # Nothing but embeddings, norms and biases is left here; none of them decays.
            self._inner.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True))
        super().__init__([group for inner in self._inner for group in inner.param_groups], {})
        self._share()

    def _share(self) -> None:
        for inner, group in zip(self._inner, self.param_groups, strict=True):
            inner.param_groups, inner.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self._inner:
            inner.step()
        return loss

"""One gradient for a matrix that is embedding and head at once.

By itself each use makes a whole matrix of its own, and the two are added up: with 151,936 entries of 768 a second
467 MB, zeroed and added in every micro-batch for the few rows that were looked up.
"""

from typing import Any

import torch
from torch import Tensor


class TiedGradient:
    """What the losses of a model have made of the gradient, until a lookup's backward pass takes it along.

    A loss depends on the lookup before it, so that lookup's backward pass comes later; whichever takes it, autograd
    adds up what all of them return.
    """

    def __init__(self) -> None:
        self.made: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Keep `gradient`; it belongs to this object now."""
        self.made = gradient if self.made is None else self.made.add_(gradient)

    def take(self, weight: Tensor) -> Tensor:
        """All that was added since, or zeros."""
        made, self.made = self.made, None
        return torch.zeros_like(weight) if made is None else made


def lookup(ids: Tensor, weight: Tensor, tied: TiedGradient) -> Tensor:
    """Rows `ids` [T] of `weight`, [T, columns]; the gradient of `weight` is that of the rows and what `tied` holds."""
    found: Tensor = _Lookup.apply(ids, weight, tied)  # type: ignore[no-untyped-call]  # torch's, untyped
    return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.tied = tied
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor, None]:
        ids, weight = ctx.saved_tensors
        return None, ctx.tied.take(weight).index_add_(0, ids, upstream[0]), None

"""Losses: hidden states and targets in, one number and its gradients out. The full logits are never held."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kiloq.model.tied import TiedGradient

IGNORE = -100
"""The target of a token that is not trained."""


_UNIT = 64  # rows


class HeadMatrix(NamedTuple):
    """A head [V, h], of which the rows of `token_ids` [n] are those of `values` [n, h] instead. Where there is `tied`,
    the gradient of `weight` goes there."""

    weight: Tensor
    token_ids: Tensor | None = None
    values: Tensor | None = None
    tied: TiedGradient | None = None

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop-1 in the type that products run in."""
        rows = self.weight[start:stop].to(dtype)
        if self.token_ids is None or self.values is None:
            return rows
        here = (self.token_ids >= start) & (self.token_ids < stop)
        return rows.index_copy(0, self.token_ids[here] - start, self.values[here].to(dtype))


def chunked_cross_entropy(
    hidden: Tensor, head: Tensor | HeadMatrix, targets: Tensor, *, columns: int | None = None
) -> Tensor:
    """Cross entropy summed over trained tokens, a scalar in fp32; shapes and costs as of `token_log_probs`."""
    return -token_log_probs(hidden, head, targets, columns=columns).sum()


def token_log_probs(
    hidden: Tensor, head: Tensor | HeadMatrix, targets: Tensor, *, columns: int | None = None
) -> Tensor:
    """log p(target) of every token under softmax(hidden @ head.T); 0 where the target is IGNORE, which costs nothing.

    hidden: [T, h], head: [V, h], targets: [T] -> [T] fp32. `columns` of the vocabulary at a time (None: what suits
    tokens and device) for all tokens at once: each row of the head is read twice and its gradient written once,
    however many tokens there are. Products run in hidden's dtype, the softmax in fp32. Two numbers a token are kept
    for the backward pass (the running softmax of arXiv 1805.02867), which computes the logits again. What is frozen
    costs no gradient.
    """
    at = (targets >= 0).nonzero().squeeze(1)
    # The first token fills the number up, and its copies are dropped: CPU kernels in bf16 are made for each number of
    # rows and kept, so that ever new ones let a process grow by a gigabyte.
    filled = torch.cat([at, at[:1].expand(-len(at) % _UNIT)])
    columns = columns or columns_at_once(len(filled), hidden.device.type)
    found = trained_log_probs(hidden[filled], head, targets[filled], columns=columns)[: len(at)]
    return torch.zeros(len(targets), device=hidden.device).index_copy(0, at, found)


def trained_log_probs(hidden: Tensor, head: Tensor | HeadMatrix, targets: Tensor, *, columns: int) -> Tensor:
    """`token_log_probs` where every token has a target."""
    matrix = head if isinstance(head, HeadMatrix) else HeadMatrix(head)
    told = (hidden, targets, columns, matrix.tied)
    found: Tensor = _TokenLogProbs.apply(*told, *matrix[:3])  # type: ignore[no-untyped-call]  # torch's, untyped
    return found


def columns_at_once(tokens: int, device: str) -> int:
    """Columns whose logits take about 8 MB in fp32, or 256 MB on a GPU, where launches cost more."""
    values = 2**21 if device == "cpu" else 2**26
    return max(256, values // max(1, tokens) // 64 * 64)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, columns: int, tied: TiedGradient | None, *tensors: Tensor
    ) -> Tensor:
        weight, token_ids, values = tensors
        head = HeadMatrix(weight, token_ids, values)
        highest = torch.full((len(targets), 1), -torch.inf, device=hidden.device)
        totals, picked = torch.zeros_like(highest), torch.zeros_like(highest)
        for start in range(0, len(head.weight), columns):
            rows = head.rows(start, start + columns, hidden.dtype)
            logits = (hidden @ rows.t()).float()  # [T, columns]
            place, here = _places(targets, start, len(rows))
            picked += logits.gather(1, place) * here
            higher = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
            totals.mul_((highest - higher).exp_()).add_(logits.sub_(higher).exp_().sum(dim=1, keepdim=True))
            highest = higher
        ctx.save_for_backward(hidden, targets, highest, totals, *tensors)
        ctx.columns, ctx.tied = columns, tied
        return (picked - highest - totals.log()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # d log p(t) / d logits = onehot(t) - softmax(logits)
        hidden, targets, highest, totals, *tensors = ctx.saved_tensors
        head, slope = HeadMatrix(*tensors), upstream[0][:, None]
        softmax_slope = -slope / totals
        wants_hidden, *_, wants_weight, _, wants_values = ctx.needs_input_grad
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32)
        weight_grad = torch.empty_like(head.weight) if wants_weight else None
        values_grad = torch.zeros_like(head.values) if wants_values and head.values is not None else None
        for start in range(0, len(head.weight), ctx.columns):
            rows = head.rows(start, start + ctx.columns, hidden.dtype)
            place, here = _places(targets, start, len(rows))
            part = (hidden @ rows.t()).float().sub_(highest).exp_().mul_(softmax_slope)
            gradient = part.scatter_add_(1, place, slope * here).to(hidden.dtype)  # [T, columns]
            if wants_hidden:
                hidden_grad += gradient @ rows
            if weight_grad is not None:
                weight_grad[start : start + len(rows)] = gradient.t() @ hidden
            if values_grad is not None and head.token_ids is not None:
                place, here = _places(head.token_ids, start, len(rows))
                trained = gradient.index_select(1, place.squeeze(1))  # [T, n], of which some stand elsewhere
                values_grad += (trained.t() @ hidden) * here
        if weight_grad is not None and head.token_ids is not None:
            weight_grad[head.token_ids] = 0
        if weight_grad is not None and ctx.tied is not None:
            ctx.tied.add(weight_grad)
            weight_grad = None
        return hidden_grad.to(hidden.dtype), None, None, None, weight_grad, None, values_grad


def _places(targets: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where among the columns from `start` on each token's target stands, [T, 1], and whether it is one of them."""
    place = (targets - start)[:, None]
    here = (place >= 0) & (place < columns)
    return place.clamp(0, columns - 1), here

"""Losses: hidden states and targets in, one number and its gradients out. The full logits are never held."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""The target of a token that is not trained."""

ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [n, V], targets [n]) -> (summed loss, gradient of it by the logits [n, V])."""


class HeadMatrix(NamedTuple):
    """A head [V, h], of which the rows of `token_ids` [n] are those of `values` [n, h] instead."""

    weight: Tensor
    token_ids: Tensor | None = None
    values: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "HeadMatrix":
        """In the type that products run in."""
        return HeadMatrix(self.weight.to(dtype), self.token_ids, None if self.values is None else self.values.to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, h] -> [n, V]"""
        logits = hidden @ self.weight.t()
        if self.token_ids is not None and self.values is not None:
            logits[:, self.token_ids] = hidden @ self.values.t()
        return logits

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of the hidden states by that of the logits, in which the replaced columns become zero."""
        if self.token_ids is None or self.values is None:
            return gradient @ self.weight
        own = gradient[:, self.token_ids]
        gradient[:, self.token_ids] = 0
        return gradient @ self.weight + own @ self.values


def chunked_cross_entropy(
    hidden: Tensor,
    head: Tensor | HeadMatrix,
    targets: Tensor,
    *,
    rows: int | None = None,
    chunk_loss: ChunkLoss | None = None,
) -> Tensor:
    """Cross entropy summed over trained tokens, `rows` tokens at a time (None: what suits vocabulary and device).

    hidden: [T, h], head: [V, h], targets: [T] with IGNORE -> scalar fp32. The products run in hidden's dtype, the
    softmax in fp32. Gradients are computed in the forward pass, so a chunk's logits live only once; a frozen head gets
    none.
    """
    matrix = head if isinstance(head, HeadMatrix) else HeadMatrix(head)
    chunk_loss = chunk_loss or softmax_loss
    rows = rows or chunk_rows(len(matrix.weight), hidden.device)
    if not torch.is_grad_enabled():
        matrix = matrix.to(hidden.dtype)
        starts = range(0, len(targets), rows)
        return sum(
            (chunk_loss(matrix.logits(hidden[i : i + rows]), targets[i : i + rows])[0] for i in starts),
            start=torch.zeros((), device=hidden.device),
        )
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, targets, rows, chunk_loss, *matrix)  # type: ignore[no-untyped-call]
    return loss


def token_log_probs(hidden: Tensor, head: Tensor | HeadMatrix, targets: Tensor, *, rows: int | None = None) -> Tensor:
    """log p(target) of every token under softmax(hidden @ head.T), `rows` tokens at a time; 0 where it is IGNORE.

    hidden: [T, h], head: [V, h], targets: [T] with IGNORE -> [T] fp32. The products run in hidden's
    dtype, the softmax in fp32. The gradients need each token's weight in the loss, which is not known yet, so the
    backward pass computes a chunk's logits once more; of the forward pass it keeps one number for each token.
    """
    at = (targets >= 0).nonzero().squeeze(1)  # a prompt costs nothing
    matrix = head if isinstance(head, HeadMatrix) else HeadMatrix(head)
    rows = rows or chunk_rows(len(matrix.weight), hidden.device)
    found: Tensor = _TokenLogProbs.apply(hidden[at], targets[at], rows, *matrix)  # type: ignore[no-untyped-call]
    return torch.zeros(len(targets), device=hidden.device).index_copy(0, at, found)


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Tokens of a chunk, a power of two: logits of about 8 MB in fp32, or 256 MB on a GPU, where launches cost more."""
    values = 2**21 if device.type == "cpu" else 2**26
    return 1 << int(math.log2(max(32, values / vocab_size)))


def softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and its gradient, softmax(logits) - onehot(target); zero where the target is IGNORE."""
    scores = logits.float()
    trained = targets >= 0
    scores = scores - scores.amax(dim=-1, keepdim=True)
    exps = scores.exp()
    total = exps.sum(dim=-1, keepdim=True)
    place = targets.clamp(min=0)[:, None]
    losses = total.log().squeeze(1) - scores.gather(1, place).squeeze(1)
    here = torch.arange(logits.shape[-1], device=logits.device) == place
    gradient = (exps / total - here.float()) * trained[:, None]
    return torch.where(trained, losses, 0.0).sum(), gradient.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, rows: int, chunk_loss: ChunkLoss, *tensors: Tensor
    ) -> Tensor:
        matrix = HeadMatrix(*tensors)
        grads = _HeadGrads(matrix, *ctx.needs_input_grad[4:])
        matrix = matrix.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        loss = torch.zeros((), device=hidden.device)
        for start in range(0, len(targets), rows):
            part = hidden[start : start + rows]
            summed, gradient = chunk_loss(matrix.logits(part), targets[start : start + rows])
            loss += summed
            grads.add(gradient, part)
            hidden_grad[start : start + rows] = matrix.back(gradient)
        ctx.save_for_backward(hidden_grad, *grads.done())
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, values_grad = (
            None if one is None else one * upstream[0].to(one.dtype) for one in ctx.saved_tensors
        )
        return hidden_grad, None, None, None, weight_grad, None, values_grad


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, rows: int, *tensors: Tensor) -> Tensor:
        matrix = HeadMatrix(*tensors).to(hidden.dtype)
        picked, totals = (torch.empty(len(targets), device=hidden.device) for _ in range(2))
        for start in range(0, len(targets), rows):
            here = slice(start, start + rows)
            logits = matrix.logits(hidden[here]).float()
            totals[here] = torch.logsumexp(logits, dim=-1)
            picked[here] = logits.gather(1, targets[here, None]).squeeze(1)
        ctx.save_for_backward(hidden, targets, totals, *tensors)
        ctx.rows = rows
        return picked - totals

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # d log p(t) / d logits = onehot(t) - softmax(logits)
        hidden, targets, totals, *tensors = ctx.saved_tensors
        matrix = HeadMatrix(*tensors)
        grads = _HeadGrads(matrix, *ctx.needs_input_grad[3:])
        matrix = matrix.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        for start in range(0, len(targets), ctx.rows):
            here = slice(start, start + ctx.rows)
            gradient = (matrix.logits(hidden[here]).float() - totals[here, None]).exp_().neg_()
            gradient.scatter_add_(1, targets[here, None], torch.ones_like(totals[here, None]))
            scaled = gradient.mul_(upstream[0][here, None]).to(hidden.dtype)
            grads.add(scaled, hidden[here])
            hidden_grad[here] = matrix.back(scaled)
        weight_grad, values_grad = grads.done()
        return hidden_grad, None, None, weight_grad, None, values_grad


class _HeadGrads:
    """The gradients of a head and of its replaced rows, summed over chunks in fp32, as far as they are wanted."""

    def __init__(self, head: HeadMatrix, weight: bool, _ids: bool, values: bool) -> None:
        self.head = head
        self.weight = torch.zeros_like(head.weight, dtype=torch.float32) if weight else None
        self.values = torch.zeros_like(head.values, dtype=torch.float32) if values and head.values is not None else None

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Of some tokens' logits [n, V] and hidden states [n, h]."""
        if self.weight is not None:
            self.weight += gradient.t() @ hidden
        if self.values is not None and self.head.token_ids is not None:
            self.values += gradient[:, self.head.token_ids].t() @ hidden

    def done(self) -> tuple[Tensor | None, Tensor | None]:
        """In the types of what they belong to. The replaced rows of the head itself get none."""
        weight = None if self.weight is None else self.weight.to(self.head.weight.dtype)
        if weight is not None and self.head.token_ids is not None:
            weight[self.head.token_ids] = 0
        if self.values is None or self.head.values is None:
            return weight, None
        return weight, self.values.to(self.head.values.dtype)

"""Losses: hidden states and targets in, one number and its gradients out. The full logits are never held."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""The target of a token that is not trained."""

ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [n, V], targets [n]) -> (summed loss, gradient of it by the logits [n, V])."""


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: int | None = None, chunk_loss: ChunkLoss | None = None
) -> Tensor:
    """Cross entropy summed over trained tokens, `rows` tokens at a time (None: what suits vocabulary and device).

    hidden: [T, h], weight: [V, h] (the head), targets: [T] with IGNORE -> scalar fp32. The products run in hidden's
    dtype, the softmax in fp32. Gradients are computed in the forward pass, so a chunk's logits live only once.
    """
    chunk_loss = chunk_loss or softmax_loss
    rows = rows or chunk_rows(len(weight), hidden.device)
    if not torch.is_grad_enabled():
        head = weight.to(hidden.dtype)
        starts = range(0, len(targets), rows)
        return sum(
            (chunk_loss(hidden[i : i + rows] @ head.t(), targets[i : i + rows])[0] for i in starts),
            start=torch.zeros((), device=hidden.device),
        )
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, rows, chunk_loss)  # type: ignore[no-untyped-call]
    return loss


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: int | None = None) -> Tensor:
    """log p(target) of every token under softmax(hidden @ weight.T), `rows` tokens at a time; 0 where it is IGNORE.

    hidden: [T, h], weight: [V, h] (the head), targets: [T] with IGNORE -> [T] fp32. The products run in hidden's
    dtype, the softmax in fp32. The gradients need each token's weight in the loss, which is not known yet, so the
    backward pass computes a chunk's logits once more; of the forward pass it keeps one number for each token.
    """
    at = (targets >= 0).nonzero().squeeze(1)  # a prompt costs nothing
    rows = rows or chunk_rows(len(weight), hidden.device)
    found: Tensor = _TokenLogProbs.apply(hidden[at], weight, targets[at], rows)  # type: ignore[no-untyped-call]
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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, chunk_loss: ChunkLoss) -> Tensor:
        head = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        loss = torch.zeros((), device=hidden.device)
        for start in range(0, len(targets), rows):
            part = hidden[start : start + rows]
            summed, gradient = chunk_loss(part @ head.t(), targets[start : start + rows])
            loss += summed
            hidden_grad[start : start + rows] = gradient @ head
            weight_grad += gradient.t() @ part
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * upstream[0].to(hidden_grad.dtype), weight_grad * upstream[0], None, None, None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        head = weight.to(hidden.dtype)
        picked, totals = (torch.empty(len(targets), device=hidden.device) for _ in range(2))
        for start in range(0, len(targets), rows):
            here = slice(start, start + rows)
            logits = (hidden[here] @ head.t()).float()
            totals[here] = torch.logsumexp(logits, dim=-1)
            picked[here] = logits.gather(1, targets[here, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, totals)
        ctx.rows = rows
        return picked - totals

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # d log p(t) / d logits = onehot(t) - softmax(logits)
        hidden, weight, targets, totals = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), ctx.rows):
            here = slice(start, start + ctx.rows)
            gradient = ((hidden[here] @ head.t()).float() - totals[here, None]).exp_().neg_()
            gradient.scatter_add_(1, targets[here, None], torch.ones_like(totals[here, None]))
            scaled = gradient.mul_(upstream[0][here, None]).to(hidden.dtype)
            hidden_grad[here] = scaled @ head
            if weight_grad is not None:
                weight_grad += scaled.t() @ hidden[here]
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None

"""Perplexity: how well a model foretells a text. The products run wherever the model's own do: packed weights on the
kernels that answer questions, plain ones in PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kiloq.errors import RequestError
from kiloq.model import PackedAttend, Transformer, ntk_alpha

_TOKENS = 2048  # computed at once
_LOGITS = 2**24  # of the logits that exist at once


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` foretold tokens."""

    value: float
    tokens: int


def perplexity(model: Transformer, ids: Sequence[int], *, window: int = 512) -> Perplexity:
    """The text is cut into windows that know nothing of each other, as GPTQ's paper does; a last shorter one counts.

    Equal windows make figures comparable: a longer window gives a lower one.
    """
    if window < 2:
        raise RequestError(f"window is {window}; it must be at least 2, for a token and the one before it.")
    rows = [ids[start : start + window] for start in range(0, len(ids), window)]
    return perplexity_of_rows(model, rows)


@torch.no_grad()
def perplexity_of_rows(model: Transformer, rows: Sequence[Sequence[int]]) -> Perplexity:
    """The same over rows of their own, each foretold from its first token on."""
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise RequestError("there are no two tokens in the text, so nothing to foretell.")
    total, tokens = 0.0, 0
    batch: list[Sequence[int]] = []
    for row in [*rows, None]:
        if batch and (row is None or len(batch[0]) != len(row) or (len(batch) + 1) * len(row) > _TOKENS):
            total += _negative_log_likelihood(model, batch)
            tokens += sum(len(one) - 1 for one in batch)
            batch = []
        if row is not None:
            batch.append(row)
    return Perplexity(math.exp(total / tokens), tokens)


def _negative_log_likelihood(model: Transformer, rows: Sequence[Sequence[int]]) -> float:
    """Summed over all but the first token of each of the rows, which have one length."""
    device = model.norm.weight.device
    ids = torch.tensor(rows, device=device)  # [B, n]
    count, length = ids.shape
    rotation = model.rotation(
        torch.arange(length, device=device).repeat(count),
        torch.full((count * length,), ntk_alpha(model.config, length), device=device),
    )
    attend = PackedAttend(range(0, count * length + 1, length), model.config.windows)
    hidden = model(ids.flatten(), rotation, attend).view(count, length, -1)[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    at_once = max(1, _LOGITS // model.config.vocab_size)
    losses = [
        F.cross_entropy(model.head(some).float(), wanted, reduction="sum").item()
        for some, wanted in zip(torch.split(hidden, at_once), torch.split(targets, at_once), strict=True)
    ]
    return sum(losses)

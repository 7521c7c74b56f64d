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
class Row:
    """Tokens that see each other; those that are not `scored` are only read, and so is the first in any case."""

    ids: Sequence[int]
    scored: Sequence[bool]

    @property
    def count(self) -> int:
        """How many tokens are foretold."""
        return sum(self.scored[1:])


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` foretold tokens; of each row, the sum and the number."""

    value: float
    tokens: int
    rows: tuple[tuple[float, int], ...]

    def change(self, after: "Perplexity") -> tuple[float, float]:
        """What another model makes of the same rows: per cent more, and its standard error over the rows.

        Tokens of a row have much in common, so that rows are what is drawn by chance; of fewer than two it is nan.
        """
        assert [count for _, count in self.rows] == [count for _, count in after.rows]
        mean = math.log(after.value / self.value)
        pairs = zip(self.rows, after.rows, strict=True)
        squares = sum((later - earlier - count * mean) ** 2 for (earlier, count), (later, _) in pairs)
        number = len(self.rows)
        error = math.sqrt(squares * number / (number - 1)) / self.tokens if number > 1 else math.nan
        return 100 * math.expm1(mean), 100 * error


def perplexity(model: Transformer, ids: Sequence[int], *, window: int = 512) -> Perplexity:
    """The text is cut into windows that know nothing of each other, as GPTQ's paper does; a last shorter one counts.

    Equal windows make figures comparable: a longer window gives a lower one.
    """
    if window < 2:
        raise RequestError(f"window is {window}; it must be at least 2, for a token and the one before it.")
    cut = [ids[start : start + window] for start in range(0, len(ids), window)]
    return perplexity_of_rows(model, [Row(row, [True] * len(row)) for row in cut])


@torch.no_grad()
def perplexity_of_rows(model: Transformer, rows: Sequence[Row]) -> Perplexity:
    """The same over the scored tokens of rows of their own."""
    rows = [row for row in rows if row.count]
    if not rows:
        raise RequestError("there are no two tokens in the text, so nothing to foretell.")
    sums: list[float] = []
    batch: list[Row] = []
    for row in [*rows, None]:
        length = len(row.ids) if row is not None else 0
        if batch and (len(batch[0].ids) != length or (len(batch) + 1) * length > _TOKENS):
            sums += _negative_log_likelihoods(model, batch)
            batch = []
        if row is not None:
            batch.append(row)
    tokens = sum(row.count for row in rows)
    listed = tuple((total, row.count) for total, row in zip(sums, rows, strict=True))
    return Perplexity(math.exp(sum(sums) / tokens), tokens, listed)


def _negative_log_likelihoods(model: Transformer, rows: Sequence[Row]) -> list[float]:
    """Summed over the scored tokens of each of the rows, which have one length."""
    device = model.norm.weight.device
    ids = torch.tensor([list(row.ids) for row in rows], device=device)  # [B, n]
    scored = torch.tensor([list(row.scored[1:]) for row in rows], device=device)  # [B, n - 1]
    count, length = ids.shape
    rotation = model.rotation(
        torch.arange(length, device=device).repeat(count),
        torch.full((count * length,), ntk_alpha(model.config, length), device=device),
    )
    attend = PackedAttend(range(0, count * length + 1, length), model.config.windows)
    hidden = model(ids.flatten(), rotation, attend).view(count, length, -1)[:, :-1][scored]  # [T, D]
    targets = ids[:, 1:][scored]
    at_once = max(1, _LOGITS // model.config.vocab_size)
    losses = [
        F.cross_entropy(model.head(some).float(), wanted, reduction="none")
        for some, wanted in zip(torch.split(hidden, at_once), torch.split(targets, at_once), strict=True)
    ]
    of_row = torch.split(torch.cat(losses).double(), scored.sum(1).tolist())
    return [one.sum().item() for one in of_row]

"""Sampling: logits in, token ids out, in fp32. Knows nothing of text, requests or models.

The order is that of transformers: repetition penalty (over prompt and output, divides or multiplies), presence and
frequency penalties (over output, subtracted, as the OpenAI API defines them), logit_bias; what a constraint does not
allow goes; then temperature, top_k, top_p over what top_k left, min_p. Log probabilities describe the model itself:
log-softmax of the raw logits. Each row draws by numbers of its own, so it draws the same token in any batch.
"""

import random
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from kiloq.errors import NumericsError, RequestError
from kiloq.ops.draw import Wish, draw, largest

from .constrain import Matcher
from .device_draw import draw_on_device
from .params import SamplingParams
from .shifts import Shifts


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token, with the model's log probability of it and of the most likely tokens if they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class BadLogitsError(NumericsError):
    """Rows whose logits hold NaN, +inf or nothing finite; raised before any row's state moves."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        super().__init__(
            f"The model gave no finite logits for row {', '.join(map(str, rows))} of the batch. "
            "Check the weights, or use bfloat16 or float32 in place of float16."
        )


class RowSampler:
    """The sampling state of one sequence: its seen tokens, its own random numbers, its place in a grammar."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        seed: int,
        matcher: Matcher | None = None,
    ) -> None:
        for token_id in params.logit_bias:
            if token_id >= vocab_size:
                raise RequestError(f"logit_bias names token {token_id:,}; the model has {vocab_size:,} tokens.")
        self.params = params
        self.shifts = Shifts(params, prompt_ids)
        self.matcher = matcher
        self._random = random.Random(seed)
        self._ahead: deque[float] = deque()  # numbers that a preview has seen and no token has used

    def sample(self, logits: Tensor) -> Sampled:
        """Draw the next token from logits [V] and remember it."""
        return sample_batch(logits[None], [self])[0]

    def wish(self) -> Wish:
        """What the next token is to be; nothing moves."""
        params = self.params
        return Wish(
            temperature=params.temperature,
            uniform=0.0 if params.is_greedy else self._number(0),
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            shifts=self.shifts.arrays() if len(self.shifts) else None,
            allowed=None if self.matcher is None else self.matcher.allowed,
        )

    def remember(self, token_id: int) -> None:
        """The sequence goes on with this token; the next one has a number of its own."""
        if not self.params.is_greedy:
            self._ahead.popleft()
        self.shifts.count(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)

    def preview(self, guesses: Sequence[int]) -> "RowSampler":
        """A row that draws what this one draws after these tokens, with its numbers, and changes nothing of it."""
        row = copy(self)
        row._ahead = deque((self._number(len(guesses)),))
        row.params = replace(self.params, logprobs=None)
        row.shifts = self.shifts.frozen()
        row.matcher = None if self.matcher is None else self.matcher.fork(guesses)
        return row

    def _number(self, ahead: int) -> float:
        """The number in [0, 1) of the token after the next `ahead`."""
        while len(self._ahead) <= ahead:
            self._ahead.append(self._random.random())
        return self._ahead[ahead]


def sample_batch(logits: Tensor, rows: Sequence[RowSampler]) -> list[Sampled]:
    """Draw one token per row of logits [N, V]; row i remembers its token."""
    assert logits.shape[0] == len(rows), (logits.shape, len(rows))
    raw, wishes = logits.detach().float(), [row.wish() for row in rows]
    chosen = draw(raw.numpy(), wishes) if raw.is_cpu else draw_on_device(raw, wishes)
    if bad := [i for i, token_id in enumerate(chosen) if token_id < 0]:
        raise BadLogitsError(tuple(bad))
    for row, token_id in zip(rows, chosen, strict=True):
        row.remember(token_id)
    return [
        Sampled(token_id) if row.params.logprobs is None else describe(logits[i], token_id, row.params.logprobs)
        for i, (row, token_id) in enumerate(zip(rows, chosen, strict=True))
    ]


def describe(logits: Tensor, token_id: int, alternatives: int) -> Sampled:
    """The token with log-softmax of the raw logits [V] and the most likely alternatives, best first."""
    raw = logits.detach().float().cpu().numpy()
    peak = raw.max()
    norm = float(peak) + float(np.log(np.exp(raw - peak).sum(dtype=np.float64)))
    best = largest(raw, alternatives) if alternatives else ()
    return Sampled(token_id, float(raw[token_id]) - norm, tuple((int(i), float(raw[i]) - norm) for i in best))

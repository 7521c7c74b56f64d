"""Sampling: logits in, token ids out, in fp32. Knows nothing of text, requests or models.

The order is that of transformers: repetition penalty (over prompt and output, divides or multiplies), presence and
frequency penalties (over output, subtracted, as the OpenAI API defines them), logit_bias; what a constraint does not
allow goes; then temperature, top_k, top_p over what top_k left, min_p. Log probabilities describe the model itself:
log-softmax of the raw logits.

No step sorts or draws from the whole vocabulary. Only a weight of at least (1 - top_p) * total / V can belong to the
nucleus, because all smaller ones together weigh less than (1 - top_p) * total: a comparison leaves a short list. One
uniform number of the row's own generator becomes a token by the inverse of the cumulative weights, so a row draws the
same token in any batch.
"""

import random
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kiloq.errors import NumericsError, RequestError

from .constrain import Matcher
from .params import SamplingParams
from .shifts import Shifts

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

_SHORT = 1024  # tokens that a GPU hands over at first; a nucleus is rarely longer
_DEPTH = 64  # weights per block of the two-level inverse, about the square root of the cost of one level
_COLDEST = 1e-6  # below this, fp32 cannot tell a temperature from greedy


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

    def uniform(self) -> float:
        """The next number in [0, 1) of this row alone."""
        return self._ahead.popleft() if self._ahead else self._random.random()

    def remember(self, token_id: int) -> None:
        """The sequence goes on with this token."""
        self.shifts.count(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)

    def preview(self, guesses: Sequence[int]) -> "RowSampler":
        """A row that draws what this one draws after these tokens, with its numbers, and changes nothing of it."""
        ahead = len(guesses)
        while len(self._ahead) <= ahead:
            self._ahead.append(self._random.random())
        row = copy(self)
        row._ahead = deque((self._ahead[ahead],))
        row.params = replace(self.params, logprobs=None)
        row.shifts = self.shifts.frozen()
        row.matcher = None if self.matcher is None else self.matcher.fork(guesses)
        return row


def sample_batch(logits: Tensor, rows: Sequence[RowSampler]) -> list[Sampled]:
    """Draw one token per row of logits [N, V]; row i remembers its token."""
    assert logits.shape[0] == len(rows), (logits.shape, len(rows))
    scores = _shifted(logits.detach(), rows)  # [N, V] fp32
    # Not by PyTorch on the CPU: its threads go on to spin for milliseconds on cores that the next step needs.
    peaks = torch.from_numpy(scores.numpy().max(1)) if scores.is_cpu else scores.amax(1)
    if bad := (~peaks.isfinite()).nonzero()[:, 0].tolist():
        raise BadLogitsError(tuple(bad))
    if scores.is_cpu:
        chosen = [_choose(_allowed(scores[i].numpy(), row), row) for i, row in enumerate(rows)]
    else:
        chosen = _choose_on_device(_allowed_on_device(scores, rows), peaks, rows)
    for row, token_id in zip(rows, chosen, strict=True):
        row.remember(token_id)
    return [
        Sampled(token_id) if row.params.logprobs is None else _describe(logits[i], token_id, row.params.logprobs)
        for i, (row, token_id) in enumerate(zip(rows, chosen, strict=True))
    ]


def _shifted(logits: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """fp32 scores [N, V] after penalties and bias; the caller's logits stay as they are."""
    scores = logits.float()
    tables = [row.shifts.table(i) for i, row in enumerate(rows) if len(row.shifts)]
    if not tables:
        return scores
    if scores is logits:  # the same holds for its copies
        scores = torch.from_numpy(logits.numpy().copy()) if logits.is_cpu else logits.clone()
    table = torch.from_numpy(np.concatenate(tables, axis=1)).to(scores.device)  # [4, M], one transfer
    where, ids, divide, add = table[0].long(), table[1].long(), table[2].float(), table[3].float()
    seen = scores[where, ids]
    scores[where, ids] = torch.where(seen > 0, seen / divide, seen * divide) + add
    return scores


def _allowed(scores: Floats, row: RowSampler) -> Floats:
    """The scores [V], -inf where the row's grammar cannot go on."""
    return scores if row.matcher is None else np.where(row.matcher.allowed, scores, np.float32(-np.inf))


def _allowed_on_device(scores: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    held = [(i, row.matcher) for i, row in enumerate(rows) if row.matcher is not None]
    if not held:
        return scores
    allowed = torch.from_numpy(np.stack([matcher.allowed for _, matcher in held])).to(scores.device)
    scores, at = scores.clone(), [i for i, _ in held]
    scores[at] = scores[at].masked_fill(~allowed, -torch.inf)
    return scores


def _choose(scores: Floats, row: RowSampler) -> int:
    """A token from one row's scores [V] on the host."""
    params = row.params
    if params.is_greedy:
        return int(scores.argmax())
    if not params.has_filters:
        return _choose_any(scores, params.temperature, row.uniform())
    if 0 < params.top_k < scores.size:
        ids = _largest(scores, params.top_k)
        weights = _tempered(scores[ids], scores[ids[0]], params.temperature)
        total = float(weights.sum())
    else:
        weights = _tempered(scores, scores.max(), params.temperature)
        total = float(weights.sum())
        ids = _nucleus(weights, total, params)
        weights = weights[ids]
    mass = _kept_mass(weights, total, params)
    return int(ids[_invert(mass, row.uniform() * mass[-1])])


def _nucleus(weights: Floats, total: float, params: SamplingParams) -> Ids:
    """Ids, heaviest first, of a short list that holds all that top_p and min_p keep."""
    # The bound of the module's docstring, tried first as if no more than _SHORT tokens mattered.
    for spread in (_SHORT, weights.size):
        light = 0.999 * (1 - params.top_p) * total / spread  # 0.999 covers rounding
        ids = np.flatnonzero(weights >= min(max(params.min_p, light), 1.0))
        if params.min_p >= light or weights[ids].sum() >= params.top_p * total:
            break
    return ids[weights[ids].argsort()[::-1]]


def _choose_any(scores: Floats, temperature: float, uniform: float) -> int:
    """From the whole distribution: find the block by the sums of blocks, then the token inside it."""
    columns = -(-scores.size // _DEPTH)
    weights = np.empty(_DEPTH * columns, np.float32)
    weights[scores.size :] = 0
    _tempered(scores, scores.max(), temperature, out=weights[: scores.size])
    blocks = weights.reshape(_DEPTH, columns)
    column, rest = _find_block(blocks.sum(0), uniform)
    return _invert(blocks[:, column].cumsum(dtype=np.float64), rest) * columns + column


def _find_block(sums: Floats, uniform: float) -> tuple[int, float]:
    """The block that the uniform number falls into, and how far into it."""
    mass = sums.cumsum(dtype=np.float64)
    column = _invert(mass, uniform * mass[-1])
    return column, uniform * mass[-1] - (mass[column - 1] if column else 0.0)


def _kept_mass(weights: Floats, total: float, params: SamplingParams) -> Doubles:
    """Cumulative weights, heaviest first, of what top_p and min_p keep; at least one."""
    mass = weights.cumsum(dtype=np.float64)
    keep = len(mass)
    if params.top_p < 1:
        keep = min(keep, 1 + int(mass.searchsorted(params.top_p * total)))
    if params.min_p > 0:
        keep = min(keep, int(np.count_nonzero(weights >= params.min_p)))
    return mass[:keep]


def _invert(mass: Doubles, target: float) -> int:
    """The place where the cumulative mass passes the target; never one of weight zero, however the sums round."""
    return int(min(mass.searchsorted(target, "right"), mass.searchsorted(mass[-1], "left")))


def _tempered(scores: Floats, peak: np.float32, temperature: float, out: Floats | None = None) -> Floats:
    """Weights, not yet divided by their sum; the heaviest is 1."""
    with np.errstate(over="ignore"):  # a masked score may be the lowest fp32 number
        weights: Floats = np.subtract(scores, peak, out=out)
        if temperature != 1:
            weights /= np.float32(max(temperature, _COLDEST))
        np.exp(weights, out=weights)
    return weights


def _largest(scores: Floats, count: int) -> Ids:
    """Ids of the largest scores, best first, less those of -inf; the maxima of blocks bound the search."""
    depth = min(_DEPTH, scores.size // (4 * count)) if count else 1
    floor = np.finfo(np.float32).min
    if depth > 1:
        blocks = scores.size // depth
        maxima = scores[: depth * blocks].reshape(depth, blocks).max(0)
        # At least `count` scores (one per block) reach the count-th largest of the maxima.
        floor = max(floor, np.partition(maxima, blocks - count)[blocks - count])
    ids = np.flatnonzero(scores >= floor)
    return ids[scores[ids].argsort()[::-1][:count]]


def _choose_on_device(scores: Tensor, peaks: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """The same choices for scores on a GPU; only short lists and block sums travel to the host."""
    chosen = scores.argmax(1).tolist()
    warm = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    for group, choose in (
        ([i for i in warm if rows[i].params.has_filters], _choose_short),
        ([i for i in warm if not rows[i].params.has_filters], _choose_blocks),
    ):
        if group:
            some = [rows[i] for i in group]
            heat = torch.tensor([row.params.temperature for row in some], dtype=torch.float32, device=scores.device)
            weights = ((scores[group] - peaks[group, None]) / heat.clamp(min=_COLDEST)[:, None]).exp()
            for i, token_id in zip(group, choose(weights, some), strict=True):
                chosen[i] = token_id
    return chosen


def _choose_short(weights: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    size = weights.shape[1]
    count = min(size, max(_SHORT, *(row.params.top_k for row in rows)))
    heaviest = weights.topk(count)
    sums: list[float] = weights.sum(1).tolist()
    short, ids = heaviest.values.cpu().numpy(), heaviest.indices.cpu().numpy()
    chosen = []
    for i, row in enumerate(rows):
        top_k, tokens = row.params.top_k, ids[i]
        some = short[i, : top_k or None]
        mass = _kept_mass(some, float(some.sum()) if top_k else sums[i], row.params)
        if not top_k and len(mass) == count < size:  # the nucleus is longer than the short list
            order = weights[i].sort(descending=True)
            tokens, mass = order.indices.cpu().numpy(), _kept_mass(order.values.cpu().numpy(), sums[i], row.params)
        chosen.append(int(tokens[_invert(mass, row.uniform() * mass[-1])]))
    return chosen


def _choose_blocks(weights: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    columns = -(-weights.shape[1] // _DEPTH)  # the layout of _choose_any
    blocks = torch.nn.functional.pad(weights, (0, _DEPTH * columns - weights.shape[1])).view(-1, _DEPTH, columns)
    found = [_find_block(sums, row.uniform()) for sums, row in zip(blocks.sum(1).cpu().numpy(), rows, strict=True)]
    picked = blocks[torch.arange(len(rows)), :, [column for column, _ in found]].cpu().numpy()  # [N, DEPTH]
    return [
        _invert(inside.cumsum(dtype=np.float64), rest) * columns + column
        for inside, (column, rest) in zip(picked, found, strict=True)
    ]


def _describe(logits: Tensor, token_id: int, alternatives: int) -> Sampled:
    """The token with log-softmax of the raw logits [V] and the most likely alternatives, best first."""
    raw = logits.detach().float().cpu().numpy()
    peak = raw.max()
    norm = float(peak) + float(np.log(np.exp(raw - peak).sum(dtype=np.float64)))
    best = _largest(raw, alternatives) if alternatives else ()
    return Sampled(token_id, float(raw[token_id]) - norm, tuple((int(i), float(raw[i]) - norm) for i in best))

"""Attention over the paged cache: the serving side of `Attend`. Knows blocks and positions, not requests or sampling.

Everything that does not depend on the layer (slots, masks, how rows are grouped) is built once per step. Tokens that
are alone in their step (decode) share one call per group; a chunk of a prompt has a call of its own. No token reads a
slot that is not its own sequence's, so that a broken sequence cannot disturb another one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kiloq import ops

from .blocks import BLOCK_SIZE
from .kv import KVCache

# Bytes of keys. A run of blocks longer than _ALONE is read in place in a call of its own: copying it costs more than
# the call. Rows are gathered together up to _TOGETHER: beyond, the copy falls out of the processor's cache.
_ALONE = {"cpu": 64 * 2**10, "cuda": 64 * 2**20}
_TOGETHER = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}

_OFFSETS = np.arange(BLOCK_SIZE)

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step: positions start..stop-1 are computed; `blocks` hold all before stop."""

    blocks: Sequence[int]
    start: int
    stop: int


class PagedAttend:
    """Tokens of several sequences, laid end to end as `spans` say, attending to what the cache holds of their own."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], windows: Sequence[int | None]) -> None:
        self._cache = cache
        self._slots = _to_device(np.concatenate([_slots(span, span.start) for span in spans]), cache)  # [T]
        calls = {window: _plan(cache, spans, window) for window in set(windows)}
        self._calls = [calls[window] for window in windows]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write_kv(layer, self._slots, k, v)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = [call.attend(q, k, v, keys, values) for call in self._calls[layer]]
        return out[0] if len(out) == 1 else torch.cat(out)


@dataclass(frozen=True, slots=True)
class _Whole:
    """Rows first..last-1 are a sequence from its first token on: the step itself holds all they see."""

    first: int
    last: int
    window: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (x[None, self.first : self.last] for x in (q, k, v))
        return ops.causal_attention(q, k, v, window=self.window)[0]


@dataclass(frozen=True, slots=True)
class _Paged:
    """Rows first..last-1 are `batch` sequences with as many rows each; all see `where`, less what the mask hides."""

    first: int
    last: int
    batch: int
    where: slice | Tensor  # slots of the keys: a run of the only sequence, or [batch * L]
    mask: Tensor | None  # [batch, 1, rows of each x heads per key, L], 0 or -inf

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_heads, (_, num_kv_heads, head_dim) = q.shape[1], keys.shape
        shared = num_heads // num_kv_heads
        # Heads that share a key become rows of one head: nothing is repeated in memory.
        q = q[self.first : self.last].reshape(self.batch, -1, num_kv_heads, shared, head_dim)  # [N, rows, K, G, D]
        q = q.transpose(1, 2).reshape(self.batch, num_kv_heads, -1, head_dim)  # [N, K, rows*G, D]
        out = F.scaled_dot_product_attention(q, self._read(keys), self._read(values), attn_mask=self.mask)
        out = out.view(self.batch, num_kv_heads, -1, shared, head_dim).transpose(1, 2)  # [N, rows, K, G, D]
        return out.reshape(self.last - self.first, num_heads, head_dim)

    def _read(self, kept: Tensor) -> Tensor:
        """[slots, K, D] -> [batch, K, L, D]"""
        seen = kept[self.where] if isinstance(self.where, slice) else kept.index_select(0, self.where)
        return seen.view(self.batch, -1, *kept.shape[1:]).transpose(1, 2)


def _plan(cache: KVCache, spans: Sequence[Span], window: int | None) -> list[_Whole | _Paged]:
    """Cut the rows of a step into calls, for layers of one window."""
    calls: list[_Whole | _Paged] = []
    row = 0
    for group in _groups(cache, spans, window):
        end = row + sum(span.stop - span.start for span in group)
        span = group[0]
        if span.start == 0 and span.stop > 1:
            calls.append(_Whole(row, end, window))
        elif len(group) > 1:
            calls.append(_Paged(row, end, len(group), *_together(cache, group, window)))
        else:
            mask = None if span.stop - span.start == 1 else _chunk_mask(cache, span, window)
            calls.append(_Paged(row, end, 1, _alone(cache, span, window), mask))
        row = end
    return calls


def _groups(cache: KVCache, spans: Sequence[Span], window: int | None) -> Iterator[list[Span]]:
    """Spans that share a call: chunks and long runs stand alone, other single rows go together."""
    token_bytes = cache.keys[0][0].numel() * cache.dtype.itemsize
    group: list[Span] = []
    longest = 0
    for span in spans:
        seen = (span.stop - _oldest(span, window)) * token_bytes
        is_chunk = span.stop - span.start > 1
        if is_chunk or (seen > _ALONE[cache.device.type] and _run(span, window) is not None):
            if group:
                yield group
                group = []
            yield [span]
            continue
        longest = max(longest, seen) if group else seen
        if group and longest * (len(group) + 1) > _TOGETHER[cache.device.type]:
            yield group
            group, longest = [], seen
        group.append(span)
    if group:
        yield group


def _alone(cache: KVCache, span: Span, window: int | None) -> slice | Tensor:
    """What one sequence sees: a slice where its blocks are neighbours."""
    run = _run(span, window)
    return run if run is not None else _to_device(_slots(span, _oldest(span, window)), cache)


def _together(cache: KVCache, group: Sequence[Span], window: int | None) -> tuple[Tensor, Tensor | None]:
    """What single rows see, as long as the longest: the slots, [N * L], and the mask over what is too much."""
    rows = [_slots(span, _oldest(span, window)) for span in group]
    lengths = [len(row) for row in rows]
    where = np.empty((len(rows), max(lengths)), np.int64)
    for i, row in enumerate(rows):
        where[i, : len(row)] = row
        where[i, len(row) :] = row[0]  # masked, and finite if the row's own sequence is
    if min(lengths) == max(lengths):
        return _to_device(where.reshape(-1), cache), None
    hidden = np.arange(max(lengths)) >= np.array(lengths)[:, None]  # [N, L]
    mask = np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None, None]
    return _to_device(where.reshape(-1), cache), _to_device(mask, cache).to(cache.dtype)


def _chunk_mask(cache: KVCache, span: Span, window: int | None) -> Tensor:
    """A later part of a sequence sees all before it and itself causally: [1, 1, rows * heads per key, L]."""
    rows = torch.arange(span.start, span.stop, device=cache.device)
    behind = rows[:, None] - torch.arange(_oldest(span, window), span.stop, device=cache.device)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    mask = torch.zeros(hidden.shape, dtype=cache.dtype, device=cache.device).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(cache.heads_per_key, 0)[None, None]


def _oldest(span: Span, window: int | None) -> int:
    """The first position that any row of the span sees."""
    return 0 if window is None else max(0, span.start - window + 1)


def _run(span: Span, window: int | None) -> slice | None:
    """The slots that the span sees, if they are neighbours."""
    oldest = _oldest(span, window)
    first, last = oldest // BLOCK_SIZE, -(-span.stop // BLOCK_SIZE)
    start = span.blocks[first]
    if list(span.blocks[first:last]) != list(range(start, start + last - first)):
        return None
    offset = (start - first) * BLOCK_SIZE
    return slice(offset + oldest, offset + span.stop)


def _slots(span: Span, oldest: int) -> Ids:
    """Slots of positions oldest..stop-1."""
    first, last = oldest // BLOCK_SIZE, -(-span.stop // BLOCK_SIZE)
    blocks = np.array(span.blocks[first:last], np.int64)
    slots: Ids = (blocks[:, None] * BLOCK_SIZE + _OFFSETS).reshape(-1)
    return slots[oldest - first * BLOCK_SIZE : span.stop - first * BLOCK_SIZE]


def _to_device(array: NDArray[np.generic], cache: KVCache) -> Tensor:
    return torch.from_numpy(array).to(cache.device)

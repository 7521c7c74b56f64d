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

# Bytes of keys that rows may gather together: beyond, the copy falls out of a processor's cache. A GPU minds launches.
_TOGETHER_ON_CPU = 512 * 2**10
_TOGETHER_ON_GPU = 256 * 2**20

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
        self._slots = torch.tensor(_own_slots(spans), device=cache.device)  # [T]
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
class _Chunk:
    """Rows first..last-1 are a later part of one sequence."""

    first: int
    last: int
    seen: "_Seen"
    mask: Tensor  # [rows * heads per key, L]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_rows, num_heads, head_dim = self.last - self.first, *q.shape[1:]
        num_kv_heads = keys.shape[1]
        # Heads that share a key become rows of one head, so that no key is repeated in memory.
        q = q[self.first : self.last].reshape(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1)  # [K, rows, G, D]
        q = q.reshape(1, num_kv_heads, -1, head_dim)  # [1, K, rows*G, D]
        out = F.scaled_dot_product_attention(q, self.seen.of(keys), self.seen.of(values), attn_mask=self.mask)
        out = out.view(num_kv_heads, num_rows, -1, head_dim).transpose(0, 1)  # [rows, K, G, D]
        return out.reshape(num_rows, num_heads, head_dim)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows first..last-1 are the newest tokens of as many sequences, all as if they saw L tokens."""

    first: int
    last: int
    seen: "_Seen"
    mask: Tensor | None  # [N, 1, 1, L]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        shape = q.shape[1:]
        # As above: heads that share a key are rows of one head.
        q = q[self.first : self.last].reshape(self.last - self.first, keys.shape[1], -1, shape[-1])  # [N, K, G, D]
        out = F.scaled_dot_product_attention(q, self.seen.of(keys), self.seen.of(values), attn_mask=self.mask)
        return out.reshape(-1, *shape)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The slots that N sequences see: [N * L], or a run of the only one."""

    slots: Tensor | slice
    num_sequences: int = 1

    def of(self, kept: Tensor) -> Tensor:
        """[slots, K, D] -> [N, K, L, D]"""
        if isinstance(self.slots, slice):
            return kept[None, self.slots].transpose(1, 2)
        return kept.index_select(0, self.slots).view(self.num_sequences, -1, *kept.shape[1:]).transpose(1, 2)


_Call = _Whole | _Chunk | _Rows


def _plan(cache: KVCache, spans: Sequence[Span], window: int | None) -> list[_Call]:
    """Cut the rows of a step into calls, for layers of one window."""
    calls: list[_Call] = []
    row = 0
    for group in _groups(cache, spans, window):
        span = group[0]
        end = row + sum(span.stop - span.start for span in group)
        if span.start == 0 and span.stop > 1:
            calls.append(_Whole(row, end, window))
        elif span.stop - span.start > 1:
            calls.append(_Chunk(row, end, _one(cache, span, window), _chunk_mask(cache, span, window)))
        elif len(group) == 1:
            calls.append(_Rows(row, end, _one(cache, span, window), None))
        else:
            calls.append(_Rows(row, end, *_several(cache, group, window)))
        row = end
    return calls


def _groups(cache: KVCache, spans: Sequence[Span], window: int | None) -> Iterator[list[Span]]:
    """Spans that share a call: parts of prompts stand alone, single rows go together."""
    token_bytes = cache.keys[0][0].numel() * cache.dtype.itemsize
    most = _TOGETHER_ON_CPU if cache.device.type == "cpu" else _TOGETHER_ON_GPU
    group: list[Span] = []
    longest = 0
    for span in spans:
        seen = (span.stop - _oldest(span, window)) * token_bytes
        is_chunk = span.stop - span.start > 1
        longest = max(longest, seen)
        if group and (is_chunk or longest * (len(group) + 1) > most):
            yield group
            group, longest = [], seen
        group.append(span)
        if is_chunk:
            yield group
            group, longest = [], 0
    if group:
        yield group


def _one(cache: KVCache, span: Span, window: int | None) -> _Seen:
    """What one sequence sees, in place where its blocks are neighbours."""
    oldest = _oldest(span, window)
    first, last = oldest // BLOCK_SIZE, -(-span.stop // BLOCK_SIZE)
    start = span.blocks[first]
    if list(span.blocks[first:last]) != list(range(start, start + last - first)):
        return _Seen(_to_device(_slots(span, oldest), cache))
    offset = (start - first) * BLOCK_SIZE
    return _Seen(slice(offset + oldest, offset + span.stop))


def _several(cache: KVCache, group: Sequence[Span], window: int | None) -> tuple[_Seen, Tensor | None]:
    """What single rows see, filled up to the longest, and the mask that hides the filling: [N, 1, 1, L]."""
    rows = [_slots(span, _oldest(span, window)) for span in group]
    lengths = [len(row) for row in rows]
    slots = np.empty((len(rows), max(lengths)), np.int64)
    for i, row in enumerate(rows):
        slots[i, : len(row)] = row
        slots[i, len(row) :] = row[0]  # hidden, but finite as long as the row's own sequence is
    seen = _Seen(_to_device(slots.reshape(-1), cache), len(rows))
    if min(lengths) == max(lengths):
        return seen, None
    hidden = np.arange(max(lengths)) >= np.array(lengths)[:, None]  # [N, L]
    mask = np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None, None]
    return seen, _to_device(mask, cache).to(cache.dtype)


def _chunk_mask(cache: KVCache, span: Span, window: int | None) -> Tensor:
    """A later part of a sequence sees all before it and itself causally: [rows * heads per key, L]."""
    rows = torch.arange(span.start, span.stop, device=cache.device)
    behind = rows[:, None] - torch.arange(_oldest(span, window), span.stop, device=cache.device)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    mask = torch.zeros(hidden.shape, dtype=cache.dtype, device=cache.device).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(cache.heads_per_key, 0)


def _own_slots(spans: Sequence[Span]) -> list[int]:
    """Where the step's own tokens are kept."""
    slots: list[int] = []
    for span in spans:
        if span.stop - span.start == 1:
            slots.append(span.blocks[span.start // BLOCK_SIZE] * BLOCK_SIZE + span.start % BLOCK_SIZE)
        else:
            slots += _slots(span, span.start).tolist()
    return slots


def _oldest(span: Span, window: int | None) -> int:
    """The first position that any row of the span sees."""
    return 0 if window is None else max(0, span.start - window + 1)


def _slots(span: Span, oldest: int) -> Ids:
    """Slots of positions oldest..stop-1."""
    first, last = oldest // BLOCK_SIZE, -(-span.stop // BLOCK_SIZE)
    blocks = np.array(span.blocks[first:last], np.int64)
    slots: Ids = (blocks[:, None] * BLOCK_SIZE + _OFFSETS).reshape(-1)
    return slots[oldest - first * BLOCK_SIZE : span.stop - first * BLOCK_SIZE]


def _to_device(array: NDArray[np.generic], cache: KVCache) -> Tensor:
    return torch.from_numpy(array).to(cache.device)

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
from .key_bias import turned
from .kv import KVCache

# Bytes of keys that rows may gather together: beyond, the copy falls out of a processor's cache. A GPU minds launches.
_TOGETHER_ON_CPU = 512 * 2**10
_TOGETHER_ON_GPU = 256 * 2**20

_OFFSETS = np.arange(BLOCK_SIZE)

Ids = NDArray[np.int64]
Places = tuple[Tensor, Tensor]  # cos and sin of n positions, [n, R/2] each


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step: positions start..stop-1 are computed; `blocks` hold all before stop.

    `alpha` is the sequence's NTK factor; only a cache that keeps keys without their bias asks for it.
    """

    blocks: Sequence[int]
    start: int
    stop: int
    alpha: float = 1.0


class PagedAttend:
    """Tokens of several sequences, laid end to end as `spans` say, attending to what the cache holds of their own.

    All keys and values are seen as the cache gives them back, the step's own too: how steps are cut changes nothing.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span], windows: Sequence[int | None]) -> None:
        self._cache = cache
        self._slots = torch.tensor(_own_slots(spans), device=cache.device)  # [T]
        self._places = _places(cache, spans, [span.start for span in spans])
        calls = {window: _plan(cache, spans, window) for window in set(windows)}
        self._calls = [calls[window] for window in windows]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, bias = self._cache, self._cache.key_biases[layer]
        if bias is None or self._places is None:
            k, v = cache.write_kv(layer, self._slots, k, v)
        else:
            constant = turned(bias, self._places)  # [T, K, D]
            k, v = cache.write_kv(layer, self._slots, k.float() - constant, v)
            k = k + constant
        k, v = k.to(q.dtype), v.to(q.dtype)
        out = [call.attend(q, k, v, cache, layer) for call in self._calls[layer]]
        return out[0] if len(out) == 1 else torch.cat(out)


@dataclass(frozen=True, slots=True)
class _Whole:
    """Rows first..last-1 are a sequence from its first token on: the step itself holds all they see."""

    first: int
    last: int
    window: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
        q, k, v = (x[None, self.first : self.last] for x in (q, k, v))
        return ops.causal_attention(q, k, v, window=self.window)[0]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows first..last-1 are a later part of one sequence."""

    first: int
    last: int
    seen: "_Seen"
    mask: Tensor  # [rows * heads per key, L]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
        num_rows, num_heads, head_dim = self.last - self.first, *q.shape[1:]
        num_kv_heads = k.shape[1]
        keys, values = self.seen.of(cache, layer, q.dtype)
        # Heads that share a key become rows of one head, so that no key is repeated in memory.
        q = q[self.first : self.last].reshape(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1)  # [K, rows, G, D]
        q = q.reshape(1, num_kv_heads, -1, head_dim)  # [1, K, rows*G, D]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask.to(q.dtype))
        out = out.view(num_kv_heads, num_rows, -1, head_dim).transpose(0, 1)  # [rows, K, G, D]
        return out.reshape(num_rows, num_heads, head_dim)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows first..last-1 are the newest tokens of as many sequences, all as if they saw L tokens."""

    first: int
    last: int
    seen: "_Seen"
    mask: Tensor | None  # [N, 1, 1, L]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
        shape = q.shape[1:]
        keys, values = self.seen.of(cache, layer, q.dtype)
        # As above: heads that share a key are rows of one head.
        q = q[self.first : self.last].reshape(self.last - self.first, k.shape[1], -1, shape[-1])  # [N, K, G, D]
        mask = None if self.mask is None else self.mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.reshape(-1, *shape)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The slots that N sequences see: [N * L], or a run of the only one."""

    slots: Tensor | slice
    places: Places | None  # where the cache keeps keys without their bias
    num_sequences: int = 1

    def of(self, cache: KVCache, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, each [N, K, L, D]."""
        keys, values = cache.keys_at(layer, self.slots), cache.values_at(layer, self.slots)  # [N * L, K, D]
        bias = cache.key_biases[layer]
        if bias is not None and self.places is not None:
            keys = keys + turned(bias, self.places)
        return self._by_sequence(keys.to(dtype)), self._by_sequence(values.to(dtype))

    def _by_sequence(self, kept: Tensor) -> Tensor:
        return kept.view(self.num_sequences, -1, *kept.shape[1:]).transpose(1, 2)


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
    places = _places(cache, [span], [oldest])
    if list(span.blocks[first:last]) != list(range(start, start + last - first)):
        return _Seen(_to_device(_slots(span, oldest), cache), places)
    offset = (start - first) * BLOCK_SIZE
    return _Seen(slice(offset + oldest, offset + span.stop), places)


def _several(cache: KVCache, group: Sequence[Span], window: int | None) -> tuple[_Seen, Tensor | None]:
    """What single rows see, filled up to the longest, and the mask that hides the filling: [N, 1, 1, L]."""
    oldest = [_oldest(span, window) for span in group]
    rows = [_slots(span, first) for span, first in zip(group, oldest, strict=True)]
    lengths = [len(row) for row in rows]
    slots = np.empty((len(rows), max(lengths)), np.int64)
    for i, row in enumerate(rows):
        slots[i, : len(row)] = row
        slots[i, len(row) :] = row[0]  # hidden, but finite as long as the row's own sequence is
    places = _places(cache, group, oldest, fill_to=max(lengths))
    seen = _Seen(_to_device(slots.reshape(-1), cache), places, len(rows))
    if min(lengths) == max(lengths):
        return seen, None
    hidden = np.arange(max(lengths)) >= np.array(lengths)[:, None]  # [N, L]
    mask = np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None, None]
    return seen, _to_device(mask, cache)


def _chunk_mask(cache: KVCache, span: Span, window: int | None) -> Tensor:
    """A later part of a sequence sees all before it and itself causally: [rows * heads per key, L]."""
    rows = torch.arange(span.start, span.stop, device=cache.device)
    behind = rows[:, None] - torch.arange(_oldest(span, window), span.stop, device=cache.device)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    mask = torch.zeros(hidden.shape, device=cache.device).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(cache.heads_per_key, 0)


def _places(
    cache: KVCache, spans: Sequence[Span], oldest: Sequence[int], *, fill_to: int | None = None
) -> Places | None:
    """Of positions oldest..stop-1 of each span, each filled up with its first; None if the cache does not ask."""
    if cache.angles is None:
        return None
    cosines: list[Tensor] = []
    sines: list[Tensor] = []
    for span, first in zip(spans, oldest, strict=True):
        rows = torch.arange(first, span.stop if fill_to is None else first + fill_to, device=cache.device)
        rows = rows.where(rows < span.stop, first)
        for parts, table in zip((cosines, sines), cache.angles.upto(span.stop, span.alpha), strict=True):
            parts.append(table.index_select(0, rows))
    return torch.cat(cosines), torch.cat(sines)


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

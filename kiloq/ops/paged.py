"""Attention over a paged cache, from the rows of a fused q, k, v product: what it means, and the call of its kernel.

Knows tensors, block tables and angles; no requests, no model. The meaning is that of PagedAttend in kiloq.cache,
spelled out slot by slot, so that the kernels have a twin that shares no code with them.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu, reference
from .structs import Cache, Places, Span

KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.float32: 2}  # kq_cache_kind


@dataclass(frozen=True, kw_only=True)
class PagedLayer:
    """One layer's cache; slot = block * block_size + offset. int8: value = code * scale.

    `key_bias` [K, D] fp32, int8 only: keys are kept without their turned bias. A pair of channels that is zero in it
    costs nothing.
    """

    num_heads: int
    rotary_dim: int
    keys: Tensor  # [slots, K, D] bf16, fp32 or int8
    values: Tensor
    key_scales: Tensor | None = None  # [slots, K] fp16
    value_scales: Tensor | None = None
    key_bias: Tensor | None = None
    block_size: int = 16


@dataclass(frozen=True, kw_only=True)
class PagedSpan:
    """One sequence's part of a step: its next rows are positions start..stop-1; `blocks` hold all before stop.

    `cos` and `sin` [>= max(stop, 16), R/2] fp32 are the angles from position 0 on, where the layer has a key bias.
    """

    blocks: Tensor  # int32
    start: int
    stop: int
    cos: Tensor | None = None
    sin: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PagedPlaces:
    """The angles of the step's rows, [T, R/2] fp32, and what their queries are multiplied by, [T]."""

    cos: Tensor
    sin: Tensor
    q_scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PagedNorms:
    """Gains [D] fp32 that q and k are normed with before they are turned."""

    q: Tensor
    k: Tensor
    eps: float


def paged_attention(
    layer: PagedLayer,
    spans: Sequence[PagedSpan],
    places: PagedPlaces,
    qkv: Tensor,
    *,
    norms: PagedNorms | None = None,
    window: int | None = None,
) -> Tensor:
    """Turn q and k, write k and v to the cache, attend. qkv: [T, (H + 2K) * D] fp32 -> [T, H * D].

    By the kernel where there is one. No span may read a slot that another span of the same call writes.
    """
    library = cpu.library()
    if library is None:
        return paged_attention_reference(layer, spans, places, qkv, norms=norms, window=window)
    out = torch.empty(qkv.shape[0], layer.num_heads * layer.keys.shape[2])
    given = (places.cos, places.sin, qkv, layer.keys, layer.values)
    assert all(x.is_contiguous() for x in given), "paged attention takes contiguous tensors"
    library.kq_attention(
        ctypes.byref(_layer_struct(layer)),
        ctypes.byref(_places_struct(spans, places)),
        qkv.data_ptr(),
        norms.q.data_ptr() if norms else None,
        norms.k.data_ptr() if norms else None,
        norms.eps if norms else 0.0,
        window or 0,
        out.data_ptr(),
    )
    return out


def paged_attention_reference(
    layer: PagedLayer,
    spans: Sequence[PagedSpan],
    places: PagedPlaces,
    qkv: Tensor,
    *,
    norms: PagedNorms | None = None,
    window: int | None = None,
) -> Tensor:
    """The slow twin of `paged_attention`."""
    q, k, v = _turned(layer, places, qkv, norms)
    for span, (first, last) in zip(spans, _rows(spans), strict=True):
        _write(layer, span, k[first:last], v[first:last])
    return read_reference(layer, spans, q, window)


def read_reference(layer: PagedLayer, spans: Sequence[PagedSpan], q: Tensor, window: int | None) -> Tensor:
    """Turned and scaled queries [T, H, D] against what the cache holds -> [T, H * D]."""
    out = []
    for span, (first, last) in zip(spans, _rows(spans), strict=True):
        slots = _slots(layer, span, 0, span.stop)
        keys = _read(layer.keys, layer.key_scales, slots) + _turned_bias(layer, span, 0, span.stop)
        values = _read(layer.values, layer.value_scales, slots)
        out.append(_attend(q[first:last], keys, values, span, window))
    return torch.cat(out).flatten(1)


def _turned(
    layer: PagedLayer, places: PagedPlaces, qkv: Tensor, norms: PagedNorms | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], k and v [T, K, D]; q and k normed and turned, q scaled."""
    num_kv_heads, dim = layer.keys.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, dim)
    q, k, v = torch.split(heads, [layer.num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q, k = (reference.rms_norm(x, gain, norms.eps) for x, gain in ((q, norms.q), (k, norms.k)))
    q, k = _turn(q, places.cos, places.sin), _turn(k, places.cos, places.sin)
    return (q if places.q_scale is None else q * places.q_scale[:, None, None]), k, v


def _attend(q: Tensor, keys: Tensor, values: Tensor, span: PagedSpan, window: int | None) -> Tensor:
    """q [rows, H, D] of positions start..stop-1, keys and values [stop, K, D] -> [rows, H, D]."""
    shared = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))  # [stop, H, D]
    scores = torch.einsum("rhd,shd->hrs", q, keys) / q.shape[-1] ** 0.5
    behind = torch.arange(span.start, span.stop)[:, None] - torch.arange(span.stop)  # [rows, stop]
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    return torch.einsum("hrs,shd->rhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def _write(layer: PagedLayer, span: PagedSpan, k: Tensor, v: Tensor) -> None:
    slots = _slots(layer, span, span.start, span.stop)
    k = k - _turned_bias(layer, span, span.start, span.stop)
    kept = ((k, layer.keys, layer.key_scales), (v, layer.values, layer.value_scales))
    for x, into, scales in kept:
        if scales is None:
            into[slots] = x.to(into.dtype)
        else:
            into[slots], scales[slots] = reference.quantize_heads(x)


def _read(kept: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    x = kept[slots].float()
    return x if scales is None else x * scales[slots].float()[..., None]


def _turned_bias(layer: PagedLayer, span: PagedSpan, first: int, last: int) -> Tensor:
    """What is taken from the keys of positions first..last-1: [last - first, K, D], or 0."""
    if layer.key_bias is None:
        return torch.zeros(1, 1, 1)
    assert span.cos is not None, "a layer with a key bias needs its spans' angles"
    assert span.sin is not None
    return _turn(layer.key_bias.expand(last - first, -1, -1), span.cos[first:last], span.sin[first:last])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of each head, halves paired. x: [n, heads, D]; cos, sin: [n, R/2]."""
    half = cos.shape[1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def _slots(layer: PagedLayer, span: PagedSpan, first: int, last: int) -> Tensor:
    positions = torch.arange(first, last)
    return span.blocks.long()[positions // layer.block_size] * layer.block_size + positions % layer.block_size


def _rows(spans: Sequence[PagedSpan]) -> list[tuple[int, int]]:
    """First and last + 1 of each span's rows: spans lie end to end."""
    rows, first = [], 0
    for span in spans:
        rows.append((first, first + span.stop - span.start))
        first = rows[-1][1]
    return rows


def _layer_struct(layer: PagedLayer) -> Cache:
    return Cache(
        kind=KINDS[layer.keys.dtype],
        block_size=layer.block_size,
        num_heads=layer.num_heads,
        num_kv_heads=layer.keys.shape[1],
        head_dim=layer.keys.shape[2],
        rotary_dim=layer.rotary_dim,
        keys=layer.keys.data_ptr(),
        values=layer.values.data_ptr(),
        key_scales=_at(layer.key_scales),
        value_scales=_at(layer.value_scales),
        key_bias=_at(layer.key_bias),
    )


def _places_struct(spans: Sequence[PagedSpan], places: PagedPlaces) -> Places:
    described = [
        Span(
            first_row=first,
            start=span.start,
            stop=span.stop,
            blocks=span.blocks.data_ptr(),
            cos=_at(span.cos),
            sin=_at(span.sin),
        )
        for span, (first, _) in zip(spans, _rows(spans), strict=True)
    ]
    return Places(
        rows=places.cos.shape[0],
        cos=places.cos.data_ptr(),
        sin=places.sin.data_ptr(),
        q_scale=_at(places.q_scale),
        num_spans=len(spans),
        spans=(Span * len(spans))(*described),
    )


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

"""Bits in words: tensors of GPTQ and compressed-tensors files <-> codes, scales and zeros. Knows no file and no name.

GPTQ: qweight int32 [K * bits / 32, N], neighbouring inputs in one word, lowest bits first; qzeros int32
[G, N * bits / 32], neighbouring outputs in one word, one less than the zero in the first version; scales [G, N]; g_idx
[K], the group of each input. compressed-tensors: weight_packed int32 [N, K * bits / 32], neighbouring inputs in one
word; weight_zero_point int32 [N * bits / 32, G]; weight_scale [N, G].
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kiloq.errors import CheckpointError
from kiloq.ops.layout import GROUP_SIZES, QuantWeight

Bits = Literal[4, 8]


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A matrix as any file holds it: scales * (codes - zeros), unsigned; the groups are those of sorted inputs."""

    bits: Bits
    codes: Tensor  # [N, K] uint8
    scales: Tensor  # [N, G] fp32
    zeros: Tensor | None  # [N, G] int32; None: 2^(bits - 1) everywhere
    order: Tensor | None  # [K] int32


def unpack_words(words: Tensor, bits: Bits, dim: int) -> Tensor:
    """int32 words to the unsigned numbers in them along `dim`, lowest bits first; uint8."""
    per_word = 32 // bits
    last = words.movedim(dim, -1).contiguous()  # [.., W]
    # Little-endian: byte by byte, lowest first. Flat, because a length of 1 may have any stride. [.., 4 W]
    nibbles = last.flatten().view(torch.uint8).view(*last.shape[:-1], -1)
    if bits == 4:
        nibbles = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(-2)
    assert nibbles.shape[-1] == last.shape[-1] * per_word
    return nibbles.movedim(-1, dim)


def pack_words(numbers: Tensor, bits: Bits, dim: int) -> Tensor:
    """The reverse of `unpack_words`; the length along `dim` must fill whole words."""
    last = numbers.to(torch.uint8).movedim(dim, -1).contiguous()
    if bits == 4:
        pairs = last.unflatten(-1, (-1, 2))
        last = pairs[..., 0] | (pairs[..., 1] << 4)
    words = last.flatten().view(torch.int32).view(*last.shape[:-1], -1)
    return words.movedim(-1, dim).contiguous()


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, bits: Bits, less_one: bool
) -> Codes:
    """The tensors of a GPTQ layer; `less_one` for the first version's zeros."""
    codes = unpack_words(qweight, bits, 0).t()  # [K, N] -> [N, K]
    zeros = unpack_words(qzeros, bits, 1).t().to(torch.int32)  # [G, N] -> [N, G]
    if less_one:
        zeros = (zeros + 1) & (2**bits - 1)  # a zero of 0 was stored as all ones
    return _by_order(codes, scales.t().float(), zeros, g_idx, bits)


def to_gptq(weight: QuantWeight, *, less_one: bool) -> dict[str, Tensor]:
    """Tensors of a GPTQ layer; `less_one` for the first version, which is for weights without zeros."""
    rows, columns = weight.codes.shape
    bits: Bits = 4 if weight.kind == "int4" else 8
    groups = weight.scales.shape[1]
    codes = weight.codes if bits == 4 else weight.codes.to(torch.int16) + 128
    assert weight.zeros is None or not less_one, "the first version cannot hold a zero of 0"
    zeros = torch.full((rows, groups), 2 ** (bits - 1) - less_one) if weight.zeros is None else weight.zeros
    place = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    g_idx = place
    if weight.order is not None:
        back = torch.argsort(weight.order.long())
        codes, g_idx = codes[:, back], place[back]
    return {
        "qweight": pack_words(codes.t(), bits, 0),
        "qzeros": pack_words(zeros.t(), bits, 1),
        "scales": weight.scales.t().to(torch.float16).contiguous(),
        "g_idx": g_idx.contiguous(),
    }


def from_compressed(packed: Tensor, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None, *, bits: Bits) -> Codes:
    """The tensors of a pack-quantized layer."""
    codes = unpack_words(packed, bits, 1)
    whole = None if zeros is None else unpack_words(zeros, bits, 0).to(torch.int32)
    return _by_order(codes, scales.float(), whole, g_idx, bits)


def to_compressed(weight: QuantWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a compressed-tensors layer: packed for 4 bits, plain int8 for 8 bits with one scale a row."""
    scales = weight.scales.to(dtype)
    if weight.kind == "int8":
        assert weight.order is None, "int-quantized files have no order"
        return {"weight": weight.codes, "weight_scale": scales}
    codes, extra = weight.codes, {}
    if weight.order is not None:
        back = torch.argsort(weight.order.long())
        codes = codes[:, back]
        extra["weight_g_idx"] = (back // weight.group_size).to(torch.int32)
    if weight.zeros is not None:
        extra["weight_zero_point"] = pack_words(weight.zeros, 4, 0)
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {"weight_packed": pack_words(codes, 4, 1), "weight_scale": scales, "weight_shape": shape, **extra}


def dequantize(found: Codes) -> Tensor:
    """What the codes stand for, fp32 [N, K] in the order of the inputs."""
    groups = found.scales.shape[1]
    zeros = float(2 ** (found.bits - 1)) if found.zeros is None else found.zeros.float()[..., None]
    codes = found.codes.float().reshape(len(found.codes), groups, -1)
    weight = ((codes - zeros) * found.scales[..., None]).flatten(1)
    if found.order is None:
        return weight
    back = torch.empty_like(weight)
    back[:, found.order.long()] = weight
    return back


def for_kernels(found: Codes) -> QuantWeight | None:
    """The same numbers as the kernels take them; None for 8 bits in groups or with zeros, which no kernel has."""
    columns, groups = found.codes.shape[1], found.scales.shape[1]
    if found.bits == 8:
        if groups > 1 or found.zeros is not None:
            return None
        codes = (found.codes.to(torch.int16) - 128).to(torch.int8)
        return QuantWeight(kind="int8", group_size=columns, codes=codes, scales=found.scales, order=found.order)
    # Larger groups become several with one scale.
    size = next(size for size in reversed(GROUP_SIZES) if (columns // groups) % size == 0)
    again = columns // groups // size
    scales = found.scales.repeat_interleave(again, 1)
    zeros = None if found.zeros is None else found.zeros.to(torch.uint8).repeat_interleave(again, 1)
    return QuantWeight(
        kind="int4", group_size=size, codes=found.codes.contiguous(), scales=scales, zeros=zeros, order=found.order
    )


def as_stored(found: Codes) -> QuantWeight:
    """The same numbers, with 8 bits in groups and with zeros too, which no kernel has."""
    if (kept := for_kernels(found)) is not None:
        return kept
    zeros = None if found.zeros is None else (found.zeros - 128).to(torch.int8)
    return QuantWeight(
        kind="int8",
        group_size=found.codes.shape[1] // found.scales.shape[1],
        codes=(found.codes.to(torch.int16) - 128).to(torch.int8),
        scales=found.scales,
        zeros=zeros,
        order=found.order,
    )


def stack(matrices: list[QuantWeight], name: str) -> QuantWeight:
    """Matrices that read the same inputs as one, row after row; refused where they read them in different orders."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    orders = [torch.arange(first.codes.shape[1]) if one.order is None else one.order for one in matrices]
    if any(not torch.equal(orders[0].long(), order.long()) for order in orders):
        raise CheckpointError(
            f"{name}: its parts were quantised in different orders of their inputs (g_idx), but are multiplied as one. "
            "Quantise the model again without desc_act, or with static groups."
        )
    if len({(one.kind, one.group_size) for one in matrices}) > 1:
        raise CheckpointError(f"{name}: its parts are quantised differently, but are multiplied as one.")
    zeros = None
    if (some := next((one.zeros for one in matrices if one.zeros is not None), None)) is not None:
        middle = 8 if first.kind == "int4" else 0
        zeros = torch.cat(
            [torch.full_like(one.scales, middle).to(some) if one.zeros is None else one.zeros for one in matrices]
        )
    return QuantWeight(
        kind=first.kind,
        group_size=first.group_size,
        codes=torch.cat([one.codes for one in matrices]),
        scales=torch.cat([one.scales for one in matrices]),
        zeros=zeros,
        order=first.order,
    )


def _by_order(codes: Tensor, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None, bits: Bits) -> Codes:
    order = None if g_idx is None else order_of(g_idx, scales.shape[1])
    if order is not None:
        codes = codes[:, order.long()]
    if zeros is not None and bool((zeros == 2 ** (bits - 1)).all()):
        zeros = None
    return Codes(bits=bits, codes=codes.contiguous(), scales=scales.contiguous(), zeros=zeros, order=order)


def order_of(g_idx: Tensor, groups: int) -> Tensor | None:
    """Inputs sorted by their group, [K]; None where they are so already. CheckpointError unless all are of one size."""
    columns = len(g_idx)
    if columns and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise CheckpointError(
            f"g_idx names groups {int(g_idx.min()):,} to {int(g_idx.max()):,}, but there are {groups:,}"
        )
    if bool((torch.bincount(g_idx.long(), minlength=groups) * groups != columns).any()):
        raise CheckpointError(
            f"g_idx does not give each of {groups:,} groups the same number of the {columns:,} inputs"
        )
    order = torch.argsort(g_idx.long(), stable=True)
    return None if torch.equal(order, torch.arange(columns)) else order.to(torch.int32)

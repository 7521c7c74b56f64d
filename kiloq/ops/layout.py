"""Layouts that all kernels share: weights as numbers a person can check, and weights as a kernel wants them.

`QuantWeight` is what quantisers make and files hold; `PackedWeight` is what a linear layer multiplies by. Knows no
files, no model and no processor.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WeightKind = Literal["bf16", "int8", "int4"]

GROUP_SIZES = (32, 64, 128)
KINDS: dict[WeightKind, int] = {"bf16": 0, "int8": 1, "int4": 2}  # kq_kind
TILE = 16  # outputs that lie side by side
STEP = 64  # columns are padded to a multiple of this


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantWeight:
    """w[j, i] = scales[j, i // group_size] * (codes[j, i] - zeros[j, i // group_size]), N outputs by K inputs.

    int4: codes uint8 0..15, zeros uint8, 8 for all where `zeros` is None. int8: codes int8; kernels take one scale a
    row (group_size K) and no zeros, files may have groups and int8 zeros. `order` [K] int32, for act-order files:
    column j multiplies input order[j].
    """

    kind: Literal["int8", "int4"]
    group_size: int
    codes: Tensor  # [N, K] uint8 or int8
    scales: Tensor  # [N, K / group_size] fp32
    zeros: Tensor | None = None  # [N, K / group_size] uint8
    order: Tensor | None = None  # [K] int32

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for, in the order of the inputs: fp32 [N, K]."""
        groups = self.scales.shape[1]
        zero = (8 if self.kind == "int4" else 0) if self.zeros is None else self.zeros.float()[..., None]
        weight = (self.codes.reshape(len(self.codes), groups, -1).float() - zero) * self.scales[..., None]
        weight = weight.flatten(1)
        if self.order is None:
            return weight
        back = weight.new_empty(weight.shape)
        back[:, self.order.long()] = weight
        return back


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """A matrix in the running backend's own layout; only `ops` looks inside `data`."""

    kind: WeightKind
    rows: int  # N
    columns: int  # K
    group_size: int  # int4 only, else 0
    has_zeros: bool
    data: Tensor  # uint8, 64-byte aligned
    bias: Tensor | None  # [N] fp32
    order: Tensor | None  # [K] int32

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads."""
        return self.data.nbytes


def pack(weight: QuantWeight | Tensor, bias: Tensor | None = None) -> PackedWeight:
    """The layout of csrc/packed.h, made by PyTorch: the slow twin of kq_pack."""
    bias = None if bias is None else bias.detach().float().contiguous()
    if isinstance(weight, Tensor):
        rows, columns = weight.shape
        tiles = _tiles(weight.to(torch.bfloat16), 0, 2)  # [tiles, K/2, 16, 2]
        return PackedWeight(
            kind="bf16",
            rows=rows,
            columns=columns,
            group_size=0,
            has_zeros=False,
            data=_bytes(tiles),
            bias=bias,
            order=None,
        )
    rows, columns = weight.codes.shape
    if weight.kind == "int8":
        codes = _tiles((weight.codes.short() + 128).to(torch.uint8), 128, 4)
        parts = [_bytes(codes), _bytes(F.pad(weight.scales.float()[:, 0], (0, -rows % TILE)))]
    else:
        codes = _tiles(weight.codes, 0, 8)  # [tiles, K/8, 16, 8]
        parts = [_bytes(codes[..., :4] | codes[..., 4:] << 4), _bytes(_by_group(weight, weight.scales.half()))]
        if weight.zeros is not None:
            parts.append(_bytes(_by_group(weight, weight.zeros)))
    order = None if weight.order is None else weight.order.to(torch.int32).contiguous()
    return PackedWeight(
        kind=weight.kind,
        rows=rows,
        columns=columns,
        group_size=weight.group_size if weight.kind == "int4" else 0,
        has_zeros=weight.zeros is not None,
        data=torch.cat(parts),
        bias=bias,
        order=order,
    )


def codes_bytes(packed: PackedWeight) -> int:
    """How long the first section is, the codes of all tiles."""
    padded = -(-packed.rows // TILE) * TILE * -(-packed.columns // STEP) * STEP
    return {"bf16": 2 * padded, "int8": padded, "int4": padded // 2}[packed.kind]


def unpack(packed: PackedWeight) -> QuantWeight | Tensor:
    """The slow twin of kq_unpack."""
    rows, columns = packed.rows, packed.columns
    tiles, padded, size = -(-rows // TILE), -(-columns // STEP) * STEP, codes_bytes(packed)
    if packed.kind == "bf16":
        values = packed.data.view(torch.bfloat16).view(tiles, padded // 2, TILE, 2)
        return values.transpose(1, 2).reshape(tiles * TILE, padded)[:rows, :columns].contiguous()
    if packed.kind == "int8":
        codes = packed.data[:size].view(tiles, padded // 4, TILE, 4).transpose(1, 2).reshape(-1, padded)
        codes = (codes[:rows, :columns].short() - 128).to(torch.int8)
        scales = packed.data[size:][: tiles * TILE * 4].view(torch.float32)[:rows, None].contiguous()
        return QuantWeight(kind="int8", group_size=columns, codes=codes, scales=scales, order=packed.order)
    both = packed.data[:size].view(tiles, padded // 8, TILE, 4).transpose(1, 2)  # [tiles, 16, K/8, 4]
    codes = torch.stack((both & 15, both >> 4), dim=3).reshape(-1, padded)[:rows, :columns].contiguous()
    groups, kept = -(-padded // packed.group_size), columns // packed.group_size
    count = tiles * groups * TILE

    def by_row(values: Tensor) -> Tensor:
        return values.view(tiles, groups, TILE).transpose(1, 2).reshape(-1, groups)[:rows, :kept].contiguous()

    scales = by_row(packed.data[size:][: 2 * count].view(torch.float16)).float()
    at = size + -(-2 * count // STEP) * STEP
    zeros = by_row(packed.data[at:][:count]) if packed.has_zeros else None
    return QuantWeight(
        kind="int4", group_size=packed.group_size, codes=codes, scales=scales, zeros=zeros, order=packed.order
    )


def _tiles(values: Tensor, filling: int, width: int) -> Tensor:
    """[N, K], both padded -> [tiles, K / width, 16, width]"""
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % STEP, 0, -rows % TILE), value=filling)
    return padded.view(-1, TILE, padded.shape[1] // width, width).transpose(1, 2)


def _by_group(weight: QuantWeight, values: Tensor) -> Tensor:
    """[N, groups] -> [tiles, groups, 16], both padded with zero."""
    rows, columns = weight.codes.shape
    groups = -(-(columns + -columns % STEP) // weight.group_size)
    padded = F.pad(values, (0, groups - values.shape[1], 0, -rows % TILE))
    return padded.view(-1, TILE, groups).transpose(1, 2)


def _bytes(values: Tensor) -> Tensor:
    """Flat, and filled up to whole vectors: uint8."""
    flat = values.contiguous().flatten().view(torch.uint8)
    return F.pad(flat, (0, -len(flat) % STEP))

"""Layouts that all kernels share: weights as numbers a person can check, and weights as a kernel wants them.

`QuantWeight` is what quantisers make and files hold; `PackedWeight` is what a linear layer multiplies by. Knows no files,
no model and no processor.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

WeightKind = Literal["bf16", "int8", "int4"]

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class QuantWeight:
    """w[j, i] = scales[j, i // group_size] * (codes[j, i] - zeros[j, i // group_size]), N outputs by K inputs.

    int4: codes uint8 0..15, zeros uint8, 8 for all where `zeros` is None. int8: codes int8 -127..127, one scale a row
    (group_size K) and no zeros. `order` [K] int32, for act-order files: column j multiplies input order[j].
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
        weight = (self.codes.unflatten(1, (groups, -1)).float() - zero) * self.scales[..., None]
        weight = weight.flatten(1)
        if self.order is None:
            return weight
        back = weight.new_empty(weight.shape)
        back[:, self.order.long()] = weight
        return back


@dataclass(frozen=True, kw_only=True)
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

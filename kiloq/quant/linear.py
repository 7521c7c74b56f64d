"""Layers over packed matrices: what a Transformer is built of where the kernels run. Knows no file and no rounding.

Their matrices are no parameters: they are read-only, in the layout of one processor, and `state_dict` holds none of
them. Activations are fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kiloq import ops
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.ops.layout import PackedWeight


class Packed(nn.Module):
    """A packed matrix that stays where and what it is."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.packed = packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        # What .to(), .half() and .cuda() call. The packed matrix cannot follow, so that nothing else may go.
        probe = fn(torch.empty(0))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise ConfigError(
                f"a model with packed weights cannot become {probe.dtype} on {probe.device}; load the checkpoint again "
                "with the dtype and device that you want."
            )
        return self


class QuantLinear(Packed):
    """y = x W^T + b by the kernels. [T, K] -> [T, N]."""

    @property
    def bias(self) -> Tensor | None:
        """[N] fp32."""
        return self.packed.bias

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.packed)


class QuantEmbedding(Packed):
    """Rows of a packed matrix by id, fp32; a tied head multiplies by the same matrix."""

    def forward(self, ids: Tensor) -> Tensor:
        return ops.gather_rows(self.packed, ids)

    def project(self, hidden: Tensor) -> Tensor:
        return ops.linear(hidden, self.packed)


def is_packed(model: Transformer) -> bool:
    """Whether the kernels hold the matrices of this model."""
    return isinstance(model.embed, QuantEmbedding)

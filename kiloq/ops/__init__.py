"""Arithmetic on tensors: the kernel interface. Knows no model, cache or request.

One function per op. `reference` holds its meaning in PyTorch, which is also the training path; on a processor that we
have kernels for, `cpu` computes the ops on packed weights.
"""

import torch
from torch import Tensor

from . import cpu, layout, reference
from .layout import GROUP_SIZES, PackedWeight, QuantWeight, WeightKind
from .reference import causal_attention, quantize_heads, rms_norm, swiglu

__all__ = [
    "GROUP_SIZES",
    "PackedWeight",
    "QuantWeight",
    "WeightKind",
    "backend",
    "causal_attention",
    "gather_rows",
    "linear",
    "linear_swiglu",
    "pack",
    "quantize_heads",
    "rms_norm",
    "swiglu",
    "unpack",
]


def backend() -> str:
    """What computes on the processor: "amx", "avx512", "avxvnni", "avx2", or "reference" for PyTorch."""
    return cpu.active().name


def pack(weight: QuantWeight | Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Bring codes, or a matrix [N, K] that is kept as bf16, into the layout that the other ops take."""
    if cpu.library() is None:
        return layout.pack(weight, bias)
    return cpu.pack(weight, bias)


def unpack(packed: PackedWeight) -> QuantWeight | Tensor:
    """What `pack` was given, with int4 scales rounded to fp16."""
    return cpu.unpack(packed) if _is_native(packed.data) else layout.unpack(packed)


def linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """x [.., K] times the matrix, plus its bias: [.., N] in the type of x."""
    return cpu.linear(x, packed) if _is_native(x) else reference.quant_linear(x, packed)


def linear_swiglu(x: Tensor, packed: PackedWeight) -> Tensor:
    """silu(gate) * up of the two halves of `linear`, gate first: [.., N / 2]."""
    return cpu.linear_swiglu(x, packed) if _is_native(x) else swiglu(reference.quant_linear(x, packed))


def gather_rows(packed: PackedWeight, ids: Tensor) -> Tensor:
    """Rows `ids` [T] of the matrix, fp32 [T, K]: the embedding."""
    return cpu.gather_rows(packed, ids) if _is_native(packed.data) else reference.gather_rows(packed, ids)


def _is_native(x: Tensor) -> bool:
    """Whether the kernels can take it: they know no other device, and no gradients."""
    if cpu.library() is None or x.device.type != "cpu":
        return False
    return not (x.requires_grad and torch.is_grad_enabled())

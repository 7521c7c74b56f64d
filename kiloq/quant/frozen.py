"""Frozen matrices in few bits that gradients flow through: what Q-LoRA (arXiv 2305.14314) trains its updates beside.

The weights are written out a slab at a time when they are multiplied by, in the forward and in the backward pass, and
never kept; of the forward pass nothing is saved. Any device; knows no file, and nothing of what is trained.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiloq.ops.layout import QuantWeight

from .nf4 import LEVELS, Nf4Weight, nested_magnitudes

# Weights that are written out at once, and on a CPU how many of them in fp32 before they are rounded to bf16: these
# stay in a core's own cache (0.85 ns a weight on one core of a Xeon with AMX; whole matrices take 4).
_SLAB, _CHUNK = 2**24, 2**18


class FrozenLinear(nn.Module):
    """y = x W^T + b by codes of W. [T, K] -> [T, N], and the gradient of x; computed in the type of x or of autocast.

    The codes are buffers that follow `.to(device)` and are in no state_dict; `.to(dtype)` leaves them as they are.
    """

    def __init__(self, matrix: QuantWeight | Nf4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.codes.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        tensors = _nf4_tensors(matrix) if isinstance(matrix, Nf4Weight) else _int_tensors(matrix)
        for name in ("codes", "pairs", "scales", "steps", "mean", "zeros", "order", "places"):
            self.register_buffer(name, tensors.get(name), persistent=False)
        self.codes: Tensor  # 4 bits: [N, K / 2] uint8, even columns in the low half; 8 bits: [N, K] int8
        self.pairs: Tensor | None  # 4 bits: [256, 2] fp32, what the two codes of a byte stand for
        self.scales: Tensor  # [N, K / group] in fp16 or fp32; NF4's magnitudes: uint8
        self.steps: Tensor | None  # NF4 only, as in Nf4Weight
        self.mean: Tensor | None
        self.zeros: Tensor | None  # [N, K / group]; the level of a code is less by it
        self.order: Tensor | None  # [K] int64: column j of the codes multiplies input order[j]
        self.places: Tensor | None  # its inverse

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenLinear":
        # .to(torch.bfloat16) means the network around it: scales that lost digits would be other weights.
        kept = {name: one for name, one in self._buffers.items() if one is not None and one.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, untyped
        for name, one in kept.items():
            self._buffers[name] = one.to(self.codes.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _Multiply.apply(x, self, dtype)  # type: ignore[no-untyped-call]  # torch's, untyped
        return out

    def extra_repr(self) -> str:
        kind = f"{4 if self.pairs is not None else 8} bits, {self.scales.shape[1]} scales a row"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes."""
        return sum(one.nbytes for name, one in self._buffers.items() if one is not None and name != "pairs")

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the codes stand for, [N, K]."""
        return self.dense_rows(0, self.out_features).to(dtype)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows of it, fp32 [stop - start, K]."""
        rows = self._slab(slice(start, stop), slice(0, self.in_features), torch.float32)
        return rows if self.places is None else rows[:, self.places]

    @torch.no_grad()
    def multiply(self, x: Tensor) -> Tensor:
        """x: [.., K] -> x W^T + b, [.., N] in the type of x."""
        if self.order is not None:
            x = x[..., self.order]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        parts = [
            F.linear(x, self._slab(rows, slice(0, self.in_features), x.dtype), None if bias is None else bias[rows])
            for rows in _slices(self.out_features, max(1, _SLAB // self.in_features))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @torch.no_grad()
    def multiply_back(self, gradient: Tensor) -> Tensor:
        """gradient: [.., N] -> gradient W, [.., K] in its type; slabs of columns, so that nothing is summed twice."""
        groups = self.scales.shape[1]
        # Whole groups; one scale a row can be cut anywhere, but two codes of a byte stay together.
        unit = 2 if groups == 1 else self.in_features // groups
        step = max(1, _SLAB // self.out_features // unit) * unit
        parts = [
            gradient @ self._slab(slice(0, self.out_features), columns, gradient.dtype)
            for columns in _slices(self.in_features, step)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if self.places is None else out[..., self.places]

    def _slab(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """Rows and whole groups of columns in the order of the codes, [rows, columns]."""
        scales, width = self._scales(), columns.stop - columns.start
        size = self.in_features // scales.shape[1]
        groups = slice(columns.start // size, -(-columns.stop // size))
        scales = scales[rows, groups]
        zeros = None if self.zeros is None else self.zeros[rows, groups]
        size = min(size, width)  # a part of a row that has one scale
        per_byte = 1 if self.pairs is None else 2
        codes = self.codes[rows, columns.start // per_byte : -(-columns.stop // per_byte)]
        out = torch.empty(len(codes), width, dtype=dtype, device=codes.device)
        # A compiler fuses what a cache would hold, and would write every turn of the loop out.
        in_chunks = codes.device.type == "cpu" and not torch.compiler.is_compiling()
        chunk = max(1, _CHUNK // width) if in_chunks else len(codes)
        for some in _slices(len(codes), chunk):
            levels = self._levels(codes[some]).view(-1, width // size, size)
            if zeros is not None:
                levels -= zeros[some, :, None]
            # Rounded once, when it is copied: a rounded scale would be wrong for its whole group.
            out[some].view(levels.shape).copy_(levels.mul_(scales[some, :, None]))
        return out

    def _levels(self, codes: Tensor) -> Tensor:
        """What codes count in steps of their scale, fp32 [rows, columns]."""
        if self.pairs is None:
            return codes.float()
        # One look-up for two codes, moved as one word of 64 bits.
        table = self.pairs.view(torch.int64).flatten()
        return table.index_select(0, codes.flatten().int()).view(torch.float32).view(len(codes), -1)

    def _scales(self) -> Tensor:
        """fp32 [N, K / group]."""
        if self.steps is None:
            return self.scales.float()
        assert self.mean is not None
        return nested_magnitudes(self.scales, self.steps, self.mean)


class _Multiply(torch.autograd.Function):
    """The gradient needs the codes alone, which are there anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.input_dtype = layer, x.dtype
        return layer.multiply(x.to(dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layer.multiply_back(upstream[0]).to(ctx.input_dtype), None, None


def _int_tensors(matrix: QuantWeight) -> dict[str, Tensor]:
    """int4 and int8 as the layer keeps them; a scale is exact in fp16 where files had it so."""
    half = matrix.scales.half()
    tensors = {"scales": half if torch.equal(half.float(), matrix.scales.float()) else matrix.scales.float()}
    if matrix.zeros is not None:
        tensors["zeros"] = matrix.zeros.contiguous()
    if matrix.order is not None:
        tensors["order"] = matrix.order.long()
        tensors["places"] = torch.argsort(tensors["order"])
    if matrix.kind == "int8":
        return {**tensors, "codes": matrix.codes.contiguous()}
    middle = 0.0 if matrix.zeros is not None else 8.0
    levels = torch.arange(16.0, device=matrix.codes.device) - middle
    return {**tensors, "codes": _two_in_a_byte(matrix.codes), "pairs": _pairs(levels)}


def _nf4_tensors(matrix: Nf4Weight) -> dict[str, Tensor]:
    return {
        "codes": _two_in_a_byte(matrix.codes),
        "pairs": _pairs(torch.tensor(LEVELS, device=matrix.codes.device)),
        "scales": matrix.magnitude_codes.contiguous(),
        "steps": matrix.steps,
        "mean": matrix.mean,
    }


def _two_in_a_byte(codes: Tensor) -> Tensor:
    assert codes.shape[1] % 2 == 0, codes.shape  # groups and blocks are even
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def _pairs(levels: Tensor) -> Tensor:
    """[16] -> [256, 2]: the levels of a byte's low and high half."""
    return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))

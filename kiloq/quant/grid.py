"""Which numbers a matrix may hold in few bits, and rounding to the nearest (RTN). Knows no inputs and no files."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kiloq.errors import ConfigError
from kiloq.ops.layout import GROUP_SIZES, QuantWeight

# The range is searched by squared error in steps of 5 %, down to a quarter. GPTQ's own code takes steps of 1 % and the
# exponent 2.4: ten times the time, and in groups of 128 no nearer to the weights (decision 0015).
ROUNDING = 2  # changes whenever the same weights round to other codes: kept files of older ones are not read

_SHRINK_STEPS, _SHRINK_GRID = 16, 20
_SMALLEST_SCALE = 2.0**-24  # of fp16
_AT_ONCE = 2**17  # values of a search step: what it needs stays in a core's own cache


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the values of one matrix are kept: `group_size` neighbours in a row share a scale, all of a row if None.

    `clip` may give up the largest values of a group for finer steps. `scale_dtype` is what the file keeps scales in;
    they are exact in fp16 too, which the kernels keep.
    """

    bits: Literal[4, 8]
    group_size: int | None
    symmetric: bool = True
    clip: bool = True
    scale_dtype: Literal["float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        checked_bits(self.bits)
        if self.bits == 4 and self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"group_size is {self.group_size}; with 4 bits it must be one of {', '.join(map(str, GROUP_SIZES))}."
            )
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"group_size is {self.group_size}; it must be one of {', '.join(map(str, GROUP_SIZES))}, or none."
            )
        if self.bits == 8 and not self.symmetric:
            raise ConfigError("weights of 8 bits are symmetric: a zero of their own gains nothing there.")


@dataclass(frozen=True)
class Grid:
    """The values that codes low..high stand for: scales * (code - zeros), by row and group."""

    scales: Tensor  # [N, G] fp32, exact in fp16
    zeros: Tensor  # [N, G] fp32, whole numbers
    low: int
    high: int

    def round(self, values: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes, and what they stand for."""
        codes = self.codes(values, scales, zeros)
        return codes, (codes - zeros) * scales

    def codes(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes, as floats; all three of shapes that go together."""
        return (values / scales).round_().add_(zeros).clamp_(self.low, self.high)


def checked_bits(bits: int) -> Literal[4, 8]:
    """The number, if weights can have so many bits."""
    match bits:
        case 4 | 8:
            return bits
    raise ConfigError(f"bits is {bits}; weights can have 4 or 8 bits.")


def fit(name: str, columns: int, bits: Literal[4, 8], group_size: int | None) -> Scheme:
    """The symmetric scheme for a matrix of so many inputs under a wish for the whole model.

    A size of which no group size is a divisor cannot have 4 bits: it gets 8 with one scale a row.
    """
    divisors = [size for size in GROUP_SIZES if columns % size == 0]
    if group_size is None or columns % group_size == 0:
        if bits == 8 or group_size is not None:
            return Scheme(bits=bits, group_size=group_size)
        group_size = divisors[-1] if divisors else None
    elif divisors:
        raise ConfigError(
            f"{name} has {columns:,} inputs, which groups of {group_size} do not divide; "
            f"--group-size {' or '.join(map(str, divisors))} would."
        )
    else:
        group_size = None
    return Scheme(bits=4 if group_size and bits == 4 else 8, group_size=group_size)


def find_grid(weight: Tensor, scheme: Scheme) -> Grid:
    """The grid of each row and group of weight [N, K], fp32. A range always holds 0."""
    rows, columns = weight.shape
    size = scheme.group_size or columns
    groups = weight.float().reshape(rows * (columns // size), size)
    parts = [_find(part, scheme) for part in torch.split(groups, max(1, _AT_ONCE // size))]
    scales = torch.cat([scales for scales, _ in parts]).view(rows, -1)
    zeros = torch.cat([zeros for _, zeros in parts]).view(rows, -1)
    low, high = _codes(scheme)
    return Grid(scales, zeros, low, high)


def rtn(weight: Tensor, scheme: Scheme, grid: Grid | None = None) -> QuantWeight:
    """Each value rounded to the nearest one of its grid; `grid` if it was found already."""
    grid = grid or find_grid(weight, scheme)
    groups = weight.float().view(len(weight), grid.scales.shape[1], -1)
    tensors = (groups, grid.scales[..., None], grid.zeros[..., None])
    parts = zip(*(torch.split(tensor, max(1, _AT_ONCE // weight.shape[1])) for tensor in tensors), strict=True)
    codes = torch.cat([grid.codes(*part).to(_dtype(scheme)) for part in parts])
    return as_quant_weight(codes.flatten(1), grid, scheme)


def as_quant_weight(codes: Tensor, grid: Grid, scheme: Scheme, order: Tensor | None = None) -> QuantWeight:
    """Codes [N, K] of a grid as the layout that kernels and files share."""
    if scheme.bits == 8:
        size = scheme.group_size or codes.shape[1]
        return QuantWeight(
            kind="int8", group_size=size, codes=codes.to(_dtype(scheme)), scales=grid.scales, zeros=None, order=order
        )
    assert scheme.group_size is not None, scheme
    zeros = None if scheme.symmetric else grid.zeros.to(torch.uint8)
    return QuantWeight(
        kind="int4",
        group_size=scheme.group_size,
        codes=codes.to(_dtype(scheme)),
        scales=grid.scales,
        zeros=zeros,
        order=order,
    )


def _dtype(scheme: Scheme) -> torch.dtype:
    return torch.uint8 if scheme.bits == 4 else torch.int8


def _codes(scheme: Scheme) -> tuple[int, int]:
    return (0, 15) if scheme.bits == 4 else (-127, 127)


def _middle(scheme: Scheme) -> int:
    return (sum(_codes(scheme)) + 1) // 2


def _find(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales and zeros of groups [M, size] -> [M], [M]."""
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = _grid_of(low, high, scheme)
    # 8 bits have steps to spare: there, clipping loses more than it gains.
    if not scheme.clip or scheme.bits == 8:
        return best
    least, peak = _loss(groups, *best, scheme), torch.maximum(-low, high)
    for step in range(1, _SHRINK_STEPS):
        share = 1 - step / _SHRINK_GRID
        scales, zeros = _grid_of(low * share, high * share, scheme)
        # The largest value alone loses this much, and ever more from here on.
        if (((1 - share) * peak - scales / 2).clamp(min=0).square() > least).all():
            break
        loss = _loss(groups, scales, zeros, scheme)
        better = loss < least
        least = torch.where(better, loss, least)
        best = (torch.where(better, scales, best[0]), torch.where(better, zeros, best[1]))
    return best


def _grid_of(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    first, last = _codes(scheme)
    # Codes are chosen for the scale that files and kernels will keep.
    scales = (high - low) / (last - first)
    if scheme.scale_dtype == "bfloat16":
        scales = scales.to(torch.bfloat16)
    scales = scales.to(torch.float16).float().clamp_(min=_SMALLEST_SCALE)
    if not scheme.symmetric:
        return scales, torch.round(-low / scales).clamp_(first, last)
    return scales, torch.full_like(scales, _middle(scheme))


def _loss(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    low, high = _codes(scheme)
    scale, zero = scales[:, None], zeros[:, None]
    wrong = (groups * (1 / scale)).round_()
    if scheme.symmetric:  # two passes fewer where the zeros are one number
        wrong.clamp_(low - _middle(scheme), high - _middle(scheme))
    else:
        wrong.add_(zero).clamp_(low, high).sub_(zero)
    return wrong.mul_(scale).sub_(groups).square_().sum(1)

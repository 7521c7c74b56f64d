"""Plain rounding of a weight matrix to a grid, with no data: what `quantization=` does at load. Knows no file."""

import torch
from torch import Tensor

from kiloq.ops.layout import GROUP_SIZES, QuantWeight

_ROWS = 4096  # rounded at a time, so that the fp32 copy of a vocabulary's matrix never exists whole


def group_size_of(columns: int) -> int | None:
    """The group size of int4 for a matrix of that many columns; None where no group divides it."""
    return next((size for size in reversed(GROUP_SIZES) if columns % size == 0), None)


def round_int8(weight: Tensor) -> QuantWeight:
    """One scale a row, absmax / 127. weight: [N, K] of any float type."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], 1)
    for start in range(0, weight.shape[0], _ROWS):
        rows = weight[start : start + _ROWS].float()
        scale = rows.abs().amax(1, keepdim=True) / 127
        scales[start : start + _ROWS] = scale
        codes[start : start + _ROWS] = (rows / scale.clamp(min=1e-30)).round().to(torch.int8)
    return QuantWeight(kind="int8", group_size=weight.shape[1], codes=codes, scales=scales)


def round_int4(weight: Tensor, group_size: int) -> QuantWeight:
    """One fp16 scale a group, absmax / 7. weight: [N, K]."""
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(rows, columns // group_size)
    for start in range(0, rows, _ROWS):
        groups = weight[start : start + _ROWS].float().view(-1, columns // group_size, group_size)
        scale = (groups.abs().amax(2) / 7).half().float()
        scales[start : start + _ROWS] = scale
        whole = (groups / scale.clamp(min=1e-30)[..., None]).round().clamp(-8, 7) + 8
        codes[start : start + _ROWS] = whole.flatten(1).to(torch.uint8)
    return QuantWeight(kind="int4", group_size=group_size, codes=codes, scales=scales)

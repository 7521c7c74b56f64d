"""Key biases turned to positions. Knows angles, not slots.

The key projection of Qwen v1 to 2.5 has a bias, a few channels of which dwarf all else: one int8 scale per head would
spend its codes on a constant. Turning is linear, turn(k + b) = turn(k) + turn(b), so the cache keeps turn(k) and the
constant of each position is added when it is read: q . turn(k + b) = scale * (q . codes) + q . turn(b).
"""

import torch
from torch import Tensor

from kiloq.model import Rope, Rotation, rotate

_SHORTEST = 1024  # positions in a new table
_PAIRS = 16  # of each head that are left out of its keys: docs/decisions/0014


class Angles:
    """Cosines and sines of every position from 0 on, one table per NTK factor, grown by doubling."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self._rope = rope
        self._device = device
        self._tables: dict[float, tuple[Tensor, Tensor]] = {}

    def upto(self, length: int, alpha: float) -> tuple[Tensor, Tensor]:
        """cos and sin, [at least `length`, R/2] fp32."""
        table = self._tables.get(alpha)
        if table is None or len(table[0]) < length:
            rows = max(_SHORTEST, 1 << (length - 1).bit_length())
            rotation = self._rope(torch.arange(rows, device=self._device), alpha)
            table = self._tables[alpha] = rotation.cos.contiguous(), rotation.sin.contiguous()
        return table


def largest_pairs(bias: Tensor, rotary_dim: int) -> Tensor:
    """The bias [K, D] with zeros for all but each head's largest pairs of channels: only a few dwarf the rest.

    Channels that do not turn stay: the softmax sees them as a constant, which costs nothing.
    """
    half = rotary_dim // 2
    size = bias[:, :half].square() + bias[:, half:rotary_dim].square()  # [K, R/2]
    keep = torch.zeros_like(size, dtype=torch.bool).scatter_(1, size.topk(min(_PAIRS, half), dim=1).indices, True)
    rest = keep.new_ones(len(bias), bias.shape[1] - rotary_dim)
    return bias * torch.cat((keep, keep, rest), dim=1)


def turned(bias: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """bias [K, D] at n places, whose cos and sin are [n, R/2] -> [n, K, D] fp32."""
    return rotate(bias.expand(len(places[0]), *bias.shape), Rotation(*places, None))

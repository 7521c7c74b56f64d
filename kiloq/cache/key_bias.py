"""Key biases turned to positions. Knows angles, not slots.

The key projection of Qwen v1 to 2.5 has a bias, a few channels of which dwarf all else: one int8 scale per head would
spend its codes on a constant. Turning is linear, turn(k + b) = turn(k) + turn(b), so the cache keeps turn(k) and the
constant of each position is added when it is read: q . turn(k + b) = scale * (q . codes) + q . turn(b).
"""

import torch
from torch import Tensor

from kiloq.model import Rope, Rotation, rotate

_SHORTEST = 1024  # positions in a new table


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


def turned(bias: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """bias [K, D] at n places, whose cos and sin are [n, R/2] -> [n, K, D] fp32."""
    return rotate(bias.expand(len(places[0]), *bias.shape), Rotation(*places, None))

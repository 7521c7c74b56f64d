"""Attention over rows of equal length that hold several pieces: fixed shapes, so that a compiled step never recompiles.

PackedAttend says what it means; this is its fast twin for training, where rows are always full.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class RowAttend:
    """Each token sees its own past within its piece. No piece may cross a row.

    `pieces` are the offsets [0, n0, ..., T], `seq_len` divides T, `windows` is ModelConfig.windows.
    """

    def __init__(
        self, pieces: Sequence[int], windows: Sequence[int | None], *, seq_len: int, dtype: torch.dtype, device: str
    ) -> None:
        self.seq_len = seq_len
        offsets = torch.tensor(pieces, device=device)
        lengths = offsets.diff()
        piece = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths).view(-1, seq_len)  # [B, S]
        place = torch.arange(seq_len, device=device)
        behind = place[:, None] - place[None, :]  # [S, S]
        same = piece[:, :, None] == piece[:, None, :]  # [B, S, S]
        biases = {
            window: _bias(same & (behind >= 0) & (behind < (window or seq_len)), dtype) for window in set(windows)
        }
        self.biases = [biases[window] for window in windows]  # per layer [B, 1, S, S]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.unflatten(0, (-1, self.seq_len)).transpose(1, 2) for x in (q, k, v)]  # [T, H, D] -> [B, H, S, D]
        out = F.scaled_dot_product_attention(*rows, attn_mask=self.biases[layer], enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)  # [B, H, S, D] -> [T, H, D]


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    # An additive mask is faster than a boolean one in CPU SDPA: 6.7k against 5.3k tok/s for a whole step.
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[:, None]

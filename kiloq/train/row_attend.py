"""Attention over rows of equal length that hold several pieces, as training runs it.

PackedAttend says what it means; these are its fast twins: with fixed shapes, so that a compiled step never recompiles,
and piece by piece for long rows.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kiloq import ops

_UNIT = 64


class RowAttend:
    """Each token sees its own past within its piece. No piece may cross a row.

    `pieces` are the offsets [0, n0, ..., T], `seq_len` divides T, `windows` is ModelConfig.windows. `block` queries at
    a time see only the keys up to their own end, in plain products that the compiler fuses: on a CPU 12.2k tok/s for a
    whole step where SDPA gives 9.7k (7.3 M parameters, rows of 512). None leaves it to SDPA.
    """

    def __init__(
        self,
        pieces: Sequence[int],
        windows: Sequence[int | None],
        *,
        seq_len: int,
        dtype: torch.dtype,
        device: str,
        block: int | None = None,
    ) -> None:
        self.seq_len, self.block = seq_len, block
        offsets = torch.tensor(pieces, device=device)
        lengths = offsets.diff()
        numbers = torch.arange(len(lengths), device=device)
        piece = torch.repeat_interleave(numbers, lengths, output_size=pieces[-1]).view(-1, seq_len)  # [B, S]
        place = torch.arange(seq_len, device=device)
        behind = place[:, None] - place[None, :]  # [S, S]
        same = piece[:, :, None] == piece[:, None, :]  # [B, S, S]
        biases = {
            window: _bias(same & (behind >= 0) & (behind < (window or seq_len)), dtype) for window in set(windows)
        }
        self.biases = [biases[window] for window in windows]  # per layer [B, 1, S, S]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        q, k, v = (_rows(x, self.seq_len) for x in (q, k, v))
        if self.block is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.biases[layer], enable_gqa=groups > 1)
        else:
            out = self._blocked(self.biases[layer], q, *(x.repeat_interleave(groups, dim=1) for x in (k, v)))
        return out.transpose(1, 2).flatten(0, 1)  # [B, H, S, D] -> [T, H, D]

    def _blocked(self, bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        parts = []
        for start in range(0, self.seq_len, self.block or self.seq_len):
            stop = min(start + (self.block or self.seq_len), self.seq_len)
            scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2)  # [B, H, block, stop]
            weights = torch.softmax(scores.float() + bias[:, :, start:stop, :stop], dim=-1)
            parts.append(weights.to(v.dtype) @ v[:, :, :stop])
        return torch.cat(parts, dim=2)


class PieceAttend:
    """The same one piece after the other: what long rows take on a CPU, where masking all pairs of places of 2,048
    takes three times as long, of 4,096 six to nine times (bf16, forward and backward). A whole step of LoRA with rows
    of 1,024 takes 1.08 to 1.29 times as long with masks (fp32 1.14), with rows of 512 0.83 to 1.12 times (0.11 B, 1 to
    20 pieces a row).

    A piece is padded to a multiple of 64, which causal tokens never see: kernels are made for each length and kept, and
    without it a run of bf16 grew by 2 GB in 60 steps.
    """

    def __init__(self, pieces: Sequence[int], windows: Sequence[int | None]) -> None:
        self.lengths = [end - start for start, end in pairwise(pieces)]
        self.windows = windows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(torch.split(x, self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([self._one(*part, window=self.windows[layer]) for part in parts])

    def _one(self, *part: Tensor, window: int | None) -> Tensor:
        length = len(part[0])
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -length % _UNIT))[None] for x in part)
        return ops.causal_attention(q, k, v, window=window)[0, :length]


def _rows(x: Tensor, seq_len: int) -> Tensor:
    return x.view(-1, seq_len, *x.shape[1:]).transpose(1, 2)  # [T, H, D] -> [B, H, S, D]


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    # An additive mask is faster than a boolean one in CPU SDPA: 6.7k against 5.3k tok/s for a whole step.
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[:, None]

"""How tokens see each other: the door through which the model reaches keys and values, and the cache-free way to do it.

Knows sequences laid end to end; nothing of paged caches (kiloq.cache) or of what the tokens mean.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from kiloq import ops


class Attend(Protocol):
    """How tokens see each other. The model never knows where keys and values are kept."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [T, H, D], k and v: [T, K, D], q and k already turned to their places -> [T, H, D]."""
        ...


class PackedAttend:
    """Whole sequences laid end to end, each seeing only itself and its own past. For training and scoring.

    `seq_starts` are the offsets [0, n0, n0+n1, ..., T]; `windows` is ModelConfig.windows.
    """

    def __init__(self, seq_starts: Sequence[int], windows: Sequence[int | None]) -> None:
        self.lengths = [end - start for start, end in pairwise(seq_starts)]
        self.windows = windows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.windows[layer]
        if len(set(self.lengths)) == 1:
            batch, length = len(self.lengths), self.lengths[0]
            out = ops.causal_attention(*(x.view(batch, length, *x.shape[1:]) for x in (q, k, v)), window=window)
            return out.flatten(0, 1)
        if q.is_cuda:
            return self._padded(q, k, v, window)
        # One call per sequence costs some tens of microseconds and no wasted arithmetic.
        parts = zip(*(torch.split(x, self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([ops.causal_attention(*(x[None] for x in part), window=window)[0] for part in parts])

    def _padded(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        # On a GPU launches cost more than padding; causal tokens never see the padding at their right.
        lengths = torch.tensor(self.lengths, device=q.device)
        real = torch.arange(max(self.lengths), device=q.device)[None] < lengths[:, None]  # [B, S]

        def pad(x: Tensor) -> Tensor:
            return x.new_zeros(*real.shape, *x.shape[1:]).masked_scatter(real[..., None, None], x)

        return ops.causal_attention(pad(q), pad(k), pad(v), window=window)[real]

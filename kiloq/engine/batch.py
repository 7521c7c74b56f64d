"""A step's work as flat arrays. Knows where tokens lie, not how the model computes."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from kiloq.cache import Span

from .scheduler import Work
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of several sequences laid end to end; logits are wanted of the last row of each in `drawing`."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    alphas: Tensor | float  # [T], or one for all
    spans: list[Span]
    drawing: list[Sequence]
    last_rows: Tensor | None  # [len(drawing)]; None if those are all rows in order


def build_batch(works: Items[Work], device: torch.device) -> Batch:
    """Single tokens first and by length, so that attention can take rows of like length together."""
    works = sorted(works, key=lambda work: (work.stop - work.start > 1, work.stop))
    ids: list[int] = []
    positions: list[int] = []
    alphas: list[float] = []
    last_rows: list[int] = []
    drawing: list[Sequence] = []
    for work in works:
        ids += work.sequence.ids[work.start : work.stop]
        positions += range(work.start, work.stop)
        alphas += [work.sequence.alpha] * (work.stop - work.start)
        if work.is_last:
            last_rows.append(len(ids) - 1)
            drawing.append(work.sequence)
    one_alpha = min(alphas) == max(alphas)
    return Batch(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        alphas[0] if one_alpha else torch.tensor(alphas, device=device),
        [Span(work.sequence.table, work.start, work.stop, work.sequence.alpha) for work in works],
        drawing,
        None if len(last_rows) == len(ids) else torch.tensor(last_rows, dtype=torch.int64, device=device),
    )

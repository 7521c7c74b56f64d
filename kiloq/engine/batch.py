"""A step's work as flat arrays. Knows where tokens lie, not how the model computes."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kiloq.cache import Span
from kiloq.model.lora import AdapterRun

from .scheduler import Work
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to be drawn from one row of the logits; the rows behind it belong to the guesses of its sequence."""

    sequence: Sequence
    row: int
    guesses: tuple[int, ...]
    num_right: int = 0

    def is_right(self, token_id: int) -> bool:
        """Whether the token that was drawn is what was guessed."""
        return self.num_right < len(self.guesses) and token_id == self.guesses[self.num_right]

    def next(self) -> "Draw":
        """The draw behind the guess that was right."""
        return replace(self, row=self.row + 1, num_right=self.num_right + 1)


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tokens of one sequence, from position `start` on; logits are wanted of the last `num_logits`."""

    ids: Items[int]
    start: int
    blocks: Items[int]
    alpha: float
    num_logits: int
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of several sequences laid end to end; logits are wanted of N rows."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    alphas: Tensor | float  # [T], or one for all
    spans: list[Span]
    logit_rows: Tensor | None  # [N]; None if those are all rows in order
    draws: list[Draw]  # the first of each sequence
    adapters: list[AdapterRun]  # rows that use one, in order


def build_batch(works: Items[Work], device: torch.device) -> Batch:
    """Single tokens first and by length, so that attention can take rows of like length together; each adapter's rows
    are neighbours."""
    works = sorted(works, key=lambda work: (work.sequence.request.adapter, work.num_rows > 1, work.stop))
    parts: list[Part] = []
    draws: list[Draw] = []
    row = 0
    for work in works:
        sequence = work.sequence
        ids = [*sequence.ids[work.start : work.stop], *work.guesses]
        num_logits = 1 + len(work.guesses) if work.is_last else 0
        parts.append(Part(ids, work.start, sequence.table, sequence.alpha, num_logits, sequence.request.adapter))
        if num_logits:
            draws.append(Draw(sequence, row, work.guesses))
            row += num_logits
    return flat_batch(parts, device, draws)


def flat_batch(parts: Items[Part], device: torch.device, draws: list[Draw]) -> Batch:
    """Parts laid end to end."""
    ids: list[int] = []
    positions: list[int] = []
    alphas: list[float] = []
    rows: list[int] = []
    adapters: list[AdapterRun] = []
    for part in parts:
        if part.adapter:
            start = adapters.pop().start if adapters and adapters[-1].adapter == part.adapter else len(ids)
            adapters.append(AdapterRun(part.adapter, start, len(ids) + len(part.ids)))
        ids += part.ids
        positions += range(part.start, part.start + len(part.ids))
        alphas += [part.alpha] * len(part.ids)
        rows += range(len(ids) - part.num_logits, len(ids))
    one_alpha = min(alphas) == max(alphas)
    return Batch(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        alphas[0] if one_alpha else torch.tensor(alphas, device=device),
        [Span(part.blocks, part.start, part.start + len(part.ids), part.alpha) for part in parts],
        None if len(rows) == len(ids) else torch.tensor(rows, dtype=torch.int64, device=device),
        draws,
        adapters,
    )

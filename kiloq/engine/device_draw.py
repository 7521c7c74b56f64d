"""The choices of kiloq/ops/draw.py for scores on a GPU; only short lists and block sums travel to the host."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kiloq.ops.draw import BAD_LOGITS, COLDEST, DEPTH, NOTHING_ALLOWED, Wish, find_block, invert, kept_mass

_SHORT = 1024  # tokens that are handed over at first; a nucleus is rarely longer


def draw_on_device(logits: Tensor, wishes: Sequence[Wish]) -> list[int]:
    """A token for each row of logits [N, V] fp32 on a GPU, as `draw` gives."""
    scores = _shifted(logits, wishes)
    peaks = scores.amax(1)
    is_bad = (~peaks.isfinite()).tolist()
    scores = _allowed(scores, wishes)
    if any(wish.allowed is not None for wish in wishes):
        peaks = scores.amax(1)
    is_empty = (~peaks.isfinite()).tolist()
    chosen = scores.argmax(1).tolist()
    warm = [i for i, wish in enumerate(wishes) if wish.temperature != 0 and not is_empty[i]]
    for group, choose in (
        ([i for i in warm if wishes[i].has_filters], _choose_short),
        ([i for i in warm if not wishes[i].has_filters], _choose_blocks),
    ):
        if group:
            some = [wishes[i] for i in group]
            heat = torch.tensor([wish.temperature for wish in some], dtype=torch.float32, device=scores.device)
            weights = ((scores[group] - peaks[group, None]) / heat.clamp(min=COLDEST)[:, None]).exp()
            for i, token_id in zip(group, choose(weights, some), strict=True):
                chosen[i] = token_id
    found = zip(is_bad, is_empty, chosen, strict=True)
    return [BAD_LOGITS if bad else NOTHING_ALLOWED if empty else token_id for bad, empty, token_id in found]


def _shifted(scores: Tensor, wishes: Sequence[Wish]) -> Tensor:
    """After penalties and bias; the caller's scores stay as they are."""
    tables = [np.stack([np.full(len(wish.shifts[0]), i), *wish.shifts]) for i, wish in enumerate(wishes) if wish.shifts]
    if not tables:
        return scores
    table = torch.from_numpy(np.concatenate(tables, axis=1)).to(scores.device)  # [4, M], ids are exact in fp64
    where, ids, divide, add = table[0].long(), table[1].long(), table[2].float(), table[3].float()
    scores = scores.clone()
    seen = scores[where, ids]
    scores[where, ids] = torch.where(seen > 0, seen / divide, seen * divide) + add
    return scores


def _allowed(scores: Tensor, wishes: Sequence[Wish]) -> Tensor:
    """-inf where a grammar cannot go on."""
    held = [(i, wish.allowed) for i, wish in enumerate(wishes) if wish.allowed is not None]
    if not held:
        return scores
    allowed = torch.from_numpy(np.stack([flags for _, flags in held])).to(scores.device)
    scores, at = scores.clone(), [i for i, _ in held]
    scores[at] = scores[at].masked_fill(~allowed, -torch.inf)
    return scores


def _choose_short(weights: Tensor, wishes: Sequence[Wish]) -> list[int]:
    size = weights.shape[1]
    count = min(size, max(_SHORT, *(wish.top_k for wish in wishes)))
    heaviest = weights.topk(count)
    sums: list[float] = weights.sum(1).tolist()
    short, ids = heaviest.values.cpu().numpy(), heaviest.indices.cpu().numpy()
    chosen = []
    for i, wish in enumerate(wishes):
        top_k, tokens = wish.top_k, ids[i]
        some = short[i, : top_k or None]
        mass = kept_mass(some, float(some.sum()) if top_k else sums[i], wish)
        if not top_k and len(mass) == count < size:  # the nucleus is longer than the short list
            order = weights[i].sort(descending=True)
            tokens, mass = order.indices.cpu().numpy(), kept_mass(order.values.cpu().numpy(), sums[i], wish)
        chosen.append(int(tokens[invert(mass, wish.uniform * mass[-1])]))
    return chosen


def _choose_blocks(weights: Tensor, wishes: Sequence[Wish]) -> list[int]:
    columns = -(-weights.shape[1] // DEPTH)  # the layout in which ops.draw inverts the whole distribution
    blocks = torch.nn.functional.pad(weights, (0, DEPTH * columns - weights.shape[1])).view(-1, DEPTH, columns)
    sums = blocks.sum(1).cpu().numpy()
    found = [find_block(row, wish.uniform) for row, wish in zip(sums, wishes, strict=True)]
    picked = blocks[torch.arange(len(wishes)), :, [column for column, _ in found]].cpu().numpy()  # [N, DEPTH]
    return [
        invert(inside.cumsum(dtype=np.float64), rest) * columns + column
        for inside, (column, rest) in zip(picked, found, strict=True)
    ]

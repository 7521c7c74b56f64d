"""What the model makes of texts that are given: embeddings, and how likely each token was. Knows no requests, no cache.

Sequences lie end to end and see only themselves. The work comes in parts, so that who generates meanwhile need not
wait for all of it: a part is at most one layer's attention, its MLP over some rows, or the logits of some rows.
"""

from collections.abc import Generator, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kiloq.errors import ContextLengthError, RequestError
from kiloq.model import Transformer
from kiloq.model.transformer import Block

from .limits import check_ids
from .sampler import Sampled, describe

T = TypeVar("T")
Parts = Generator[None, None, T]
"""A result that is made part by part."""

_TOKENS = 1024  # of short sequences that go through the model together, and rows of an MLP at once
_LOGITS = 2**23  # that exist at once: 32 MB


def finished(parts: Parts[T]) -> T:
    """The result, when all parts are done."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            result: T = end.value
            return result


@torch.inference_mode()
def embed_parts(model: Transformer, prompts: Sequence[Sequence[int]], *, max_context: int) -> Parts[list[list[float]]]:
    """A unit vector for each prompt: the mean of its tokens' hidden states after the final norm."""
    vectors: list[list[float]] = []
    for group in _groups(model, prompts, max_context):
        hidden = yield from _hidden(model, group)
        means = [row.float().mean(0) for row in torch.split(hidden, [len(ids) for ids in group])]
        vectors += [F.normalize(mean, dim=0).tolist() for mean in means]
    return vectors


@torch.inference_mode()
def score_parts(
    model: Transformer, prompts: Sequence[Sequence[int]], top: int, *, max_context: int
) -> Parts[list[list[Sampled]]]:
    """Each token of each prompt with its log probability and the `top` likeliest; the first one has none."""
    scores: list[list[Sampled]] = []
    for group in _groups(model, prompts, max_context):
        hidden = yield from _hidden(model, group)
        for ids, rows in zip(group, torch.split(hidden, [len(ids) for ids in group]), strict=True):
            scored = [Sampled(ids[0])]
            for some in torch.split(rows[:-1], max(1, _LOGITS // model.config.vocab_size)):
                wanted = ids[len(scored) : len(scored) + len(some)]
                logits = model.head(some)  # [n, vocab_size]
                scored += [describe(row, token_id, top) for row, token_id in zip(logits, wanted, strict=True)]
                yield
            scores.append(scored)
    return scores


def _groups(model: Transformer, prompts: Sequence[Sequence[int]], max_context: int) -> Iterator[list[Sequence[int]]]:
    """Neighbours that together have _TOKENS tokens at most; RequestError for one that cannot be read."""
    for number, ids in enumerate(prompts):
        if not ids:
            raise RequestError(f"prompts[{number}] is empty; give at least one token.")
        if len(ids) > max_context:
            found = f"prompts[{number}] has {len(ids):,} tokens, but the limit is {max_context:,}"
            raise ContextLengthError(f"{found}. Shorten it, or cut it into several.", limit=max_context)
        check_ids(ids, model.config.vocab_size)
    group: list[Sequence[int]] = []
    for ids in prompts:
        if group and sum(map(len, group)) + len(ids) > _TOKENS:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


def _hidden(model: Transformer, group: Sequence[Sequence[int]]) -> Parts[Tensor]:
    """Hidden states after the final norm, [T, hidden_size], of sequences laid end to end."""
    ids = torch.tensor([token_id for ids in group for token_id in ids], device=model.norm.weight.device)
    rotation, attend = model.packed((0, *accumulate(map(len, group))), ids.device)
    x = model.embed(ids)
    for block in model.blocks:
        assert isinstance(block, Block), type(block)
        x = x + block.attn(block.attn_norm(x), rotation, attend)
        yield
        for rows in torch.split(x, _TOKENS):
            rows.add_(block.mlp(block.mlp_norm(rows)))
            yield
    hidden: Tensor = model.norm(x)
    return hidden

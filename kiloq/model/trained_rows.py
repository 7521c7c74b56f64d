"""Token tables that learn: a few rows of a frozen embedding and head, or both tables whole. Knows no tokenizer.

A vocabulary's tables are large (1.2 GB each for 151,936 x 4,096 in 16 bits), and what a base model lacks for chatting
is two rows of them.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer import Embedding, Linear, TiedHead, Transformer


class Rows(nn.Module):
    """Some rows of a frozen table [V, h], trained as [n, h] of their own, in fp32."""

    token_ids: Tensor

    def __init__(self, table: Tensor, token_ids: Sequence[int]) -> None:
        super().__init__()
        ids = torch.tensor(list(token_ids), device=table.device)
        self.enabled = True  # False: the frozen table alone
        self.values = nn.Parameter(table.detach()[ids].float().clone())
        self.register_buffer("token_ids", ids, persistent=False)

    def patch(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """The ids and values that stand in the frozen table's place now; nothing while it stands alone."""
        return (self.token_ids, self.values) if self.enabled else ()

    def embed(self, ids: Tensor, frozen: Tensor) -> Tensor:
        """What the table gives for these ids, [T, h], with the trained rows in their places."""
        if not self.enabled:
            return frozen
        hits = torch.eq(ids[..., None], self.token_ids)  # [T, n]
        trained = F.embedding(hits.int().argmax(-1), self.values).to(frozen.dtype)
        return torch.where(hits.any(-1, keepdim=True), trained, frozen)

    def project(self, hidden: Tensor, frozen: Tensor) -> Tensor:
        """The table's logits, [N, V], with those of the trained rows in their places."""
        if not self.enabled:
            return frozen
        trained = F.linear(hidden, self.values.to(hidden.dtype))  # [N, n]
        return frozen.index_copy(-1, self.token_ids, trained.to(frozen.dtype))


class RowsEmbedding(Embedding):
    """An embedding with trained rows, and the head of a model that ties the two."""

    def __init__(self, table: nn.Parameter, token_ids: Sequence[int]) -> None:
        nn.Embedding.__init__(self, table.shape[0], table.shape[1], _weight=table)
        self.weight = table
        self.rows = Rows(table, token_ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows.embed(ids, super().forward(ids))

    def project(self, hidden: Tensor) -> Tensor:
        return self.rows.project(hidden, super().project(hidden))


class RowsHead(Linear):
    """A head with trained rows."""

    def __init__(self, table: nn.Parameter, token_ids: Sequence[int]) -> None:
        nn.Linear.__init__(self, table.shape[1], table.shape[0], bias=False, device="meta")
        self.weight = table
        self.rows = Rows(table, token_ids)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rows.project(hidden, super().forward(hidden))


class WholeEmbedding(Embedding):
    """A trained table in fp32 within a network of another type."""

    def __init__(self, table: Tensor) -> None:
        nn.Embedding.__init__(self, table.shape[0], table.shape[1], _weight=table)
        self.out_dtype = table.dtype
        self.weight = nn.Parameter(table.detach().float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.out_dtype)

    def project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight.to(hidden.dtype))


class WholeHead(Linear):
    """A trained head in fp32 within a network of another type."""

    def __init__(self, table: Tensor) -> None:
        nn.Linear.__init__(self, table.shape[1], table.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(table.detach().float().clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight.to(hidden.dtype))


def put_rows(model: Transformer, token_ids: Mapping[str, Sequence[int]]) -> None:
    """Make rows of "embed" and "head" trainable; the rows of a tied table serve as both."""
    if "embed" in token_ids:
        _put_embedding(model, RowsEmbedding(model.get_parameter("embed.weight"), token_ids["embed"]))
    if "head" in token_ids:
        model.head = RowsHead(model.get_parameter("head.weight"), token_ids["head"])


def put_tables(model: Transformer, tables: Iterable[str]) -> None:
    """Make "embed" or "head" or both trainable as a whole; of a tied model, "embed" is both."""
    for table in tables:
        if table == "embed":
            _put_embedding(model, WholeEmbedding(model.get_parameter("embed.weight")))
        else:
            model.head = WholeHead(model.get_parameter("head.weight"))


def trained_tables(model: Transformer) -> list[str]:
    """Which of "embed" and "head" are trained, in rows or whole."""
    trained = {name.partition(".")[0] for name, one in model.named_parameters() if one.requires_grad}
    return [table for table in ("embed", "head") if table in trained]


def _put_embedding(model: Transformer, embedding: Embedding) -> None:
    model.embed = embedding
    if model.config.tie_embeddings:
        model.head = TiedHead(embedding)

"""Low-rank adapters on a model that is shared: y = W x + B (A x) for those rows of a step that want it.

LoRA: Hu et al., arXiv 2106.09685. Knows no file and no request; rows name their adapter, "" being none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer import RMSNorm, Transformer


@dataclass(frozen=True)
class LowRank:
    """The update of one of our fused matrices: `down` is A, [R, K]; `up` is B times its scale, [N, R]."""

    down: Tensor
    up: Tensor

    def like(self, other: Tensor) -> "LowRank":
        """In the type and on the device of another tensor."""
        return LowRank(self.down.to(other), self.up.to(other))

    def rounded(self) -> "LowRank":
        """Its values to bf16."""
        return LowRank(self.down.to(torch.bfloat16), self.up.to(torch.bfloat16))


Adapter = Mapping[str, LowRank]
"""Updates by the name of our module, such as "blocks.0.attn.qkv"; modules without one are left as they are."""


class AdapterRun(NamedTuple):
    """Rows start..stop-1 of a step use this adapter."""

    adapter: str
    start: int
    stop: int


@dataclass
class AdapterRows:
    """The runs of the step that is under way; all adapted layers of a model look here."""

    runs: Sequence[AdapterRun] = field(default=())


class AdaptedLinear(nn.Module):
    """A layer of the shared model, and what each adapter adds to it. [T, K] -> [T, N]."""

    def __init__(self, shared: nn.Module, updates: Mapping[str, LowRank], rows: AdapterRows) -> None:
        super().__init__()
        self.shared = shared
        self._updates = updates
        self._rows = rows

    @property
    def bias(self) -> object:
        return self.shared.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shared(x)
        for adapter, start, stop in self._rows.runs:
            update = self._updates.get(adapter)
            if update is not None:
                out[start:stop] += F.linear(F.linear(x[start:stop], update.down), update.up)
        return out


def adapted(model: Transformer, adapters: Mapping[str, Adapter], rows: AdapterRows) -> Transformer:
    """The same model seen through adapters: every weight is the model's own, each layer looks up its rows."""

    def layer(name: str, _columns: int, _rows: int, _bias: bool) -> nn.Module:
        shared = model.get_submodule(name)
        updates = {
            adapter: update[name].like(model.norm.weight) for adapter, update in adapters.items() if name in update
        }
        return AdaptedLinear(shared, updates, rows) if updates else shared

    seen = Transformer(model.config, linear=layer, embedding=lambda _name, _rows, _columns: model.embed)
    norms = {name: module.weight for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    for name, module in seen.named_modules():
        if isinstance(module, RMSNorm):
            module.weight = norms[name]
    return seen.eval().requires_grad_(False)

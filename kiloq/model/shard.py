"""One network over several processes, each with a share of every block's matrices (Shoeybi et al., arXiv 1909.08053).

Each process has whole heads and matching columns of gate and up, which end in a sum over all; embedding, norms and head
are whole everywhere. Knows no loop and no file.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from kiloq import ops
from kiloq.errors import ConfigError

from .config import ModelConfig
from .transformer import Attention, Block, Linear, RMSNorm, Transformer


@dataclass(frozen=True)
class Cut:
    """Dimension `dim` of a matrix holds `parts` side by side; each process has an equal share of each part."""

    dim: int
    parts: tuple[int, ...]

    def ranges(self, rank: int, ways: int) -> list[tuple[int, int]]:
        """Where in the whole the share of process `rank` of `ways` lies, (start, stop) of each part."""
        starts = accumulate(self.parts[:-1], initial=0)
        return [
            (start + size // ways * rank, start + size // ways * (rank + 1))
            for start, size in zip(starts, self.parts, strict=True)
        ]

    def take(self, whole: Tensor, rank: int, ways: int) -> Tensor:
        """A copy of one process's share."""
        return torch.cat([whole.narrow(self.dim, a, b - a) for a, b in self.ranges(rank, ways)], dim=self.dim)

    def join(self, shares: list[Tensor]) -> Tensor:
        """The whole of all processes' shares, in the order of their ranks."""
        sizes = [size // len(shares) for size in self.parts]
        split = [torch.split(share, sizes, dim=self.dim) for share in shares]
        return torch.cat([one for part in zip(*split, strict=True) for one in part], dim=self.dim)


def plan(config: ModelConfig) -> dict[str, Cut]:
    """How each parameter of a block is cut, by its name within the block; the others are whole everywhere."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv, inner = (queries, keys, keys), config.intermediate_size
    return {
        "attn.qkv.weight": Cut(0, qkv),
        "attn.qkv.bias": Cut(0, qkv),
        "attn.out.weight": Cut(1, (queries,)),
        "mlp.gate_up.weight": Cut(0, (inner, inner)),
        "mlp.down.weight": Cut(1, (inner,)),
    }


def cut_of(cuts: dict[str, Cut], name: str) -> Cut | None:
    """The cut of a parameter by its whole name, such as "blocks.0.attn.qkv.weight"."""
    return cuts.get(".".join(name.split(".")[-3:]))


class Split(Linear):
    """A share of a matrix, of which `ways` processes have one each."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> None:
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)
        self.group, self.ways = group, dist.get_world_size(group)


class SplitColumns(Split):
    """Computes a share of the outputs: its rows in memory are columns of the product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_enter(x, self.group), self.weight, self.bias)


class SplitRows(Split):
    """Takes a share of the inputs; the processes' products are added."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Leave.apply(F.linear(x, self.weight), self.group)  # type: ignore[no-untyped-call]  # torch's, untyped
        return out


class HeadNorm(RMSNorm):
    """The norm of a process's own heads, by the gain of all heads."""

    def __init__(self, gain: nn.Parameter, eps: float, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps, self.group = gain, eps, group

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, _enter(self.weight, self.group), self.eps)


def split(model: Transformer, group: dist.ProcessGroup) -> None:
    """Keep this process's share of every block; all processes of `group` must call it on equal models. Mutates it.

    The model then gives every process the same hidden states and logits; what needs its own keys and values beside it
    (an engine's cache) must count the heads that are here.
    """
    rank, ways = dist.get_rank(group), dist.get_world_size(group)
    config = model.config
    for what in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(config, what) % ways:
            raise ConfigError(
                f"the model's {what} is {getattr(config, what)}, which {ways} processes cannot share equally; "
                "make parallel.tensor a divisor of it."
            )
    cuts = plan(config)
    for block in model.blocks:
        assert isinstance(block, Block), type(block)
        for name, kind in _KINDS.items():
            whole = block.get_submodule(name)
            if type(whole) is not Linear:
                raise ConfigError(
                    "parallel.tensor is set, which shares out plain matrices; with an adapter or a quantised model "
                    "leave it out, and use parallel.kind = fsdp."
                )
            taken = {key: cuts[f"{name}.{key}"].take(one.detach(), rank, ways) for key, one in whole.named_parameters()}
            share = kind(taken["weight"], taken.get("bias"), group).train(whole.training)
            share.requires_grad_(whole.weight.requires_grad)
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, share)
        _split_heads(block.attn, ways, group)


_KINDS: dict[str, type[Split]] = {
    "attn.qkv": SplitColumns,
    "attn.out": SplitRows,
    "mlp.gate_up": SplitColumns,
    "mlp.down": SplitRows,
}


def whole_share(share: Tensor, cut: Cut, group: dist.ProcessGroup) -> Tensor:
    """The whole of a parameter of which each process has a share."""
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, share.contiguous(), group=group)
    return cut.join(shares)


def _split_heads(attention: Attention, ways: int, group: dist.ProcessGroup) -> None:
    attention.heads = [count // ways for count in attention.heads]
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        if isinstance(norm, RMSNorm):
            setattr(attention, name, HeadNorm(norm.weight, norm.eps, group))


def _enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out: Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]  # torch's, untyped
    return out


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Not in place: autograd, recomputation and the compiler know what becomes of the tensors.
    begun = collectives.all_reduce(x.contiguous(), "sum", group)
    summed: Tensor = collectives.wait_tensor(begun)
    return summed


class _Enter(torch.autograd.Function):
    """Each process goes on alone with x; the gradients of all are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return _sum(upstream[0], ctx.group), None


class _Leave(torch.autograd.Function):
    """The values of all processes are added; each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None

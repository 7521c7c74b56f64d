"""A frozen model that learns by small additions: low-rank updates beside its matrices.

LoRA: Hu et al., arXiv 2106.09685; rsLoRA only changes the scale (arXiv 2312.03732); DoRA: Liu et al., arXiv 2402.09353.
Knows no file and no name on disk.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiloq.errors import ConfigError

from .lora import LowRank
from .trained_rows import Rows, trained_tables
from .transformer import Transformer


@runtime_checkable
class Frozen(Protocol):
    """A frozen matrix in few bits that can say what it stands for; dense layers need not."""

    def dense_rows(self, start: int, stop: int) -> Tensor: ...  # [stop - start, K], in the type it computes in


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows start .. start + rows - 1 of a fused matrix have an update of their own rank, which counts `scale` times."""

    start: int
    rows: int
    rank: int
    scale: float

    @property
    def stop(self) -> int:
        return self.start + self.rows


class TrainedLinear(nn.Module):
    """y = W x + scale B A drop(x) + b, where W and b are frozen and shared. [T, K] -> [T, N].

    `down` holds the slices' A above each other, so that one product serves them all; `ups` holds their B. Both are
    fp32; their products run in the type of the frozen layer's output. With DoRA a row n of the matrix is worth
    magnitude_n (W + scale B A)_n / |(W + scale B A)_n|, whose norm carries no gradient (section 4.3); dropout touches
    the low-rank part alone.
    """

    squares: Tensor  # |W_n|^2 of the rows of all slices, under DoRA

    def __init__(
        self,
        shared: nn.Module,
        slices: Sequence[Slice],
        shape: tuple[int, int],
        *,
        dropout: float = 0.0,
        dora: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.slices = tuple(slices)
        self.num_rows, columns = shape
        self.dropout = dropout
        self.enabled = True  # False: the frozen model alone
        self.down = nn.Parameter(torch.zeros(sum(one.rank for one in slices), columns, device=device))
        self.ups = nn.ParameterList(nn.Parameter(torch.zeros(one.rows, one.rank, device=device)) for one in slices)
        self.magnitude: nn.Parameter | None = None
        if dora:
            squares = torch.cat([_dense(shared, one).float().square().sum(1) for one in slices])
            self.register_buffer("squares", squares, persistent=False)
            self.magnitude = nn.Parameter(squares.sqrt())

    @property
    def bias(self) -> Tensor | None:
        bias = self.shared.bias
        return bias if isinstance(bias, Tensor) else None

    def downs(self) -> tuple[Tensor, ...]:
        """A of each slice, [r, K]."""
        return torch.split(self.down, [one.rank for one in self.slices])

    @torch.no_grad()
    def init(self, generator: torch.Generator) -> None:
        """A as PEFT begins it: Kaiming's uniform with a = sqrt(5), which is 1 / sqrt(K) to both sides; B is zero."""
        bound = 1 / math.sqrt(self.down.shape[1])
        for one in self.downs():
            # Drawn on the CPU, so that a seed means the same numbers on every device.
            one.copy_(torch.empty(one.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shared(x)
        if not self.enabled:
            return out
        kept, share = _dropped(x, self.dropout) if self.dropout and self.training else (x, 1.0)
        mixed = F.linear(kept.to(out.dtype), self.down.to(out.dtype)).to(out.dtype)  # [T, K] -> [T, R]
        ups = [up.to(out.dtype) for up in self.ups]
        scales = [one.scale / share for one in self.slices]
        if self.magnitude is None:
            return _add(out, mixed, self.slices, scales, ups)
        lengths = self._row_scales(self.magnitude).to(out.dtype)
        bias = None if self.bias is None else self.bias.to(out.dtype)
        whole = _add(out if bias is None else out - bias, mixed, self.slices, scales, ups) * lengths
        return whole if bias is None else whole + bias

    def _row_scales(self, magnitude: Tensor) -> Tensor:
        """DoRA's magnitude by norm for each of N rows, one where a row has no update."""
        norms, parts = self.row_norms(), torch.split(magnitude, [one.rows for one in self.slices])
        pieces, at = [], 0
        for one, norm, part in zip(self.slices, norms, parts, strict=True):
            pieces += [part.new_ones(one.start - at), part / norm]
            at = one.stop
        return torch.cat([*pieces, magnitude.new_ones(self.num_rows - at)])

    @torch.no_grad()
    def row_norms(self) -> list[Tensor]:
        """|(W + scale B A)_n| of each slice's rows, from |W_n|^2 and products that never make B A."""
        with torch.autocast(self.down.device.type, enabled=False):
            return self._row_norms()

    def _row_norms(self) -> list[Tensor]:
        norms = []
        squares = torch.split(self.squares, [one.rows for one in self.slices])
        for one, down, up, square in zip(self.slices, self.downs(), self.ups, squares, strict=True):
            weight = _dense(self.shared, one)
            crossed = F.linear(weight, down.to(weight.dtype)).float()  # W A^T, [n, r]
            norm = square + 2 * one.scale * (crossed * up).sum(1)
            norms.append((norm + one.scale**2 * ((up @ (down @ down.t())) * up).sum(1)).clamp(min=0).sqrt())
        return norms

    def low_rank(self) -> LowRank:
        """What it adds now, as one update of the whole matrix; the tensors are copies."""
        if self.magnitude is not None:
            raise ConfigError("a DoRA adapter rescales the model's own rows, so it is no update beside them; merge it.")
        up = self.down.new_zeros(self.num_rows, len(self.down))
        at = 0
        for one, part in zip(self.slices, self.ups, strict=True):
            up[one.start : one.stop, at : at + one.rank] = part.detach() * one.scale
            at += one.rank
        return LowRank(self.down.detach().clone(), up)


def put_layers(model: Transformer, layers: Mapping[str, TrainedLinear]) -> None:
    """Put trained layers where the modules that they share stand."""
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(model.training))


def trained_layers(model: nn.Module) -> dict[str, TrainedLinear]:
    """Its low-rank layers by the names of our modules, such as "blocks.0.attn.qkv"."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedLinear)}


def as_adapter(model: Transformer) -> dict[str, LowRank]:
    """The updates as they are now, for an engine that serves the frozen model beside them; copies, not views."""
    tables = trained_tables(model)
    if tables:
        raise ConfigError(
            f"the run trains the model's {' and '.join(tables)}, which an adapter in service cannot change. Serve the "
            "trained network itself."
        )
    return {name: layer.low_rank() for name, layer in trained_layers(model).items()}


@contextmanager
def frozen_alone(model: Transformer) -> Iterator[None]:
    """Within it the model is the one that training began with, all additions left out."""
    added = [one for one in model.modules() if isinstance(one, TrainedLinear | Rows)]
    if len(trained_tables(model)) > sum(isinstance(one, Rows) for one in added):
        raise ConfigError('adapter.embeddings is "full", which keeps no copy of the tables that training began with.')
    for one in added:
        one.enabled = False
    try:
        yield
    finally:
        for one in added:
            one.enabled = True


def _dense(shared: nn.Module, one: Slice) -> Tensor:
    """What rows of a frozen matrix stand for."""
    if isinstance(shared, nn.Linear):
        return shared.weight[one.start : one.stop].detach()
    assert isinstance(shared, Frozen), type(shared)
    return shared.dense_rows(one.start, one.stop).detach()


def _dropped(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """x with that share of its values zeroed, the others as they were, and by what those must be divided.

    On a CPU a value costs 16 random bits and two cheap passes: 1.2 ns forwards and 0.5 ns back in bf16 on one core,
    where F.dropout takes 8.9 ns, and was a quarter of a step.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate), 1.0
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    below = round(rate * 2**16)
    keep = words[: x.numel()].ge_(below - 2**15).view(x.shape)  # 0 or 1
    return x * keep, 1 - below / 2**16


def _add(out: Tensor, mixed: Tensor, slices: Sequence[Slice], scales: Sequence[float], ups: Sequence[Tensor]) -> Tensor:
    """out + scale_i mixed_i up_i^T in each slice's own rows; `out` may be changed."""
    # Selective recomputation, a dispatch mode, keeps products to use them again: those must stay what they were.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        out = out.clone()
    added: Tensor = _AddLowRank.apply(out, mixed, tuple(slices), tuple(scales), *ups)  # type: ignore[no-untyped-call]  # torch's, untyped
    return added


class _AddLowRank(torch.autograd.Function):
    """In place: plain products and sums would write [T, N] three times more, and autograd's views copy gradients."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, mixed: Tensor, slices: tuple[Slice, ...], scales: tuple[float, ...], *ups: Tensor
    ) -> Tensor:
        at = 0
        for one, scale, up in zip(slices, scales, ups, strict=True):
            out[:, one.start : one.stop].addmm_(mixed[:, at : at + one.rank], up.t(), alpha=scale)
            at += one.rank
        ctx.mark_dirty(out)
        ctx.save_for_backward(mixed, *ups)
        ctx.slices, ctx.scales = slices, scales
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        mixed, *ups = ctx.saved_tensors
        (gradient,) = upstream
        mixed_grads, up_grads, at = [], [], 0
        for one, scale, up in zip(ctx.slices, ctx.scales, ups, strict=True):
            rows = gradient[:, one.start : one.stop]
            mixed_grads.append(rows @ up * scale)
            up_grads.append(rows.t() @ mixed[:, at : at + one.rank] * scale)
            at += one.rank
        return gradient, torch.cat(mixed_grads, dim=1), None, None, *up_grads

"""The optimiser: which weights decay, how fast all of them move, and how far one step may go. Knows no data."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kiloq.errors import ConfigError

from .eight_bit import STATE_BYTES, AdamW8bit
from .muon import Cutting, MuonAdamW
from .offload import Offloaded


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) under a warm-up and a cosine that ends at `floor` times the peak.

    `steps` 0 means as many as the recipe's `epochs` take. The first tenth of them, at most 100, warms up, or else
    `warmup_steps`, or `warmup_ratio` of all. `kind` "adamw8bit" keeps its averages in 8 bits, a quarter of the memory;
    "muon" moves the matrices that multiply by orthogonalised momentum, at the same rate. `offload` keeps the state in
    the CPU's memory: slower, and 8 bytes a trained value less on a GPU.
    """

    lr: float
    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    steps: int = 0
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    offload: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0 or not (0 < self.lr < math.inf and self.clip > 0):
            raise ConfigError(
                f"optim has steps {self.steps}, lr {self.lr} and clip {self.clip}; lr and clip must be numbers above "
                "zero, steps zero or more."
            )
        if not (all(0 <= beta < 1 for beta in self.betas) and self.eps > 0 and self.weight_decay >= 0):
            raise ConfigError(
                f"optim has betas {list(self.betas)}, eps {self.eps} and weight_decay {self.weight_decay}; betas must "
                "be from 0 to below 1, eps above zero, weight_decay zero or more."
            )
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"optim.floor is {self.floor}; it is a share of lr, from 0 to 1.")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"optim.warmup_ratio is {self.warmup_ratio}; it must be from 0 to below 1.")
        if self.warmup_steps is not None and (self.warmup_steps < 0 or self.warmup_ratio is not None):
            raise ConfigError(
                f"optim.warmup_steps is {self.warmup_steps} and warmup_ratio {self.warmup_ratio}; set one of them, and "
                "no steps below zero."
            )

    @property
    def warmup(self) -> int:
        """How many steps the rate rises."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * self.steps)
        return min(100, math.ceil(self.steps / 10)) if self.warmup_steps is None else self.warmup_steps

    @property
    def state_bytes(self) -> float:
        """Of the optimiser's memory, for each trained value; Muon keeps less for matrices."""
        return STATE_BYTES if self.kind == "adamw8bit" else 8.0


def with_steps(config: OptimConfig, epochs: float, *, epoch_tokens: int, step_tokens: int) -> OptimConfig:
    """The configuration with its number of steps, which may be left open in the recipe."""
    if not config.steps and not 0 < epochs < math.inf:
        raise ConfigError(f"epochs is {epochs}; it must be a number above zero where optim.steps is not set.")
    steps = config.steps or math.ceil(epochs * epoch_tokens / step_tokens)
    return dataclasses.replace(config, steps=steps)


def make_optimizer(
    model: nn.Module,
    config: OptimConfig,
    rates: Mapping[str, float] | None = None,
    cutting: Cutting | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of what requires gradients, its state beside it or on the CPU.

    What begins with a key of `rates` learns so many times as fast as the rest. `cutting` is of weights in parts.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if config.offload:
        return Offloaded(trained, lambda copies: _optimizer(copies, config, rates, cutting))
    return _optimizer(trained, config, rates, cutting)


def _optimizer(
    trained: Mapping[str, nn.Parameter],
    config: OptimConfig,
    rates: Mapping[str, float] | None,
    cutting: Cutting | None,
) -> torch.optim.Optimizer:
    """The decay touches only matrices that multiply; embeddings, norms and biases keep their size."""
    # An embedding row moves only when its token occurs; decay would shrink rare tokens to nothing.
    decayed = [one for name, one in trained.items() if one.ndim >= 2 and ".embed." not in f".{name}"]
    kept = [one for name, one in trained.items() if one.ndim < 2 or ".embed." in f".{name}"]
    if config.kind == "muon":
        if rates:
            raise ConfigError("optim.kind muon moves all matrices at one rate, and this run has two; use adamw.")
        # The head is an embedding turned round: its rows are tokens, which AdamW suits.
        matrices = {
            name: one
            for name, one in trained.items()
            if any(one is matrix for matrix in decayed) and ".head." not in f".{name}"
        }
        rest = [one for name, one in trained.items() if name not in matrices]
        return MuonAdamW(
            matrices,
            [[one for one in rest if isinstance(one, DTensor) == is_part] for is_part in (False, True)],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            cutting=cutting,
        )
    groups: list[dict[str, object]] = []
    faster = {id(p): rate for key, rate in (rates or {}).items() for n, p in trained.items() if n.startswith(key)}
    # No kernel moves parts of weights and whole ones together.
    in_parts = dict.fromkeys(isinstance(one, DTensor) for one in trained.values())
    for rate, is_part in product(dict.fromkeys((1.0, *faster.values())), in_parts):
        for some, decay in ((decayed, config.weight_decay), (kept, 0.0)):
            params = [p for p in some if faster.get(id(p), 1.0) == rate and isinstance(p, DTensor) == is_part]
            groups.append({"params": params, "weight_decay": decay, "rate": rate})
    if config.kind == "adamw8bit":
        return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of step 0, 1, ...: linear to the peak, then half a cosine down to floor * peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.lr * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Mutates every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale all gradients so that their joint norm is at most `limit`; the norm before. Not finite: nothing scaled."""
    with_grad = [p for p in parameters if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None]))
    if math.isfinite(norm) and norm > limit:
        torch.nn.utils.clip_grads_with_norm_(with_grad, limit, torch.tensor(norm))
    return norm

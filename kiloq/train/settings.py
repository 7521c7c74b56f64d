"""What any run may set: its batches, its optimiser, how it goes about its steps. Plain values; nothing is done here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from kiloq.errors import ConfigError
from kiloq.model import Recompute

from .journal import Report
from .optim import OptimConfig
from .ranges import Count


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """A step trains `accumulate` micro-batches of `tokens` flat tokens in rows of `seq_len`, on all ranks together."""

    seq_len: int = 512
    tokens: int = 4096
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.seq_len < 2 or self.tokens < 1 or self.tokens % self.seq_len:
            raise ConfigError(
                f"batch.tokens is {self.tokens} and batch.seq_len {self.seq_len}; a micro-batch holds whole rows, "
                "so tokens must be a multiple of seq_len, and accumulate at least 1."
            )

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.tokens * self.accumulate

    def by_rows(self) -> "BatchConfig":
        """The same steps with one row a micro-batch."""
        return replace(self, tokens=self.seq_len, accumulate=self.step_tokens // self.seq_len)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run goes about its steps; nothing here changes what is learned, except `precision` and `spike`.

    `checkpointing` "selective" recomputes what is cheap in the backward pass, "full" whole blocks; true and false are
    its older words for full and none. A step whose loss or gradient jumps is told (`spike` "warn"), told and left out
    ("skip"), or ends the run before it harms ("stop"). `report` names what gets the figures besides log.jsonl.
    """

    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    checkpointing: Literal["none", "selective", "full", True, False] = "none"
    spike: Literal["warn", "skip", "stop"] = "warn"
    report: tuple[Report, ...] = ("tensorboard",)
    log_every: int = 10
    eval_every: int = 250
    eval_tokens: Count = 65_536
    save_every: int = 250
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        every = {"log_every": self.log_every, "eval_every": self.eval_every, "save_every": self.save_every}
        for name, steps in every.items():
            if steps < 1:
                raise ConfigError(f"loop.{name} is {steps}; it must be at least 1 step.")
        if self.max_minutes is not None and not self.max_minutes >= 0:
            raise ConfigError(f"loop.max_minutes is {self.max_minutes}; it must be zero (one step) or more.")

    @property
    def recompute(self) -> Recompute:
        """`checkpointing` in today's words."""
        if isinstance(self.checkpointing, bool):
            return "full" if self.checkpointing else "none"
        return self.checkpointing


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes that torchrun starts share a run; one process alone needs none of it.

    `kind` "ddp" keeps the whole model in each process, "fsdp" a part of each weight (FSDP2); "auto" takes the first
    where weights, gradients and moments fill less than half of the memory of each, else the second. `reshard` false
    keeps gathered weights from the forward to the backward pass: more memory, less traffic. `sync` "micro" adds up
    gradients over the processes after every micro-batch instead of once a step: more traffic, but nowhere a whole
    model's gradients. "deepspeed" is ZeRO-2 or ZeRO-3 as the DeepSpeed file `config` says. `tensor` processes share
    every block of one model (tensor parallel) and train the same batches; what `kind` says holds between such groups.
    """

    kind: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    config: str = ""
    reshard: bool = True
    sync: Literal["step", "micro"] = "step"
    tensor: Count = 1

    def __post_init__(self) -> None:
        if bool(self.config) != (self.kind == "deepspeed"):
            raise ConfigError(
                f"parallel.kind is {self.kind} and parallel.config {self.config!r}; a DeepSpeed file belongs to kind "
                "deepspeed, and to no other."
            )
        if self.tensor > 1 and self.kind == "deepspeed":
            raise ConfigError(
                f"parallel.tensor is {self.tensor} with kind deepspeed, which knows nothing of models in shares; take "
                "kind ddp or fsdp, or leave tensor out."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the loop needs to know of a recipe. Parameters whose names begin with a key of `rates` learn so many times
    as fast as the others."""

    batch: BatchConfig
    optim: OptimConfig
    loop: LoopConfig
    rates: Mapping[str, float] = field(default_factory=dict)

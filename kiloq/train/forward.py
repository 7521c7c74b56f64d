"""A Transformer over a batch as training runs it: on its device, in its precision, compiled where that pays."""

import importlib.util
import shutil
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kiloq.errors import ConfigError
from kiloq.model import Attend, Recompute, Transformer
from kiloq.model.tied import TiedGradient
from kiloq.model.trained_rows import RowsEmbedding, RowsHead
from kiloq.model.transformer import Embedding

from .data import Batch
from .losses import HeadMatrix, chunked_cross_entropy
from .row_attend import PieceAttend, RowAttend
from .settings import BatchConfig, LoopConfig


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes: chosen once, before any weight is read."""

    device: str
    dtype: torch.dtype
    compiled: bool

    @classmethod
    def choose(cls, loop: LoopConfig) -> "Runtime":
        """What "auto" means on this machine."""
        device = choose_device(loop.device)
        compiled = loop.compile == "on" or (loop.compile == "auto" and can_compile(device))
        return cls(device, choose_precision(loop.precision, device), compiled)

    def batch(self, batch: BatchConfig) -> BatchConfig:
        """How a step is computed: in fp32 row by row, so that however it is split into micro-batches, every sum has
        the same terms in the same order. One product over four times the rows would add up in another order. It costs
        nothing: 1,860 tok/s row by row, 1,745 with 8 rows of 512 at once (8.8 M parameters, one core, eager)."""
        return batch.by_rows() if self.dtype == torch.float32 else batch


LONG_ROW = 512
"""Tokens beyond which attention on a CPU goes piece by piece."""


class Forward:
    """Runs `model` over batches of rows of `seq_len`. What an objective holds of each network that it needs.

    Moves the model to the runtime's device. Weights keep their type; products run in the runtime's.
    """

    def __init__(
        self, model: Transformer, runtime: Runtime, *, seq_len: int, checkpointing: Recompute = "none"
    ) -> None:
        if seq_len > model.config.max_length:
            raise ConfigError(
                f"a row would have {seq_len:,} tokens, and the model goes to {model.config.max_length:,}; set "
                "seq_len to at most that, or the length in its config.json."
            )
        is_there = all(one.device == torch.device(runtime.device) for one in (*model.parameters(), *model.buffers()))
        self.model = model if is_there else model.to(runtime.device)  # tensors of a plan cannot be moved
        self.model.checkpointing = checkpointing
        self.runtime, self.seq_len = runtime, seq_len
        self._hidden = model.__call__
        # Of a model in parts the blocks are compiled one by one: what gathers their weights runs between them.
        if runtime.compiled and not isinstance(model, FSDPModule):
            self._hidden = torch.compile(model.forward, dynamic=False)

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [T, hidden_size] in the runtime's type."""
        device, dtype = self.runtime.device, self.runtime.dtype
        ids, positions = batch.ids.to(device), batch.positions.to(device)
        attend = self._attend(batch)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            hidden: Tensor = self._hidden(ids, self.model.rotation(positions), attend).to(dtype)
        return hidden

    def _attend(self, batch: Batch) -> Attend:
        windows, runtime = self.model.config.windows, self.runtime
        if runtime.device == "cpu" and not runtime.compiled and self.seq_len > LONG_ROW:
            return PieceAttend(batch.pieces, windows)
        block = 256 if runtime.device == "cpu" else None
        return RowAttend(
            batch.pieces, windows, seq_len=self.seq_len, dtype=runtime.dtype, device=runtime.device, block=block
        )

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Summed over the batch's trained tokens, a scalar in fp32."""
        targets = batch.targets.to(self.runtime.device)
        return chunked_cross_entropy(self(batch), head_of(self.model), targets)


def head_of(model: Transformer) -> HeadMatrix:
    """The head as losses take it: the matrix, and the rows that are trained in place of some of its own."""
    table = model.embed if model.config.tie_embeddings else model.head
    if isinstance(table, RowsEmbedding | RowsHead):
        return HeadMatrix(table.weight, *table.rows.patch())
    return HeadMatrix(head_weight(model), tied=table.tied if isinstance(table, Embedding) else None)


def share_tied_gradient(model: Transformer, runtime: Runtime) -> Transformer:
    """Let embedding and head make one gradient where they are one trained matrix; the model itself.

    Of one process, where its gradients are its own business. Compiled code cannot hand the gradient over, and on a GPU
    the order in which a token's rows are added is not fixed.
    """
    table = model.embed
    can_share = model.config.tie_embeddings and runtime.device == "cpu" and not runtime.compiled
    if can_share and isinstance(table, Embedding) and table.weight.requires_grad:
        table.tied = TiedGradient()
    return model


def head_weight(model: Transformer) -> Tensor:
    """The matrix behind `model.head`: its own, or the embedding's."""
    return model.get_parameter("embed.weight" if model.config.tie_embeddings else "head.weight")


def choose_device(name: str) -> str:
    """The device of a run: "auto" takes the GPU where there is one. ConfigError for one that is not here."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name != "cpu" and not (has_gpu and name.partition(":")[0] == "cuda"):
        here = f"cpu and {torch.cuda.device_count()} of cuda" if has_gpu else "cpu only"
        raise ConfigError(f"loop.device is {name!r}; this machine has {here}. Set auto, cpu or cuda.")
    return name


def can_compile(device: str) -> bool:
    """True where torch.compile has what it needs: a C++ compiler, or Triton for a GPU."""
    if device == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return importlib.util.find_spec("triton") is not None


def choose_precision(name: str, device: str) -> torch.dtype:
    """bf16 or fp32; "auto" takes bf16 where the processor multiplies it in hardware (GPU, AMX), else fp32."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32

"""The one training loop: batches in, a trained model and a saved run out. Knows no text, recipe or file format."""

import importlib.util
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kiloq.errors import ConfigError, NumericsError
from kiloq.model import Transformer

from .data import Batch
from .journal import Journal
from .losses import chunked_cross_entropy, softmax_loss
from .optim import OptimConfig, clip_gradients, learning_rate, make_optimizer, set_learning_rate
from .row_attend import RowAttend
from .run_folder import STATE_FILE
from .state import Progress, load_state, save_state

Outcome = Literal["finished", "paused"]


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """A step trains `accumulate` micro-batches of `tokens` flat tokens in rows of `seq_len`."""

    seq_len: int = 512
    tokens: int = 4096
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.seq_len < 2 or self.tokens % self.seq_len:
            raise ConfigError(
                f"batch.tokens is {self.tokens} and batch.seq_len {self.seq_len}; a micro-batch holds whole rows, "
                "so tokens must be a multiple of seq_len, and accumulate at least 1."
            )

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.tokens * self.accumulate


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run goes about its steps; nothing here changes what is learned, except `precision`."""

    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    checkpointing: bool = False
    log_every: int = 10
    eval_every: int = 250
    eval_tokens: int = 65_536
    save_every: int = 250
    max_minutes: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the loop needs to know of a recipe."""

    batch: BatchConfig
    optim: OptimConfig
    loop: LoopConfig


class Batches(Protocol):
    """An endless stream of batches whose place can be saved."""

    def next_batch(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


Held = Mapping[str, Callable[[], Iterable[Batch]]]
"""Held-out sets: name -> a function that gives its batches from the start."""


class Trainer:
    """One run in one folder. `run()` goes on from the saved state, if there is one."""

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        *,
        folder: Path,
        config: TrainConfig,
        held: Held | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.batch, self.optim, self.loop = config.batch, config.optim, config.loop
        self.device = choose_device(self.loop.device)
        self.dtype = choose_precision(self.loop.precision, self.device)
        self.model = model.to(self.device).requires_grad_(True).train()
        self.model.checkpointing = self.loop.checkpointing
        self.batches, self.folder, self.held = batches, folder, held or {}
        self.optimizer = make_optimizer(model, self.optim)
        self.notes = notes  # told at the start and kept in the log
        self.progress = Progress()
        self.logged = Progress()  # where the last log line stood
        self.stop_asked = False
        self.compiled = self.loop.compile == "on" or (self.loop.compile == "auto" and can_compile(self.device))
        self.hidden, self.chunk_loss = model.forward, softmax_loss
        if self.compiled:
            self.hidden = torch.compile(model.forward, dynamic=False)
            self.chunk_loss = torch.compile(softmax_loss, dynamic=False)

    @property
    def state_path(self) -> Path:
        return self.folder / STATE_FILE

    def run(self) -> Outcome:
        """Train until the last step, the time limit or a signal; the state is saved whichever comes first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = load_state(self.state_path, model=self.model, optimizer=self.optimizer)
        if saved is not None:
            self.progress, stream = saved
            self.batches.restore(stream)
        self.logged = replace(self.progress)
        started = time.monotonic()
        with Journal(self.folder, step=self.progress.step) as journal, self._stopping_on_signals():
            for note in self.notes:
                journal.note(self.progress.step, note)
            while self.progress.step < self.optim.steps:
                self._step(journal)
                minutes = (time.monotonic() - started) / 60
                if self.stop_asked or (self.loop.max_minutes is not None and minutes >= self.loop.max_minutes):
                    break
            self.save()
            finished = self.progress.step >= self.optim.steps
            if not finished:
                journal.say(f"paused at step {self.progress.step:,}; the same command goes on from here")
        return "finished" if finished else "paused"

    def save(self) -> None:
        """Put the whole state on disk."""
        save_state(
            self.state_path,
            model=self.model,
            optimizer=self.optimizer,
            progress=self.progress,
            stream=self.batches.state(),
        )

    def evaluate(self) -> dict[str, float]:
        """Mean loss per trained token of each held-out set."""
        self.model.eval()
        losses = {}
        with torch.no_grad():
            for name, batches in self.held.items():
                total, trained = 0.0, 0
                for batch in batches():
                    total += self._loss(batch).item()
                    trained += batch.trained
                losses[name] = total / max(1, trained)
        self.model.train()
        return losses

    def _step(self, journal: Journal) -> None:
        began = time.monotonic()
        step, loop = self.progress.step, self.loop
        rate = learning_rate(self.optim, step)
        set_learning_rate(self.optimizer, rate)
        micro = [self.batches.next_batch() for _ in range(self.batch.accumulate)]
        # One count for the whole step: the mean over its tokens, however they are split (transformers#34191).
        trained = max(1, sum(batch.trained for batch in micro))
        loss = 0.0
        for batch in micro:
            part = self._loss(batch) / trained
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        norm = clip_gradients(self.model.parameters(), self.optim.clip)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NumericsError(
                f"step {step + 1:,}: loss is {loss}, gradient norm {norm}. The last good state is in "
                f"{self.state_path}; lower optim.lr or use loop.precision = fp32, then run again."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step = step = step + 1
        self.progress.tokens += self.batch.step_tokens
        self.progress.seconds += time.monotonic() - began
        if step % loop.log_every == 0 or step in (1, self.optim.steps):
            self._log(journal, loss=loss, lr=rate, grad_norm=norm)
        if self.held and (step % loop.eval_every == 0 or step == self.optim.steps):
            losses = self.evaluate()
            journal.write(step, {f"eval/{name}": value for name, value in losses.items()})
            journal.say(f"step {step:,}  held out  " + "  ".join(f"{n} {v:.3f}" for n, v in losses.items()))
        if step % loop.save_every == 0:
            self.save()

    def _loss(self, batch: Batch) -> Tensor:
        """Summed loss of one micro-batch."""
        ids, targets, positions = (x.to(self.device) for x in (batch.ids, batch.targets, batch.positions))
        attend = RowAttend(
            batch.pieces,
            self.model.config.windows,
            seq_len=self.batch.seq_len,
            dtype=self.dtype,
            device=self.device,
            block=256 if self.compiled and self.device == "cpu" else None,
        )
        with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.hidden(ids, self.model.rotation(positions), attend).to(self.dtype)
        return chunked_cross_entropy(hidden, head_weight(self.model), targets, chunk_loss=self.chunk_loss)

    def _log(self, journal: Journal, *, loss: float, lr: float, grad_norm: float) -> None:
        speed = (self.progress.tokens - self.logged.tokens) / (self.progress.seconds - self.logged.seconds)
        self.logged = replace(self.progress)
        journal.write(
            self.progress.step,
            {
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": self.progress.tokens,
                "tokens_per_second": round(speed, 1),
                "seconds": round(self.progress.seconds, 3),
            },
        )
        journal.say(
            f"step {self.progress.step:,}/{self.optim.steps:,}  loss {loss:.3f}  lr {lr:.1e}  norm {grad_norm:.2f}  "
            f"{speed / 1000:.1f}k tok/s  {self.progress.tokens / 1e6:.2f}M tokens"
        )

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        def ask(number: int, frame: object) -> None:
            self.stop_asked = True
            signal.signal(number, signal.SIG_DFL)  # asked twice, it stops at once; the state on disk is whole

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are someone else's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def head_weight(model: Transformer) -> Tensor:
    """The matrix behind `model.head`: its own, or the embedding's."""
    return model.get_parameter("embed.weight" if model.config.tie_embeddings else "head.weight")


def choose_device(name: str) -> str:
    """The device of a run: "auto" takes the GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


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

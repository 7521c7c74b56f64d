"""The one training loop: batches in, trained parameters and a saved run out. Knows no text, recipe or method."""

import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Generic, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from kiloq.errors import CheckpointError, ConfigError, NumericsError

from .forward import Runtime
from .heap import keeping_freed
from .journal import Journal
from .meter import Meter, clock
from .objective import B, Batches, Loss, Objective, Watch
from .optim import learning_rate, make_optimizer, set_learning_rate
from .parallel import Alone, Parallel
from .settings import TrainConfig
from .state import STATE_FOLDER, Progress, in_one_line, load_state, save_state, trained_parameters
from .watchdog import remember, spike

Outcome = Literal["finished", "paused"]


class Trainer(Generic[B]):
    """One run in one folder. `run()` goes on from the saved state, if there is one.

    What of `module` requires gradients is trained, and nothing else is saved; `objective` holds the same module.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective[B],
        batches: Batches[B],
        *,
        folder: Path,
        config: TrainConfig,
        watch: Watch[B] | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.batch, self.optim, self.loop = config.batch, config.optim, config.loop
        self.module, self.batches = module.train(), batches
        self.folder, self.watch = folder, watch or Watch()
        if parallel is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("this method trains in one process; run it without torchrun.")
        self.parallel = parallel or Alone()
        if not trained_parameters(module):
            raise ConfigError("no parameter is to be trained; the recipe freezes all of them.")
        if self.batch.accumulate % self.parallel.world:
            raise ConfigError(
                f"a step has {self.batch.accumulate} micro-batches (accumulate) for {self.parallel.world} "
                "processes; it must be a multiple of them."
            )
        is_tensor = self.parallel.processes != self.parallel.world
        if self.parallel.is_sharded and (self.optim.offload or (self.optim.kind == "adamw8bit" and is_tensor)):
            raise ConfigError(
                f"optim.kind is {self.optim.kind} and offload {self.optim.offload}, and weights are in parts: offload "
                "takes whole weights (set parallel.kind = ddp and tensor = 1), adamw8bit no tensor above 1."
            )
        cutting = self.parallel if self.parallel.is_sharded else None
        self.optimizer = make_optimizer(module, self.optim, config.rates, cutting)
        self.meter = Meter(module, Runtime.choose(self.loop), steps=self.optim.steps, world=self.parallel.processes)
        self.objective, self.optimizer = self.parallel.adopt(module, objective, self.optimizer, config)
        self.progress = Progress()
        self.logged = Progress()  # where the last log line stood
        self.stop_asked = False

    @property
    def state_path(self) -> Path:
        return self.folder / STATE_FOLDER

    def run(self) -> Outcome:
        """Train until the last step, the time limit or a signal; the state is saved whichever comes first."""
        try:
            self.state_path.mkdir(parents=True, exist_ok=True)
            with keeping_freed(), self.parallel.noticing():
                return self._run()
        except (OSError, CheckpointException) as error:
            raise CheckpointError(
                f"the run in {self.folder} broke off: {in_one_line(error)}. A state that was saved before is whole: "
                "mend that, or make room, and the same command goes on from it."
            ) from error

    def _run(self) -> Outcome:
        saved = load_state(self.folder, module=self.module, optimizer=self.optimizer, parallel=self.parallel)
        if saved is not None:
            self.progress, stream = saved
            try:
                self.batches.restore(stream)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"the saved state in {self.state_path} is not of this kind of run: its place in the data cannot be "
                    f"read ({type(error).__name__}: {error}). Use another out folder, or remove that one."
                ) from error
        self.logged = replace(self.progress)
        started = time.monotonic()
        begin, steps, report = self.progress.step, self.optim.steps, self.loop.report
        journal = Journal(self.folder, step=begin, steps=steps, report=report, writes=self.parallel.is_first)
        with journal, self._stopping_on_signals():
            for note in self.watch.notes:
                journal.note(self.progress.step, note)
            if self.watch.before and self.watch.held and self.progress.step == 0:
                self._report_held(journal)
            while self.progress.step < self.optim.steps:
                self._step(journal)
                minutes = (time.monotonic() - started) / 60
                in_time = self.loop.max_minutes is None or minutes < self.loop.max_minutes
                if self.parallel.any(self.stop_asked or not in_time):
                    break
            self.save()
            finished = self.progress.step >= self.optim.steps
            if not finished:
                journal.say(f"paused at step {self.progress.step:,}; the same command goes on from here")
        return "finished" if finished else "paused"

    def save(self) -> None:
        """Put the whole state on disk."""
        save_state(
            self.folder,
            module=self.module,
            optimizer=self.optimizer,
            progress=self.progress,
            stream=self.batches.state(),
            parallel=self.parallel,
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Of each held-out set: the mean loss, and what else the objective measures."""
        self.module.eval()
        means = {}
        with torch.no_grad():
            for name, batches in self.watch.held.items():
                sums, count = _Sums(), 0
                for batch, is_counted in self._shares(batches()):
                    sums.add(self.objective(batch), weight=int(is_counted))
                    count += batch.count * is_counted
                means[name] = self._means(sums, *self.parallel.total([count]))
        self.module.train()
        return means

    def _step(self, journal: Journal) -> None:
        began = time.monotonic()
        step, loop = self.progress.step, self.loop
        rate = learning_rate(self.optim, step)
        set_learning_rate(self.optimizer, rate)
        # All processes draw the same batches, so that the place in the data is the same whatever their number.
        drawn = [self.batches.next_batch() for _ in range(self.batch.accumulate)]
        micro = drawn[self.parallel.rank :: self.parallel.world]
        # One count for the whole step: the mean over its tokens, however they are split (transformers#34191).
        count, size = self.parallel.total([sum(x.count for x in micro), sum(x.size for x in micro)])
        sums = _Sums()
        for number, batch in enumerate(micro, 1):
            with self.parallel.gathering(self.module, is_last=number == len(micro)):
                loss = self.objective(batch)
                self.parallel.backward(loss.total / max(1, count))
            sums.add(loss)
        means = self._means(sums, count)
        norm = self.parallel.clip(self.module, self.optim.clip)
        if not math.isfinite(means["loss"]) or not math.isfinite(norm):
            raise NumericsError(
                f"step {step + 1:,}: loss is {means['loss']}, gradient norm {norm}. The last good state is in "
                f"{self.state_path}; lower optim.lr or use loop.precision = fp32, then run again."
            )
        if self._is_fit(journal, {"loss": means["loss"], "grad_norm": norm}):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step = step = step + 1
        self.progress.tokens += round(size)
        self.progress.seconds += time.monotonic() - began
        journal.advance(step)
        if step % loop.log_every == 0 or step in (1, self.optim.steps):
            self._log(journal, means, lr=rate, grad_norm=norm)
        if self.watch.held and (step % loop.eval_every == 0 or step == self.optim.steps):
            self._report_held(journal)
        if step % loop.save_every == 0:
            self.save()

    def _is_fit(self, journal: Journal, values: dict[str, float]) -> bool:
        """Whether the step may be taken. Decided by what the state holds, so that a run that goes on decides alike."""
        recent, number = self.progress.recent, self.progress.step + 1
        found = spike(recent, values)
        remember(recent, values)
        if found is None:
            return True
        place = ", ".join(f"{key} {at}" for key, at in self.batches.state().items() if key in ("epoch", "index"))
        told = f"step {number:,}: {found}; the data stood at {place or 'an unnamed place'}"
        if self.loop.spike == "stop":
            raise NumericsError(
                f"{told}. Nothing was learned from it; the last saved state is in {self.state_path}. Look at the data "
                "there, lower optim.lr, or set loop.spike to warn or skip, then run again."
            )
        journal.note(number, f"{told}; {'left out' if self.loop.spike == 'skip' else 'trained all the same'}")
        return self.loop.spike == "warn"

    def _shares(self, batches: Iterable[B]) -> Iterator[tuple[B, bool]]:
        """This process's batches, and whether each counts: all run equally many, for a forward pass may need all."""
        rank, world = self.parallel.rank, self.parallel.world
        left = iter(batches)
        while group := list(islice(left, world)):
            yield group[min(rank, len(group) - 1)], rank < len(group)

    def _means(self, sums: "_Sums", count: float) -> dict[str, float]:
        totals = self.parallel.total(sums.values())
        return {name: total / max(1, count) for name, total in zip(sums.names(), totals, strict=True)}

    def _report_held(self, journal: Journal) -> None:
        step, measured = self.progress.step, self.evaluate()
        for name, means in measured.items():
            journal.write(step, {f"eval/{name}" + (f"/{k}" if k != "loss" else ""): v for k, v in means.items()})
        for name, means in measured.items():
            rest = "".join(f"  {what} {value:.3f}" for what, value in means.items() if what != "loss")
            journal.say(f"step {step:,}  held out  {name} {means['loss']:.3f}{rest}")
        for sample in self.watch.samples():
            journal.note(step, sample)

    def _log(self, journal: Journal, means: dict[str, float], *, lr: float, grad_norm: float) -> None:
        now, then = self.progress, self.logged
        figures = self.meter.read(
            step=now.step,
            steps=now.step - then.step,
            tokens=now.tokens - then.tokens,
            seconds=now.seconds - then.seconds,
        )
        self.logged = replace(now)
        journal.write(
            self.progress.step,
            {
                **means,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": self.progress.tokens,
                "seconds": round(self.progress.seconds, 3),
                **figures,
            },
        )
        shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        journal.say(
            f"step {self.progress.step:,}/{self.optim.steps:,}  {shown}  lr {lr:.1e}  norm {grad_norm:.2f}  "
            f"{figures['tokens_per_second'] / 1000:.1f}k tok/s  MFU {figures['mfu']:.0%}  "
            f"{figures['peak_memory'] / 2**30:.1f} GiB  {now.tokens / 1e6:.2f}M tokens  "
            f"{clock(figures['eta_seconds'])} left"
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


class _Sums:
    """The loss and the measures of a step's micro-batches, added up where they were computed: no wait for a GPU."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, loss: Loss, *, weight: int = 1) -> None:
        for name, value in (("loss", loss.total), *loss.measures.items()):
            exact = value.detach().double() * weight
            self.sums[name] = self.sums[name] + exact if name in self.sums else exact

    def names(self) -> list[str]:
        return list(self.sums)

    def values(self) -> Tensor:
        return torch.stack(list(self.sums.values()))

"""The comparisons of a run, read, packed and counted: what every method that learns from them begins with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from kiloq.chat import chat_format_for
from kiloq.checkpoint import Checkpoint

from .comparisons import Compared, PackedPairs
from .optim import OptimConfig, with_steps
from .samples import Long, Samples
from .settings import BatchConfig
from .sft import ChatSource, HeldOut


class PairRecipe(Protocol):
    """What such a method's recipe says of its data."""

    @property
    def data(self) -> tuple[ChatSource, ...]: ...

    @property
    def held(self) -> tuple[HeldOut, ...]: ...

    @property
    def seed(self) -> int: ...

    @property
    def long(self) -> Long: ...

    @property
    def epochs(self) -> float: ...

    @property
    def batch(self) -> BatchConfig: ...

    @property
    def optim(self) -> OptimConfig: ...


@dataclass(frozen=True)
class PairData:
    """`optim` has its number of steps, and `note` says for the log what was read."""

    stream: PackedPairs
    held: dict[str, PackedPairs]
    optim: OptimConfig
    note: str


def read_pair_data(
    config: PairRecipe,
    checkpoint: Checkpoint,
    read: Callable[[Path, Samples], list[Compared]],
    *,
    apart: bool = False,
) -> PairData:
    """Every file that the recipe names, by `read`; `apart` is as in PackedPairs. DataError names every bad row."""
    fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
    samples = Samples(checkpoint.tokenizer, fmt, seq_len=config.batch.seq_len, long=config.long)
    filler = checkpoint.tokenizer.end_of_text_id
    pack = partial(PackedPairs, batch=config.batch, seed=config.seed, filler=filler, apart=apart)
    stream = pack([(read(Path(source.path), samples), source.repeat) for source in config.data])
    note = f"{samples.tally}; {len(stream):,} micro-batches of an epoch {100 * stream.filled:.1f} % full"
    held = {one.name: pack([(read(Path(one.path), samples), 1.0)]) for one in config.held}
    tokens = {"epoch_tokens": len(stream) * config.batch.tokens, "step_tokens": config.batch.step_tokens}
    return PairData(stream, held, with_steps(config.optim, config.epochs, **tokens), note)

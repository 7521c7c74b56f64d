"""Supervised fine-tuning: conversations and a checkpoint in, a checkpoint that answers out."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from kiloq.chat import chat_format_for
from kiloq.checkpoint import Checkpoint, GenerationDefaults, open_checkpoint
from kiloq.errors import ConfigError

from .adapters import AdapterConfig
from .contract import check_contract, check_saved, first_samples
from .conversations import conversation
from .forward import Forward, Runtime
from .network import read_network, write_network
from .objective import Watch, next_token
from .optim import OptimConfig, with_steps
from .parallel import join
from .preflight import preflight
from .ranges import Count, Range, Seed, Share
from .recipe import to_toml
from .rows import Fault, good_rows, kinds_of
from .run_folder import alone, claim_folder
from .samples import Long, Mask, PackedSamples, Sample, Samples
from .sampling import Answers
from .settings import BatchConfig, LoopConfig, ParallelConfig, TrainConfig
from .state import newest_state
from .trainer import Outcome, Trainer


@dataclass(frozen=True, kw_only=True)
class ChatSource:
    """A file of conversations; an epoch sees each `repeat` times (0.5: another half every epoch)."""

    path: str
    repeat: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.repeat < math.inf:
            raise ConfigError(f"the data {self.path} has repeat {self.repeat}; it must be a number from 0 on.")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A file of conversations that is only scored, under `name` in the log."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """What the saved model's generation_config.json recommends; what is not set stays as the starting model has it."""

    temperature: Annotated[float, Range(0)] | None = None
    top_k: Annotated[int, Range(-1)] | None = None
    top_p: Share | None = None
    repetition_penalty: Annotated[float, Range(1e-3)] | None = None
    max_tokens: Count | None = None
    max_window: Count | None = None


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """A whole fine-tuning run. `optim.steps` 0 means as many as `epochs` passes over the data take.

    `mask` "assistant" trains answers and the token that ends them; "qwen1" is the published v1 script's mask, which
    trains every role's control tokens too. `long` says what becomes of conversations beyond batch.seq_len: "cut" after
    the last answer that fits, "drop", or "error". `bad_rows` "skip" leaves out what cannot be read, and counts it. With
    an `adapter` the model is frozen, and the end of the run is the folder out/adapter in place of out/model. `prompts`
    are answered greedily beside the figures of `held`.
    """

    out: str
    model: str
    seed: Seed = 0
    data: tuple[ChatSource, ...]
    held: tuple[HeldOut, ...] = ()
    prompts: tuple[str, ...] = ()
    mask: Mask = "assistant"
    long: Long = "cut"
    bad_rows: Literal["refuse", "skip"] = "refuse"
    epochs: float = 3.0
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    adapter: AdapterConfig | None = None
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@alone
def sft(config: SftConfig, *, try_first: bool = False) -> Outcome:
    """Fine-tune `config.model`, or go on where the run in `config.out` stopped; export when the last step is done.

    A run that has not begun may be tried first, on a copy: see preflight.
    """
    folder = Path(config.out)
    checkpoint = open_checkpoint(config.model)
    runtime = Runtime.choose(config.loop)
    batch = runtime.batch(config.batch)
    fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
    make = partial(Samples, checkpoint.tokenizer, fmt, seq_len=batch.seq_len, mask=config.mask, long=config.long)
    samples = make()
    left_out: list[Fault] | None = [] if config.bad_rows == "skip" else None
    sources = [(_read(samples, source.path, left_out), source.repeat) for source in config.data]
    pack = partial(PackedSamples, seq_len=batch.seq_len, tokens=batch.tokens, seed=config.seed)
    stream = pack(sources, filler=checkpoint.tokenizer.end_of_text_id)
    held = {one.name: pack([(_read(make(), one.path, left_out), 1.0)], filler=stream.filler) for one in config.held}
    optim = with_steps(
        config.optim,
        config.epochs,
        epoch_tokens=len(stream) * batch.seq_len,
        step_tokens=batch.step_tokens,
    )
    generation = answering(checkpoint, config.answer)
    flat = [one for part, _ in sources for one in part]
    notes = _before_step_1(flat, checkpoint, generation)
    notes.insert(0, f"{samples.tally}; {len(stream):,} rows of an epoch {100 * stream.filled:.1f} % full")
    notes += [f"left out: {line}" for line in kinds_of(left_out or [])]
    parallel = join(config.parallel, runtime.device)
    with parallel.first_goes_ahead():
        changes = claim_folder(folder, to_toml(config))
        if try_first and parallel.is_first and newest_state(folder) is None:
            notes.append(preflight(config, checkpoint, flat, generation=generation, runtime=runtime, optim=optim))
    model, trained = read_network(config, checkpoint, runtime, parallel)
    forward = Forward(model, runtime, seq_len=batch.seq_len, checkpointing=config.loop.recompute)
    trainer = Trainer(
        model,
        next_token(forward),
        stream,
        folder=folder,
        config=TrainConfig(batch=batch, optim=optim, loop=config.loop),
        parallel=parallel,
        watch=Watch(
            held={name: partial(packed.one_pass, config.loop.eval_tokens) for name, packed in held.items()},
            samples=Answers(model, checkpoint, config.prompts, parallel=parallel).lines,
            notes=[trained, *notes, *changes],
        ),
    )
    outcome = trainer.run()
    if outcome == "finished":
        written = write_network(config, model, checkpoint, generation, parallel)
        if parallel.is_first:
            check_saved(written)
    return outcome


def answering(checkpoint: Checkpoint, answer: AnswerConfig) -> GenerationDefaults:
    """The checkpoint's sampling, as a chat model's: an answer ends where the trained end token stands."""
    wished = {name: value for name, value in dataclasses.asdict(answer).items() if value is not None}
    tokenizer = checkpoint.tokenizer
    stops = (tokenizer.im_end_id, tokenizer.im_start_id, *checkpoint.generation.stop_ids)
    return dataclasses.replace(
        checkpoint.generation, chat_format="chatml", stop_ids=tuple(dict.fromkeys(stops)), **wished
    )


def text_stream(
    checkpoint: Checkpoint, sources: Sequence[ChatSource], batch: BatchConfig, *, seed: int = 0
) -> PackedSamples:
    """Conversations beside a run of another kind: to see what it does to the rest, or to train on them too."""
    fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
    samples = Samples(checkpoint.tokenizer, fmt, seq_len=batch.seq_len)
    read = [(_read(samples, source.path), source.repeat) for source in sources]
    filler = checkpoint.tokenizer.end_of_text_id
    return PackedSamples(read, seq_len=batch.seq_len, tokens=batch.tokens, seed=seed, filler=filler)


def _read(samples: Samples, path: str, left_out: list[Fault] | None = None) -> list[Sample]:
    return samples.read(good_rows(Path(path), conversation, left_out))


def _before_step_1(samples: list[Sample], checkpoint: Checkpoint, generation: GenerationDefaults) -> list[str]:
    """What the log should know of the data; on a terminal some samples are shown whole."""
    tokenizer = checkpoint.tokenizer
    notes = check_contract(samples, tokenizer, generation, vocab_size=checkpoint.config.vocab_size)
    if not sys.stderr.isatty():
        return [*notes, *first_samples(samples, tokenizer, whole=False)]
    print(*first_samples(samples, tokenizer, whole=True), sep="\n", file=sys.stderr)
    return notes

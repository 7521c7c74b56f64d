"""Pre-training: text files and a model's shape in, a base checkpoint in Qwen v1 layout out."""

import json
import math
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kiloq.checkpoint import GenerationDefaults, load_dense, open_checkpoint
from kiloq.errors import ConfigError, DataError
from kiloq.model import ModelConfig, RopeConfig, Transformer
from kiloq.tokenizer import Tokenizer

from .data import PackedBatches, TokenFolder, held_out_batches, write_tokens
from .forward import Forward, Runtime
from .objective import Watch, next_token
from .optim import OptimConfig, with_steps
from .parallel import join
from .ranges import Seed
from .recipe import to_toml
from .rows import good_rows
from .run_folder import alone, claim_folder, export
from .settings import BatchConfig, LoopConfig, ParallelConfig, TrainConfig
from .texts import document
from .trainer import Outcome, Trainer


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """A Qwen v1 model. `vocab_multiple` pads the embedding's rows; `trained_length` is v1's seq_length."""

    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    intermediate_size: int = 688
    trained_length: int = 512
    max_length: int = 8192
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    dynamic_ntk: bool = True
    logn: bool = True
    vocab_multiple: int = 64


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Documents to learn from: rows with "text" (JSON lines, a JSON list, Parquet), a .txt as one document, either also
    as .gz, or a folder of tokens.

    `repeat` is how often one epoch sees them (0.5: every other piece). Every `holdout_every`-th document (1: all)
    is kept for evaluation, under the name `group` (or the source's own).
    """

    name: str
    path: str
    repeat: float = 1.0
    group: str = ""
    holdout_every: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.repeat < math.inf or self.holdout_every < 0:
            raise ConfigError(
                f"the data {self.name} has repeat {self.repeat} and holdout_every {self.holdout_every}; both must be "
                "numbers from 0 on."
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A whole pre-training run; `out` is the run's folder. `epochs` counts where optim.steps is 0.

    `start` is a checkpoint of this shape and vocabulary whose weights the run begins with, instead of random ones.
    """

    out: str
    tokenizer: str
    start: str = ""
    seed: Seed = 0
    epochs: float = 1.0
    model: ShapeConfig = field(default_factory=ShapeConfig)
    data: tuple[TextSource, ...]
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@alone
def pretrain(config: PretrainConfig) -> Outcome:
    """Train, or go on where the run in `config.out` stopped; export when the last step is done."""
    folder = Path(config.out)
    tokenizer = Tokenizer.load(config.tokenizer)
    model_config = qwen1_config(config.model, tokenizer.size)
    runtime = Runtime.choose(config.loop)
    parallel = join(config.parallel, runtime.device)
    batch = runtime.batch(config.batch)
    with parallel.first_goes_ahead():
        changes = claim_folder(folder, to_toml(config))
        trained, held = _token_folders(config, tokenizer)
    size = {"seq_len": batch.seq_len, "tokens": batch.tokens}
    stream = PackedBatches(trained, seed=config.seed, **size)
    optim = with_steps(config.optim, config.epochs, epoch_tokens=stream.epoch_tokens, step_tokens=batch.step_tokens)
    model = parallel.spread(_first_weights(config, model_config).requires_grad_(True), runtime)
    forward = Forward(model, runtime, seq_len=batch.seq_len, checkpointing=config.loop.recompute)
    trainer = Trainer(
        model,
        next_token(forward),
        stream,
        folder=folder,
        config=TrainConfig(batch=batch, optim=optim, loop=config.loop),
        parallel=parallel,
        watch=Watch(
            held={n: partial(held_out_batches, f, limit=config.loop.eval_tokens, **size) for n, f in held.items()},
            notes=[f"{model_config.num_parameters:,} parameters, {stream.epoch_tokens:,} tokens an epoch", *changes],
        ),
    )
    outcome = trainer.run()
    if outcome == "finished" and parallel.gather(model):
        end = tokenizer.end_of_text_id
        # max_tokens and top_p as the published base models of v1 have them.
        generation = GenerationDefaults(
            stop_ids=(end,),
            pad_id=end,
            chat_format="raw",
            max_window=model_config.max_length,
            max_tokens=512,
            top_p=0.8,
        )
        export(folder / "model", model, tokenizer, generation)
    return outcome


def _first_weights(config: PretrainConfig, shape: ModelConfig) -> Transformer:
    """Random weights, or those of the checkpoint that the run starts from."""
    if not config.start:
        model = Transformer(shape)
        model.init_weights(torch.Generator().manual_seed(config.seed))
        return model
    checkpoint = open_checkpoint(config.start)
    if checkpoint.config != shape:
        names = [f.name for f in fields(shape) if getattr(shape, f.name) != getattr(checkpoint.config, f.name)]
        raise ConfigError(f"start {config.start} has another {', '.join(names)} than the recipe; make them equal.")
    return load_dense(checkpoint, dtype=torch.float32)


def qwen1_config(shape: ShapeConfig, tokens: int) -> ModelConfig:
    """The model configuration of a v1 shape for a vocabulary of `tokens` ids."""
    head_dim, rest = divmod(shape.hidden_size, shape.num_heads)
    if rest:
        raise ConfigError(f"model.hidden_size {shape.hidden_size} is not a multiple of num_heads {shape.num_heads}.")
    return ModelConfig(
        family="qwen",
        vocab_size=-(-tokens // shape.vocab_multiple) * shape.vocab_multiple,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        head_dim=head_dim,
        intermediate_size=shape.intermediate_size,
        qkv_bias=True,
        tie_embeddings=shape.tie_embeddings,
        rope=RopeConfig(
            theta=shape.rope_theta,
            rotary_dim=head_dim,
            kind="qwen1" if shape.dynamic_ntk else "plain",
            original_length=shape.trained_length,
        ),
        logn_length=shape.trained_length if shape.logn else None,
        windows=(None,) * shape.num_layers,
        max_length=shape.max_length,
    )


def _token_folders(
    config: PretrainConfig, tokenizer: Tokenizer
) -> tuple[list[tuple[TokenFolder, float]], dict[str, list[TokenFolder]]]:
    """(token folder, repeat) of all sources to train on, and the held-out folders of each group."""
    trained: list[tuple[TokenFolder, float]] = []
    held: dict[str, list[TokenFolder]] = {}
    for source in config.data:
        folder = Path(source.path)
        if not (folder / "tokens.npy").exists():
            folder = Path(config.out) / "tokens" / source.name
            _tokenize(source, tokenizer, folder)
        if source.holdout_every != 1:
            trained.append((TokenFolder(folder), source.repeat))
        if source.holdout_every:
            held.setdefault(source.group or source.name, []).append(TokenFolder(folder / "held"))
    return trained, held


def _tokenize(source: TextSource, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the source as token folders, one to train on and one held out, unless they are there already."""
    path = Path(source.path)
    try:
        stamp = [
            str(path.resolve()),
            path.stat().st_size,
            path.stat().st_mtime_ns,
            source.holdout_every,
            tokenizer.size,
        ]
    except OSError as error:
        raise DataError(f"data source {source.name}: {path} cannot be read: {error.strerror}.") from error
    made = folder / "made_from.json"
    if _stamp_in(made) == stamp:
        return
    made.unlink(missing_ok=True)  # a kill from here on leaves folders that nothing vouches for
    kept: list[npt.NDArray[np.uint32]] = []
    held: list[npt.NDArray[np.uint32]] = []
    for number, one in enumerate(good_rows(path, document)):
        out = held if source.holdout_every and number % source.holdout_every == 0 else kept
        out.append(np.array([*tokenizer.encode(one.text), tokenizer.end_of_text_id], dtype=np.uint32))
    if source.holdout_every != 1:
        write_tokens(folder, kept, tokenizer.size)
    if source.holdout_every:
        write_tokens(folder / "held", held, tokenizer.size)
    unfinished = made.with_suffix(".part")
    unfinished.write_text(json.dumps(stamp), encoding="utf-8")
    unfinished.replace(made)


def _stamp_in(made: Path) -> object:
    """What the token folders were made from; None where that cannot be told."""
    try:
        return json.loads(made.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

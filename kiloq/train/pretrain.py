"""Pre-training: text files and a model's shape in, a base checkpoint in Qwen v1 layout out."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from kiloq.checkpoint import GenerationDefaults, save_checkpoint
from kiloq.errors import ConfigError
from kiloq.model import ModelConfig, RopeConfig, Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.train import read_texts

from .data import PackedBatches, TokenFolder, held_out_batches, write_tokens
from .optim import OptimConfig
from .recipe import to_toml
from .trainer import BatchConfig, LoopConfig, Outcome, Trainer


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
    """Documents to learn from: .jsonl[.gz] rows with "text", a .txt[.gz] as one document, or a folder of tokens.

    `repeat` is how often one epoch sees them (0.5: every other piece). Every `holdout_every`-th document is kept for
    evaluation, under the name `group` (or the source's own).
    """

    name: str
    path: str
    repeat: float = 1.0
    group: str = ""
    holdout_every: int = 0


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A whole pre-training run; `out` is the run's folder, relative to where the command is run."""

    out: str
    tokenizer: str
    seed: int = 0
    model: ShapeConfig = field(default_factory=ShapeConfig)
    data: tuple[TextSource, ...]
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig
    loop: LoopConfig = field(default_factory=LoopConfig)


def pretrain(config: PretrainConfig) -> Outcome:
    """Train from random weights, or go on where the run in `config.out` stopped; export when the last step is done."""
    folder = Path(config.out)
    tokenizer = Tokenizer.load(config.tokenizer)
    model_config = qwen1_config(config.model, tokenizer.size)
    claim_folder(folder, to_toml(config))
    trained, held = _token_folders(config, tokenizer, model_config.vocab_size)
    size = {"seq_len": config.batch.seq_len, "tokens": config.batch.tokens}
    model = Transformer(model_config)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    trainer = Trainer(
        model,
        PackedBatches(trained, seed=config.seed, **size),
        folder=folder,
        batch=config.batch,
        optim=config.optim,
        loop=config.loop,
        held={n: partial(held_out_batches, f, limit=config.loop.eval_tokens, **size) for n, f in held.items()},
    )
    outcome = trainer.run()
    if outcome == "finished":
        export(folder / "model", model, tokenizer, chat=False)
    return outcome


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


def claim_folder(folder: Path, recipe: str) -> None:
    """Put the whole recipe in the run's folder; refuse a folder that holds another run."""
    path = folder / "recipe.toml"
    if path.exists():
        before = path.read_text(encoding="utf-8").splitlines()
        fixed = [line for line in recipe.splitlines() if line not in before and not _may_change(line)]
        if fixed and (folder / "state.pt").exists():
            raise ConfigError(
                f"{folder} holds a run with other settings ({fixed[0]} is new). Use another out folder, or remove it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe, encoding="utf-8")


def export(folder: Path, model: Transformer, tokenizer: Tokenizer, *, chat: bool) -> None:
    """Write the trained weights as a checkpoint that kiloq and the first Qwen's readers load."""
    end = tokenizer.end_of_text_id
    defaults = GenerationDefaults(
        stop_ids=(tokenizer.im_end_id, tokenizer.im_start_id) if chat else (end,),
        pad_id=end,
        chat_format="chatml" if chat else "raw",
        max_window=model.config.max_length,
    )
    state = {name: tensor.detach().cpu().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_checkpoint(folder, model_state=state, config=model.config, tokenizer=tokenizer, generation=defaults)


def _may_change(line: str) -> bool:
    name = line.partition("=")[0].strip()
    return name in ("max_minutes", "log_every", "eval_every", "eval_tokens", "save_every", "steps", "lr", "floor")


def _token_folders(
    config: PretrainConfig, tokenizer: Tokenizer, vocab_size: int
) -> tuple[list[tuple[TokenFolder, float]], dict[str, list[TokenFolder]]]:
    """Token folders of all sources, made once in the run's folder: (folder, repeat) to train on, and held-out ones."""
    trained: list[tuple[TokenFolder, float]] = []
    groups: dict[str, list[TokenFolder]] = {}
    root = Path(config.out) / "tokens"
    for source in config.data:
        path = Path(source.path)
        if (path / "tokens.npy").exists():
            trained.append((TokenFolder(path), source.repeat))
            continue
        folder = root / source.name
        if not (folder / "starts.npy").exists():
            documents = [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in read_texts([path])]
            held = documents[:: source.holdout_every] if source.holdout_every else []
            kept = [d for i, d in enumerate(documents) if not source.holdout_every or i % source.holdout_every]
            if held:
                write_tokens(folder / "held", held, vocab_size)
            write_tokens(folder, kept, vocab_size)
        trained.append((TokenFolder(folder), source.repeat))
        if source.holdout_every:
            groups.setdefault(source.group or source.name, []).append(TokenFolder(folder / "held"))
    return trained, groups

"""The [adapter] table of a recipe: what of a frozen model is trained, from new or from a folder, into a folder.

LoRA, rsLoRA and DoRA are in kiloq.model.trained_lora; PEFT's files in kiloq.checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kiloq.checkpoint import Checkpoint
from kiloq.checkpoint.adapter import (
    LARGEST_RANK,
    PartUpdate,
    StoredAdapter,
    TokenRows,
    matrix_parts,
    read_stored_adapter,
)
from kiloq.checkpoint.adapter_config import read_settings
from kiloq.checkpoint.adapter_writer import write_adapter
from kiloq.checkpoint.fingerprint import Base
from kiloq.checkpoint.names import SCORE, Part
from kiloq.checkpoint.weights import empty_model, parameter_shapes
from kiloq.errors import CheckpointError, ConfigError
from kiloq.model import ModelConfig, Transformer
from kiloq.model.trained_lora import Slice, TrainedLinear, put_layers, trained_layers
from kiloq.model.trained_rows import Rows, put_rows, put_tables, trained_tables
from kiloq.tokenizer.vocabulary import IM_END, IM_START

from .run_folder import replacing
from .state import newest_state

ALL_LINEAR = "all-linear"
SCORE_FILE = "score.safetensors"  # a reward model's row, beside an adapter's own files


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Train low-rank updates beside a frozen model; the defaults are those of the reference's finetune.py.

    `targets` are ends of the names that linear layers have on disk ("c_attn", "q_proj", "mlp.c_proj"); none, or
    "all-linear", is all of the blocks. `embeddings` "rows" trains the rows of <|im_start|>, <|im_end|> and `tokens` in
    embedding and head, "full" both tables whole; "auto" is "rows" where a base model learns to chat or `tokens` names
    some, else "none". `start` is an adapter's folder to go on from: its shape counts, not the one given here.
    `quantization` rounds the frozen matrices of a 16-bit model while they are loaded (Q-LoRA, arXiv 2305.14314); a
    quantised checkpoint keeps its codes.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    embeddings: Literal["auto", "none", "rows", "full"] = "auto"
    tokens: tuple[str, ...] = ()
    start: str | None = None
    quantization: Literal["int8", "int4", "nf4"] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= LARGEST_RANK or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"adapter has rank {self.rank}, alpha {self.alpha} and dropout {self.dropout}; rank must be from "
                f"1 to {LARGEST_RANK:,}, alpha above zero, dropout from 0 to less than 1."
            )

    def scale(self, rank: int) -> float:
        """alpha / rank, or by its root (rsLoRA, arXiv 2312.03732)."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


def attach(
    model: Transformer, checkpoint: Checkpoint, config: AdapterConfig, *, seed: int = 0, is_chat: bool = True
) -> None:
    """Freeze the model and put into it what is trained. `is_chat` says that the run trains ChatML's conversations."""
    start = None if config.start is None else read_stored_adapter(config.start, model.config)
    model.requires_grad_(False)
    if start is None:
        attach_new(model, config, token_ids=_wanted_tokens(checkpoint, config, is_chat=is_chat), seed=seed)
    else:
        put_layers(model, _layers_of(model, start, config.dropout))
        _fill_tables(model, start)


def attach_new(model: Transformer, config: AdapterConfig, *, token_ids: Sequence[int] = (), seed: int = 0) -> None:
    """Put into a frozen model updates that change nothing yet, and the rows of these tokens."""
    put_layers(model, _new_layers(model, config, seed))
    _open_tables(model, token_ids, config)


def counts(model: Transformer) -> tuple[int, int]:
    """How many parameters are trained, and how many there are, frozen ones of few bits included."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    low_rank = sum(one.numel() for layer in trained_layers(model).values() for one in _own(layer))
    rows = sum(module.values.numel() for module in model.modules() if isinstance(module, Rows))
    return trained, model.config.num_parameters + low_rank + rows


def describe(model: Transformer) -> str:
    """One line for the start of a run's log."""
    trained, total = counts(model)
    tables = trained_tables(model)
    inside = [
        one.numel() for name, one in model.named_parameters() if name.partition(".")[0] in tables and one.requires_grad
    ]
    more = f", {sum(inside):,} of them in {' and '.join(tables)}" if tables and trained < total else ""
    return f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %){more}"


def begun_elsewhere(config: AdapterConfig, base: Base) -> str:
    """A warning for the end of that line where the run goes on from an adapter of another model: rightly so if one is
    the other in few bits, and in vain otherwise."""
    before = None if config.start is None else Base.read(Path(config.start))
    if before is None or before.fingerprint == base.fingerprint:
        return ""
    return f"; {config.start} was trained on {before.model or before.folder}, whose weights are not this model's"


def stored(model: Transformer, config: AdapterConfig) -> StoredAdapter:
    """What is trained, as it is now, in the form that files hold."""
    begun = None if config.start is None else read_settings(Path(config.start))
    layers = trained_layers(model)
    rows, tables = {}, {}
    for table in trained_tables(model):
        module = model.get_submodule(table)
        if isinstance(own := getattr(module, "rows", None), Rows):
            rows[table] = TokenRows(tuple(own.token_ids.tolist()), own.values.detach())
        else:
            tables[table] = model.get_parameter(f"{table}.weight").detach()
    listed = _by_module(matrix_parts(model.config))
    named = {name: tuple(_updates(layer, listed[name])) for name, layer in layers.items()}
    ranks = [one.rank for layer in layers.values() for one in layer.slices]
    return StoredAdapter(
        updates=named,
        rows=rows,
        tables=tables,
        rank=max(set(ranks), key=ranks.count) if ranks else config.rank,
        alpha=config.alpha if begun is None else begun.alpha,
        dropout=config.dropout,
        is_rank_stabilised=config.rslora if begun is None else begun.is_rank_stabilised,
    )


def export(
    folder: Path,
    model: Transformer,
    config: AdapterConfig,
    *,
    base: Base | None = None,
    generation: Mapping[str, object] | None = None,
    score: Tensor | None = None,
) -> None:
    """Write what is trained as a folder that PEFT reads, with a reward model's `score` row; replaces what an earlier
    end of the same run left there."""
    with replacing(folder) as new:
        write_adapter(new, stored(model, config), model.config, base=base, generation=generation)
        if score is not None:
            save_file({SCORE: score}, new / SCORE_FILE)


def claim_base(run: Path, base: Base) -> None:
    """Note in a run's folder which model it trains; ConfigError where a run that has begun trains another."""
    before = Base.read(run)
    if before is not None and newest_state(run) is not None and before.fingerprint != base.fingerprint:
        raise ConfigError(
            f"{run} holds a run on {before.model or before.folder} ({before.short}), and the model is now "
            f"{base.model or base.folder} ({base.short}). Give the first one, or use another out folder."
        )
    run.mkdir(parents=True, exist_ok=True)
    base.write(run)


def targeted(config: ModelConfig, targets: Sequence[str]) -> list[Part]:
    """The matrices that these names mean; ConfigError for a name that means none."""
    every = {part.tensor.removesuffix(".weight"): part for part in matrix_parts(config)}
    known = list(every)
    wanted = known if tuple(targets) in ((), (ALL_LINEAR,)) else []
    for target in targets if not wanted else ():
        meant = [name for name in known if name == target or name.endswith(f".{target}")]
        if not meant:
            ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in known)
            raise ConfigError(
                f"adapter.targets has {target!r}; the linear layers of this {config.family} model are "
                f"{', '.join(ends)}."
            )
        wanted = [*wanted, *meant]
    chosen = set(wanted)
    return [part for name, part in every.items() if name in chosen]


def _new_layers(model: Transformer, config: AdapterConfig, seed: int) -> dict[str, TrainedLinear]:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, listed in _by_module(targeted(model.config, config.targets)).items():
        slices = [_slice(part, config.rank, config.scale(config.rank)) for part in listed]
        layers[name] = _layer(model, name, slices, dropout=config.dropout, dora=config.dora)
        layers[name].init(generator)
    return layers


def _layers_of(model: Transformer, start: StoredAdapter, dropout: float) -> dict[str, TrainedLinear]:
    layers = {}
    for name, updates in start.updates.items():
        slices = [_slice(one.part, len(one.down), one.scale) for one in updates]
        layer = layers[name] = _layer(model, name, slices, dropout=dropout, dora=start.is_dora)
        with torch.no_grad():
            for down, up, one in zip(layer.downs(), layer.ups, updates, strict=True):
                down.copy_(one.down)
                up.copy_(one.up)
            if layer.magnitude is not None:
                layer.magnitude.copy_(torch.cat([one.magnitude for one in updates if one.magnitude is not None]))
    return layers


def _layer(model: Transformer, name: str, slices: Sequence[Slice], *, dropout: float, dora: bool) -> TrainedLinear:
    shape = parameter_shapes(empty_model(model.config))[f"{name}.weight"]
    return TrainedLinear(
        model.get_submodule(name),
        slices,
        (shape[0], shape[1]),
        dropout=dropout,
        dora=dora,
        device=model.norm.weight.device,
    )


def _wanted_tokens(checkpoint: Checkpoint, config: AdapterConfig, *, is_chat: bool) -> list[int]:
    """The tokens whose rows "rows" trains. A model is a base model if its own files end no answer with <|im_end|>."""
    special = checkpoint.tokenizer.vocabulary.special
    if unknown := [name for name in config.tokens if name not in special]:
        raise ConfigError(f"adapter.tokens has {unknown[0]!r}, which is no added token of {checkpoint.folder}.")
    is_base = checkpoint.generation.chat_format == "raw"
    control = [special[IM_START], special[IM_END]] if is_chat and (is_base or config.embeddings == "rows") else []
    return list(dict.fromkeys([*control, *(special[name] for name in config.tokens)]))


def _open_tables(model: Transformer, token_ids: Sequence[int], config: AdapterConfig) -> None:
    if config.embeddings == "full":
        put_tables(model, _tables(model.config))
    elif token_ids and config.embeddings != "none":
        put_rows(model, dict.fromkeys(_tables(model.config), token_ids))


def _fill_tables(model: Transformer, start: StoredAdapter) -> None:
    if model.config.tie_embeddings and "head" in {*start.tables, *start.rows}:
        raise CheckpointError(
            "the adapter brings an embedding and a head, but the model ties the two; merge it into the model and train "
            "that."
        )
    put_tables(model, list(start.tables))
    put_rows(model, {table: rows.ids for table, rows in start.rows.items()})
    with torch.no_grad():
        for table, whole in start.tables.items():
            model.get_parameter(f"{table}.weight").copy_(whole)
        for table, rows in start.rows.items():
            model.get_parameter(f"{table}.rows.values").copy_(rows.values)


def _tables(config: ModelConfig) -> tuple[str, ...]:
    return ("embed",) if config.tie_embeddings else ("embed", "head")


def _updates(layer: TrainedLinear, listed: Sequence[Part]) -> Iterator[PartUpdate]:
    by_start = {part.start: part for part in listed}
    magnitudes: Sequence[Tensor | None] = [None] * len(layer.slices)
    if layer.magnitude is not None:
        magnitudes = torch.split(layer.magnitude.detach(), [one.rows for one in layer.slices])
    for one, down, up, magnitude in zip(layer.slices, layer.downs(), layer.ups, magnitudes, strict=True):
        yield PartUpdate(by_start[one.start], down.detach(), up.detach(), one.scale, magnitude)


def _own(layer: TrainedLinear) -> list[nn.Parameter]:
    return [layer.down, *layer.ups, *([] if layer.magnitude is None else [layer.magnitude])]


def _slice(part: Part, rank: int, scale: float) -> Slice:
    return Slice(start=part.start, rows=part.shape[0], rank=rank, scale=scale)


def _by_module(listed: Sequence[Part]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in listed:
        found.setdefault(part.parameter.removesuffix(".weight"), []).append(part)
    return found

"""A trained adapter becomes a folder in PEFT's format, which peft on transformers loads. Knows no training."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kiloq.model import ModelConfig

from .adapter import PREFIX, ROWS, WEIGHTS_FILE, PartUpdate, StoredAdapter, matrix_parts
from .adapter_config import CONFIG_FILE
from .files import write_json
from .fingerprint import Base
from .names import parts
from .writer import new_folder


def write_adapter(
    folder: str | Path,
    adapter: StoredAdapter,
    config: ModelConfig,
    *,
    base: Base | None = None,
    generation: Mapping[str, object] | None = None,
) -> None:
    """Write a new folder, which appears under its name only when it is complete; `base` is told by its hash, no path.

    `generation` is the generation_config.json of the model that the base and the adapter are together.
    """
    with new_folder(Path(folder)) as unfinished:
        raw = _config(adapter, config, base)
        # Sorted and indented as PEFT's own.
        (unfinished / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", "utf-8")
        save_file(_tensors(adapter, config), unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        (unfinished / WEIGHTS_FILE).chmod(0o644)  # the library makes it private
        if base is not None:
            base.write(unfinished)
        if generation is not None:
            write_json(unfinished / "generation_config.json", generation)


def table_names(config: ModelConfig) -> dict[str, str]:
    """The modules on disk of our token tables: "embed" and "head", the latter for a tied model too."""
    shape = (config.vocab_size, config.hidden_size)
    both = parts(config, {"embed.weight": shape, "head.weight": shape})
    return {part.parameter.removesuffix(".weight"): _stem(part.tensor) for part in both}


def _tensors(adapter: StoredAdapter, config: ModelConfig) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for update in _all(adapter):
        stem = f"{PREFIX}{_stem(update.part.tensor)}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = update.down, update.up
        if update.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = update.magnitude
    names = table_names(config)
    tensors |= {f"{PREFIX}{names[table]}{ROWS}": rows.values for table, rows in adapter.rows.items()}
    tensors |= {f"{PREFIX}{names[table]}.weight": whole for table, whole in _tables(adapter, config).items()}
    # Copies: two names for one memory are refused by the format.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _tables(adapter: StoredAdapter, config: ModelConfig) -> Mapping[str, Tensor]:
    """A tied matrix under both names, as PEFT writes it."""
    tied = config.tie_embeddings and set(adapter.tables) == {"embed"}
    return {**adapter.tables, "head": adapter.tables["embed"]} if tied else adapter.tables


def _config(adapter: StoredAdapter, config: ModelConfig, base: Base | None) -> dict[str, object]:
    trained = {_stem(update.part.tensor): update for update in _all(adapter)}
    rank = Counter(len(update.down) for update in trained.values()).most_common(1)[0][0] if trained else adapter.rank
    alphas = {stem: _alpha(update, adapter.is_rank_stabilised) for stem, update in trained.items()}
    names = table_names(config)
    tables = [names[table].rpartition(".")[2] for table in _tables(adapter, config)]
    tokens = {names[table].rpartition(".")[2]: list(rows.ids) for table, rows in adapter.rows.items()}
    return {
        "alpha_pattern": {stem: alpha for stem, alpha in alphas.items() if alpha != _whole(adapter.alpha)},
        "auto_mapping": None,
        "base_model_name_or_path": None if base is None else base.model,
        "bias": "none",
        "ensure_weight_tying": config.tie_embeddings and bool(adapter.tables),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(adapter.alpha),
        "lora_bias": False,
        "lora_dropout": adapter.dropout,
        "modules_to_save": tables or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {stem: len(one.down) for stem, one in trained.items() if len(one.down) != rank},
        "revision": None,
        "target_modules": _targets(trained, [_stem(part.tensor) for part in matrix_parts(config)]),
        "task_type": "CAUSAL_LM",
        # PEFT takes a plain list for the embedding, and for the head that is tied to it.
        "trainable_token_indices": next(iter(tokens.values())) if set(adapter.rows) == {"embed"} else tokens or None,
        "use_dora": adapter.is_dora,
        "use_rslora": adapter.is_rank_stabilised,
    }


def _targets(trained: Iterable[str], known: Iterable[str]) -> list[str]:
    """The shortest ends of names that PEFT takes for just these modules."""
    wanted, everything = set(trained), list(known)
    found: set[str] = set()
    for name in wanted:
        pieces = name.split(".")
        ends = (".".join(pieces[-count:]) for count in range(1, len(pieces) + 1))
        found.add(next(end for end in ends if {one for one in everything if _ends(one, end)} <= wanted))
    return sorted(found)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _alpha(update: PartUpdate, is_rank_stabilised: bool) -> float:
    rank = len(update.down)
    return _whole(update.scale * (rank**0.5 if is_rank_stabilised else rank))


def _whole(alpha: float) -> float:
    """As an integer where it is one but for rounding: PEFT's own files have integers."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


def _all(adapter: StoredAdapter) -> list[PartUpdate]:
    return [update for listed in adapter.updates.values() for update in listed]


def _stem(tensor: str) -> str:
    return tensor.removesuffix(".weight")

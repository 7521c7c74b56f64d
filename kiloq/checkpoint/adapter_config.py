"""What adapter_config.json says, as far as it matters here. Knows PEFT's words, no tensors."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kiloq.errors import CheckpointError

from .files import read_json

CONFIG_FILE = "adapter_config.json"

# What changes the arithmetic in a way that these files' other parts do not show.
_REFUSED = (
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "use_qalora",
    "lora_bias",
    "layer_replication",
)
# Ways to begin that take a part out of the model's own weights, which the update gives back.
_CHANGES_WEIGHTS = ("pissa", "corda", "olora")


@dataclass(frozen=True)
class AdapterSettings:
    """The fields that reading, merging and training go by."""

    path: Path
    rank: int
    ranks: frozenset[int]  # that its matrices may have: `rank`, and those of single modules
    alpha: float
    patterns: Mapping[str, float]
    dropout: float
    is_rank_stabilised: bool
    is_dora: bool
    is_tied: bool  # what is trained of an embedding and a head that are one stays one
    has_tables: bool  # whole copies of modules
    token_ids: Mapping[str, tuple[int, ...]]  # by the end of a module's name; "" is the embedding

    def scale(self, module: str, rank: int) -> float:
        """rsLoRA (arXiv 2312.03732) divides by the root of the rank. A pattern is a name, or a regular expression's end
        of one, as in PEFT."""
        matching = [value for key, value in self.patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
        alpha = matching[0] if matching else self.alpha
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_settings(folder: Path) -> AdapterSettings:
    """Of an adapter's folder; CheckpointError for what no reader of ours can compute."""
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give that of an adapter in PEFT's format.")
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r}; kiloq reads LORA.")
    for key in _REFUSED:
        if raw.get(key):
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}, which kiloq cannot compute.")
    begun = str(raw.get("init_lora_weights", True)).lower()
    if begun.startswith(_CHANGES_WEIGHTS):
        raise CheckpointError(
            f"{path}: init_lora_weights is {begun!r}, which belongs to changed weights of the model. Save the adapter "
            "with path_initial_model_for_weight_conversion, which makes a plain one of it."
        )
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {raw['bias']!r}; kiloq takes adapters that train no bias.")
    patterns = raw.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{path}: alpha_pattern is no object.")
    more = raw.get("rank_pattern") or {}
    if not isinstance(more, Mapping):
        raise CheckpointError(f"{path}: rank_pattern is no object.")
    rank = _rank(path, "r", raw.get("r", 8))
    return AdapterSettings(
        path=path,
        rank=rank,
        ranks=frozenset({rank, *(_rank(path, f"rank_pattern.{key}", value) for key, value in more.items())}),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha")),
        patterns={_pattern(path, key): _number(path, f"alpha_pattern.{key}", value) for key, value in patterns.items()},
        dropout=_number(path, "lora_dropout", raw.get("lora_dropout", 0.0)),
        is_rank_stabilised=_flag(path, "use_rslora", raw),
        is_dora=_flag(path, "use_dora", raw),
        is_tied=_flag(path, "ensure_weight_tying", raw),
        has_tables=bool(raw.get("modules_to_save")),
        token_ids=_token_ids(path, raw.get("trainable_token_indices")),
    )


def _token_ids(path: Path, value: object) -> dict[str, tuple[int, ...]]:
    """trainable_token_indices: a list for the embedding, or lists by the end of a module's name."""
    by_name = value if isinstance(value, Mapping) else {} if value is None else {"": value}
    found = {}
    for name, ids in by_name.items():
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise CheckpointError(f"{path}: trainable_token_indices is {value!r:.200}; lists of token ids are needed.")
        found[str(name).rpartition(".")[2]] = tuple(ids)
    return found


def _number(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{path}: {key} is {value!r:.80}; it must be a number.")
    return float(value)


def _rank(path: Path, key: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{path}: {key} is {value!r:.80}; a rank is a whole number of at least 1.")
    return value


def _flag(path: Path, key: str, raw: Mapping[str, object]) -> bool:
    # Another truth value than PEFT's would be another scale, without a word.
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} is {value!r:.80}; it must be true or false.")
    return value is True


def _pattern(path: Path, key: str) -> str:
    # A regular expression from outside could take for ever; PEFT's own files hold names of modules.
    if not re.fullmatch(r"[\w.]{1,200}", key):
        raise CheckpointError(f"{path}: alpha_pattern has {key!r:.200}; kiloq takes names of modules there.")
    return re.escape(key)

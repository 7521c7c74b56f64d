"""What config.json says of a quantised checkpoint, as data. Knows no tensors and no files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from kiloq.errors import ConfigError
from kiloq.model.fields import Fields

FileFormat = Literal["gptq", "gptq_v2", "pack-quantized", "int-quantized"]
"""GPTQ as AutoGPTQ wrote it (zeros less one) and its second version; compressed-tensors in two of its layouts."""

_USE = "Use the unquantised model, or one in GPTQ or compressed-tensors with 4 or 8 bits."


@dataclass(frozen=True, kw_only=True)
class FileQuantization:
    """How the matrices of a checkpoint lie in its files; `group_size` None is one scale a row."""

    format: FileFormat
    bits: Literal[4, 8]
    group_size: int | None
    symmetric: bool

    @property
    def label(self) -> str:
        grouped = "one scale a row" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.format}, {self.bits} bits, {grouped}"

    @classmethod
    def from_hf(cls, raw: object) -> "FileQuantization":
        """Read a quantization_config; ConfigError for one that this version cannot compute."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"quantization_config is {raw!r:.80}; an object is needed.")
        fields = Fields(raw)
        # quantize_config.json of AutoGPTQ, which knows no other method, leaves it out.
        method = fields.first("quant_method") or ("gptq" if "bits" in raw else None)
        if method == "gptq":
            return _from_gptq(fields)
        if method == "compressed-tensors":
            return _from_compressed(fields)
        raise ConfigError(f"quant_method is {method!r}; kiloq reads gptq and compressed-tensors. {_USE}")


def _from_gptq(f: Fields) -> FileQuantization:
    word = str(f.first("checkpoint_format", "format") or "gptq")
    match word:
        case "gptq" | "gptq_v2":
            form: FileFormat = word
        case _:
            raise ConfigError(f"checkpoint_format is {word!r}; kiloq reads gptq and gptq_v2. {_USE}")
    dynamic = f.first("dynamic")
    # "-:" names layers that are not quantised, as their tensors show.
    if dynamic and not (isinstance(dynamic, Mapping) and all(str(key).startswith("-:") for key in dynamic)):
        raise ConfigError(f"quantization_config has `dynamic`, other settings for some layers. {_USE}")
    size = f.first("group_size")
    whole = size is None or size == -1
    return FileQuantization(
        format=form,
        bits=_bits(f.integer("bits")),
        group_size=None if whole else _group_size(f.integer("group_size")),
        symmetric=f.flag("sym", default=True),
    )


def _from_compressed(f: Fields) -> FileQuantization:
    groups = f.first("config_groups")
    if (
        not isinstance(groups, Mapping)
        or len(groups) != 1
        or not isinstance(one := next(iter(groups.values())), Mapping)
    ):
        raise ConfigError(f"config_groups must hold one group of layers with the same settings. {_USE}")
    raw = one.get("weights")
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config_groups says nothing of weights. {_USE}")
    weights = Fields(raw)
    word = str(one.get("format") or f.first("format"))
    if word not in ("pack-quantized", "int-quantized") or weights.first("type") not in (None, "int"):
        known = ", ".join(get_args(FileFormat)[2:])
        raise ConfigError(
            f"the compressed-tensors format is {word!r} of {weights.first('type')}; known: {known}. {_USE}"
        )
    strategy = weights.first("strategy")
    if strategy not in ("group", "channel"):
        raise ConfigError(f"the strategy of quantised weights is {strategy!r}; it must be group or channel. {_USE}")
    bits = _bits(weights.integer("num_bits"))
    symmetric = weights.flag("symmetric", default=True)
    if word == "int-quantized" and (bits, strategy, symmetric) != (8, "channel", True):
        raise ConfigError(f"int-quantized weights must have 8 bits, one scale a row and no zeros. {_USE}")
    return FileQuantization(
        format="pack-quantized" if word == "pack-quantized" else "int-quantized",
        bits=bits,
        group_size=_group_size(weights.integer("group_size")) if strategy == "group" else None,
        symmetric=symmetric,
    )


def _bits(value: int) -> Literal[4, 8]:
    if value not in (4, 8):
        raise ConfigError(f"quantised weights have {value} bits; kiloq computes with 4 and 8. {_USE}")
    return 4 if value == 4 else 8


def _group_size(value: int) -> int:
    if value < 32 or value % 32:
        raise ConfigError(f"group_size is {value}; it must be a multiple of 32, or -1 for whole rows. {_USE}")
    return value

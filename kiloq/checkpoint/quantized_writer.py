"""A quantised model becomes a checkpoint folder that other programs read too: GPTQ or compressed-tensors."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from kiloq.errors import ConfigError
from kiloq.ops.layout import QuantWeight
from kiloq.quant.pack import to_compressed, to_gptq

from .files import read_json, write_json
from .merge import AnyWeights, weights_of
from .names import parts
from .quantized import stem_of
from .reader import Checkpoint
from .writer import new_folder

Layout = Literal["gptq", "compressed-tensors"]

_COPIED = ("*.json", "*.tiktoken", "merges.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_WRITTEN = ("config.json", "quantize_config.json", "*.index.json", "quantize_report.json")


@dataclass
class _Shards:
    """Tensors go to a file when there are enough of them; the files get their names when their number is known."""

    folder: Path
    most_bytes: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: list[list[str]] = field(default_factory=list)
    held: int = 0
    total: int = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self.held and self.held + tensor.nbytes > self.most_bytes:
                self.flush()
            # A copy where it is a part: a shared whole would be kept, and refused by the writer.
            self.tensors[name] = tensor.clone() if tensor._is_view() else tensor.contiguous()
            self.held += tensor.nbytes
            self.total += tensor.nbytes

    def flush(self) -> None:
        path = self.folder / f"{len(self.files)}.part"
        save_file(self.tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes it private
        self.files.append(list(self.tensors))
        self.tensors, self.held = {}, 0

    def finish(self) -> None:
        if self.tensors:
            self.flush()
        count = len(self.files)
        places: dict[str, str] = {}
        for number, names in enumerate(self.files):
            target = f"model-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            (self.folder / f"{number}.part").rename(self.folder / target)
            places |= dict.fromkeys(names, target)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)


def write_quantized(
    folder: Path,
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, QuantWeight]],
    *,
    layout: Layout = "gptq",
    notes: Mapping[str, object] | None = None,
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Write a new folder: these matrices (by our names) in codes, all else as the checkpoint has it.

    GPTQ is of the first version, or of the second where groups have zeros. What the format cannot say beside the
    first matrix (8 bits beside 4) is written plain, as the numbers that its codes stand for. `notes` go into the
    settings of a GPTQ file.
    """
    source = weights_of(checkpoint)
    rest = dict.fromkeys(source.shapes)
    with new_folder(Path(folder)) as unfinished:
        shards = _Shards(unfinished, max_shard_bytes)
        first: QuantWeight | None = None
        plain: list[str] = []
        for name, weight in weights:
            if first is None:
                whole = _is_whole(weight)
                check_layout(layout, 8 if weight.kind == "int8" else 4, None if whole else weight.group_size)
                first = weight
            del rest[name]
            for stem, part in _split(checkpoint, source, name, weight):
                if _alike(part, first):
                    shards.add({f"{stem}.{suffix}": tensor for suffix, tensor in _tensors(part, first, layout, source)})
                else:
                    plain.append(stem)
                    shards.add({f"{stem}.weight": part.dequantize().to(source.dtype)})
        if first is None:
            raise ConfigError("no matrix was quantised; there is nothing to write.")
        for name in rest:
            shards.add(source.read_stored(name))
        shards.finish()
        _write_settings(unfinished, checkpoint, _settings(first, layout, plain, notes or {}), source)
        _copy_small_files(checkpoint.folder, unfinished)
        if checkpoint.adapter is not None:
            generation = checkpoint.generation.to_json(checkpoint.config.family, checkpoint.tokenizer)
            write_json(unfinished / "generation_config.json", generation)


def scale_dtype(layout: Layout, checkpoint: Checkpoint) -> Literal["float16", "bfloat16"]:
    """The type that `write_quantized` will keep scales in, where it is no wider than fp16: grids must allow for it."""
    if layout == "gptq":
        return "float16"
    # Readers multiply by the scales in their own type, which must be the model's.
    source = weights_of(checkpoint)
    return "bfloat16" if source.dtype == torch.bfloat16 else "float16"


def _split(
    checkpoint: Checkpoint, source: AnyWeights, name: str, weight: QuantWeight
) -> Iterator[tuple[str, QuantWeight]]:
    """The matrices on disk that one of ours holds."""
    assert tuple(weight.codes.shape) == source.shapes[name], (name, weight.codes.shape, source.shapes[name])
    for part in parts(checkpoint.config, {name: source.shapes[name]}):
        rows = slice(part.start, part.start + part.shape[0])
        yield (
            stem_of(part.tensor),
            QuantWeight(
                kind=weight.kind,
                group_size=weight.group_size,
                codes=weight.codes[rows],
                scales=weight.scales[rows],
                zeros=None if weight.zeros is None else weight.zeros[rows],
                order=weight.order,
            ),
        )


def _is_whole(weight: QuantWeight) -> bool:
    """Whether a file says of it that a row, however long, has one scale."""
    return weight.kind == "int8" and weight.scales.shape[1] == 1


def _alike(weight: QuantWeight, first: QuantWeight) -> bool:
    """Whether one description fits both."""
    same_groups = _is_whole(weight) if _is_whole(first) else weight.group_size == first.group_size
    return weight.kind == first.kind and same_groups


def _tensors(
    weight: QuantWeight, first: QuantWeight, layout: Layout, source: AnyWeights
) -> Iterator[tuple[str, Tensor]]:
    if layout == "gptq":
        yield from to_gptq(weight, less_one=first.zeros is None).items()
    else:
        yield from to_compressed(weight, source.dtype).items()


def check_layout(layout: Layout, bits: int, group_size: int | None) -> None:
    """ConfigError for what files of this layout cannot hold; `group_size` None is one scale a row."""
    if layout == "compressed-tensors" and bits == 8 and group_size is not None:
        raise ConfigError(
            "compressed-tensors with 8 bits has one scale a row, for programs that compute in int8; leave out the "
            "group size, or write gptq."
        )


def _settings(first: QuantWeight, layout: Layout, plain: list[str], notes: Mapping[str, object]) -> dict[str, object]:
    """The quantization_config."""
    bits, whole = (4 if first.kind == "int4" else 8), _is_whole(first)
    if layout == "gptq":
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": -1 if whole else first.group_size,
            "desc_act": first.order is not None,
            "sym": first.zeros is None,
            "lm_head": False,
            "checkpoint_format": "gptq" if first.zeros is None else "gptq_v2",
            "model_name_or_path": None,
            "model_file_base_name": "model",
            **({"dynamic": {f"-:^{stem.replace('.', chr(92) + '.')}$": {} for stem in plain}} if plain else {}),
            **{name: value for name, value in notes.items() if name != "desc_act"},
        }
    weights: dict[str, object] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": first.zeros is None,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else first.group_size,
        "actorder": "group" if first.order is not None else None,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if whole else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *plain],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs if whole else None,
                "output_activations": None,
            }
        },
    }


def _write_settings(folder: Path, checkpoint: Checkpoint, settings: dict[str, object], source: AnyWeights) -> None:
    raw = read_json(checkpoint.folder / "config.json")
    if checkpoint.adapter is not None:
        raw["tie_word_embeddings"] = checkpoint.config.tie_embeddings
    dtype = str(source.dtype).removeprefix("torch.")
    # transformers 5 writes `dtype` and reads both; files before it have torch_dtype.
    raw |= {"dtype" if "dtype" in raw else "torch_dtype": dtype, "quantization_config": settings}
    write_json(folder / "config.json", raw)
    if settings["quant_method"] == "gptq":
        write_json(folder / "quantize_config.json", settings)


def _copy_small_files(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not any(path.match(written) for written in _WRITTEN):
                shutil.copyfile(path, folder / path.name)

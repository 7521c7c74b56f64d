"""The files of a checkpoint folder: configuration, weight shards and their tensors. Knows no names of tensors."""

import json
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kiloq.errors import CheckpointError, ConfigError
from kiloq.model.config import ModelConfig
from kiloq.quant.config import FileQuantization


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file; its values are read by `read_tensor`. `dtype` is torch's word for it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file of a checkpoint."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is not a complete checkpoint folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; a JSON object is needed.")
    return value


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object as people read it; the file is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    unfinished.replace(path)


def read_config(folder: Path) -> ModelConfig:
    """The model configuration in config.json."""
    try:
        return ModelConfig.from_hf(read_json(folder / "config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from None


def read_quantization(folder: Path) -> FileQuantization | None:
    """How the weights are quantised: from config.json, else from the file that AutoGPTQ wrote; None if they are not."""
    path = folder / "config.json"
    raw = read_json(path).get("quantization_config")
    if raw is None and (folder / "quantize_config.json").is_file():
        path = folder / "quantize_config.json"
        raw = read_json(path)
    try:
        return None if raw is None else FileQuantization.from_hf(raw)
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the shards' own headers; no values are read."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in list_safetensors(file) if file.suffix == ".safetensors" else _list_bin(file):
            if tensor.name in found:
                raise CheckpointError(
                    f"tensor {tensor.name} is in both {found[tensor.name].file} and {file.name}; "
                    "remove the shard that does not belong."
                )
            found[tensor.name] = tensor
    return found


def read_tensor(stored: StoredTensor) -> Tensor:
    """The values. The shard is opened anew and mapped, so that no page of its other tensors stays in memory."""
    if stored.file.suffix == ".safetensors":
        with _open_safetensors(stored.file) as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor
    return _load_bin(stored.file)[stored.name].detach()


def map_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight file, mapped: a value is read from the disk when it is looked at."""
    if path.suffix != ".safetensors":
        yield from _load_bin(path).items()
        return
    with _open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118  # not a dict: the handle itself cannot be iterated
            yield name, file.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one file, the shards of an index, or a complete numbered set; safetensors
    before `.bin`."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _indexed_shards(index)
        numbered = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if numbered:
            return _complete_set(numbered)
    others = sorted(path.name for path in folder.glob("*.gguf")) or sorted(path.name for path in folder.iterdir())
    raise CheckpointError(
        f"{folder} has no weights: neither model*.safetensors nor pytorch_model*.bin is there "
        f"(found {', '.join(others[:6]) or 'nothing'}). Is the download complete?"
    )


def _indexed_shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise CheckpointError(f"{index} has no weight_map; remove the file if the shards are complete.")
    tensor_of: dict[str, str] = {}
    for tensor, name in places.items():
        # An index comes from outside: a shard is a plain file name beside it, never a path.
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or name.startswith("."):
            raise CheckpointError(f"{index} places tensor {tensor} in {name!r}; only a file beside it is accepted.")
        tensor_of[name] = tensor
    present = {path.name for path in index.parent.iterdir() if path.is_file()}
    for name, tensor in tensor_of.items():
        if not name.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{index} places tensor {tensor} in {name!r}, which is no weight file.")
        if name not in present:
            raise CheckpointError(
                f"{index} places tensor {tensor} in {name:.200}, but that file is not there; download it again."
            )
    return [index.parent / name for name in sorted(tensor_of)]


def _complete_set(shards: list[Path]) -> list[Path]:
    counts = {match[1] for path in shards if (match := re.search(r"-of-(\d+)\.", path.name))}
    if len(counts) != 1 or len(shards) != int(next(iter(counts))):
        names = ", ".join(path.name for path in shards[:8])
        raise CheckpointError(f"{shards[0].parent} holds an incomplete or mixed set of shards: {names}.")
    return shards


# safetensors' words for the types that kiloq reads; any other keeps its own word and is refused by the reader.
_DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
}


def list_safetensors(path: Path) -> Iterable[StoredTensor]:
    """The tensors of one file, from its header; no values are read."""
    with _open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118  # not a dict: the handle itself cannot be iterated
            view = file.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype(), view.get_dtype())
            yield StoredTensor(name, path, tuple(view.get_shape()), dtype)


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        reason = _cut_off(path) or f"{error}"
        raise CheckpointError(f"{path} is damaged: {reason}. Remove it and download it again.") from None


def _cut_off(path: Path) -> str | None:
    """What a truncated safetensors file lacks, from its own header: 8 bytes of length, JSON, then the values."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not prefix or 8 + length > size:
            return f"it is cut off inside its header, after {size:,} bytes"
        try:
            header = json.loads(file.read(length))
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if "shape" in entry}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
    lost = sorted(name for name, end in ends.items() if end > size)
    if not lost:
        return None
    return f"it has {size:,} of {max(ends.values()):,} bytes, and tensor {lost[0]} is cut off"


def _list_bin(path: Path) -> Iterable[StoredTensor]:
    for name, tensor in _load_bin(path).items():
        yield StoredTensor(name, path, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it holds pickled objects other than tensors, which could run code "
            f"({_reason(error)}). Use the safetensors form of this model."
        ) from None
    except Exception as error:  # a broken pickle raises whatever its codes stumble over
        raise CheckpointError(
            f"{path} is damaged or cut off: {_reason(error)}. Remove it and download it again."
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path} does not hold tensors by name; it is not a weight file.")
    if empty := [name for name, value in content.items() if value.is_meta]:
        raise CheckpointError(f"{path} holds {empty[0]} as a shape without values; it was saved from no real model.")
    return content


def _reason(error: Exception) -> str:
    """The first line of an error's message; its kind, where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)

"""Which model an adapter belongs to: a hash over its weight files, so that both folders may move. Knows no model.

The hash covers every tensor's name, shape and type, and 16 stretches of 64 bytes of its values, so that 15 GB are known
in seconds. Two trainings of one model differ in it; a change of single rows of a large table may not.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kiloq.errors import CheckpointError

from .adapter_config import CONFIG_FILE
from .files import map_tensors, read_json, weight_files, write_json
from .hub import bundled_names, resolve

BASE_FILE = "kiloq_base.json"  # beside PEFT's two files, which know no hash

_STRETCHES, _STRETCH = 16, 64
_MOST_FOLDERS = 200  # that are looked at as neighbours


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on. `model` is the name it was asked for by, None if that was a path;
    `quantization` what its matrices were rounded to for that, if they were."""

    fingerprint: str
    folder: str  # its last name, for messages
    model: str | None = None
    quantization: str | None = None

    @property
    def short(self) -> str:
        """The beginning of the hash, for messages."""
        return _short(self.fingerprint)

    @classmethod
    def of(cls, folder: Path, model: str | None = None, *, quantization: str | None = None) -> "Base":
        """The base in a folder that was found under this name."""
        name = None if model is None or Path(model).expanduser().is_dir() else model
        return cls(fingerprint(folder), folder.resolve().name, name, quantization)

    def write(self, folder: Path) -> None:
        """Into an adapter's or a run's folder."""
        write_json(folder / BASE_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Base | None":
        """What `write` wrote; None where nobody did."""
        path = folder / BASE_FILE
        if not path.is_file():
            return None
        raw = read_json(path)
        fields = [raw.get(key) for key in ("fingerprint", "folder", "model", "quantization")]
        if not all(isinstance(one, str) for one in fields[:2]) or not all(
            isinstance(one, str | None) for one in fields
        ):
            raise CheckpointError(
                f"{path} must hold the strings fingerprint and folder, and model and quantization or null."
            )
        return cls(*fields)  # type: ignore[arg-type]  # checked above


def fingerprint(folder: str | Path) -> str:
    """The hash of a checkpoint's weights, however they are cut into files."""
    entries = []
    for file in weight_files(Path(folder)):
        for name, tensor in map_tensors(file):
            header = f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
            entries.append((name, header.encode() + _sample(tensor)))
    digest = hashlib.sha256()
    for _, content in sorted(entries):
        digest.update(len(content).to_bytes(8, "little") + content)
    return f"sha256:{digest.hexdigest()}"


def find_base(adapter: str | Path, base: str | Path | None = None) -> Path:
    """The folder of an adapter's base: the one given, one near the adapter, or the one it was trained by the name of.

    An adapter without a fingerprint, as PEFT writes it, is believed.
    """
    adapter = Path(adapter)
    wanted = Base.read(adapter)
    if wanted is None:
        return _named_by_peft(adapter) if base is None else resolve(str(base))
    looked: list[str] = []
    for folder in _candidates(adapter, wanted, base, looked):
        try:
            found = fingerprint(folder)
        except CheckpointError as error:
            if base is not None:
                raise
            looked.append(str(error))  # a neighbour that is damaged is no reason to look no further
            continue
        if found == wanted.fingerprint:
            return folder
        looked.append(f"{folder} is another model ({_short(found)})")
    raise CheckpointError(
        f"{adapter} was trained on {wanted.model or wanted.folder} ({wanted.short}), which was not "
        f"found: {'; '.join(looked) or 'no model lies near it'}. Give the folder of that very model."
    )


def _candidates(adapter: Path, wanted: Base, base: str | Path | None, looked: list[str]) -> Iterator[Path]:
    """Folders that may be the base, the cheapest first; why a name led nowhere is put in `looked`."""
    if base is not None:
        yield resolve(str(base))
        return
    yield from _near(adapter, wanted.folder)
    for name in bundled_names():
        yield resolve(name)
    if wanted.model is not None and wanted.model not in bundled_names():
        try:
            yield resolve(wanted.model)
        except CheckpointError as error:
            looked.append(str(error))


def _near(adapter: Path, name: str) -> Iterator[Path]:
    """Model folders beside the adapter and beside the two folders above it, those of the recorded name first."""
    here = adapter.resolve()
    beside = [entry for above in here.parents[:3] for entry in _folders(above)]
    for entry in sorted(beside[:_MOST_FOLDERS], key=lambda path: path.name != name):
        try:
            if entry != here and (entry / "config.json").is_file():
                weight_files(entry)
                yield entry
        except (CheckpointError, PermissionError):
            continue  # without weights, or another person's


def _folders(above: Path) -> list[Path]:
    try:
        return [entry for entry in sorted(above.iterdir()) if entry.is_dir()]
    except PermissionError:
        return []


def _named_by_peft(adapter: Path) -> Path:
    named = read_json(adapter / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{adapter / CONFIG_FILE} names no base_model_name_or_path; give the base's folder.")
    return resolve(named)


def _sample(tensor: Tensor) -> bytes:
    """Evenly spaced stretches of the values' bytes; of a small tensor, all of them."""
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(values) <= _STRETCHES * _STRETCH:
        return bytes(values.numpy())
    last = len(values) - _STRETCH
    starts = (last * i // (_STRETCHES - 1) for i in range(_STRETCHES))
    return b"".join(bytes(values[start : start + _STRETCH].numpy()) for start in starts)


def _short(digest: str) -> str:
    return digest[: len("sha256:") + 12]

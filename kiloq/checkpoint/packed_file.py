"""Packed matrices kept in a file, so that the next load reads them and rounds nothing. Knows no model.

A safetensors file of our own layout of each matrix, beside the checkpoint or, where nothing can be written there, in
the user's cache. It holds nothing that cannot be made again: one that does not belong to the checkpoint as it is now,
to this kiloq's layout or to itself is made anew.
"""

import hashlib
import json
import logging
import os
import shutil
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kiloq.ops.cpu import aligned_bytes, packed_bytes
from kiloq.ops.layout import KINDS, PackedWeight
from kiloq.ops.structs import VERSION
from kiloq.quant.grid import ROUNDING

logger = logging.getLogger(__name__)

_DTYPES = {torch.uint8: "U8", torch.float32: "F32", torch.int32: "I32"}
_LONGEST_HEADER = 50_000_000  # bytes; a 7B model's has 60,000


@dataclass(frozen=True)
class PackedFile:
    """Where the packed matrices of one checkpoint and rounding would lie, and what they must say of their source."""

    beside: Path
    cached: Path
    key: str

    def read(self) -> dict[str, PackedWeight] | None:
        """Every matrix by name; None where there is no such file, or none that fits."""
        for path in (self.beside, self.cached):
            if not path.is_file():
                continue
            try:
                return _read(path, self.key)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                logger.warning(
                    "%s is not used (%s); packing anew", path, next(iter(str(error).splitlines()), "damaged")
                )
        return None

    def write(self, matrices: Mapping[str, PackedWeight]) -> None:
        """Keep the matrices for the next load; where that fails, there is no file and no harm."""
        size = sum(one.data.nbytes for one in matrices.values())
        for path in (self.beside, self.cached):
            unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if shutil.disk_usage(path.parent).free < 2 * size:
                    continue
                _write(unfinished, matrices, self.key)
                unfinished.replace(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                continue
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
            logger.warning("packed weights are kept in %s (%.2f GB), so that the next load is short", path, size / 1e9)
            return


def packed_file(folder: Path, files: Sequence[Path], what: str) -> PackedFile:
    """The file for the matrices of a checkpoint folder; `files` are its source, `what` how they are rounded."""
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    key = hashlib.sha256(json.dumps([VERSION, ROUNDING, what, states]).encode()).hexdigest()
    place = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kiloq" / "packed"
    name = f"kiloq-packed-{what}.safetensors"
    return PackedFile(folder / f".{name}", cache / f"{place}-{name}", key)


def _write(path: Path, matrices: Mapping[str, PackedWeight], key: str) -> None:
    """By hand, tensor after tensor: the library would hold a second copy of all."""
    facts: dict[str, list[object]] = {}
    tensors: dict[str, Tensor] = {}
    for name, one in matrices.items():
        facts[name] = [one.kind, one.rows, one.columns, one.group_size, one.has_zeros]
        parts = {"data": one.data, "bias": one.bias, "order": one.order}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    header: dict[str, object] = {"__metadata__": {"key": key, "matrices": json.dumps(facts)}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.numpy().data)


def _read(path: Path, key: str) -> dict[str, PackedWeight]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 0 < length <= min(size, _LONGEST_HEADER):
            raise ValueError("it is damaged")
        header = json.loads(file.read(length))
        if header["__metadata__"]["key"] != key:
            raise ValueError("it was made from other files or by another version")
        facts = json.loads(header["__metadata__"]["matrices"])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if 8 + length + max(ends) != size:
            raise ValueError(f"it has {size:,} of {8 + length + max(ends):,} bytes")

        def read(name: str, dtype: torch.dtype, count: int) -> Tensor:
            first, last = header[name]["data_offsets"]
            nbytes = count * dtype.itemsize
            if last - first != nbytes or not 0 <= first <= last <= size:
                raise ValueError(f"{name} has {last - first} bytes, not {nbytes}")
            data = aligned_bytes(nbytes)
            file.seek(8 + length + first)
            if file.readinto(data.numpy().data) != nbytes:
                raise ValueError(f"{name} is cut off")
            return data.view(dtype)

        found = {}
        for name, (kind, rows, columns, group_size, has_zeros) in facts.items():
            if kind not in KINDS:
                raise ValueError(f"{name} is of kind {kind!r}")
            nbytes = packed_bytes(kind, rows, columns, group_size, has_zeros=has_zeros)
            order = read(f"{name}.order", torch.int32, columns) if f"{name}.order" in header else None
            # The kernels read inputs by it.
            if order is not None and not torch.equal(order.sort().values, torch.arange(columns, dtype=torch.int32)):
                raise ValueError(f"{name} has no proper order")
            found[name] = PackedWeight(
                kind=kind,
                rows=rows,
                columns=columns,
                group_size=group_size,
                has_zeros=has_zeros,
                data=read(f"{name}.data", torch.uint8, nbytes),
                bias=read(f"{name}.bias", torch.float32, rows) if f"{name}.bias" in header else None,
                order=order,
            )
        return found

"""The index of a saved state: which tensors lie where in its files. Knows nothing of runs.

It is a pickle, and someone else may have written it: it is read with exactly the classes that it consists of.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

_PLACES = "torch.distributed.checkpoint.metadata"
_CONTENT = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (_PLACES, "Metadata"),
        (_PLACES, "MetadataIndex"),
        (_PLACES, "StorageMeta"),
        (_PLACES, "TensorStorageMetadata"),
        (_PLACES, "TensorProperties"),
        (_PLACES, "ChunkStorageMetadata"),
        (_PLACES, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
    }
)


class IndexReader(FileSystemReader):
    """Reads a state whose index runs no code and names no file but the state's own; ValueError where it would."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                index = _IndexPickle(file).load()
            if not isinstance(index, Metadata):
                raise TypeError(f"it holds {type(index).__name__}")
            if not all(isinstance(name, str) for name in index.state_dict_metadata):
                raise TypeError("its names are no strings")
            files = {info.relative_path for info in index.storage_data.values()}
            strange = sorted(name for name in files if Path(name).name != name)
        except Exception as error:  # a broken pickle raises whatever its codes stumble over
            raise ValueError(f".metadata is no index of a saved state ({type(error).__name__}: {error})") from error
        if strange:
            raise ValueError(f".metadata names {strange[0]}, which is no file of the state")
        return index


class _IndexPickle(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) not in _CONTENT:
            # Every class of a module would be too many: one of torch.serialization's opens files to write.
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a saved state")
        return super().find_class(module, name)

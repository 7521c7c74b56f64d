"""Parts of a tensor that is spread over processes, as torch.distributed.checkpoint saves and loads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

Range = tuple[int, int]
"""(start, stop) along one dimension of the whole."""


@dataclass(frozen=True)
class Rectangle:
    """`sizes` values that begin at `here` in the local tensor, and at `there` in the whole."""

    here: tuple[int, ...]
    there: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Which rectangles of a tensor of `size` are in this process."""

    size: torch.Size
    rectangles: tuple[Rectangle, ...]


def whole(tensor: Tensor) -> Layout:
    """All of it is here."""
    origin = (0,) * tensor.ndim
    return Layout(tensor.shape, (Rectangle(origin, origin, tuple(tensor.shape)),))


def part(size: Sequence[int], *, dim: int = 0, ranges: Sequence[Range], rows: Range | None = None) -> Layout:
    """The `ranges` of dimension `dim` of a tensor of `size`, laid end to end; of these `rows` (None: all) are here."""
    first, last = rows or (0, sum(stop - start for start, stop in ranges) if dim == 0 else size[0])
    found = []
    end = 0
    for start, stop in ranges:
        begin, end = end, end + stop - start  # where the range lies among those laid end to end
        here, there, sizes = [0] * len(size), [0] * len(size), list(size)
        there[0], sizes[0] = first, last - first
        low, high = (max(begin, first), min(end, last)) if dim == 0 else (begin, end)
        here[dim] = low - first if dim == 0 else low
        there[dim], sizes[dim] = start + low - begin, high - low
        if min(sizes) > 0:
            found.append(Rectangle(tuple(here), tuple(there), tuple(sizes)))
    return Layout(torch.Size(size), tuple(found))


def take(layout: Layout, whole: Tensor, like: Tensor) -> Tensor:
    """What `layout` keeps of a whole tensor, in the shape of the local one `like`."""
    local = whole.new_empty(like.shape)
    for one in layout.rectangles:
        local[_slices(one.here, one.sizes)] = whole[_slices(one.there, one.sizes)]
    return local


def local_of(tensor: Tensor) -> Tensor:
    """The rows that FSDP2 keeps here; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Pieces:
    """What `layout` says of a local tensor, as torch.distributed.checkpoint takes it."""

    def __init__(self, layout: Layout, local: Tensor) -> None:
        self.layout = layout
        self.views = {
            rectangle.there: local[_slices(rectangle.here, rectangle.sizes)] for rectangle in layout.rectangles
        }
        self.properties = TensorProperties.create_from_tensor(local)

    def size(self) -> torch.Size:
        """Of the whole; compared with what was saved."""
        return self.layout.size

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(there)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=self.properties, size=self.layout.size),
            )
            for there, chunk in zip(self.views, self.__create_chunk_list__(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(there), sizes=torch.Size(view.shape))
            for there, view in self.views.items()
        ]

    def at(self, index: MetadataIndex) -> Tensor:
        """The view that begins where `index` says."""
        assert index.offset is not None, index
        return self.views[tuple(index.offset)]


class PieceWriter(DefaultSavePlanner):
    """Writes pieces beside plain tensors."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.at(index) if isinstance(found, Pieces) else super().lookup_object(index)


class PieceReader(DefaultLoadPlanner):
    """Reads into pieces and plain tensors, in place."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default one replaces what it does not know by None.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.at(index) if isinstance(found, Pieces) else super().lookup_tensor(index)


def _slices(begin: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(begin, sizes, strict=True))

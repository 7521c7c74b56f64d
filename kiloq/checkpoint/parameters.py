"""One parameter at a time: our fused values from the tensors on disk, for work that must not hold a whole model."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from kiloq.errors import CheckpointError

from .files import find_tensors, read_tensor
from .names import Part, parts
from .reader import Checkpoint, empty_model, parameter_shapes


def parameter_reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """A function from our parameter names to their values, read when it is called, in the type they are stored in."""
    stored = find_tensors(checkpoint.folder)
    wanted: dict[str, list[Part]] = defaultdict(list)
    for part in parts(checkpoint.config, parameter_shapes(empty_model(checkpoint.config))):
        wanted[part.parameter].append(part)
        tensor = stored.get(part.tensor)
        if tensor is None or tensor.shape != part.shape:
            found = f"has shape {list(tensor.shape)}" if tensor else "is missing"
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {part.tensor} {found}, but config.json asks for {list(part.shape)}."
            )

    def read(name: str) -> Tensor:
        return torch.cat([read_tensor(stored[part.tensor]) for part in wanted[name]])

    return read

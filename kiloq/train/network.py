"""The network that a run trains: read and made trainable at its start, written at its end. For every method alike."""

from pathlib import Path

import torch

from kiloq.checkpoint import Checkpoint, GenerationDefaults, load_dense
from kiloq.model import Transformer

from .run_folder import export


def read_network(checkpoint: Checkpoint) -> Transformer:
    """The checkpoint's network with fp32 weights; what the run trains requires gradients, the rest does not."""
    return load_dense(checkpoint, dtype=torch.float32).requires_grad_(True)


def write_network(out: Path, model: Transformer, checkpoint: Checkpoint, generation: GenerationDefaults) -> Path:
    """Write what was trained below the run's folder `out`; where it is."""
    folder = out / "model"
    export(folder, model, checkpoint.tokenizer, generation)
    return folder

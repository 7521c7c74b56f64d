"""A checkpoint's small files become a configuration, a tokenizer and defaults. Reads no weights."""

from dataclasses import dataclass
from pathlib import Path

from kiloq.errors import CheckpointError
from kiloq.model import ModelConfig
from kiloq.quant.config import FileQuantization
from kiloq.tokenizer import Tokenizer

from .adapter import StoredAdapter
from .files import read_config, read_quantization
from .generation import GenerationDefaults
from .hub import resolve


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose small files were read and found consistent; the weights are still where they were.

    With an `adapter` (kiloq.checkpoint.merge) it is what that makes of `base`, in the folder of the base.
    """

    folder: Path
    config: ModelConfig
    generation: GenerationDefaults
    tokenizer: Tokenizer
    quantization: FileQuantization | None = None
    base: "Checkpoint | None" = None
    adapter: StoredAdapter | None = None


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Read everything but the weights. `model` is a folder or a hub id."""
    folder = resolve(str(model), revision=revision)
    config = read_config(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.size:,} ids, but config.json gives the model "
            f"{config.vocab_size:,} rows; they do not belong together."
        )
    generation = GenerationDefaults.from_files(folder, tokenizer)
    return Checkpoint(folder, config, generation, tokenizer, read_quantization(folder))

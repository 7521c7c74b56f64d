"""One checkpoint layout becomes another: the same weights under other names. Knows no arithmetic."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from kiloq.errors import CheckpointError
from kiloq.model import ModelConfig
from kiloq.model.config import Family

from .reader import Checkpoint, load_model
from .writer import save_checkpoint

logger = logging.getLogger(__name__)


def convert_checkpoint(checkpoint: Checkpoint, folder: Path, *, family: Family, dtype: str = "auto") -> None:
    """Write a checkpoint in another family's layout into a new folder; its licence files come along."""
    config = in_layout(checkpoint.config, family)
    generation = checkpoint.generation
    generation = replace(generation, max_window=min(generation.max_window, config.max_length))
    if config.max_length < checkpoint.config.max_length or config.logn_length != checkpoint.config.logn_length:
        logger.warning(
            "the %s layout cannot say NTK and LogN: %s is written for its trained length of %s tokens.",
            family,
            folder,
            f"{config.max_length:,}",
        )
    model = load_model(checkpoint, dtype=dtype)
    save_checkpoint(
        folder, model_state=model.state_dict(), config=config, tokenizer=checkpoint.tokenizer, generation=generation
    )
    for pattern in ("LICENSE*", "NOTICE*"):
        for file in checkpoint.folder.glob(pattern):
            shutil.copy(file, folder)


def in_layout(config: ModelConfig, family: Family) -> ModelConfig:
    """The configuration of the same weights in another family's words; refused where a word is missing."""
    if family == config.family:
        return config
    if (config.family, family) != ("qwen", "qwen2"):
        raise CheckpointError(f"a {config.family} model cannot be written in the {family} layout.")
    if config.rope.rotary_dim != config.head_dim:
        raise CheckpointError(
            f"rotary_pct covers {config.rope.rotary_dim} of {config.head_dim} dimensions, which the qwen2 layout "
            "cannot say."
        )
    stretches = config.rope.kind == "qwen1" or config.logn_length is not None
    return replace(
        config,
        family=family,
        rope=replace(config.rope, kind="plain"),
        logn_length=None,
        max_length=config.rope.original_length if stretches else config.max_length,
    )

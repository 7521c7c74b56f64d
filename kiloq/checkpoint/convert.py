"""One checkpoint layout becomes another: the same weights under other names. Knows no arithmetic."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from kiloq.errors import CheckpointError
from kiloq.model import ModelConfig
from kiloq.model.config import Family

from .load import target_dtype
from .merge import weights_of
from .reader import Checkpoint
from .writer import refuse_existing, save_streamed

logger = logging.getLogger(__name__)


def convert_checkpoint(checkpoint: Checkpoint, folder: Path, *, family: Family, dtype: str = "auto") -> None:
    """Write a checkpoint in another family's layout into a new folder, parameter by parameter, with what its adapter
    makes of it if it has one; its licence files come along."""
    refuse_existing(folder)
    config = in_layout(checkpoint.config, family)
    generation = checkpoint.generation
    weights = weights_of(checkpoint)
    if weights.config.tie_embeddings:
        weights.check_tied_head(weights.read("embed.weight", dtype=weights.dtype))
    target = target_dtype(dtype, weights)
    save_streamed(
        folder,
        read=lambda name: weights.read(name, dtype=target),
        dtype=target,
        config=config,
        tokenizer=checkpoint.tokenizer,
        generation=replace(generation, max_window=min(generation.max_window, config.max_length)),
    )
    for pattern in ("LICENSE*", "NOTICE*"):
        for file in checkpoint.folder.glob(pattern):
            shutil.copy(file, folder)
    if _stretches(checkpoint.config) and not _stretches(config):
        logger.warning(
            "note: the %s layout cannot say NTK and LogN; %s is good for the trained length of %s tokens.",
            family,
            folder,
            f"{config.max_length:,}",
        )


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
    return replace(
        config,
        family=family,
        rope=replace(config.rope, kind="plain"),
        logn_length=None,
        max_length=config.rope.original_length if _stretches(config) else config.max_length,
    )


def _stretches(config: ModelConfig) -> bool:
    return config.rope.kind == "qwen1" or config.logn_length is not None

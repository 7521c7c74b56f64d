"""A quantised model becomes a checkpoint folder, in the layout of GPTQ or of compressed-tensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from kiloq.ops.layout import QuantWeight

from .reader import Checkpoint

QuantFormat = Literal["gptq", "compressed-tensors"]


def write_quantized(
    folder: str | Path,
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, QuantWeight]],
    *,
    layout: QuantFormat,
    notes: Mapping[str, object],
) -> None:
    """Write a new folder that loads with no manual step; it appears under its name only when it is complete.

    `weights` come once, in the order of the layers, by our parameter names (blocks.0.attn.qkv.weight); everything else
    (embedding, norms, biases, head, tokenizer, generation defaults) is copied from `checkpoint` as stored. One model
    may mix kinds: a matrix that no group size divides is int8 per row among int4 ones. int8 comes with one scale a
    row or in groups. `notes` are how the weights were made (damp_percent, desc_act, static_groups, true_sequential),
    for the layouts that record it.
    """
    raise NotImplementedError

"""A checkpoint folder becomes a configuration, a tokenizer, defaults and a model. Knows no network and no cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kiloq.errors import CheckpointError, ConfigError
from kiloq.model import ModelConfig, Transformer
from kiloq.tokenizer import Tokenizer

from .files import StoredTensor, find_tensors, read_config, read_tensor
from .generation import GenerationDefaults
from .hub import resolve
from .names import Part, is_harmless, layer_of, parts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose small files were read and found consistent; the weights are still where they were."""

    folder: Path
    config: ModelConfig
    generation: GenerationDefaults
    tokenizer: Tokenizer


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
    return Checkpoint(folder, config, GenerationDefaults.from_files(folder, tokenizer), tokenizer)


def load_model(
    checkpoint: Checkpoint, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> Transformer:
    """The model in evaluation mode without gradients; memory peaks at the model in `dtype` plus one tensor.

    "auto" keeps the type that the weights are stored in; where files mix types, the one config.json names.
    """
    stored = find_tensors(checkpoint.folder)
    model = empty_model(checkpoint.config)
    shapes = parameter_shapes(model)
    wanted = list(parts(checkpoint.config, shapes))
    _check(checkpoint, wanted, stored)
    target = _target_dtype(dtype, checkpoint.config, [stored[part.tensor] for part in wanted])
    state = {name: torch.empty(shape, dtype=target, device=device) for name, shape in shapes.items()}
    for part in wanted:
        rows = state[part.parameter][part.start : part.start + part.shape[0]]
        rows.copy_(read_tensor(stored[part.tensor]))
    if checkpoint.config.tie_embeddings and "lm_head.weight" in stored:
        _check_tied_head(stored["lm_head.weight"], state["embed.weight"])
    # Assigned, not copied; and Module.to_empty would import half a second of torch's meta kernels.
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def empty_model(config: ModelConfig) -> Transformer:
    """A model on the meta device: shapes and names without memory."""
    with torch.device("meta"):
        return Transformer(config)


def parameter_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes, in the order of the network."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check(checkpoint: Checkpoint, wanted: Sequence[Part], stored: Mapping[str, StoredTensor]) -> None:
    """Compare what the configuration asks for with what the files hold, before any memory is spent."""
    folder = checkpoint.folder
    tied_head = {"lm_head.weight"} if checkpoint.config.tie_embeddings else set()
    unknown = [name for name in stored if not is_harmless(name)]
    unknown = sorted(set(unknown) - {part.tensor for part in wanted} - tied_head)
    if any(name.endswith((".qweight", ".qzeros", ".scales")) for name in unknown):
        raise CheckpointError(
            f"{folder} holds GPTQ tensors such as {unknown[0]}; quantised checkpoints are not yet in this version. "
            "Use the unquantised model."
        )
    missing = [part for part in wanted if part.tensor not in stored]
    if missing:
        raise CheckpointError(f"{folder}: {_explain_missing(missing[0].tensor, checkpoint.config, stored)}")
    if unknown:
        raise CheckpointError(f"{stored[unknown[0]].file}: {_explain_unknown(unknown, checkpoint.config)}")
    for part in wanted:
        tensor = stored[part.tensor]
        if tensor.shape != part.shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(part.shape)}; the two do not belong together."
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}; "
                f"kiloq reads {', '.join(_DTYPES)} in this version."
            )


def _explain_missing(name: str, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> str:
    layers = 1 + max((layer for tensor in stored if (layer := layer_of(tensor)) is not None), default=-1)
    if name == "lm_head.weight":
        return (
            "config.json says tie_word_embeddings is false, but no weight file has lm_head.weight. Set it to true if "
            "the model shares its embedding with the output, else download the missing shard."
        )
    if (layer := layer_of(name)) is not None and layer >= layers:
        return (
            f"config.json gives the model {config.num_layers} layers, but the weights end after {layers}; "
            f"tensor {name} is missing."
        )
    files = len({tensor.file for tensor in stored.values()})
    return f"tensor {name} is in none of the {files} weight files. Is the download complete?"


def _explain_unknown(names: Sequence[str], config: ModelConfig) -> str:
    beyond = [name for name in names if (layer_of(name) or 0) >= config.num_layers]
    if beyond:
        return f"config.json gives the model {config.num_layers} layers, but there is a tensor {beyond[0]}."
    more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
    return f"tensor {names[0]}{more} is unknown in a {config.family} model; kiloq would compute without it."


def _target_dtype(dtype: str | torch.dtype, config: ModelConfig, tensors: Sequence[StoredTensor]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        kinds = {tensor.dtype for tensor in tensors}
        return _DTYPES[kinds.pop() if len(kinds) == 1 else config.dtype]
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _check_tied_head(stored: StoredTensor, embedding: Tensor) -> None:
    # Some writers repeat the tied matrix. Equal is harmless; different means that config.json is wrong.
    head = read_tensor(stored)
    if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
        raise CheckpointError(
            f"{stored.file}: config.json says tie_word_embeddings is true, but lm_head.weight differs from the "
            "embedding. Set tie_word_embeddings to false."
        )

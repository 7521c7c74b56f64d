"""A model becomes a checkpoint folder: sharded safetensors, configuration, tokenizer, generation defaults."""

import dataclasses
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kiloq.chat.chatml import QWEN1
from kiloq.errors import CheckpointError
from kiloq.model import ModelConfig
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.vocabulary import END_OF_TEXT, IM_END

from .fast_tokenizer import chatml_template, write_fast_tokenizer
from .files import write_json
from .generation import GenerationDefaults
from .names import SCORE, Part, parts
from .weights import empty_model, parameter_shapes


def save_checkpoint(
    folder: str | Path,
    *,
    model_state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    generation: GenerationDefaults,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a new folder in the layout of `config.family`; it appears under its name only when it is complete.

    `model_state` is a Transformer's state_dict; its dtype is what is written. With a "score.weight" in it the folder is
    a reward model's, which transformers opens as ...ForSequenceClassification.
    """
    shapes = _shapes(config, scored=SCORE in model_state)
    found = {name: tuple(tensor.shape) for name, tensor in model_state.items()}
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"the weights do not fit the configuration: {wrong[0]} has shape {found.get(wrong[0], 'none')}, "
            f"asked for is {shapes.get(wrong[0], 'none')}."
        )
    save_streamed(
        folder,
        read=lambda name: model_state[name].detach(),
        dtype=model_state["embed.weight"].dtype,
        config=config,
        tokenizer=tokenizer,
        generation=generation,
        max_shard_bytes=max_shard_bytes,
        scored=SCORE in model_state,
    )


def save_streamed(
    folder: str | Path,
    *,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    config: ModelConfig,
    tokenizer: Tokenizer,
    generation: GenerationDefaults,
    max_shard_bytes: int = 2_000_000_000,
    scored: bool = False,
) -> None:
    """The same of parameters that are read one by one, all of them in `dtype`: no more than a file of them is held."""
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    wanted = list(parts(config, _shapes(config, scored=scored)))
    with new_folder(Path(folder)) as unfinished:
        kind = _reward_fields(config, tokenizer) if scored else {}
        write_json(unfinished / "config.json", config.to_hf() | kind)
        write_json(unfinished / "generation_config.json", generation.to_json(config.family, tokenizer))
        _write_tokenizer(unfinished, tokenizer, config, generation)
        _write_weights(unfinished, read, _split(wanted, dtype, max_shard_bytes))


def _shapes(config: ModelConfig, *, scored: bool) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(empty_model(config)) | ({SCORE: (1, config.hidden_size)} if scored else {})


def _reward_fields(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """Of a config.json. Transformers looks for the last token that is no padding, so that must not end an answer."""
    name = "QWen" if config.family == "qwen" else config.family.capitalize()
    return {
        "architectures": [f"{name}ForSequenceClassification"],
        "num_labels": 1,
        "pad_token_id": tokenizer.end_of_text_id,
    }


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside the wanted one, renamed to it at the end, or removed when something fails."""
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.unfinished"
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def refuse_existing(folder: Path) -> None:
    """Nothing is ever overwritten; long work asks before it begins."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; give another name or remove it.")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig, generation: GenerationDefaults) -> None:
    # Other programs read .tiktoken only by running a model's own code; their layout gets files that need none.
    if config.family != "qwen" and any(name.endswith(".tiktoken") for name in tokenizer.vocabulary.files):
        write_fast_tokenizer(
            folder,
            tokenizer,
            max_length=config.max_length,
            eos_token=IM_END if generation.chat_format == "chatml" else END_OF_TEXT,
            chat_template=chatml_template(QWEN1.default_system or ""),
        )
    else:
        tokenizer.save(folder)


def _write_weights(folder: Path, read: Callable[[str], Tensor], shards: Sequence[Sequence[Part]]) -> None:
    places: dict[str, str] = {}
    total = 0
    name, whole = "", torch.empty(0)
    for number, shard in enumerate(shards, start=1):
        target = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for part in shard:
            if part.parameter != name:
                name, whole = part.parameter, read(part.parameter)
            tensors[part.tensor] = whole[part.start : part.start + part.shape[0]].contiguous().cpu()
        save_file(tensors, folder / target, metadata={"format": "pt"})
        (folder / target).chmod(0o644)  # the library makes it private
        places |= dict.fromkeys(tensors, target)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _split(wanted: Sequence[Part], dtype: torch.dtype, max_shard_bytes: int) -> list[list[Part]]:
    shards: list[list[Part]] = [[]]
    size = 0
    for part in wanted:
        nbytes = math.prod(part.shape) * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += nbytes
    return shards

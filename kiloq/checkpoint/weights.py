"""The weights of a checkpoint under our names, compared with its configuration before any memory is spent.

Knows files and names, not what a model does with the values.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kiloq.errors import CheckpointError
from kiloq.model import ModelConfig, Transformer
from kiloq.ops.layout import QuantWeight
from kiloq.quant.config import FileQuantization
from kiloq.quant.grid import Scheme, rtn
from kiloq.quant.pack import Codes, as_stored, dequantize, for_kernels, stack

from .files import StoredTensor, find_tensors, read_tensor
from .names import SCORE, Part, is_harmless, layer_of, parts
from .quantized import check, is_quantized, read_codes, stem_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Weights:
    """Our parameters of one checkpoint folder; each is read when it is asked for, and not kept."""

    def __init__(
        self, folder: Path, config: ModelConfig, scheme: FileQuantization | None = None, *, scored: bool = False
    ) -> None:
        self.folder = folder
        self.config = config
        self.scheme = scheme
        self.stored = find_tensors(folder)
        self.shapes = parameter_shapes(empty_model(config)) | ({SCORE: (1, config.hidden_size)} if scored else {})
        wanted = list(parts(config, self.shapes))
        self._parts: dict[str, list[Part]] = {name: [] for name in self.shapes}
        for part in wanted:
            self._parts[part.parameter].append(part)
        self._plain = _check(self, wanted)

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix lies in codes."""
        return len(self._plain) < sum(len(parts) for parts in self._parts.values())

    @property
    def files(self) -> list[Path]:
        """What the weights depend on."""
        settings = [self.folder / name for name in ("config.json", "quantize_config.json")]
        return [*sorted({tensor.file for tensor in self.stored.values()}), *settings]

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are stored in; where files mix types, the one config.json names."""
        kinds = {self.stored[part.tensor].dtype for part in self._plain}
        return DTYPES[kinds.pop() if len(kinds) == 1 else self.config.dtype]

    def read(self, name: str, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """The values of a parameter of ours, its parts on disk put together; codes become what they stand for."""
        whole = torch.empty(self.shapes[name], dtype=dtype, device=device)
        for part in self._parts[name]:
            rows = whole[part.start : part.start + part.shape[0]]
            rows.copy_(read_tensor(self.stored[part.tensor]) if part in self._plain else dequantize(self._codes(part)))
        return whole

    def read_stored(self, name: str) -> dict[str, Tensor]:
        """The tensors of a parameter that has no codes, under their names on disk."""
        return {part.tensor: read_tensor(self.stored[part.tensor]) for part in self._parts[name]}

    def read_matrix(self, name: str) -> Tensor | QuantWeight:
        """A weight matrix for the kernels: in codes where the files have some that kernels take, else in bf16."""
        listed = self._parts[name]
        if any(part in self._plain for part in listed):
            return self.read(name, dtype=torch.bfloat16)
        found = []
        for part in listed:
            codes = self._codes(part)
            # 8 bits in groups: no kernel has them, and a scale for each row costs little beside what 8 bits lost.
            found.append(for_kernels(codes) or rtn(dequantize(codes), Scheme(bits=8, group_size=None)))
        return stack(found, name)

    def read_codes(self, name: str) -> QuantWeight | None:
        """A weight matrix in the very codes of its files; None where any of its parts has none."""
        listed = self._parts[name]
        if any(part in self._plain for part in listed):
            return None
        return stack([as_stored(self._codes(part)) for part in listed], name)

    def _codes(self, part: Part) -> Codes:
        assert self.scheme is not None
        stem = stem_of(part.tensor)
        # AutoGPTQ gave every layer a bias, of zeros where the model has none.
        bias = self.stored.get(f"{stem}.bias")
        is_extra = bias is not None and part.parameter.replace(".weight", ".bias") not in self.shapes
        if bias is not None and is_extra and read_tensor(bias).any():
            raise CheckpointError(f"{bias.file}: {bias.name} is a bias, which {self.config.family} models lack there.")
        return read_codes(stem, self.scheme, self.stored)

    def check_tied_head(self, embedding: Tensor) -> None:
        """Some writers repeat the tied matrix. Equal is harmless; different means that config.json is wrong."""
        if not self.config.tie_embeddings or "lm_head.weight" not in self.stored:
            return
        stored = self.stored["lm_head.weight"]
        head = read_tensor(stored)
        if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
            raise CheckpointError(
                f"{stored.file}: config.json says tie_word_embeddings is true, but lm_head.weight differs from the "
                "embedding. Set tie_word_embeddings to false."
            )


def empty_model(config: ModelConfig) -> Transformer:
    """A model on the meta device: shapes and names without memory."""
    with torch.device("meta"):
        return Transformer(config)


def parameter_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes, in the order of the network."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check(weights: Weights, wanted: Sequence[Part]) -> frozenset[Part]:
    """Compare names, shapes and types; the parts that lie on disk as they are, without codes."""
    folder, config, stored, scheme = weights.folder, weights.config, weights.stored, weights.scheme
    known = {"lm_head.weight"} if config.tie_embeddings else set()
    plain = []
    for part in wanted:
        stem = stem_of(part.tensor)
        if scheme is not None and len(part.shape) == 2 and is_quantized(stem, stored):
            known |= check(stem, part.shape, scheme, stored) | {f"{stem}.bias"}
        else:
            known.add(part.tensor)
            plain.append(part)
    unknown = sorted(name for name in stored if name not in known and not is_harmless(name))
    if scheme is None and any(name.endswith((".qweight", ".weight_packed")) for name in unknown):
        raise CheckpointError(
            f"{folder} holds quantised tensors such as {unknown[0]}, but config.json has no quantization_config, and "
            "there is no quantize_config.json."
        )
    missing = [part for part in plain if part.tensor not in stored]
    if missing:
        raise CheckpointError(f"{folder}: {_explain_missing(missing[0].tensor, config, stored)}")
    if unknown:
        raise CheckpointError(f"{stored[unknown[0]].file}: {_explain_unknown(unknown, config)}")
    for part in plain:
        tensor = stored[part.tensor]
        if tensor.shape != part.shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(part.shape)}; the two do not belong together."
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}; "
                f"kiloq reads {', '.join(DTYPES)} there."
            )
    return frozenset(plain)


def _explain_missing(name: str, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> str:
    layers = 1 + max((layer for tensor in stored if (layer := layer_of(tensor)) is not None), default=-1)
    if name == SCORE:
        return f"there is no {SCORE}, so this is no reward model; make one of it with kiloq train reward."
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
    if SCORE in names:
        return f"there is a {SCORE}: this is a reward model, which scores answers and writes none."
    beyond = [name for name in names if (layer_of(name) or 0) >= config.num_layers]
    if beyond:
        return f"config.json gives the model {config.num_layers} layers, but there is a tensor {beyond[0]}."
    more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
    return f"tensor {names[0]}{more} is unknown in a {config.family} model; kiloq would compute without it."

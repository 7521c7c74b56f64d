"""The hidden states of all calibration tokens on their way through one layer, in mapped files of the work folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from kiloq.model import ModelConfig, PackedAttend, Rotation, ntk_alpha
from kiloq.model.rope import Rope
from kiloq.model.transformer import Block

from .calibration_data import CalibrationData
from .layer_files import hidden_file, map_hidden

_CHUNK_TOKENS = 4096  # at once: enough for the matrix units, little beside the weights


@dataclass(frozen=True)
class Chunk:
    """Some whole rows of the data: their tokens, how they are turned, and how they see each other."""

    tokens: slice
    rotation: Rotation
    attend: PackedAttend


class Stream:
    """One layer and what flows through it: the quantised model's hidden states, or the exact ones beside them.

    Every product is computed once, except gate_up's, whose outputs would be the largest of all to keep. `inputs` is
    called for the four matrices in their order, for all chunks each.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Callable[[str], Tensor],
        data: CalibrationData,
        *,
        layer: int,
        work: Path,
        kind: str,
    ) -> None:
        self.chunks = _chunks(config, data)
        self.block = _load_block(config, layer, read)
        self._work, self._kind, self._layer = work, kind, layer
        tokens = len(data.ids)
        if layer == 0:
            self._embed(read, data, config.hidden_size)
        self.before = map_hidden(hidden_file(work, kind, layer), tokens, config.hidden_size)
        self._unfinished = work / f"{kind}.unfinished"
        self.after = map_hidden(self._unfinished, tokens, config.hidden_size, new=True)
        self._mixed_file = work / f"{kind}.mixed"
        self.mixed = map_hidden(self._mixed_file, tokens, config.num_heads * config.head_dim, new=True)

    def weight(self, name: str) -> Tensor:
        """A matrix of the layer, fp32."""
        return self.block.get_parameter(f"{name}.weight")

    def set_weight(self, name: str, values: Tensor) -> None:
        self.weight(name).copy_(values)

    @torch.no_grad()
    def inputs(self, name: str, chunk: Chunk) -> Tensor:
        """What the matrix `name` multiplies for the tokens of a chunk, given the layer's matrices as they are now."""
        block, at = self.block, chunk.tokens
        found: Tensor
        if name == "attn.qkv":
            found = block.attn_norm(self.before[at])
        elif name == "attn.out":
            with _Passing(block.attn, "out"):
                self.mixed[at] = block.attn(block.attn_norm(self.before[at]), chunk.rotation, chunk.attend)
            found = self.mixed[at]
        elif name == "mlp.gate_up":
            self.after[at] = self.before[at] + block.attn.out(self.mixed[at])
            found = block.mlp_norm(self.after[at])
        else:
            with _Passing(block.mlp, "down"):
                found = block.mlp(block.mlp_norm(self.after[at]))
        return found

    @torch.no_grad()
    def finish(self) -> None:
        """The hidden states behind the layer, as the next layer's file."""
        for chunk in self.chunks:
            after = self.after[chunk.tokens]
            after += self.block.mlp(self.block.mlp_norm(after))
        self._unfinished.replace(hidden_file(self._work, self._kind, self._layer + 1))
        self._mixed_file.unlink()

    def _embed(self, read: Callable[[str], Tensor], data: CalibrationData, width: int) -> None:
        unfinished = self._work / f"{self._kind}.unfinished"
        hidden = map_hidden(unfinished, len(data.ids), width, new=True)
        table = read("embed.weight")
        for chunk in self.chunks:
            hidden[chunk.tokens] = table[data.ids[chunk.tokens]].float()
        unfinished.replace(hidden_file(self._work, self._kind, 0))


class _Passing:
    """While it lasts, a matrix of a module hands its inputs on: the module's result is what the matrix would read."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.own = module.get_submodule(name)

    def __enter__(self) -> None:
        setattr(self.module, self.name, nn.Identity())

    def __exit__(self, *_: object) -> None:
        setattr(self.module, self.name, self.own)


def _load_block(config: ModelConfig, layer: int, read: Callable[[str], Tensor]) -> Block:
    def linear(_name: str, columns: int, rows: int, bias: bool) -> nn.Module:
        return nn.Linear(columns, rows, bias=bias)

    with torch.device("meta"):
        block = Block(config, layer, linear)
    state = {name: read(f"blocks.{layer}.{name}").float() for name, _ in block.named_parameters()}
    block.load_state_dict(state, assign=True)
    return block.requires_grad_(False).eval()


def _chunks(config: ModelConfig, data: CalibrationData) -> list[Chunk]:
    rope, found = Rope(config), []
    for first, last in data.chunks(_CHUNK_TOKENS):
        starts: Sequence[int] = data.starts[first : last + 1]
        lengths = [end - start for start, end in pairwise(starts)]
        positions = torch.cat([torch.arange(n) for n in lengths])
        alphas = torch.cat([torch.full((n,), ntk_alpha(config, n)) for n in lengths])
        attend = PackedAttend([start - starts[0] for start in starts], config.windows)
        found.append(Chunk(slice(starts[0], starts[-1]), rope(positions, alphas), attend))
    return found

"""The one network: every dense Qwen generation from v1 to 3. Knows no cache, device, quantisation or file.

Tokens lie flat, [T], sequences end to end; how they see each other is handed in (`Attend`).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kiloq import ops

from .attend import Attend, PackedAttend
from .config import ModelConfig
from .rope import Rope, Rotation, ntk_alpha, rotate
from .tied import TiedGradient, lookup

LinearFactory = Callable[[str, int, int, bool], nn.Module]
"""(name in the model, in features, out features, has bias) -> the module that multiplies."""


Recompute = Literal["none", "selective", "full"]
"""What a block computes again in the backward pass instead of keeping it: nothing, all but its products, or all."""


class TokenTable(Protocol):
    """One row of a matrix per token id: an embedding, and the head of a model that ties the two."""

    def __call__(self, ids: Tensor) -> Tensor: ...  # [T] -> [T, hidden_size]

    def project(self, hidden: Tensor) -> Tensor: ...  # [T, hidden_size] -> [T, rows]


EmbeddingFactory = Callable[[str, int, int], TokenTable]
"""(name in the model, rows, columns) -> the table."""


class Transformer(nn.Module):
    """A decoder-only Transformer: ids [T] -> hidden states [T, hidden_size] -> logits.

    `linear` and `embedding` make the weight matrices; quantised and adapted models pass their own. Weights are unset
    until `init_weights` or the checkpoint reader fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        linear: LinearFactory | None = None,
        embedding: EmbeddingFactory | None = None,
    ) -> None:
        super().__init__()
        make = linear or _dense
        self.config = config
        self.checkpointing: Recompute = "none"
        self.rope = Rope(config)
        self.embed = (embedding or Embedding)("embed", config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer, make) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # Hidden states [N, hidden_size] -> logits [N, vocab_size].
        self.head: Callable[[Tensor], Tensor] = (
            TiedHead(self.embed)
            if config.tie_embeddings
            else make("head", config.hidden_size, config.vocab_size, False)
        )

    def forward(self, ids: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """ids: [T] -> hidden states after the final norm, [T, hidden_size]."""
        x = self.embed(ids)
        for block in self.blocks:
            if self.checkpointing == "none" or not torch.is_grad_enabled():
                x = block(x, rotation, attend)
            elif self.checkpointing == "full":
                x = checkpoint(block, x, rotation, attend, use_reentrant=False)
            else:
                x = checkpoint(block, x, rotation, attend, use_reentrant=False, context_fn=_keeping_products)
        normed: Tensor = self.norm(x)
        return normed

    def rotation(self, positions: Tensor, alphas: Tensor | float = 1.0) -> Rotation:
        """Where T tokens stand; `alphas` are the NTK factors of their sequences, [T] or one for all."""
        return self.rope(positions, alphas)

    def key_biases(self) -> list[Tensor | None]:
        """What each layer adds to its keys before they are turned, [K, D]; None where it adds nothing constant."""
        return [block.attn.key_bias for block in self.blocks if isinstance(block, Block)]

    def logits(self, ids: Tensor, seq_starts: Sequence[int] | None = None) -> Tensor:
        """Logits of whole sequences laid end to end, each under the NTK factor of its length. [T] -> [T, vocab]."""
        starts = [0, len(ids)] if seq_starts is None else seq_starts
        return self.head(self(ids, *self.packed(starts, ids.device)))

    def packed(self, seq_starts: Sequence[int], device: torch.device) -> tuple[Rotation, PackedAttend]:
        """Where tokens of whole sequences laid end to end stand, and what they see."""
        lengths = [end - start for start, end in pairwise(seq_starts)]
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        alphas = torch.cat([torch.full((n,), ntk_alpha(self.config, n), device=device) for n in lengths])
        return self.rotation(positions, alphas), PackedAttend(seq_starts, self.config.windows)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal(0, initializer_range); what feeds the residual stream is narrower by sqrt(2 * layers) (GPT-2)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                feeds_residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
                scale = std / math.sqrt(2 * self.config.num_layers) if feeds_residual else std
                parameter.normal_(0.0, scale, generator=generator)


class Block(nn.Module):
    """One layer: attention and MLP, each normed before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, make: LinearFactory) -> None:
        super().__init__()
        name = f"blocks.{layer}"
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config, layer, f"{name}.attn", make)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, f"{name}.mlp", make)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotation, attend)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Attention(nn.Module):
    """Queries, keys and values from one matrix; what they see of each other is up to `attend`."""

    def __init__(self, config: ModelConfig, layer: int, name: str, make: LinearFactory) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.qkv = make(f"{name}.qkv", config.hidden_size, sum(self.heads) * config.head_dim, config.qkv_bias)
        self.out = make(f"{name}.out", config.num_heads * config.head_dim, config.hidden_size, False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, (H+2K)*D] -> [T, H+2K, D]
        q, k, v = qkv.split(self.heads, dim=1)
        q = rotate(self.q_norm(q), rotation)
        k = rotate(self.k_norm(k), rotation)
        if rotation.q_scale is not None:
            q = q * rotation.q_scale[:, None, None].to(q.dtype)
        mixed = attend(self.layer, q, k, v).flatten(1)  # [T, H, D] -> [T, H*D]
        out: Tensor = self.out(mixed)
        return out

    @property
    def key_bias(self) -> Tensor | None:
        """The key's part of the bias, [K, D]; None without one, and where a norm follows it."""
        bias = self.qkv.bias
        if not isinstance(bias, Tensor) or not isinstance(self.k_norm, nn.Identity):
            return None
        queries, keys, _ = self.heads
        return bias.detach().view(-1, self.head_dim)[queries : queries + keys]


class MLP(nn.Module):
    """SwiGLU with gate and up projection in one matrix, gate first."""

    def __init__(self, config: ModelConfig, name: str, make: LinearFactory) -> None:
        super().__init__()
        self.gate_up = make(f"{name}.gate_up", config.hidden_size, 2 * config.intermediate_size, False)
        self.down = make(f"{name}.down", config.intermediate_size, config.hidden_size, False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(ops.swiglu(self.gate_up(x)))
        return out


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Embedding):
    """The rows of the vocabulary; waits to be filled. `tied` is set where a loss leaves the head's gradient in it."""

    tied: TiedGradient | None = None

    def __init__(self, name: str, rows: int, columns: int) -> None:
        super().__init__(rows, columns, _weight=torch.empty(rows, columns))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) if self.tied is None else lookup(ids, self.weight, self.tied)

    def project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class TiedHead(nn.Module):
    """The embedding read backwards; owns no weights, so that the tied matrix is saved, moved and counted once."""

    def __init__(self, embed: TokenTable) -> None:
        super().__init__()
        self.owner = (embed,)  # in a tuple, out of sight of nn.Module's registration

    def forward(self, hidden: Tensor) -> Tensor:
        return self.owner[0].project(hidden)


class Linear(nn.Linear):
    """nn.Linear that waits to be filled: random numbers that the reader overwrites cost more than the reading."""

    def reset_parameters(self) -> None:
        pass


def _dense(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
    return Linear(in_features, out_features, bias=bias)


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _what_to_keep(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


# Norms, rotations and activations are cheap to compute again and hold most of a block's memory (arXiv 2205.05198).
_keeping_products = partial(create_selective_checkpoint_contexts, _what_to_keep)

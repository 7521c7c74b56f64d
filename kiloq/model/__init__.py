"""The one network and its configuration."""

from .attend import Attend, PackedAttend
from .config import ModelConfig
from .rope import Rope, Rotation, ntk_alpha, rotate
from .rope_config import RopeConfig
from .transformer import EmbeddingFactory, LinearFactory, Recompute, TokenTable, Transformer

__all__ = [
    "Attend",
    "EmbeddingFactory",
    "LinearFactory",
    "ModelConfig",
    "PackedAttend",
    "Recompute",
    "Rope",
    "RopeConfig",
    "Rotation",
    "TokenTable",
    "Transformer",
    "ntk_alpha",
    "rotate",
]

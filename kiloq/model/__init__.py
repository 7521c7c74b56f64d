"""The one network and its configuration."""

from .attend import Attend, PackedAttend
from .config import ModelConfig, RopeConfig
from .rope import Rotation, ntk_alpha
from .transformer import LinearFactory, Transformer

__all__ = [
    "Attend",
    "LinearFactory",
    "ModelConfig",
    "PackedAttend",
    "RopeConfig",
    "Rotation",
    "Transformer",
    "ntk_alpha",
]

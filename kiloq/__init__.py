"""kiloq (千问): one package for the whole life of a Qwen language model."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kiloq.compat import (
        AutoModelForCausalLM,
        AutoPeftModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        decode_tokens,
        get_stop_words_ids,
        make_context,
        snapshot_download,
    )
    from kiloq.engine import LLM, SamplingParams
    from kiloq.tokenizer import Tokenizer

# Importing kiloq costs nothing: each name is looked up when it is first used.
_HOME = {
    "LLM": "kiloq.engine",
    "SamplingParams": "kiloq.engine",
    "Tokenizer": "kiloq.tokenizer",
    "AutoModelForCausalLM": "kiloq.compat",
    "AutoPeftModelForCausalLM": "kiloq.compat",
    "AutoTokenizer": "kiloq.compat",
    "GenerationConfig": "kiloq.compat",
    "decode_tokens": "kiloq.compat",
    "get_stop_words_ids": "kiloq.compat",
    "make_context": "kiloq.compat",
    "snapshot_download": "kiloq.compat",
}

__all__ = [
    "LLM",
    "AutoModelForCausalLM",
    "AutoPeftModelForCausalLM",
    "AutoTokenizer",
    "GenerationConfig",
    "SamplingParams",
    "Tokenizer",
    "decode_tokens",
    "get_stop_words_ids",
    "make_context",
    "snapshot_download",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kiloq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

"""The door for code written for Qwen's first README: the same names and calls, with one changed import.

`trust_remote_code` is accepted everywhere and never obeyed. Padded tensors exist only here.
"""

from .auto import AutoModelForCausalLM, AutoTokenizer, snapshot_download
from .context import decode_tokens, get_stop_words_ids, make_context
from .generation_config import GenerationConfig
from .model import CausalLM, CausalLMOutput
from .peft import AutoPeftModelForCausalLM, PeftCausalLM
from .tokenizer import BatchEncoding, QwenTokenizer

__all__ = [
    "AutoModelForCausalLM",
    "AutoPeftModelForCausalLM",
    "AutoTokenizer",
    "BatchEncoding",
    "CausalLM",
    "CausalLMOutput",
    "GenerationConfig",
    "PeftCausalLM",
    "QwenTokenizer",
    "decode_tokens",
    "get_stop_words_ids",
    "make_context",
    "snapshot_download",
]

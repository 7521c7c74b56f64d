"""from_pretrained: names, flags and devices as transformers spells them. Knows nothing of what is loaded."""

from pathlib import Path

import torch

from kiloq.checkpoint import resolve
from kiloq.checkpoint.fingerprint import find_base
from kiloq.engine import LLM
from kiloq.tokenizer import Tokenizer

from .arguments import WITHOUT_EFFECT, DeviceMap, check_names, chosen_dtype, device_of
from .generation_config import GenerationConfig
from .model import CausalLM
from .peft import is_adapter
from .tokenizer import QwenTokenizer


class AutoTokenizer:
    """Loads tokenizers."""

    @staticmethod
    def from_pretrained(
        name: str | Path,
        *,
        pad_token: str | None = None,
        eos_token: str | None = None,
        padding_side: str = "right",
        errors: str = "replace",
        extra_vocab_file: str | Path | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: object,
    ) -> QwenTokenizer:
        """The tokenizer of a folder or hub id."""
        check_names(AutoTokenizer.from_pretrained, others, WITHOUT_EFFECT)
        folder = resolve(str(name), revision=revision, cache_dir=cache_dir)
        if is_adapter(folder):  # which has no words of its own
            folder = find_base(folder)
        return QwenTokenizer(
            Tokenizer.load(folder, extra_vocab=extra_vocab_file),
            pad_token=pad_token,
            eos_token=eos_token,
            padding_side=padding_side,
            errors=errors,
        )


class AutoModelForCausalLM:
    """Loads models."""

    @staticmethod
    def from_pretrained(  # noqa: PLR0913  # the arguments are those of transformers and of the original
        name: str | Path,
        *,
        device_map: DeviceMap = None,
        torch_dtype: str | torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        bf16: bool = False,
        fp16: bool = False,
        fp32: bool = False,
        use_cache_quantization: bool = False,
        pad_token_id: int | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: object,
    ) -> CausalLM:
        """The model of a folder or hub id, in one of bf16, fp16 and fp32, or else in the type it is stored in.

        `use_cache_quantization` keeps keys and values in int8, at half the bytes.
        """
        check_names(AutoModelForCausalLM.from_pretrained, others, WITHOUT_EFFECT)
        chosen = chosen_dtype(dtype or torch_dtype, bf16=bf16, fp16=fp16, fp32=fp32)
        device = device_of(device_map)
        folder = resolve(str(name), revision=revision, cache_dir=cache_dir)
        llm = LLM(folder, dtype=chosen, device=device, kv_dtype="int8" if use_cache_quantization else "auto")
        settings = GenerationConfig.of(llm.generation, llm.tokenizer)
        if pad_token_id is not None:
            settings.pad_token_id = pad_token_id
        return CausalLM(llm, settings)


def snapshot_download(model_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> str:
    """The local folder of a hub id, fetched if it is not there; from ModelScope if the id begins with `modelscope:`."""
    return str(resolve(model_id, revision=revision, cache_dir=cache_dir))

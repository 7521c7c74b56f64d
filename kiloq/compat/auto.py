"""from_pretrained: names, flags and devices as transformers spells them. Knows nothing of what is loaded."""

from pathlib import Path

import torch

from kiloq.checkpoint import resolve
from kiloq.engine import LLM
from kiloq.errors import ConfigError
from kiloq.tokenizer import Tokenizer

from .generation_config import GenerationConfig
from .model import CausalLM
from .tokenizer import QwenTokenizer

Device = str | int | torch.device
# Arguments of other loaders that choose nothing here: there is one attention, and no remote code.
_NO_EFFECT = frozenset(
    {
        *("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "attn_implementation", "use_flash_attn"),
        *("resume_download", "use_fast", "model_max_length", "use_cache_kernel"),
    }
)


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
        **others: object,
    ) -> QwenTokenizer:
        """The tokenizer of a folder or hub id."""
        _check_names(others)
        return QwenTokenizer(
            Tokenizer.load(resolve(str(name), revision=revision), extra_vocab=extra_vocab_file),
            pad_token=pad_token,
            eos_token=eos_token,
            padding_side=padding_side,
            errors=errors,
        )


class AutoModelForCausalLM:
    """Loads models."""

    @staticmethod
    def from_pretrained(
        name: str | Path,
        *,
        device_map: Device | dict[str, Device] | None = None,
        torch_dtype: str | torch.dtype | None = None,
        bf16: bool = False,
        fp16: bool = False,
        fp32: bool = False,
        pad_token_id: int | None = None,
        **others: object,
    ) -> CausalLM:
        """The model of a folder or hub id, in one of bf16, fp16 and fp32, or else in the type it is stored in."""
        dtype = _dtype(others.pop("dtype", None) or torch_dtype, bf16=bf16, fp16=fp16, fp32=fp32)
        revision = others.pop("revision", None)
        quantised = bool(others.pop("use_cache_quantization", False))
        _check_names(others)
        folder = resolve(str(name), revision=None if revision is None else str(revision))
        llm = LLM(folder, dtype=dtype, device=_device(device_map), kv_dtype="int8" if quantised else "auto")
        settings = GenerationConfig.of(llm.generation, llm.tokenizer)
        if pad_token_id is not None:
            settings.pad_token_id = pad_token_id
        return CausalLM(llm, settings)


def snapshot_download(name: str, *, revision: str | None = None) -> str:
    """The local folder of a hub id, fetched if it is not there."""
    return str(resolve(name, revision=revision))


def _check_names(given: dict[str, object]) -> None:
    unknown = sorted(given.keys() - _NO_EFFECT)
    if unknown:
        raise ConfigError(f"from_pretrained has no argument '{unknown[0]}' here; leave it out.")


def _dtype(wanted: object, *, bf16: bool, fp16: bool, fp32: bool) -> str:
    flags = {"bfloat16": bf16, "float16": fp16, "float32": fp32}
    chosen = [name for name, flag in flags.items() if flag]
    if wanted not in (None, "auto"):
        chosen.append(str(wanted).removeprefix("torch."))
    if len(set(chosen)) > 1:
        raise ConfigError(f"from_pretrained was asked for {' and '.join(chosen)}; give one of bf16, fp16 and fp32.")
    return chosen[0] if chosen else "auto"


def _device(device_map: Device | dict[str, Device] | None) -> str:
    """One device for the whole model; a map may name only one."""
    if isinstance(device_map, dict):
        devices = {_device(device) for device in device_map.values()}
        if len(devices) != 1:
            raise ConfigError(f"device_map names {len(devices)} devices; this version keeps a model on one.")
        return devices.pop()
    if device_map is None:
        return "cpu"
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    return str(device_map)

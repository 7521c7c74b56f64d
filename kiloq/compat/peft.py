"""AutoPeftModelForCausalLM: an adapter's folder becomes a model, as peft's class of that name makes one."""

from pathlib import Path

import torch

from kiloq.checkpoint import resolve
from kiloq.checkpoint.adapter_config import CONFIG_FILE
from kiloq.checkpoint.fingerprint import find_base
from kiloq.engine import LLM
from kiloq.errors import CheckpointError

from .arguments import WITHOUT_EFFECT, DeviceMap, check_names, chosen_dtype, device_of
from .generation_config import GenerationConfig
from .model import CausalLM


class PeftCausalLM(CausalLM):
    """A model and its adapter, which is in the weights from the start: it costs nothing to answer with.

    A quantised base becomes one of 16 bits; `kiloq serve --lora` keeps its codes, and the adapter beside them.
    """

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False) -> CausalLM:
        """The model that the two are together; both arguments change nothing: values are always checked."""
        return CausalLM(self.llm, self.generation_config)


class AutoPeftModelForCausalLM:
    """Loads adapters with the models that they were trained on, which are found by their hashes."""

    @staticmethod
    def from_pretrained(
        path: str | Path,
        *,
        device_map: DeviceMap = None,
        torch_dtype: str | torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: object,
    ) -> PeftCausalLM:
        """The adapter of a folder or hub id, in the type that its base is stored in or the one asked for."""
        check_names(AutoPeftModelForCausalLM.from_pretrained, others, WITHOUT_EFFECT)
        chosen = chosen_dtype(dtype or torch_dtype)
        folder = resolve(str(path), revision=revision, cache_dir=cache_dir)
        if not is_adapter(folder):
            raise CheckpointError(
                f"{folder} has no {CONFIG_FILE}: it is no adapter. AutoModelForCausalLM loads models."
            )
        llm = LLM(find_base(folder), dtype=chosen, device=device_of(device_map), merged=folder)
        return PeftCausalLM(llm, GenerationConfig.of(llm.generation, llm.tokenizer))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()

"""Arguments as transformers spells them: names without effect here, devices, types. Knows no model."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature

import torch

from kiloq.errors import ConfigError

Device = str | int | torch.device
DeviceMap = Device | dict[str, Device] | None
# Names that a call takes though they choose nothing, each with the values for which that is true; None: for all.
WithoutEffect = Mapping[str, tuple[object, ...] | None]

# There is one attention, one preferred file format, no remote code, and a kernel wherever a quantised cache has one.
WITHOUT_EFFECT: WithoutEffect = dict.fromkeys(
    (
        *("trust_remote_code", "code_revision", "low_cpu_mem_usage", "use_safetensors", "attn_implementation"),
        *("use_flash_attn", "resume_download", "use_fast", "model_max_length", "use_cache_kernel"),
    )
)

_WHOLE_MACHINE = ("auto", "balanced", "balanced_low_0", "sequential")
_DTYPES = ("bfloat16", "float16", "float32")


def check_names(call: Callable[..., object], given: Mapping[str, object], without_effect: WithoutEffect) -> None:
    """ConfigError for an argument that `call` does not have, or that asks here for what there is not."""
    name_of_call = call.__qualname__.removesuffix(".__call__")
    for name, value in given.items():
        if name not in without_effect:
            known = [*signature(call).parameters, *without_effect]
            near = get_close_matches(name, known, n=1)
            advice = f" Did you mean '{near[0]}'?" if near else " Leave it out."
            raise ConfigError(f"{name_of_call} has no argument '{name}' here.{advice}")
        values = without_effect[name]
        if values is not None and not any(value is one for one in values):
            raise ConfigError(
                f"{name_of_call} was asked for {name}={value!r:.40}, which is not supported here; leave '{name}' out."
            )


def device_of(wanted: DeviceMap) -> str:
    """One device for the whole model, or "auto"; a map may name only one. ConfigError if it is not there."""
    if isinstance(wanted, dict):
        devices = {f"cuda:{device}" if isinstance(device, int) else str(device) for device in wanted.values()}
        if len(devices) != 1:
            raise ConfigError(f"device_map names {len(devices)} devices; this version keeps a model on one.")
        return device_of(devices.pop())
    if wanted is None:
        return "cpu"
    if wanted in _WHOLE_MACHINE:
        return "auto"
    try:
        device = torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"the device is {wanted!r}; write 'auto', 'cpu', 'cuda' or 'cuda:0'.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no CUDA device {device.index or 0} here (torch sees {torch.cuda.device_count()}); "
            "use device_map='auto' or 'cpu'."
        )
    return str(device)


def dtype_of(wanted: object) -> str:
    """The name of a type that a model can be kept in."""
    name = str(wanted).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"the type of the weights is '{name}'; it must be one of {', '.join(_DTYPES)}.")
    return name


def chosen_dtype(
    wanted: str | torch.dtype | None, *, bf16: bool = False, fp16: bool = False, fp32: bool = False
) -> str:
    """The one type that flags and name ask for, or "auto"."""
    flags = {"bfloat16": bf16, "float16": fp16, "float32": fp32}
    chosen = [name for name, flag in flags.items() if flag]
    if wanted not in (None, "auto"):
        chosen.append(dtype_of(wanted))
    if len(set(chosen)) > 1:
        raise ConfigError(f"from_pretrained was asked for {' and '.join(chosen)}; give one of bf16, fp16 and fp32.")
    return chosen[0] if chosen else "auto"

"""How many blocks the cache gets: what the requests can use, within what the machine can spare."""

import os
from pathlib import Path

import torch

from kiloq.errors import ConfigError
from kiloq.model import ModelConfig

from .blocks import BLOCK_SIZE
from .kv import kv_bytes_per_token

_CPU_SHARE = 0.5  # of what is free once the weights are loaded; the rest is for activations and other programs
_GPU_SHARE = 0.85


def pool_blocks(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_context: int,
    max_batch: int,
    kv_memory: int | None = None,
) -> int:
    """Blocks for `max_batch` sequences of `max_context` tokens, or as many as `kv_memory` bytes hold.

    Without `kv_memory`, a share of the memory that is available now. Nothing beyond what the requests can use is taken.
    """
    block_bytes = BLOCK_SIZE * kv_bytes_per_token(config, dtype)
    wanted = max_batch * -(-max_context // BLOCK_SIZE)
    budget = kv_memory
    if budget is None:
        budget = int(available_memory(device) * (_GPU_SHARE if device.type == "cuda" else _CPU_SHARE))
    blocks = min(wanted, budget // block_bytes)
    if blocks < 1:
        raise ConfigError(
            f"the cache may take {budget:,} bytes, but {BLOCK_SIZE} tokens of this model need {block_bytes:,}. "
            "Raise kv_memory, or free some memory."
        )
    return blocks


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken on this device without driving anything else out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_system_available(), _container_available())


def _system_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 2**30  # a platform that does not tell: a modest cache


def _container_available() -> int:
    # cgroup v2, then v1; a container without a limit says "max" or a number beyond any machine.
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        paths = Path(folder, limit), Path(folder, used)
        if all(path.is_file() for path in paths):
            most, now = (path.read_text().strip() for path in paths)
            return max(int(most) - int(now), 0) if most.isdigit() else 2**63
    return 2**63

"""What is measured beside the model: memory bandwidth, and which machine and versions these were."""

import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from kiloq import ops
from kiloq.ops import cpu

_READ_BYTES = 640 << 20  # more than the shared caches of today
_READ_SECONDS = 0.5


def memory_bandwidth(device: str = "cpu") -> float:
    """Bytes a second: reads by all threads on a CPU, a copy (read and write) on a GPU. The fastest of many."""
    if device != "cpu":
        return _copy_bandwidth(device)
    library = cpu.library()
    data = cpu.aligned_bytes(_READ_BYTES).fill_(1)
    words = data.view(torch.int64)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < _READ_SECONDS:
        begin = time.perf_counter()
        if library is not None:
            library.kq_read(data.data_ptr(), _READ_BYTES)
        else:
            words.sum()
        best = min(best, time.perf_counter() - begin)
    return _READ_BYTES / best


def _copy_bandwidth(device: str) -> float:
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * len(source) / best


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """What a figure needs beside it to mean anything."""
    facts = {
        "date": date.today().isoformat(),
        "processor": torch.cuda.get_device_name(device) if device != "cpu" else _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "backend": "PyTorch" if device != "cpu" else ops.backend(),
        "kiloq": version("kiloq"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    memory = Path("/proc/meminfo")
    if memory.exists():
        facts["memory"] = f"{int(memory.read_text().split()[1]) / 2**20:.0f} GiB"
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

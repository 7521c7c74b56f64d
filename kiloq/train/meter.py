"""How fast, how large and how long: the figures that every log line of a run carries. Knows no loss and no file."""

import functools
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kiloq.model import ModelConfig, Transformer
from kiloq.model.shard import Split

from .forward import Runtime

_PROBE_SECONDS = 0.25


@dataclass(frozen=True)
class Work:
    """What a token costs: `passed` weights of matrices that it goes through, of which `trained` get gradients."""

    passed: int
    trained: int

    @classmethod
    def of(cls, module: nn.Module) -> "Work":
        """Counted from the shapes, so that packed and adapted networks cost what they compute."""
        networks = [part for part in module.modules() if isinstance(part, Transformer)]
        moved = {p: name for name, p in module.named_parameters() if p.requires_grad and p.ndim >= 2}
        # A row of an embedding is looked up, not multiplied; a tied one multiplies as the head.
        looked_up = {net.get_parameter("embed.weight") for net in networks if _has_plain_embedding(net)}
        shares = [part for part in module.modules() if isinstance(part, Split)]
        ways = {p: part.ways for part in shares for p in part.parameters()}
        trained = sum(p.numel() * ways.get(p, 1) for p in moved if p not in looked_up)
        return cls(max(trained, sum(matrix_weights(net.config) for net in networks)), trained)

    @property
    def flops(self) -> int:
        """Forward 2, backward to the inputs 2, and 2 more for each weight with a gradient: 6N in full training, 4N
        where nearly all is frozen (arXiv 2001.08361, section 2.1). Attention's own products are left out."""
        return 4 * self.passed + 2 * self.trained


def matrix_weights(config: ModelConfig) -> int:
    """Weights that a token is multiplied with on its way to the logits."""
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp) + config.vocab_size * config.hidden_size


class Meter:
    """Reads the clock and the memory for a run of `steps` steps on `world` processes like this one."""

    def __init__(self, module: nn.Module, runtime: Runtime, *, steps: int, world: int) -> None:
        self.device, self.steps = runtime.device, steps
        self.flops = Work.of(module).flops
        self.peak = world * gemm_peak(runtime.device, runtime.dtype)
        self.step_seconds: float | None = None

    def read(self, *, step: int, steps: int, tokens: int, seconds: float) -> dict[str, float]:
        """Figures of the last `steps` steps, which took `seconds` for `tokens`; `step` is where the run stands.

        MFU is the share of the measured peak that the model's own arithmetic used: flops * tokens / seconds / peak.
        """
        took = seconds / max(1, steps)
        # Compiling and the first allocations make first steps slow; the average forgets them.
        self.step_seconds = took if self.step_seconds is None else 0.6 * self.step_seconds + 0.4 * took
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(self.flops * tokens / seconds / self.peak, 4),
            "peak_memory": peak_bytes(self.device),
            "eta_seconds": round((self.steps - step) * self.step_seconds, 1),
        }


@functools.cache
def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of a large square product, the fastest of several: what MFU is a share of. Measured once."""
    size = 8192 if device.startswith("cuda") else 2048
    left = torch.ones(size, size, device=device, dtype=dtype)
    right, out = torch.ones_like(left), torch.empty_like(left)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _PROBE_SECONDS:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def forget_peak(device: str = "cpu") -> None:
    """Begin a new peak, where the system can: on Linux, and on a GPU. Elsewhere the peak is the process's."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # proc(5): 5 resets the peak resident set size to what is resident now.
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_bytes(device: str = "cpu") -> int:
    """The most memory in use since `forget_peak`: resident in the whole process, or taken from a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def clock(seconds: float) -> str:
    """A span of time as people read it: 45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _has_plain_embedding(network: Transformer) -> bool:
    return not network.config.tie_embeddings and isinstance(network.embed, nn.Embedding)

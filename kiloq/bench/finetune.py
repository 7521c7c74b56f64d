"""Memory and time of fine-tuning by method and length, random weights of any shape: the first Qwen README's table.

Each cell is measured in a process of its own (`python -m kiloq.bench.finetune`, a cell as JSON on standard input), so
that its peak memory is its own. What does not fit is only predicted.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from kiloq.errors import ConfigError, KiloqError
from kiloq.model import ModelConfig, Transformer
from kiloq.model.transformer import Linear
from kiloq.ops.layout import QuantWeight
from kiloq.quant.frozen import FrozenLinear
from kiloq.train import adapters
from kiloq.train.adapters import AdapterConfig
from kiloq.train.data import Batch
from kiloq.train.forward import Forward, Runtime, share_tied_gradient
from kiloq.train.heap import keeping_freed
from kiloq.train.meter import Work, forget_peak, gemm_peak, peak_bytes
from kiloq.train.optim import OptimConfig, clip_gradients, make_optimizer
from kiloq.train.plan import Load, plan
from kiloq.train.settings import LoopConfig

from .random_weights import RandomMatrices
from .shapes import shape_config
from .tables import markdown

METHODS: dict[str, AdapterConfig | None] = {
    "LoRA": AdapterConfig(embeddings="none"),
    "LoRA (emb)": AdapterConfig(embeddings="full"),
    "Q-LoRA": AdapterConfig(embeddings="none", quantization="int4"),
    "Full-parameter": None,
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One step: `accumulate` micro-batches of one sequence of `length` tokens."""

    shape: str
    method: str
    length: int
    accumulate: int = 8
    device: str = "cpu"
    checkpointing: str = "selective"
    compile: str = "off"

    @property
    def loop(self) -> LoopConfig:
        return LoopConfig(device=self.device, checkpointing=self.checkpointing, compile=self.compile)  # type: ignore[arg-type]  # its words


def fill(cells: Sequence[Cell], known: Path | None, room: float, told: Callable[[], None]) -> list[dict[str, object]]:
    """A result for each cell; those measured in the file `known` are taken from there, and new ones written to it."""
    found = _known(known) if known is not None and known.exists() else {}
    for cell in cells:
        key = json.dumps(asdict(cell), sort_keys=True)
        one = found.get(key, {})
        if "peak_bytes" not in one and "error" not in one:
            predicted = _predict(cell)
            found[key] = {"cell": asdict(cell), "predicted_bytes": predicted}
            if predicted <= room:
                found[key] |= _in_child(cell)
            if known is not None:
                partial = known.with_name(f"{known.name}.partial")
                partial.write_text(json.dumps(list(found.values()), indent=1) + "\n", encoding="utf-8")
                partial.replace(known)
        told()
    return [found[json.dumps(asdict(cell), sort_keys=True)] for cell in cells]


def _known(path: Path) -> dict[str, dict[str, object]]:
    """Earlier results by their cell."""
    try:
        return {json.dumps(one["cell"], sort_keys=True): one for one in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not what `kiloq bench finetune --json` wrote ({type(error).__name__}: {error}). "
            "Name another file, or remove that one."
        ) from error


def table(results: Sequence[Mapping[str, object]]) -> str:
    """The README's columns: memory and seconds of an iteration; (in brackets) what is predicted and did not fit."""
    cells = [Cell(**one["cell"]) for one in results]  # type: ignore[arg-type]  # asdict of one
    lengths = sorted({cell.length for cell in cells})
    shown = {(c.shape, c.method, c.length): _entry(one) for c, one in zip(cells, results, strict=True)}
    rows = [
        [shape, method, *(shown.get((shape, method, length), "-") for length in lengths)]
        for shape, method in dict.fromkeys((cell.shape, cell.method) for cell in cells)
    ]
    return markdown(["Model Size", "Method", *map(str, lengths)], rows)


def _entry(result: Mapping[str, object]) -> str:
    predicted = float(str(result["predicted_bytes"])) / 2**30
    if "peak_bytes" not in result:
        return f"({predicted:.1f}G)"
    return f"{float(str(result['peak_bytes'])) / 2**30:.1f}G / {float(str(result['seconds'])):.1f}s/it"


def _predict(cell: Cell) -> int:
    loop, config = cell.loop, shape_config(cell.shape)
    return plan(
        Load(
            config=config,
            runtime=Runtime.choose(loop),
            seq_len=cell.length,
            tokens=cell.length,
            accumulate=cell.accumulate,
            adapter=METHODS[cell.method],
            recompute=loop.recompute,
        )
    ).total


def _in_child(cell: Cell) -> dict[str, object]:
    child = subprocess.run(
        [sys.executable, "-m", "kiloq.bench.finetune"],
        input=json.dumps(asdict(cell)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode == -9:  # the system kills what has taken all memory
        return {"error": "oom"}
    if child.returncode:
        raise KiloqError(f"the process that measured {cell.method} at {cell.length} ended with {child.returncode}.")
    found: dict[str, object] = json.loads(child.stdout.splitlines()[-1])
    return found


def measure(cell: Cell) -> dict[str, object]:
    """Seconds of an optimiser step after a first one, and the most memory that the process took for them."""
    runtime, config = Runtime.choose(cell.loop), shape_config(cell.shape)
    model = _network(config, METHODS[cell.method], runtime).train()
    forward = Forward(model, runtime, seq_len=cell.length, checkpointing=cell.loop.recompute)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-5))
    generator = torch.Generator().manual_seed(0)
    peak_flops = gemm_peak(runtime.device, runtime.dtype)
    forget_peak(runtime.device)

    def step(micro_batches: int, length: int) -> float:
        began = time.perf_counter()
        for _ in range(micro_batches):
            ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
            batch = Batch(ids, ids.roll(-1), torch.arange(length), [0, length])
            (forward.cross_entropy(batch) / (length * micro_batches)).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if runtime.device != "cpu":
            torch.cuda.synchronize(runtime.device)
        return time.perf_counter() - began

    with keeping_freed():
        # As long as the others: what is new to the process, kernels for this length and every page of its memory, makes
        # a first step of 2,048 tokens on a CPU twice as slow as the second.
        step(1, cell.length)
        seconds = step(cell.accumulate, cell.length)
    flops = Work.of(model).flops * cell.length * cell.accumulate
    return {"seconds": seconds, "peak_bytes": peak_bytes(runtime.device), "mfu": flops / seconds / peak_flops}


def _network(config: ModelConfig, adapter: AdapterConfig | None, runtime: Runtime) -> Transformer:
    """Random weights as a run would hold them."""
    draw = RandomMatrices(torch.Generator().manual_seed(0))
    dtype = torch.float32 if adapter is None else runtime.dtype

    def matrix(name: str, columns: int, rows: int, bias: bool) -> nn.Module:
        if adapter is None or adapter.quantization is None or name == "head":
            return Linear(columns, rows, bias=bias, dtype=dtype)
        codes = draw(rows, columns, "int4")
        assert isinstance(codes, QuantWeight)
        return FrozenLinear(codes, torch.zeros(rows) if bias else None)

    model = Transformer(config, linear=matrix).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            drawn = draw(parameter.shape[0], parameter.shape[1], "bf16")
            assert isinstance(drawn, torch.Tensor)
            parameter.data.copy_(drawn)
        else:
            parameter.data.fill_(1.0)
    model = model.to(runtime.device).requires_grad_(adapter is None)
    if adapter is not None:
        adapters.attach_new(model, adapter)
    return share_tied_gradient(model, runtime)


if __name__ == "__main__":
    print(json.dumps(measure(Cell(**json.load(sys.stdin)))))

"""One model in a process of its own, so that its peak memory is its own: a job as JSON comes in, results go out.

`python -m kiloq.bench.worker` reads the job from standard input and writes one JSON line for each cell.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kiloq.errors import ConfigError, KiloqError

if TYPE_CHECKING:
    from kiloq.model import Transformer

PRECISIONS = ("bf16", "int8", "int4")
_DEFAULTS: dict[str, object] = {"batch": 1, "kv": "auto"}  # those of Cell


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and what to generate with it. Either `model`, a checkpoint, or `shape`, a name for random weights."""

    model: str | None = None
    shape: str | None = None
    precision: str
    cells: tuple[dict[str, object], ...]  # the fields of Cell
    repeats: int = 3
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None


def run_in_child(job: Job, told: Callable[[], None]) -> list[dict[str, object]]:
    """The results of a job's cells, computed in a new process; `told` is called after each."""
    child = subprocess.Popen(
        [sys.executable, "-m", "kiloq.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    results: list[dict[str, object]] = []
    try:
        child.stdin.write(json.dumps(asdict(job)))
        child.stdin.close()
        for line in child.stdout:
            result = json.loads(line)
            if "failed" in result:
                raise KiloqError(result["failed"])
            results.append(result)
            told()
        status = child.wait()
    finally:
        child.kill()
        child.wait()
    missing = job.cells[len(results) :]
    if not missing:
        return results
    # The system kills what has taken all memory; what was measured before stands.
    if status != -signal.SIGKILL or not results:
        raise KiloqError(f"the process that measured {job.precision} ended with status {status} before any result.")
    known = {key: results[0][key] for key in ("name", "random_weights", "machine", "precision")}
    return results + [{**known, "cell": {**_DEFAULTS, **cell}, "error": "oom"} for cell in missing]


def run_job(job: Job) -> Iterator[dict[str, object]]:
    """One result for each cell, as soon as it is known."""
    import torch

    from kiloq.train.meter import forget_peak, peak_bytes

    from .machine import describe_machine, memory_bandwidth
    from .measure import Cell, OutOfMemoryError, cache_bytes, measure, weight_bytes

    _check(job)
    if job.threads is not None:
        torch.set_num_threads(job.threads)  # before the kernels count them
    bandwidth = memory_bandwidth(job.device)
    forget_peak(job.device)
    model = _load(job)
    load_peak = peak_bytes(job.device)  # of making or reading the model; the cells' peaks are of generating
    for fields in job.cells:
        cell = Cell(**fields)  # type: ignore[arg-type]  # asdict of one, sent as JSON
        result = {
            "name": job.shape or job.model or "kiloq-mini-chat",
            "random_weights": job.shape is not None,
            "precision": job.precision,
            "cell": asdict(cell),
            "machine": describe_machine(job.device),
            "bandwidth": bandwidth,
            "weight_bytes": weight_bytes(model),
            "load_peak_bytes": load_peak,
            "cache_bytes": cache_bytes(model.config, cell.batch * cell.context, cell.kv),
        }
        try:
            figures = measure(model, cell, repeats=job.repeats, seed=job.seed)
            result |= asdict(figures)
            if figures.step_gb_s is not None:
                # The machine's speed drifts; the faster of two looks is nearer to what it can do.
                bandwidth = max(bandwidth, memory_bandwidth(job.device))
                result |= {"bandwidth": bandwidth, "of_bandwidth": figures.step_gb_s * 1e9 / bandwidth}
        except OutOfMemoryError:
            result["error"] = "oom"
        yield result


def _check(job: Job) -> None:
    import torch

    if job.device == "cpu":
        return
    if not job.device.startswith("cuda") or not torch.cuda.is_available():
        raise ConfigError(f"device is {job.device!r}; it must be cpu, or cuda where PyTorch finds a GPU.")
    if job.precision != "bf16":
        raise ConfigError(f"{job.precision} is measured on the CPU in this version; on a GPU, pass --precision bf16.")


def _load(job: Job) -> "Transformer":
    from .random_weights import random_model
    from .shapes import shape_config

    if job.shape is not None:
        return random_model(shape_config(job.shape), job.precision, seed=job.seed, device=job.device)
    from kiloq.checkpoint import bundled, load_model, open_checkpoint

    checkpoint = open_checkpoint(job.model or bundled())
    if checkpoint.quantization is None or job.device != "cpu":  # elsewhere, codes become floats
        quantization = None if job.precision == "bf16" else job.precision
        return load_model(checkpoint, dtype="bfloat16", device=job.device, quantization=quantization)
    own = f"int{checkpoint.quantization.bits}"
    if job.precision != own:
        raise ConfigError(f"the checkpoint is quantised to {own}, and --precision is {job.precision}; leave it out.")
    return load_model(checkpoint, device=job.device)


def _serve() -> None:
    # The results have a channel of their own: whatever a library prints goes to where talk goes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fields = json.load(sys.stdin)
    job = Job(**{**fields, "cells": tuple(fields["cells"])})
    try:
        for result in run_job(job):
            print(json.dumps(result), file=answers, flush=True)
    except KiloqError as error:
        print(json.dumps({"failed": str(error)}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()

"""What the model said before it was trained: measured once and kept in the run's folder, so that it needs no copy."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .comparisons import PackedPairs, PairBatch
from .parallel import Parallel

LogProbs = Callable[[PairBatch], Tensor]
"""A batch -> log p of both answers of its comparisons, [n, 2]."""


@torch.no_grad()
def measure_reference(
    folder: Path,
    streams: Mapping[str, PackedPairs],
    log_probs: LogProbs,
    *,
    model: nn.Module,
    dtype: torch.dtype,
    parallel: Parallel,
) -> str:
    """Set every stream's reference to what `log_probs` says of it under `model` as it is before any training, or to
    what it said when the run in `folder` began; a line on which of the two it was. All processes do the same."""
    path = folder / "reference.npz"
    data = {name: stream.epochs.fingerprint for name, stream in streams.items()}
    stamp = json.dumps([_stamp(model), str(dtype), data])
    # Parts of a model differ between processes, so the first one says whose measurement it is.
    if parallel.any(parallel.is_first and _stamp_in(path) == stamp):
        _read(path, streams)
        return f"reference: as measured when the run began ({path.name})"
    was_training = model.training
    model.eval()
    for stream in streams.values():
        for batch in stream.one_pass():
            stream.reference[batch.items] = log_probs(batch).float().cpu().numpy()
    model.train(was_training)
    parallel.settle(model)  # what was gathered for these passes would stay as it is through the first step
    if parallel.is_first:
        unfinished = path.with_suffix(".tmp.npz")
        # Streams end to end; each knows how many are its own.
        log_probs_of_all = np.concatenate([stream.reference for stream in streams.values()])
        np.savez(unfinished, stamp=np.array(stamp), log_probs=log_probs_of_all)
        unfinished.replace(path)
    count = sum(len(stream.compared) for stream in streams.values())
    return f"reference: log-probabilities of {count:,} comparisons under the model as it begins"


def _stamp(model: nn.Module) -> int:
    """A number that another model, or this one after a step, does not have: over a thousand values of each tensor."""
    crc = 0
    for name, tensor in model.state_dict().items():
        values = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().reshape(-1)
        some = values[:: max(1, len(values) // 1024)].cpu().contiguous().view(torch.uint8)
        crc = zlib.crc32(f"{name} {list(tensor.shape)}".encode() + some.numpy().tobytes(), crc)
    return crc


def _stamp_in(path: Path) -> str:
    if not path.exists():
        return ""
    with np.load(path, allow_pickle=False) as file:
        return str(file["stamp"])


def _read(path: Path, streams: Mapping[str, PackedPairs]) -> None:
    ends = np.cumsum([len(stream.compared) for stream in streams.values()])
    with np.load(path, allow_pickle=False) as file:
        for stream, part in zip(streams.values(), np.split(file["log_probs"], ends[:-1]), strict=True):
            stream.reference = part

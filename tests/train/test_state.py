"""A saved state that someone else wrote, or that is damaged, is one clear error and runs no code."""

import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from kiloq.errors import CheckpointError
from kiloq.model import Transformer
from kiloq.train.data import PackedBatches, TokenFolder, write_tokens
from kiloq.train.forward import Forward, Runtime
from kiloq.train.objective import next_token
from kiloq.train.optim import OptimConfig
from kiloq.train.settings import BatchConfig, LoopConfig, TrainConfig
from kiloq.train.state import newest_state
from kiloq.train.state_index import IndexReader
from kiloq.train.trainer import Trainer


@pytest.fixture
def train(tmp_path: Path, make_model: Callable[..., Transformer]) -> Callable[..., Path]:
    """Begin a run of one step, or go on to so many; its state."""
    loop = LoopConfig(device="cpu", precision="fp32", compile="off", report=())
    write_tokens(tmp_path / "corpus", [list(range(40))], 64)

    def run(steps: int = 1) -> Path:
        optim = OptimConfig(lr=1e-2, steps=steps, warmup_steps=0)
        config = TrainConfig(batch=BatchConfig(seq_len=16, tokens=16), optim=optim, loop=loop)
        stream = PackedBatches([(TokenFolder(tmp_path / "corpus"), 1.0)], seq_len=16, tokens=16, seed=0)
        forward = Forward(make_model(), Runtime.choose(loop), seq_len=16)
        trainer = Trainer(forward.model, next_token(forward), stream, folder=tmp_path / "run", config=config)
        trainer.run()
        state = newest_state(tmp_path / "run")
        assert state is not None
        return state

    return run


class Runs:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("file", [".metadata", "run.pt", "__0_0.distcp"])
def test_a_state_runs_no_code_that_is_hidden_in_it(train: Callable[..., Path], tmp_path: Path, file: str) -> None:
    state = train()
    path, made = state / file, tmp_path / "made"
    for function, *arguments in [
        (os.mkdir, str(made)),
        (Path.touch, made),
        (torch.serialization._open_file, str(made), "w"),  # a class of a module whose other names an index needs
        (torch.serialization._open_zipfile_writer_file, str(made)),
        (torch.PyTorchFileWriter, str(made)),
        (eval, f"open({str(made)!r}, 'w')"),
    ]:
        hidden = Runs(function, *arguments)
        if file == ".metadata":
            path.write_bytes(pickle.dumps(hidden))
        else:
            torch.save(hidden, path)
        with pytest.raises(CheckpointError, match="does not fit this run"):
            train()
        assert not made.exists(), function


def test_a_state_names_no_file_elsewhere(train: Callable[..., Path], tmp_path: Path) -> None:
    state = train()
    index = pickle.loads((state / ".metadata").read_bytes())
    (state / "__0_0.distcp").rename(tmp_path / "elsewhere")
    for place in index.storage_data.values():
        place.relative_path = str(tmp_path / "elsewhere")
    (state / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="which is no file of the state"):
        train()


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"step": "two"}},
        {"progress": {"step": 1, "pace": 2}},
        {"progress": {"step": -1}},
        {"progress": None},
        {"stream": None},
        {"stream": {}},
        {"stream": {"epoch": 0, "index": "a", "open": 3, "fingerprint": 0}},
        {"optimizer": [1]},
        {"optimizer": {"another": {}}},
    ],
)
def test_odd_values_in_a_state_are_one_clear_error(train: Callable[..., Path], change: dict[str, Any]) -> None:
    state = train()
    path = state / "run.pt"
    plain = torch.load(path, weights_only=True)
    if "fingerprint" in (change.get("stream") or {}):
        change["stream"]["fingerprint"] = plain["stream"]["fingerprint"]
    torch.save({**plain, **change}, path)
    with pytest.raises(CheckpointError, match=r"does not fit this run|not of this kind of run"):
        train()


def test_any_damage_of_an_index_is_one_clear_error(train: Callable[..., Path]) -> None:
    state = train()
    path = state / ".metadata"
    data, random = path.read_bytes(), Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(bytes(damaged))
        with suppress(ValueError):
            assert isinstance(IndexReader(path.parent).read_metadata(), Metadata)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Larger ones fail to be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 400, 3000])  # the log, the index, the tensors cannot be written
def test_a_full_disk_is_one_clear_error_and_loses_no_state(train: Callable[..., Path], size: int) -> None:
    before = train()
    with files_of_at_most(size), pytest.raises(CheckpointError, match=r"broke off: .*File too large.* same command"):
        train(steps=2)
    after = train()
    assert after == before
    assert train(steps=2).name == "step-000000002"


@pytest.mark.parametrize("name", ["state", "log.jsonl"])
def test_what_cannot_be_written_is_told_before_the_first_step(
    train: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    if name == "state":
        (tmp_path / "run" / "log.jsonl").rmdir()
        (tmp_path / "run" / "state").touch()
    with pytest.raises(CheckpointError, match=rf"broke off: .*{name}"):
        train()

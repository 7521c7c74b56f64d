"""Two processes over gloo train what one trains, and go on from each other's states."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from kiloq.train.data import write_tokens
from kiloq.train.forward import Runtime
from kiloq.train.parallel import Alone, join
from kiloq.train.pieces import part
from kiloq.train.ranks import Ranks
from kiloq.train.settings import ParallelConfig
from kiloq.train.state import newest_state

DRIVER = Path(__file__).with_name("ranks_driver.py")


def corpus(out: Path) -> Path:
    random = np.random.default_rng(0)
    write_tokens(out / "corpus", [random.integers(0, 64, n).tolist() for n in (40, 9, 70, 25, 13, 50, 33)], 64)
    return out


def torchrun(
    out: Path, *jobs: str, script: Sequence[str] = (str(DRIVER),), processes: int = 2
) -> subprocess.CompletedProcess[str]:
    count = ["--nproc-per-node", str(processes)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *count, *script]
    roots = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": roots}
    return subprocess.run(
        [*command, str(out), *jobs], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def load_driver() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks_driver", DRIVER)
    assert spec is not None
    assert spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver


@pytest.fixture(scope="module")
def alone() -> Callable[..., None]:
    """A job of the driver in this process."""
    driver = load_driver()

    def run(out: Path, name: str, **options: str) -> None:
        driver.train(out, name, options)

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, alone: Callable[..., None]) -> Path:
    """Runs of one process and of two, all of the two in one session of torchrun."""
    out = corpus(tmp_path_factory.mktemp("ranks"))
    alone(out, "one")
    alone(out, "one_tied", tied="1")
    alone(out, "one_bf16", precision="bf16")
    alone(out, "one_muon", optim="muon")
    for name in ("grown", "cut"):
        alone(out, name, stop="3")
        assert newest_state(out / name) is not None
    alone(out, "whole", logits="1")
    jobs = [
        "ddp kind=ddp",
        "tied kind=fsdp tied=1",
        "fsdp kind=fsdp recompute=full",
        "ddp_bf16 kind=ddp precision=bf16",
        "fsdp_bf16 kind=fsdp precision=bf16",
        "micro kind=fsdp sync=micro",
        "ddp_paused kind=ddp stop=3",
        "ddp_paused kind=ddp",
        "paused kind=fsdp recompute=full stop=3",
        "paused kind=fsdp recompute=full",
        "shrunk kind=fsdp stop=3",
        "grown kind=fsdp",
        "halves tensor=2",
        "tied_halves tensor=2 tied=1 recompute=selective",
        "halves_paused tensor=2 stop=3",
        "halves_paused tensor=2",
        "joined tensor=2 stop=3",
        "cut tensor=2",
        "shares tensor=2 logits=1",
        "muon kind=fsdp optim=muon",
        "muon_paused kind=fsdp optim=muon stop=3",
        "muon_paused kind=fsdp optim=muon",
        "muon_halves tensor=2 optim=muon",
    ]
    done = torchrun(out, *jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    alone(out, "shrunk")
    alone(out, "joined")
    return out


def log(run: Path) -> dict[tuple[int, str], float]:
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["step"], k): line[k] for line in lines for k in ("loss", "grad_norm", "eval/same") if k in line}


def trained(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(run / "trained.pt", weights_only=True)
    return weights


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("ddp", "one"),
        ("tied", "one_tied"),
        ("fsdp", "one"),
        ("micro", "one"),
        ("ddp_bf16", "one_bf16"),
        ("fsdp_bf16", "one_bf16"),
        ("halves", "one"),
        ("tied_halves", "one_tied"),
    ],
)
def test_two_processes_learn_what_one_learns(runs: Path, name: str, alike: str) -> None:
    assert log(runs / name) == pytest.approx(log(runs / alike), abs=1e-5)
    found, wanted = trained(runs / name), trained(runs / alike)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["muon", "muon_halves"])
def test_matrices_in_parts_are_orthogonalised_whole(runs: Path, name: str) -> None:
    # In bf16, where a last bit of a gradient may become a larger one of a step.
    assert log(runs / name) == pytest.approx(log(runs / "one_muon"), abs=5e-4)
    for key, tensor in trained(runs / "one_muon").items():
        torch.testing.assert_close(trained(runs / name)[key], tensor, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "straight"),
    [("paused", "fsdp"), ("ddp_paused", "ddp"), ("halves_paused", "halves"), ("muon_paused", "muon")],
)
def test_what_stops_one_process_stops_all_and_they_go_on_exactly(runs: Path, name: str, straight: str) -> None:
    assert log(runs / name) == log(runs / straight)
    found, wanted = trained(runs / name), trained(runs / straight)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["grown", "shrunk", "cut", "joined"])
def test_another_number_of_processes_goes_on(runs: Path, name: str) -> None:
    assert log(runs / name) == pytest.approx(log(runs / "one"), abs=1e-5)
    for key, tensor in trained(runs / "one").items():
        torch.testing.assert_close(trained(runs / name)[key], tensor, rtol=0, atol=1e-5)


def test_processes_with_shares_of_the_blocks_give_the_logits_of_one(runs: Path) -> None:
    whole, first, second = (torch.load(runs / name) for name in ("whole-0.pt", "shares-0.pt", "shares-1.pt"))
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, second)


def test_each_process_writes_its_own_part(runs: Path) -> None:
    state = newest_state(runs / "fsdp")
    assert state is not None
    assert sorted(path.name for path in state.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    assert [path.name for path in state.parent.iterdir()] == [state.name]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "rank"), [("begun", 1), ("amid", 0), ("written", 0), ("renamed", 0)])
def test_a_kill_while_a_state_is_written_leaves_a_whole_one(runs: Path, tmp_path: Path, moment: str, rank: int) -> None:
    out = corpus(tmp_path)
    killed = torchrun(out, f"run kind=fsdp recompute=full die={moment} rank={rank}")
    assert killed.returncode != 0
    state = newest_state(out / "run")
    assert state is not None
    assert state.name == ("step-000000004" if moment == "renamed" else "step-000000002")
    resumed = torchrun(out, "run kind=fsdp recompute=full")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert log(out / "run") == log(runs / "fsdp")
    assert all(torch.equal(trained(out / "run")[key], tensor) for key, tensor in trained(runs / "fsdp").items())


@pytest.mark.slow
def test_groups_that_share_a_model_learn_from_other_batches(runs: Path, tmp_path: Path) -> None:
    out = corpus(tmp_path)
    jobs = ["ddp kind=ddp tensor=2", "fsdp kind=fsdp tensor=2 stop=3", "fsdp kind=fsdp tensor=2"]
    done = torchrun(out, *jobs, processes=4)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("ddp", "fsdp"):
        assert log(out / name) == pytest.approx(log(runs / "one"), abs=1e-5)
        for key, tensor in trained(runs / "one").items():
            torch.testing.assert_close(trained(out / name)[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_shares_are_compiled_and_run_in_bf16(tmp_path: Path, alone: Callable[..., None]) -> None:
    out = corpus(tmp_path)
    alone(out, "one", precision="bf16")
    alone(out, "compiled_one", compile="on")
    done = torchrun(out, "two precision=bf16 tensor=2", "compiled_two compile=on tensor=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert log(out / "two") == pytest.approx(log(out / "one"), rel=0.02)
    assert log(out / "compiled_two") == pytest.approx(log(out / "compiled_one"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["kind=ddp", "kind=fsdp", "tensor=2"])
def test_a_process_that_is_gone_ends_the_others_with_a_word(tmp_path: Path, sharing: str) -> None:
    failed = torchrun(corpus(tmp_path), f"run {sharing} gone=1")
    assert failed.returncode != 0
    assert failed.stderr.count("LostProcessError: process 0 of 2 waited for another one that is gone") == 1


@pytest.mark.slow
def test_a_process_ends_while_messages_are_on_their_way(tmp_path: Path) -> None:
    script = tmp_path / "leave.py"
    # Without end_process the interpreter is aborted: gloo's threads let go of tensors while it ends.
    script.write_text(
        """
import torch, torch.distributed as dist
from kiloq.cli.terminal import end_process
dist.init_process_group("gloo")
kept = dist.group.WORLD  # as FSDP2 keeps its own
for _ in range(2000):
    dist.all_reduce(torch.zeros(()), async_op=True)
end_process(0)
        """,
        encoding="utf-8",
    )
    done = torchrun(tmp_path, script=(str(script),))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def two() -> Iterator[None]:
    """The first of two processes, of which only this one is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_matrices_of_a_full_run_are_gathered_in_the_type_of_products(two: None) -> None:
    model = load_driver().tiny(tied=False).requires_grad_(True)
    Ranks(ParallelConfig(kind="fsdp"), "cpu").spread(model, Runtime("cpu", torch.bfloat16, compiled=False))
    assert isinstance(model.blocks[0].attn.qkv.weight, DTensor)
    for module in (model, model.blocks[0]):
        module.unshard()
    block = model.blocks[0]
    types = {name: one.dtype for name, one in model.named_parameters() if not isinstance(one, DTensor)}
    assert {types[f"blocks.0.{name}.weight"] for name in ("attn.qkv", "attn.out", "mlp.down")} == {torch.bfloat16}
    assert block.attn_norm.weight.dtype == block.attn.q_norm.weight.dtype == model.embed.weight.dtype == torch.float32


@pytest.mark.slow
def test_a_number_that_is_none_in_one_process_stops_all(tmp_path: Path) -> None:
    failed = torchrun(corpus(tmp_path), "run kind=ddp nan=1")
    assert failed.returncode != 0
    assert failed.stderr.count("NumericsError: step 3: loss is nan") == 2


def test_without_torchrun_a_run_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert join(ParallelConfig(kind="fsdp"), "cpu") == Alone()


@pytest.mark.parametrize("rows", [(0, 3), (3, 8), (5, 5), (0, 8)])
def test_rectangles_say_where_the_local_values_come_from(rows: tuple[int, int]) -> None:
    whole = torch.arange(48.0).view(12, 4)
    ranges = [(2, 6), (8, 10), (10, 12)]  # what one of several processes has of a fused matrix
    local = torch.cat([whole[a:b] for a, b in ranges])[slice(*rows)]
    rebuilt = torch.full_like(local, torch.nan)
    for one in part(whole.shape, ranges=ranges, rows=rows).rectangles:
        (h, w), (y, x), (n, m) = one.here, one.there, one.sizes
        rebuilt[h : h + n, w : w + m] = whole[y : y + n, x : x + m]
    assert torch.equal(rebuilt, local)

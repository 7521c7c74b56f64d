"""Layer by layer: what flows through a layer, what a stopped run leaves, and what the whole is worth."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kiloq.errors import ConfigError, DataError, NumericsError
from kiloq.model import ModelConfig, Transformer
from kiloq.quant.calibrate import (
    MATRICES,
    LayerReport,
    QuantizeConfig,
    default_group_size,
    job_digest,
    quantize_layers,
    quantized_weights,
    schemes,
)
from kiloq.quant.calibration_data import CalibrationData, choose_rows, shortcomings, windows
from kiloq.quant.gptq import GptqConfig
from kiloq.quant.stream import Stream
from tests.tiny import tiny_config


def config_of(family: str = "qwen2") -> ModelConfig:
    windows = (None, 9 if family == "qwen2" else None, None)
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_layers": 3, "head_dim": 16, "intermediate_size": 96}
    return tiny_config(family, original_length=32, windows=windows, **sizes)


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random, with a few large channels and biases, so that rounding hurts."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                parameter[::17] *= 4
            elif name.endswith(".bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3)
    return model.requires_grad_(False).eval()


def rows_of(count: int = 40, seed: int = 1) -> list[list[int]]:
    """Tokens of very different frequency, in rows of different length, some beyond the trained length of 32."""
    generator = torch.Generator().manual_seed(seed)
    return [(300 * torch.rand(20 + row % 5 * 9, generator=generator) ** 3).long().tolist() for row in range(count)]


DATA = choose_rows(rows_of(), samples=32, max_length=48, seed=0)
FOUR = QuantizeConfig(bits=4, group_size=32)


def read_of(model: Transformer) -> Callable[[str], torch.Tensor]:
    return lambda name: model.get_parameter(name).detach().clone()


def run(
    model: Transformer, work: Path, wanted: QuantizeConfig = FOUR, data: CalibrationData | None = DATA
) -> Transformer:
    """The model with its matrices replaced by what they became."""
    quantize_layers(model.config, read_of(model), data, wanted, work=work, digest="job")
    result = model_of(model.config)
    result.load_state_dict(model.state_dict())
    for name, weight in quantized_weights(model.config, work):
        result.get_parameter(name).copy_(weight.dequantize())
    return result


def logits_error(model: Transformer, exact: Transformer, rows: list[list[int]]) -> float:
    data = choose_rows(rows, samples=len(rows), max_length=64, seed=0)
    first, second = (one.logits(data.ids, data.starts) for one in (model, exact))
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_the_stream_is_the_model(family: str, tmp_path: Path) -> None:
    """What each matrix reads, and what leaves the last layer, is what the network itself computes."""
    model = model_of(config_of(family))
    seen: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(model.blocks):
        for name in MATRICES:

            def keep(_: object, args: tuple[torch.Tensor], key: str = f"{layer}.{name}") -> None:
                seen[key] = args[0]

            block.get_submodule(name).register_forward_pre_hook(keep)
    last: list[torch.Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    model.logits(DATA.ids, DATA.starts)
    for layer in range(3):
        stream = Stream(model.config, read_of(model), DATA, layer=layer, work=tmp_path, kind="hidden")
        assert len(stream.chunks) >= 1
        for name in MATRICES:
            found = torch.cat([stream.inputs(name, chunk) for chunk in stream.chunks])
            torch.testing.assert_close(found, seen[f"{layer}.{name}"], rtol=1e-4, atol=1e-4)
        stream.finish()
    torch.testing.assert_close(stream.after, last[0], rtol=1e-4, atol=1e-4)


def test_chunks_cover_all_rows_once() -> None:
    for tokens in (1, 60, 200, 10_000):
        ranges = list(DATA.chunks(tokens))
        assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
        assert ranges[-1][1] == DATA.rows
        assert all(last - first == 1 or DATA.starts[last] - DATA.starts[first] <= tokens for first, last in ranges)


@pytest.mark.parametrize("family", ["qwen", "qwen3"])
def test_gptq_is_nearer_to_the_model_than_rounding(family: str, tmp_path: Path) -> None:
    model, unseen = model_of(config_of(family)), rows_of(seed=9)
    gptq = logits_error(run(model, tmp_path / "gptq"), model, unseen)
    rtn = logits_error(run(model, tmp_path / "rtn", QuantizeConfig(group_size=32, method="rtn"), None), model, unseen)
    eight = logits_error(run(model, tmp_path / "eight", QuantizeConfig(bits=8)), model, unseen)
    assert gptq < 0.93 * rtn
    assert eight < 0.2 * gptq


def test_reports_name_every_matrix_and_layer(tmp_path: Path) -> None:
    model, seen = model_of(config_of()), []
    done = quantize_layers(model.config, read_of(model), DATA, FOUR, work=tmp_path, digest="job", report=seen.append)
    assert done == seen
    assert [one.layer for one in done] == [0, 1, 2]
    for one in done:
        assert tuple(one.matrices) == MATRICES
        assert all(0 < m.error < m.rounding_error and m.tokens == len(DATA.ids) for m in one.matrices.values())


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(correction: float, tmp_path: Path) -> None:
    model = model_of(config_of())
    wanted = QuantizeConfig(group_size=32, gptq=GptqConfig(correction=correction))
    whole = run(model, tmp_path / "whole", wanted).state_dict()

    class StopError(Exception):
        pass

    def stop(one: LayerReport) -> None:
        if one.layer == 1:
            raise StopError

    work = tmp_path / "stopped"
    with pytest.raises(StopError):
        quantize_layers(model.config, read_of(model), DATA, wanted, work=work, digest="job", report=stop)
    # What a layer that was not finished leaves behind is in nobody's way.
    (work / "hidden.unfinished").write_bytes(b"half")
    (work / "layer.unfinished").write_bytes(b"half")
    reads: list[str] = []

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return model.get_parameter(name).detach().clone()

    done = quantize_layers(model.config, read, DATA, wanted, work=work, digest="job")
    assert len(done) == 3
    assert all(name.startswith("blocks.2.") for name in reads)
    resumed = model_of(model.config)
    resumed.load_state_dict(model.state_dict())
    for name, weight in quantized_weights(model.config, work):
        resumed.get_parameter(name).copy_(weight.dequantize())
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_calibrate as t
        def kill(one):
            if one.layer == 1: os.kill(os.getpid(), signal.SIGKILL)
        model = t.model_of(t.config_of())
        read, work = t.read_of(model), Path(sys.argv[1])
        t.quantize_layers(model.config, read, t.DATA, t.FOUR, work=work, digest="job", report=kill)
    """)
    killed = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", script, str(killed)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    model = model_of(config_of())
    whole, resumed = run(model, tmp_path / "whole"), run(model, killed)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_a_work_folder_is_for_one_job(tmp_path: Path) -> None:
    model = model_of(config_of())
    run(model, tmp_path)
    with pytest.raises(ConfigError, match="unfinished work of another job"):
        quantize_layers(model.config, read_of(model), DATA, FOUR, work=tmp_path, digest="other")


def test_the_digest_knows_weights_settings_and_data() -> None:
    config = config_of()
    other_data = choose_rows(rows_of(seed=2), samples=32, max_length=48, seed=0)
    digests = {
        job_digest(config, FOUR, DATA, "a"),
        job_digest(config, FOUR, DATA, "b"),
        job_digest(config, FOUR, other_data, "a"),
        job_digest(config, QuantizeConfig(bits=8), DATA, "a"),
        job_digest(config_of("qwen3"), FOUR, DATA, "a"),
    }
    assert len(digests) == 5
    assert job_digest(config, FOUR, DATA, "a") == job_digest(config, FOUR, DATA, "a")


def test_sizes_decide_the_scheme() -> None:
    with pytest.raises(ConfigError, match=r"mlp.down has 96 inputs, .* 64 .*--group-size 32 would"):
        schemes(config_of(), QuantizeConfig(bits=4, group_size=64))
    free = schemes(config_of(), QuantizeConfig(bits=4))
    assert {name: scheme.group_size for name, scheme in free.items()} == {
        "attn.qkv": 64,
        "attn.out": 64,
        "mlp.gate_up": 64,
        "mlp.down": 32,
    }
    assert all(s.bits == 8 and s.group_size is None for s in schemes(config_of(), QuantizeConfig(bits=8)).values())


def test_broken_weights_are_told_with_their_place(tmp_path: Path) -> None:
    model = model_of(config_of())
    model.get_parameter("blocks.1.attn.out.weight")[3, 3] = torch.inf
    with pytest.raises(NumericsError, match=r"layer 1, mlp\.gate_up"):
        run(model, tmp_path)


def test_gptq_needs_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs calibration data"):
        run(model_of(config_of()), tmp_path, data=None)


def test_rows_are_chosen_by_seed_and_cut() -> None:
    rows = [[row] * (row + 1) for row in range(100)]
    first = choose_rows(rows, samples=10, max_length=50, seed=3)
    assert first.rows == 10
    assert max(b - a for a, b in zip(first.starts, first.starts[1:], strict=False)) <= 50
    assert torch.equal(first.ids, choose_rows(rows, samples=10, max_length=50, seed=3).ids)
    assert not torch.equal(first.ids, choose_rows(rows, samples=10, max_length=50, seed=4).ids)
    assert 0 not in choose_rows(rows, samples=100, max_length=50, seed=0).ids  # a row of one token predicts nothing
    with pytest.raises(DataError, match="no row of two tokens"):
        choose_rows([[1]], samples=4, max_length=8, seed=0)


def test_text_becomes_whole_windows() -> None:
    assert windows([[1, 2, 3], [4, 5, 6, 7]], 3) == [[1, 2, 3], [4, 5, 6], [7]]


def test_small_data_is_told() -> None:
    assert [note.split(" are few")[0] for note in shortcomings(DATA, 4096)] == [f"{len(DATA.ids):,} tokens", "32 rows"]
    assert shortcomings(choose_rows(rows_of(200), samples=200, max_length=48, seed=0), 64) == []


def test_the_group_size_nobody_names_is_the_largest_that_fits() -> None:
    config = config_of()  # 64 and 96 inputs
    assert default_group_size(config) == 32
    assert default_group_size(dataclasses.replace(config, intermediate_size=688)) == 64  # 688: no group divides it
    assert default_group_size(dataclasses.replace(config, intermediate_size=128)) == 64

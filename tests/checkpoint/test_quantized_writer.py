"""A quantised model on disk: what was written is read back code by code, in every format, and nothing else changes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kiloq import ops
from kiloq.checkpoint import load_dense, load_model, open_checkpoint
from kiloq.checkpoint.quantized_writer import write_quantized
from kiloq.cli.main import run
from kiloq.errors import CheckpointError, ConfigError
from kiloq.model import Transformer
from kiloq.model.config import Family
from kiloq.ops.layout import QuantWeight
from kiloq.quant.grid import Scheme, rtn

Write = Callable[..., tuple[Path, Transformer]]
IDS = torch.arange(30)
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
FOUR, ZEROS = Scheme(bits=4, group_size=32), Scheme(bits=4, group_size=32, symmetric=False)
ROW, EIGHT = Scheme(bits=8, group_size=None), Scheme(bits=8, group_size=32)


def rounded(model: Transformer, scheme: Scheme, *, order: bool = False) -> dict[str, QuantWeight]:
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            shuffled = torch.randperm(parameter.shape[1], generator=torch.Generator().manual_seed(1))
            weight = rtn(parameter.float()[:, shuffled] if order else parameter.float(), scheme)
            found[name] = replace(weight, order=shuffled.int()) if order else weight
    return found


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("layout", "scheme", "order"),
    [
        ("gptq", FOUR, False),
        ("gptq", FOUR, True),
        ("gptq", ZEROS, False),
        ("gptq", ROW, False),
        ("gptq", EIGHT, False),
        ("compressed-tensors", FOUR, False),
        ("compressed-tensors", FOUR, True),
        ("compressed-tensors", ZEROS, False),
        ("compressed-tensors", ROW, False),
    ],
)
def test_what_was_written_is_read_back(
    family: Family, layout: str, scheme: Scheme, order: bool, write: Write, tmp_path: Path
) -> None:
    folder, model = write(family, dtype=torch.float16, **WIDE)
    weights = rounded(model, scheme, order=order)
    target = tmp_path / "quantised"
    write_quantized(target, open_checkpoint(folder), weights.items(), layout=layout, max_shard_bytes=9_000)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1
    checkpoint = open_checkpoint(target)
    dense = load_dense(checkpoint, dtype="float32")
    for name, parameter in model.named_parameters():
        exact = weights[name].dequantize() if name in weights else parameter.float()
        assert torch.allclose(dense.get_parameter(name), exact, rtol=1e-6, atol=1e-9), name
    packed = load_model(checkpoint)
    if scheme is not EIGHT:
        for name, weight in weights.items():
            known = ops.unpack(packed.get_submodule(name.removesuffix(".weight")).packed)
            assert torch.allclose(known.dequantize(), weight.dequantize(), rtol=1e-6, atol=1e-9)
    assert checkpoint.tokenizer.vocabulary.files == open_checkpoint(folder).tokenizer.vocabulary.files
    assert checkpoint.generation == open_checkpoint(folder).generation


def test_a_matrix_that_the_format_cannot_say_is_written_plain(write: Write, tmp_path: Path) -> None:
    folder, model = write("qwen", dtype=torch.bfloat16, intermediate_size=48)
    weights = {
        name: rtn(w, ROW) if w.shape[1] == 48 else rtn(w, FOUR) for name, w in model.named_parameters() if w.ndim == 2
    }
    del weights["embed.weight"], weights["head.weight"]
    for layout in ("gptq", "compressed-tensors"):
        target = tmp_path / layout
        write_quantized(target, open_checkpoint(folder), weights.items(), layout=layout)
        stored = load_file(target / "model.safetensors")
        assert stored["transformer.h.0.mlp.c_proj.weight"].dtype == torch.bfloat16
        dense = load_dense(open_checkpoint(target), dtype="float32")
        assert torch.allclose(
            dense.blocks[1].mlp.down.weight, weights["blocks.1.mlp.down.weight"].dequantize(), rtol=0.004, atol=0
        )
        assert (load_model(open_checkpoint(target)).logits(IDS) - dense.logits(IDS)).norm() < 0.1 * dense.logits(
            IDS
        ).norm()


def test_a_failed_write_leaves_nothing(write: Write, tmp_path: Path) -> None:
    folder, model = write("qwen2", dtype=torch.float16, **WIDE)

    def broken() -> Iterator[tuple[str, QuantWeight]]:
        yield next(iter(rounded(model, FOUR).items()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_quantized(tmp_path / "new", open_checkpoint(folder), broken())
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    with pytest.raises(CheckpointError, match="not empty"):
        write_quantized(folder, open_checkpoint(folder), rounded(model, FOUR).items())
    with pytest.raises(ConfigError, match="one scale a row"):
        write_quantized(
            tmp_path / "new", open_checkpoint(folder), rounded(model, EIGHT).items(), layout="compressed-tensors"
        )


def test_gptq_settings_lie_where_every_loader_looks(write: Write, tmp_path: Path) -> None:
    folder, model = write("qwen2", dtype=torch.float16, **WIDE)
    target = tmp_path / "quantised"
    write_quantized(target, open_checkpoint(folder), rounded(model, FOUR).items(), notes={"damp_percent": 0.01})
    settings = json.loads((target / "quantize_config.json").read_text())
    assert settings == json.loads((target / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (4, 32, True, False)
    stored = load_file(target / "model.safetensors")
    assert set(stored["model.layers.0.self_attn.q_proj.qzeros"].flatten().tolist()) == {0x77777777}


def test_a_quantised_checkpoint_can_be_written_as_floats(write: Write, tmp_path: Path) -> None:
    folder, model = write("qwen2", dtype=torch.bfloat16, **WIDE)
    write_quantized(tmp_path / "codes", open_checkpoint(folder), rounded(model, FOUR).items())
    assert run(["convert", str(tmp_path / "codes"), "-o", str(tmp_path / "no"), "--to", "qwen2"]) == 1
    assert run(["convert", str(folder), "-o", str(tmp_path / "no"), "--dequantize"]) == 1
    assert run(["convert", str(folder), "-o", str(tmp_path / "no")]) == 1
    target = tmp_path / "floats"
    assert run(["convert", str(tmp_path / "codes"), "-o", str(target), "--dequantize", "--dtype", "float32"]) == 0
    assert open_checkpoint(target).quantization is None
    expected = load_dense(open_checkpoint(tmp_path / "codes"), dtype="float32").logits(IDS)
    assert torch.equal(load_dense(open_checkpoint(target)).logits(IDS), expected)

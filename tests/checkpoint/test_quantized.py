"""Quantised checkpoints: what other programs wrote is computed as their documents say, and damage is one error.

The files are made here by code of its own, number by number from the formats' description.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kiloq import ops
from kiloq.checkpoint import load_dense, load_frozen, load_model, open_checkpoint
from kiloq.errors import CheckpointError, ConfigError
from kiloq.model import Transformer
from kiloq.model.config import Family
from kiloq.quant.linear import Packed, is_packed

Write = Callable[..., tuple[Path, Transformer]]
IDS = torch.arange(30)
WIDE = {"intermediate_size": 64}  # 32 and 64 inputs: groups of 32


def words(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [.., n] in int32 words along the last dimension, the first one lowest."""
    per_word = 32 // bits
    out = torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // per_word, dtype=torch.int64)
    for i in range(per_word):
        out += numbers[..., i::per_word].long() << (bits * i)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


class Maker:
    """Random codes for a layer: its tensors in a format, and the matrix that they stand for."""

    def __init__(self, form: str, bits: int, group: int, *, symmetric: bool = True, order: bool = False) -> None:
        self.form, self.bits, self.group, self.symmetric, self.order = form, bits, group, symmetric, order
        self.generator = torch.Generator().manual_seed(5)

    def random(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def layer(self, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
        top = 2**self.bits
        group = self.group if self.group > 0 else columns
        groups = columns // group
        codes = self.random(0, top, rows, columns)
        zeros = torch.full((rows, groups), top // 2) if self.symmetric else self.random(0, top, rows, groups)
        scales = ((0.5 + torch.rand(rows, groups, generator=self.generator)) / top).half()
        place = torch.arange(columns) // group
        if self.order:  # the same for all layers of one width, as of those that read the same inputs
            place = place[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        exact = scales.float()[:, place] * (codes - zeros[:, place])
        if self.form.startswith("gptq"):
            stored = zeros - 1 if self.form == "gptq" else zeros
            tensors = {
                "qweight": words(codes, self.bits).t(),
                "qzeros": words((stored % top).t(), self.bits),
                "scales": scales.t(),
                "g_idx": place.int(),
            }
        elif self.form == "int-quantized":
            tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
        else:
            tensors = {
                "weight_packed": words(codes, self.bits),
                "weight_scale": scales,
                "weight_shape": torch.tensor([rows, columns]),
            }
            if not self.symmetric:
                tensors["weight_zero_point"] = words(zeros.t(), self.bits).t()
            if self.order:
                tensors["weight_g_idx"] = place.int()
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, exact

    @property
    def settings(self) -> dict[str, object]:
        if self.form.startswith("gptq"):
            return {
                "quant_method": "gptq",
                "bits": self.bits,
                "group_size": self.group,
                "desc_act": self.order,
                "sym": self.symmetric,
                "checkpoint_format": self.form,
            }
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group > 0 else "channel",
            "group_size": self.group if self.group > 0 else None,
        }
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return {"quant_method": "compressed-tensors", "format": self.form, "config_groups": groups}


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def quantized(folder: Path, maker: Maker) -> dict[str, Tensor]:
    """Replace the matrices of all layers; gives every tensor as it is without quantisation."""
    plain: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in sorted(tensors.items()):
            plain[name] = tensor
            if tensor.ndim == 2 and (".h." in name or ".layers." in name):
                made, plain[name] = maker.layer(*tensor.shape)
                del tensors[name]
                tensors |= {f"{name.removesuffix('.weight')}.{suffix}": value for suffix, value in made.items()}

    edit_weights(folder, change)
    edit_json(folder / "config.json", quantization_config=maker.settings, torch_dtype="float16")
    return plain


def explicit(folder: Path, plain: dict[str, Tensor], target: Path) -> Transformer:
    """The same checkpoint with plain matrices."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    save_file({name: tensor.float().contiguous() for name, tensor in plain.items()}, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return load_dense(open_checkpoint(target), dtype="float32")


def fails(folder: Path, *said: str) -> None:
    for load in (load_model, load_dense):
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            load(open_checkpoint(folder))
        assert "\n" not in str(caught.value)
        for word in said:
            assert word in str(caught.value), str(caught.value)


EXACT = [
    Maker("gptq", 4, 32),
    Maker("gptq", 4, -1),
    Maker("gptq", 4, 32, order=True),
    Maker("gptq", 4, 32, symmetric=False),
    Maker("gptq_v2", 4, 32),
    Maker("gptq_v2", 4, 32, symmetric=False, order=True),
    Maker("pack-quantized", 4, 32),
    Maker("pack-quantized", 4, 32, symmetric=False),
    Maker("pack-quantized", 4, 32, order=True),
    Maker("pack-quantized", 8, -1),
    Maker("int-quantized", 8, -1),
]
REROUNDED = [Maker("gptq", 8, 32), Maker("gptq", 8, 32, order=True), Maker("pack-quantized", 8, 32)]


def label(maker: Maker) -> str:
    return f"{maker.form}-{maker.bits}-{maker.group}{'' if maker.symmetric else '-zeros'}{'-order' * maker.order}"


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize("maker", EXACT + REROUNDED, ids=label)
def test_files_mean_what_their_format_says(family: Family, maker: Maker, write: Write, tmp_path: Path) -> None:
    folder, _ = write(family, dtype=torch.float16, **WIDE)
    plain = quantized(folder, maker)
    exact = explicit(folder, plain, tmp_path / "explicit")
    checkpoint = open_checkpoint(folder)
    assert torch.allclose(load_dense(checkpoint, dtype="float32").logits(IDS), exact.logits(IDS), atol=1e-3, rtol=0)
    frozen = load_frozen(checkpoint, dtype="float32")
    assert torch.allclose(frozen.logits(IDS), exact.logits(IDS), atol=1e-3, rtol=0)

    model = load_model(checkpoint)
    assert is_packed(model)
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            known = ops.unpack(module.packed)
            assert isinstance(known, ops.QuantWeight)
            weight = exact.get_parameter(f"{name}.weight")
            if name in ("embed", "head") or maker in REROUNDED:
                assert (known.dequantize() - weight).norm() < 0.01 * weight.norm()
            else:
                assert known.kind == ("int4" if maker.bits == 4 else "int8")
                assert torch.allclose(known.dequantize(), weight, rtol=1e-6, atol=1e-9)
    ours, theirs = model.logits(IDS), exact.logits(IDS)
    assert (ours - theirs).norm() < 0.1 * theirs.norm()  # activations and head in 8 bits, weights far from trained ones


def test_biases_of_zeros_that_old_writers_added_are_ignored(write: Write) -> None:
    folder, _ = write("qwen", dtype=torch.float16, **WIDE)
    quantized(folder, Maker("gptq", 4, 32))
    expected = load_model(open_checkpoint(folder)).logits(IDS)
    edit_weights(folder, lambda t: t.update({"transformer.h.0.mlp.w1.bias": torch.zeros(64).half()}))
    assert torch.equal(load_model(open_checkpoint(folder)).logits(IDS), expected)
    edit_weights(folder, lambda t: t.update({"transformer.h.0.mlp.w1.bias": torch.ones(64).half()}))
    fails(folder, "transformer.h.0.mlp.w1.bias")


def test_settings_may_lie_in_a_file_of_their_own(write: Write) -> None:
    folder, _ = write("qwen", dtype=torch.float16, **WIDE)
    quantized(folder, maker := Maker("gptq", 4, 32))
    expected = load_model(open_checkpoint(folder)).logits(IDS)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, "c_attn.g_idx", "no quantization_config")
    del settings["quant_method"], settings["checkpoint_format"]  # as AutoGPTQ's first files
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert torch.equal(load_model(open_checkpoint(folder)).logits(IDS), expected)
    assert maker.settings["bits"] == 4


def test_floats_can_be_asked_of_a_quantised_checkpoint(write: Write) -> None:
    folder, _ = write("qwen2", dtype=torch.float16, **WIDE)
    quantized(folder, Maker("gptq", 4, 32))
    assert not is_packed(load_model(open_checkpoint(folder), dtype="float32"))
    with pytest.raises(ConfigError, match="quantised already"):
        load_model(open_checkpoint(folder), quantization="int4")


CHANGES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "3 bits": ({"bits": 3}, ("config.json", "3 bits", "4 and 8")),
    "2 bits": ({"bits": 2}, ("2 bits",)),
    "bits in words": ({"bits": "four"}, ("bits", "'four'")),
    "another method": ({"quant_method": "awq"}, ("'awq'", "gptq and compressed-tensors")),
    "another layout": ({"checkpoint_format": "marlin"}, ("checkpoint_format", "'marlin'")),
    "a small group": ({"group_size": 16}, ("group_size", "16")),
    "no group": ({"group_size": 0}, ("group_size", "0")),
    "another group": ({"group_size": 64}, ("groups of 64",)),
    "8 bits of 4": ({"bits": 8}, ("qweight", "int32")),
    "zeros of the second version": ({"checkpoint_format": "gptq_v2"}, ("zeros differ from 8", "checkpoint_format")),
    "layers apart": ({"dynamic": {"+:mlp": {"bits": 8}}}, ("dynamic",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_cannot_be_computed_are_named(change: str, write: Write) -> None:
    folder, _ = write("qwen2", dtype=torch.float16, **WIDE)
    maker = Maker("gptq", 4, 32)
    quantized(folder, maker)
    changes, said = CHANGES[change]
    edit_json(folder / "config.json", quantization_config=maker.settings | changes)
    fails(folder, *said)
    edit_json(folder / "config.json", quantization_config=[1])
    fails(folder, "an object is needed")


LAYER = "model.layers.1.self_attn.k_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "no scales": (lambda t: t.pop(f"{LAYER}.scales"), (f"{LAYER}.scales", "no tensor")),
    "short codes": (lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:-1]}), ("qweight", "[3, 16]")),
    "floats for codes": (
        lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].float()}),
        ("qweight", "float32"),
    ),
    "wide zeros": (lambda t: t.update({f"{LAYER}.qzeros": torch.zeros(1, 3, dtype=torch.int32)}), ("qzeros", "[1, 3]")),
    "other zeros": (lambda t: t[f"{LAYER}.qzeros"].fill_(0x12345678), (LAYER, "zeros differ from 8")),
    "a group beyond": (lambda t: t[f"{LAYER}.g_idx"].fill_(2**30), (LAYER, "g_idx", "1,073,741,824")),
    "a group below": (lambda t: t[f"{LAYER}.g_idx"].fill_(-1), (LAYER, "g_idx")),
    "a scale that is no number": (lambda t: t[f"{LAYER}.scales"].fill_(torch.nan), (LAYER, "not finite")),
    "a tensor too many": (lambda t: t.update({f"{LAYER}.extra": torch.zeros(1)}), (f"{LAYER}.extra", "unknown")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_named(damage: str, write: Write) -> None:
    folder, _ = write("qwen2", dtype=torch.float16, **WIDE)
    quantized(folder, Maker("gptq", 4, 32))
    change, said = DAMAGE[damage]
    edit_weights(folder, change)
    fails(folder, *said)


def test_groups_of_unequal_size_are_named(write: Write) -> None:
    folder, _ = write("qwen2", dtype=torch.float16, **WIDE)
    quantized(folder, Maker("gptq", 4, 32))
    edit_weights(folder, lambda t: t["model.layers.0.mlp.down_proj.g_idx"].fill_(1))
    fails(folder, "model.layers.0.mlp.down_proj", "same number")


def test_parts_in_different_orders_are_refused_with_the_reason(write: Write) -> None:
    folder, _ = write("qwen2", dtype=torch.float16, hidden_size=64, head_dim=16, **WIDE)
    quantized(folder, Maker("gptq", 4, 32, order=True))
    load_model(open_checkpoint(folder))
    name = "model.layers.0.self_attn.v_proj.g_idx"
    edit_weights(folder, lambda t: t.update({name: t[name].flip(0)}))
    with pytest.raises(CheckpointError, match=r"blocks.0.attn.qkv.*different orders.*without desc_act"):
        load_model(open_checkpoint(folder))

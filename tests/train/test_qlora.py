"""Q-LoRA: an adapter trained beside codes is the one trained beside the numbers that they stand for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kiloq.checkpoint import GenerationDefaults, convert_checkpoint, load_dense, load_frozen, open_checkpoint
from kiloq.checkpoint.fingerprint import Base
from kiloq.checkpoint.merge import with_adapter
from kiloq.checkpoint.quantized_writer import write_quantized
from kiloq.errors import ConfigError
from kiloq.model.config import Family
from kiloq.quant.frozen import FrozenLinear
from kiloq.quant.grid import Scheme, rtn
from kiloq.tokenizer import Tokenizer
from kiloq.train.adapters import AdapterConfig
from kiloq.train.optim import OptimConfig
from kiloq.train.run_folder import export
from kiloq.train.settings import BatchConfig, LoopConfig
from kiloq.train.sft import ChatSource, SftConfig, sft
from tests.tiny import tiny_config, tiny_network

TALK = {"hi": "Hello!", "你好": "你好！", "안녕": "안녕!", "1+1?": "2"}
LOOP = LoopConfig(device="cpu", precision="fp32", compile="off", log_every=1)


def dense_base(folder: Path, family: Family, tokenizer: Tokenizer) -> Path:
    changes = {"qkv_bias": True, "tie_embeddings": family == "qwen2", "dtype": "float32"}
    sizes = {"vocab_size": tokenizer.size, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    model = tiny_network(tiny_config(family, original_length=256, **sizes, **changes))
    end = tokenizer.end_of_text_id
    raw = GenerationDefaults(stop_ids=(end,), pad_id=end, chat_format="raw", max_window=200)
    export(folder, model, tokenizer, raw)
    return folder


def as_codes(base: Path, folder: Path) -> Path:
    weights = {
        name: rtn(one, Scheme(bits=4, group_size=32))
        for name, one in load_dense(open_checkpoint(base)).named_parameters()
        if name.startswith("blocks.") and one.ndim == 2
    }
    write_quantized(folder, open_checkpoint(base), weights.items())
    return folder


def recipe(model: Path, out: Path, **adapter: object) -> SftConfig:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in TALK.items()
    ]
    data = out.parent / "chat.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return SftConfig(
        out=str(out),
        model=str(model),
        data=(ChatSource(path=str(data)),),
        adapter=AdapterConfig(**{"rank": 4, "dropout": 0.0, **adapter}),
        batch=BatchConfig(seq_len=160, tokens=320),
        optim=OptimConfig(lr=1e-2, steps=6, warmup_steps=1, weight_decay=0.0),
        loop=LOOP,
    )


def losses(config: SftConfig) -> list[float]:
    assert sft(config) == "finished"
    lines = (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize(("family", "dora"), [("qwen", False), ("qwen2", False), ("qwen2", True)])
def test_training_beside_codes_is_training_beside_what_they_stand_for(
    family: Family,
    dora: bool,
    tmp_path: Path,
    tokenizer: Tokenizer,
    saved_weights: Callable[..., dict[str, torch.Tensor]],
) -> None:
    codes = as_codes(dense_base(tmp_path / "dense", family, tokenizer), tmp_path / "int4")
    convert_checkpoint(open_checkpoint(codes), tmp_path / "exact", family=family, dtype="float32")
    ours, theirs = (recipe(model, tmp_path / f"run-{model.name}", dora=dora) for model in (codes, tmp_path / "exact"))
    found, wanted = losses(ours), losses(theirs)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[-1] < 0.95 * found[0]
    adapters = [load_file(Path(one.out) / "adapter" / "adapter_model.safetensors") for one in (ours, theirs)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-3, atol=1e-3)
    # Codes are in no state that is saved.
    assert saved_weights(Path(ours.out)).keys() == saved_weights(Path(theirs.out)).keys()


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_matrices_rounded_on_the_fly_are_trained_beside(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    base = dense_base(tmp_path / "dense", "qwen2", tokenizer)
    config = recipe(base, tmp_path / "run", quantization=kind)
    found = losses(config)
    assert found[-1] < 0.95 * found[0]
    adapter = Path(config.out) / "adapter"
    recorded = Base.read(adapter)
    assert recorded is not None
    assert recorded.quantization == kind
    # Merged into the full weights it still has learned: its loss is not that of codes alone.
    checkpoint = open_checkpoint(base)
    ids = torch.arange(40)
    rounded, full = load_frozen(checkpoint, kind=kind, dtype="float32"), load_dense(checkpoint)
    changed = load_dense(with_adapter(checkpoint, adapter))
    lost = (rounded.logits(ids) - full.logits(ids)).norm()
    assert (changed.logits(ids) - full.logits(ids)).norm() > lost > 0
    layer = rounded.get_submodule("blocks.0.attn.qkv")
    assert isinstance(layer, FrozenLinear)


def test_in_bf16_it_learns_as_in_fp32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    codes = as_codes(dense_base(tmp_path / "dense", "qwen2", tokenizer), tmp_path / "int4")
    exact = recipe(codes, tmp_path / "fp32")
    half = replace(recipe(codes, tmp_path / "bf16"), loop=replace(LOOP, precision="bf16"))
    assert losses(half) == pytest.approx(losses(exact), rel=0.05)


def test_codes_alone_cannot_be_trained_and_are_not_rounded_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    codes = as_codes(dense_base(tmp_path / "dense", "qwen2", tokenizer), tmp_path / "int4")
    with pytest.raises(ConfigError, match=r"is quantised .* \[adapter\] table"):
        sft(replace(recipe(codes, tmp_path / "run"), adapter=None))
    short = OptimConfig(lr=1e-2, steps=1)
    kept, again = (recipe(codes, tmp_path / name, **more) for name, more in (("a", {}), ("b", {"quantization": "nf4"})))
    assert losses(replace(again, optim=short)) == losses(replace(kept, optim=short))

"""A model and its adapter become one model. Oracles: peft's own merge, and the two side by side."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kiloq.checkpoint import Checkpoint, load_dense, load_frozen, load_model, open_checkpoint
from kiloq.checkpoint.adapter import StoredAdapter, read_stored_adapter
from kiloq.checkpoint.adapter_writer import write_adapter
from kiloq.checkpoint.convert import convert_checkpoint
from kiloq.checkpoint.fingerprint import Base
from kiloq.checkpoint.merge import with_adapter
from kiloq.checkpoint.quantized_writer import write_quantized
from kiloq.errors import NumericsError
from kiloq.model import Transformer
from kiloq.model.config import Family
from kiloq.quant.grid import Scheme, rtn
from kiloq.tokenizer import Tokenizer
from kiloq.train.adapters import AdapterConfig, attach, stored
from tests.train.peft_peers import as_checkpoint, peer
from tests.train.peft_peers import with_adapter as with_peft_adapter

Write = Callable[..., tuple[Path, Transformer]]
IDS = torch.arange(30)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [3, 257, 258]
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The vocabulary that fits the peers: single bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (folder / "bytes.tiktoken").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Tokenizer.load(folder)


def peft_settings(method: str, kind: str) -> dict[str, object]:
    tied = kind == "qwen2"
    return {
        "lora": {"target_modules": LINEARS},
        "rslora": {"target_modules": ["v_proj", "up_proj"], "use_rslora": True},
        "dora": {"target_modules": LINEARS, "use_dora": True, "use_rslora": True},
        "rows": {
            "target_modules": ["q_proj"],
            "trainable_token_indices": TOKENS if tied else {"embed_tokens": TOKENS, "lm_head": TOKENS},
        },
        "tables": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
        | ({"ensure_weight_tying": True} if tied else {}),
        "own-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[method]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "rows", "tables", "own-head"])
def test_the_merged_folder_is_what_peft_merges(
    method: str, kind: str, tmp_path: Path, bytes_tokenizer: Tokenizer
) -> None:
    checkpoint = as_checkpoint(peer(kind), tmp_path / "base", bytes_tokenizer)
    theirs = with_peft_adapter(peer(kind), tmp_path / "adapter", **peft_settings(method, kind)).eval()
    merged = with_adapter(checkpoint, tmp_path / "adapter")
    convert_checkpoint(merged, tmp_path / "merged", family=merged.config.family)
    found = open_checkpoint(tmp_path / "merged")
    ours = load_dense(found).logits(IDS)
    with torch.no_grad():
        beside = theirs(IDS[None]).logits[0]
        together = theirs.merge_and_unload()(IDS[None]).logits[0]
    torch.testing.assert_close(ours, beside, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, together, rtol=0, atol=1e-4)
    # A tied model with a head of its own says so, and brings it (transformers#45127).
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    is_tied = kind == "qwen2" and method != "own-head"
    assert config["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not is_tied


def disturbed(checkpoint: Checkpoint, config: AdapterConfig, model: Transformer) -> StoredAdapter:
    """An adapter with random values in everything that it trains."""
    attach(model, checkpoint, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return stored(model, config)


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(rank=3, dropout=0.0),
        AdapterConfig(rank=3, dropout=0.0, dora=True, rslora=True),
        AdapterConfig(rank=2, dropout=0.0, embeddings="rows"),
        AdapterConfig(rank=2, dropout=0.0, embeddings="full"),
    ],
    ids=["lora", "dora", "rows", "full"],
)
def test_merged_logits_are_those_of_base_and_adapter(
    family: Family, config: AdapterConfig, write: Write, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write(family)[0])
    model = load_dense(checkpoint)
    adapter = disturbed(checkpoint, config, model)
    write_adapter(tmp_path / "adapter", adapter, model.config, base=Base.of(checkpoint.folder))
    merged = with_adapter(checkpoint, tmp_path / "adapter")
    torch.testing.assert_close(load_dense(merged).logits(IDS), model.eval().logits(IDS), rtol=0, atol=1e-4)
    convert_checkpoint(merged, tmp_path / "out", family=merged.config.family)
    found = open_checkpoint(tmp_path / "out")
    torch.testing.assert_close(load_dense(found).logits(IDS), model.logits(IDS), rtol=0, atol=1e-4)
    assert found.generation == checkpoint.generation
    assert found.tokenizer.vocabulary.files == checkpoint.tokenizer.vocabulary.files


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_a_quantised_base_merges_into_what_its_codes_stand_for(
    dora: bool, write: Write, tmp_path: Path
) -> None:
    folder, plain = write("qwen2", dtype=torch.float16, **WIDE)
    weights = {
        name: rtn(one.float(), Scheme(bits=4, group_size=32))
        for name, one in plain.named_parameters()
        if name.startswith("blocks.") and one.ndim == 2
    }
    write_quantized(tmp_path / "int4", open_checkpoint(folder), weights.items())
    base = open_checkpoint(tmp_path / "int4")
    model = load_frozen(base, dtype="float32")
    adapter = disturbed(base, AdapterConfig(rank=3, dropout=0.0, dora=dora), model)
    write_adapter(tmp_path / "adapter", adapter, model.config, base=Base.of(base.folder))
    merged = with_adapter(base, tmp_path / "adapter")
    expected = model.eval().logits(IDS)
    torch.testing.assert_close(load_dense(merged, dtype="float32").logits(IDS), expected, rtol=0, atol=1e-4)
    convert_checkpoint(merged, tmp_path / "out", family="qwen2", dtype="float32")
    found = open_checkpoint(tmp_path / "out")
    assert found.quantization is None
    torch.testing.assert_close(load_dense(found).logits(IDS), expected, rtol=0, atol=1e-4)
    answering = load_model(merged).logits(IDS)  # packed in bf16 where there are kernels
    assert (answering - expected).norm() < 0.05 * expected.norm()


def test_a_chat_adapter_makes_a_chat_model_of_a_base(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    tokenizer = bytes_tokenizer
    checkpoint = as_checkpoint(peer("qwen2"), tmp_path / "base", tokenizer)
    assert checkpoint.generation.chat_format == "raw"
    model = load_dense(checkpoint)
    adapter = disturbed(checkpoint, AdapterConfig(rank=2, dropout=0.0), model)
    settings = {"chat_format": "chatml", "eos_token_id": [tokenizer.im_end_id], "do_sample": False}
    write_adapter(tmp_path / "adapter", adapter, model.config, generation=settings)
    merged = with_adapter(checkpoint, tmp_path / "adapter")
    convert_checkpoint(merged, tmp_path / "out", family="qwen2")
    found = open_checkpoint(tmp_path / "out").generation
    assert (found.chat_format, found.stop_ids) == ("chatml", (tokenizer.im_end_id,))


def test_a_type_that_cannot_hold_the_result_is_refused(write: Write, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write("qwen2")[0])
    model = load_dense(checkpoint)
    adapter = disturbed(checkpoint, AdapterConfig(rank=2, dropout=0.0), model)
    first = next(iter(adapter.updates.values()))[0]
    first.up.fill_(1e6)
    write_adapter(tmp_path / "adapter", adapter, model.config)
    merged = with_adapter(checkpoint, tmp_path / "adapter")
    with pytest.raises(NumericsError, match="float16"):
        convert_checkpoint(merged, tmp_path / "out", family="qwen2", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert read_stored_adapter(tmp_path / "adapter", checkpoint.config).rank == 2

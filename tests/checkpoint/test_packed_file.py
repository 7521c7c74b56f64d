"""The packed file: the next load gives the same bits from it, and any file that does not fit is made anew."""

import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kiloq import ops
from kiloq.checkpoint import load, load_model, open_checkpoint
from kiloq.model import Transformer
from kiloq.quant.linear import Packed

Write = Callable[..., tuple[Path, Transformer]]
pytestmark = pytest.mark.skipif(ops.backend() == "reference", reason="only kernels take packed matrices")


@pytest.fixture(autouse=True)
def every_load_is_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load, "LONG_LOAD", -1.0)
    monkeypatch.setattr(load, "WORTH_KEEPING", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def matrices(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: module.packed.data for name, module in model.named_modules() if isinstance(module, Packed)}


def same(left: Transformer, right: Transformer) -> bool:
    ids = torch.arange(20)
    one, other = matrices(left), matrices(right)
    return (
        one.keys() == other.keys()
        and all(torch.equal(one[name], other[name]) for name in one)
        and torch.equal(left.logits(ids), right.logits(ids))
    )


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_next_load_is_the_same_and_reads_no_matrix(
    tied: bool,
    quantization: str | None,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = open_checkpoint(write("qwen2", dtype=torch.bfloat16, tie_embeddings=tied)[0])
    first = load_model(checkpoint, quantization=quantization)
    path = checkpoint.folder / f".kiloq-packed-{quantization or 'bf16'}.safetensors"
    assert str(path) in caplog.text
    with safe_open(path, framework="pt") as file:  # a file that others can read too
        assert torch.equal(file.get_tensor("embed.data"), matrices(first)["embed"])
    monkeypatch.setattr(ops, "pack", None)
    assert same(load_model(checkpoint, quantization=quantization), first)


def test_each_rounding_has_a_file_of_its_own(write: Write) -> None:
    checkpoint = open_checkpoint(write("qwen2", dtype=torch.bfloat16)[0])
    kinds = (None, "int8", "int4")
    first = [load_model(checkpoint, quantization=kind) for kind in kinds]
    assert all(same(load_model(checkpoint, quantization=kind), model) for kind, model in zip(kinds, first, strict=True))


def test_a_folder_that_cannot_be_written_has_its_file_in_the_users_cache(write: Write, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write("qwen2", dtype=torch.bfloat16)[0])
    (checkpoint.folder / ".kiloq-packed-int4.safetensors").mkdir()  # a rename onto it fails, for root too
    first = load_model(checkpoint, quantization="int4")
    assert len(list((tmp_path / "cache").rglob("*-kiloq-packed-int4.safetensors"))) == 1
    assert not list(checkpoint.folder.glob("*.unfinished"))
    assert same(load_model(checkpoint, quantization="int4"), first)


def edit_header(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def with_facts(change: Callable[[dict[str, list[object]]], object]) -> Callable[[Path], None]:
    def edit(header: dict[str, object]) -> None:
        facts = json.loads(header["__metadata__"]["matrices"])
        change(facts)
        header["__metadata__"]["matrices"] = json.dumps(facts)

    return lambda path: edit_header(path, edit)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a header of any length": lambda path: path.write_bytes(b"\xff" * 100),
    "no header": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"null"),
    "deep": lambda path: path.write_bytes(struct.pack("<Q", 90_000) + b"[" * 90_000),
    "no key": lambda path: edit_header(path, lambda header: header["__metadata__"].pop("key")),
    "another kind": with_facts(lambda facts: facts["embed"].__setitem__(0, "int3")),
    "more rows": with_facts(lambda facts: facts["embed"].__setitem__(1, 10**15)),
    "rows in words": with_facts(lambda facts: facts["embed"].__setitem__(1, "many")),
    "another matrix": with_facts(lambda facts: facts.update({"blocks.0.attn.qkv": facts["blocks.0.mlp.down"]})),
    "places outside": lambda path: edit_header(
        path, lambda header: header["embed.data"].update(data_offsets=[-(2**40), 0])
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew_with_a_line_that_says_so(
    damage: str, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(write("qwen2", dtype=torch.bfloat16)[0])
    first = load_model(checkpoint, quantization="int4")
    path = checkpoint.folder / ".kiloq-packed-int4.safetensors"
    sound = path.read_bytes()
    DAMAGE[damage](path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert same(load_model(checkpoint, quantization="int4"), first)
    assert [str(path) in record.message for record in caplog.records] == [True, True]
    assert "\n" not in caplog.records[0].message
    assert path.read_bytes() == sound


def test_a_file_of_other_weights_is_made_anew(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint(write("qwen2", dtype=torch.bfloat16)[0])
    load_model(checkpoint, quantization="int4")
    weights = checkpoint.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 64
    weights.write_bytes(content)
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    caplog.clear()
    after = load_model(checkpoint, quantization="int4")
    assert "made from other files" in caplog.text
    (checkpoint.folder / ".kiloq-packed-int4.safetensors").unlink()
    assert same(load_model(checkpoint, quantization="int4"), after)


def test_an_order_of_inputs_that_is_none_is_refused(write: Write) -> None:
    from kiloq.checkpoint.packed_file import packed_file

    folder, _ = write("qwen2", dtype=torch.bfloat16)
    weight = ops.QuantWeight(
        kind="int8",
        group_size=64,
        codes=torch.zeros(16, 64, dtype=torch.int8),
        scales=torch.ones(16, 1),
        order=torch.full((64,), 2**20, dtype=torch.int32),
    )
    kept = packed_file(folder, [], "codes")
    kept.write({"a": ops.pack(weight)})
    assert kept.read() is None

"""Reading: what is loaded is what lies on disk, and every fault of a folder is one error that names it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.errors import CheckpointError, ConfigError
from kiloq.model import ModelConfig, Transformer
from kiloq.model.config import Family
from kiloq.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
Write = Callable[..., tuple[Path, Transformer]]


def equal(ours: Transformer, theirs: Transformer) -> bool:
    left, right = ours.state_dict(), theirs.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def load(folder: Path, dtype: str = "auto") -> Transformer:
    return load_dense(open_checkpoint(folder), dtype=dtype)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fails(folder: Path, *words: str) -> None:
    """Loading ends in one error that says each of the words."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def as_bin(folder: Path) -> None:
    for path in sorted(folder.glob("model*.safetensors")):
        torch.save(load_file(path), folder / path.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_what_was_written_is_read_bit_for_bit_in_its_own_dtype(
    family: Family, dtype: torch.dtype, write: Write
) -> None:
    folder, model = write(family, dtype=dtype)
    loaded = load(folder)
    assert equal(loaded, model)
    assert equal(loaded, load(folder))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_load_with_and_without_their_index(form: str, with_index: bool, write: Write) -> None:
    folder, model = write("qwen", max_shard_bytes=8_000)
    assert len(list(folder.glob("model-*"))) > 3
    if form == "bin":
        as_bin(folder)
    if not with_index:
        next(folder.glob("*.index.json")).unlink()
    assert equal(load(folder), model)


def test_one_bin_file_loads(write: Write) -> None:
    folder, model = write("qwen2")
    as_bin(folder)
    assert equal(load(folder), model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_what_transformers_saves_gives_the_same_logits(
    family: Family,
    tied: bool,
    tmp_path: Path,
    make_config: Callable[..., ModelConfig],
    tokenizer: Tokenizer,
) -> None:
    kind = {"qwen2": transformers.Qwen2ForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}[family]
    torch.manual_seed(0)
    oracle = kind(kind.config_class.from_dict(make_config(family, tie_embeddings=tied).to_hf())).eval()
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save(tmp_path)
    ids = torch.randint(0, tokenizer.size, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = oracle(ids[None]).logits[0]
    assert torch.allclose(load(tmp_path).logits(ids), expected, atol=1e-5, rtol=0)


def test_the_golden_weights_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shutil.copy(GOLDEN / "weights.safetensors", tmp_path / "model.safetensors")
    config = json.loads((GOLDEN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen"}))
    tokenizer.save(tmp_path)
    model = load(tmp_path)
    stored = load_file(GOLDEN / "weights.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == model.config.num_parameters
    gate_up = torch.cat([stored["transformer.h.1.mlp.w2.weight"], stored["transformer.h.1.mlp.w1.weight"]])
    assert torch.equal(model.state_dict()["blocks.1.mlp.gate_up.weight"], gate_up)


def test_the_key_names_of_the_first_release_load(write: Write) -> None:
    folder, model = write("qwen")
    hf = json.loads((folder / "config.json").read_text())
    old = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "ffn_hidden_size": "intermediate_size",
        "padded_vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
    }
    for new_name, name in old.items():
        hf[new_name] = hf.pop(name)
    (folder / "config.json").write_text(json.dumps(hf))
    assert equal(load(folder), model)


def test_dtype_can_be_chosen(write: Write) -> None:
    folder, model = write(dtype=torch.bfloat16)
    assert equal(load(folder, "float32"), model.float())
    with pytest.raises(ConfigError, match="'float8'"):
        load(folder, "float8")


def test_mixed_dtypes_become_the_one_that_the_config_names(write: Write) -> None:
    folder, _ = write(dtype=torch.bfloat16)
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    assert {parameter.dtype for parameter in load(folder).parameters()} == {torch.bfloat16}


def test_harmless_buffers_are_ignored(write: Write) -> None:
    folder, model = write("qwen")
    edit_weights(folder, lambda tensors: tensors.update({"transformer.rotary_emb.inv_freq": torch.ones(4)}))
    assert equal(load(folder), model)


def test_a_tied_model_that_repeats_its_embedding_loads(write: Write) -> None:
    folder, model = write(tie_embeddings=True)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert equal(load(folder), model)


def test_a_tied_model_with_another_head_is_an_error(write: Write) -> None:
    folder, _ = write(tie_embeddings=True)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    fails(folder, "model.safetensors", "tie_word_embeddings", "lm_head.weight")


def test_an_untied_model_without_a_head_is_an_error(write: Write) -> None:
    folder, _ = write()
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    fails(folder, "tie_word_embeddings is false", "lm_head.weight")


def test_a_missing_tensor_is_named(write: Write) -> None:
    folder, _ = write()
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    fails(folder, str(folder), "model.layers.1.mlp.up_proj.weight")


def test_an_unknown_tensor_is_named(write: Write) -> None:
    folder, _ = write()
    edit_weights(folder, lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": torch.ones(32)}))
    fails(folder, "model.safetensors", "model.layers.1.self_attn.o_proj.bias", "unknown")


def test_a_wrong_shape_is_named(write: Write) -> None:
    folder, _ = write()
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    fails(folder, "model.safetensors", "model.norm.weight", "[31]", "[32]")


def test_an_unreadable_dtype_is_named(write: Write) -> None:
    folder, _ = write()
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    fails(folder, "model.safetensors", "model.norm.weight", "int8")


@pytest.mark.parametrize(("layers", "found"), [(1, "model.layers.1."), (3, "model.layers.2.")])
def test_a_config_with_another_number_of_layers_is_an_error(layers: int, found: str, write: Write) -> None:
    folder, _ = write()
    edit_json(folder / "config.json", num_hidden_layers=layers, layer_types=["full_attention"] * layers)
    fails(folder, f"{layers} layers", found)


def test_a_config_smaller_than_the_vocabulary_is_an_error(write: Write, tokenizer: Tokenizer) -> None:
    folder, _ = write()
    edit_json(folder / "config.json", vocab_size=tokenizer.size - 1)
    fails(folder, "tokenizer", "config.json", f"{tokenizer.size:,}")


@pytest.mark.parametrize("keep", [0.5, 0.001, 0.0])
def test_a_truncated_safetensors_file_is_named(keep: float, write: Write) -> None:
    folder, _ = write()
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * keep))
    fails(folder, "model.safetensors", "cut off", *(["tensor model."] if keep == 0.5 else []))


def test_a_truncated_bin_file_is_named(write: Write) -> None:
    folder, _ = write()
    as_bin(folder)
    path = folder / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size // 2)
    fails(folder, "pytorch_model.bin", "damaged")


def test_a_damaged_header_is_named(write: Write) -> None:
    folder, _ = write()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff\xff\xff")
    fails(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize("header", [b"[1, 2]", 100_000 * b"[", 100_000 * b'{"a":'])
def test_a_header_that_is_no_table_is_named(header: bytes, write: Write) -> None:
    folder, _ = write()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    fails(folder, "model.safetensors", "damaged")


BROKEN_PICKLES = {
    "empty": b"",
    "pops from nothing": b"\x80\x02.",
    "memo": b"\x80\x02h\x05.",
    "no pairs": b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
    "no storage": b"\x80\x02K\x01Q.",
    "no text": b"\x80\x02X\x01\x00\x00\x00\xff.",
}


@pytest.mark.parametrize("broken", BROKEN_PICKLES)
def test_a_broken_pickle_is_named(broken: str, write: Write) -> None:
    folder, _ = write()
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        for name, content in (("data.pkl", BROKEN_PICKLES[broken]), ("version", b"3"), ("byteorder", b"little")):
            file.writestr(f"x/{name}", content)
    fails(folder, "pytorch_model.bin", "damaged")


def test_an_absent_shard_is_named(write: Write) -> None:
    folder, _ = write(max_shard_bytes=8_000)
    shard = sorted(folder.glob("model-*"))[2]
    shard.unlink()
    fails(folder, shard.name, "tensor", "not there")
    (folder / "model.safetensors.index.json").unlink()
    fails(folder, "incomplete")


@pytest.mark.parametrize(
    "place", ["../model-1.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x\\y.bin", 3, [], {}, None]
)
def test_an_index_cannot_point_outside_its_folder(place: object, write: Write) -> None:
    folder, _ = write(max_shard_bytes=8_000)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] | {"model.norm.weight": place}
    edit_json(index, weight_map=places)
    fails(folder, "model.safetensors.index.json", "model.norm.weight", repr(place))


@pytest.mark.parametrize("place", [5000 * "x" + ".safetensors", "a\0.safetensors"])
def test_an_index_that_names_an_impossible_file_is_an_error(place: str, write: Write) -> None:
    folder, _ = write(max_shard_bytes=8_000)
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": place})
    fails(folder, "model.safetensors.index.json", "model.norm.weight", "not there")


def test_pickled_code_is_refused_and_not_run(write: Write, tmp_path: Path) -> None:
    folder, _ = write()
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "ran"
    torch.save({"model.norm.weight": Attack(trace)}, folder / "pytorch_model.bin")
    fails(folder, "pytorch_model.bin", "refused")
    assert not trace.exists()


class Attack:
    """Touches a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.trace),))


def test_a_bin_file_without_tensors_is_named(write: Write) -> None:
    folder, _ = write()
    (folder / "model.safetensors").unlink()
    for content in ({"epoch": 3}, {1: torch.ones(2)}):
        torch.save(content, folder / "pytorch_model.bin")
        fails(folder, "pytorch_model.bin", "tensors by name")


def test_two_shards_with_the_same_tensor_are_an_error(write: Write) -> None:
    folder, _ = write(max_shard_bytes=20_000)
    first, second, *_ = sorted(folder.glob("model-*"))
    save_file(load_file(first) | load_file(second), second)
    fails(folder, first.name, second.name, "both")


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe", "qwen3_vl", None])
def test_an_unknown_architecture_is_an_error(model_type: str | None, write: Write) -> None:
    folder, _ = write()
    edit_json(folder / "config.json", model_type=model_type)
    fails(folder, "config.json", repr(model_type))


@pytest.mark.parametrize("content", ["", "[]", "{", 100_000 * "[", '{"model_type": "qwen2"}'])
def test_a_damaged_config_is_named(content: str, write: Write) -> None:
    folder, _ = write()
    (folder / "config.json").write_text(content)
    fails(folder, "config.json")


def test_a_folder_without_config_or_weights_is_an_error(write: Write) -> None:
    folder, _ = write()
    (folder / "model.safetensors").unlink()
    fails(folder, str(folder), "no weights", "config.json")
    (folder / "config.json").unlink()
    fails(folder, str(folder), "no config.json")


def test_code_beside_the_weights_is_never_imported(write: Write) -> None:
    folder, model = write("qwen")
    (folder / "modeling_qwen.py").write_text("raise SystemExit('remote code ran')")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"})
    assert equal(load(folder), model)


MEASURE = """
import os, sys
from pathlib import Path
from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.checkpoint.weights import empty_model

def memory(word):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))

for folder in sys.argv[1:]:
    checkpoint = open_checkpoint(folder)
    empty_model(checkpoint.config)  # what torch loads at its first use is not the reader's
    for dtype in "auto", "bfloat16":
        if os.fork() == 0:  # each load in a fresh child, so that none finds memory which another left behind
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = memory("VmRSS")
            model = load_dense(checkpoint, dtype=dtype)
            print(memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()), flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_the_model_and_one_tensor(write: Write) -> None:
    # 118 MB in fp32, in four shards of 30: a reader that keeps a second copy, or all shards, is far over the bound.
    sizes = {"hidden_size": 512, "num_heads": 64, "num_kv_heads": 64, "intermediate_size": 4096, "num_layers": 4}
    folder, _ = write("qwen", **sizes, windows=(None,) * 4, max_shard_bytes=30_000_000)
    old = folder.parent / "bin"
    shutil.copytree(folder, old)
    as_bin(old)
    largest = 4 * 4096 * 512
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, old],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads do not survive a fork
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    for line in lines:
        grown, model_bytes = map(int, line.split())
        assert model_bytes <= grown + 2**20, "the measurement does not see the model"
        # 64 MiB: mapped pages of a shard are the system's to take back, and it may map a shard or two around a tensor.
        assert grown <= model_bytes + largest + 64 * 2**20, f"{grown / 1e6:.0f} MB for {model_bytes / 1e6:.0f} MB"

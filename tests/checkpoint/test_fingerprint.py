"""A base is known by its weights, wherever it lies and however it is cut into files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kiloq.checkpoint import bundled
from kiloq.checkpoint.fingerprint import Base, find_base, fingerprint
from kiloq.errors import CheckpointError
from kiloq.model import Transformer

Write = Callable[..., tuple[Path, Transformer]]


def test_how_weights_are_cut_into_files_does_not_matter(write: Write, tmp_path: Path) -> None:
    whole = fingerprint(write("qwen2")[0])
    cut = write("qwen2", max_shard_bytes=30_000)[0]
    assert len(list(cut.glob("*.safetensors"))) > 2
    assert fingerprint(cut) == whole
    old = tmp_path / "old"
    old.mkdir()
    torch.save(load_file(write("qwen2")[0] / "model.safetensors"), old / "pytorch_model.bin")
    assert fingerprint(old) == whole


def test_other_types_names_and_values_are_another_model(write: Write) -> None:
    folder = write("qwen2")[0]
    found = {fingerprint(folder), fingerprint(write("qwen2", dtype=torch.bfloat16)[0])}
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:  # as after a step of training: all values of one matrix are a little different
            save_file(tensors | {name: tensor + 1e-3}, file)
            found.add(fingerprint(folder))
    assert len(found) == 2 + sum(tensor.ndim == 2 for tensor in tensors.values())


def adapter_on(base: Path, folder: Path, model: str | None = None) -> Path:
    folder.mkdir(parents=True)
    Base.of(base, model).write(folder)
    return folder


def test_the_base_is_found_after_both_have_moved_and_been_renamed(write: Write, tmp_path: Path) -> None:
    base, other = write("qwen2")[0], write("qwen3")[0]
    adapter = adapter_on(base, tmp_path / "runs" / "one" / "adapter")
    assert find_base(adapter) == base
    elsewhere = tmp_path / "elsewhere"
    shutil.move(base, elsewhere / "renamed")
    shutil.move(adapter, elsewhere / "adapters" / "mine")
    shutil.move(other, elsewhere / base.name)  # the recorded name is another model now
    assert find_base(elsewhere / "adapters" / "mine") == elsewhere / "renamed"


def test_neighbours_that_cannot_be_read_are_passed_over(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write("qwen2")[0]
    adapter = adapter_on(base, tmp_path / "runs" / "adapter")
    shutil.move(base, tmp_path / "zz")
    for name in ("cut-off", "shapes"):
        shutil.copytree(tmp_path / "zz", tmp_path / name)
    (tmp_path / "cut-off" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "shapes" / "model.safetensors").unlink()
    torch.save({"w": torch.empty(2, device="meta")}, tmp_path / "shapes" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="w as a shape without values"):
        find_base(adapter, tmp_path / "shapes")
    (tmp_path / "private").mkdir()
    is_file = Path.is_file

    def looked_at(path: Path) -> bool:
        if path.parent == tmp_path / "private":  # as the system says to all but its owner and root
            raise PermissionError(path)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", looked_at)
    assert find_base(adapter) == tmp_path / "zz"


def test_a_bundled_base_needs_no_neighbour(tmp_path: Path) -> None:
    mini = bundled("kiloq-mini-chat")
    assert find_base(adapter_on(mini, tmp_path / "adapter", "kiloq-mini-chat")) == mini


def test_without_a_fitting_base_the_error_says_what_was_wanted_and_found(write: Write, tmp_path: Path) -> None:
    base, other = write("qwen2")[0], write("qwen3")[0]
    adapter = adapter_on(base, tmp_path / "runs" / "adapter")
    wanted, found = Base.of(base), Base.of(other)
    with pytest.raises(CheckpointError, match=rf"{base.name} \({wanted.short}\).*{other} is another.*{found.short}"):
        find_base(adapter, other)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=rf"{base.name} \({wanted.short}\).*{other} is another.*{found.short}"):
        find_base(adapter)


def test_an_adapter_of_peft_is_believed(write: Write, tmp_path: Path) -> None:
    base, adapter = write("qwen2")[0], tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert find_base(adapter) == base
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no base_model_name_or_path"):
        find_base(adapter)
    assert find_base(adapter, base) == base


def test_a_path_is_not_recorded_and_a_name_is(write: Write) -> None:
    base = write("qwen2")[0]
    assert Base.of(base, str(base)).model is None
    assert Base.of(base, "Qwen/Qwen-7B").model == "Qwen/Qwen-7B"

"""Writing: a folder is complete or absent, shards obey their limit, and transformers reads what we write."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kiloq.checkpoint import GenerationDefaults, open_checkpoint, save_checkpoint
from kiloq.checkpoint.writer import new_folder
from kiloq.errors import CheckpointError, ConfigError
from kiloq.model import ModelConfig, Transformer
from kiloq.model.config import Family
from kiloq.tokenizer import Tokenizer

Write = Callable[..., tuple[Path, Transformer]]


def test_small_files_are_read_back_equal(write: Write, chat_defaults: GenerationDefaults, tokenizer: Tokenizer) -> None:
    for family in ("qwen", "qwen2", "qwen3"):
        folder, model = write(family)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.config == model.config
        assert checkpoint.generation == chat_defaults
        assert checkpoint.tokenizer.special_tokens == tokenizer.special_tokens
        assert checkpoint.tokenizer.vocabulary.ranks == tokenizer.vocabulary.ranks


def test_v1_is_written_in_its_own_files(write: Write) -> None:
    folder, _ = write("qwen")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer_config.json",
    }
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["chat_format"] == "chatml"
    assert generation["stop_words_ids"] == [[generation["eos_token_id"]]]


def test_shards_stay_below_their_limit_and_the_index_tells_the_truth(write: Write) -> None:
    folder, model = write("qwen2", max_shard_bytes=9_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    places, total = {}, 0
    for path in shards:
        with safe_open(path, framework="pt") as file:
            sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118  # not a dict
        assert len(sizes) == 1 or sum(sizes.values()) <= 9_000
        places |= dict.fromkeys(sizes, path.name)
        total += sum(sizes.values())
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == total == sum(p.nbytes for p in model.parameters())


def test_the_config_names_the_dtype_of_the_weights(write: Write) -> None:
    folder, _ = write("qwen2", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_folder_with_files_is_never_overwritten(
    write: Write, tokenizer: Tokenizer, chat_defaults: GenerationDefaults
) -> None:
    folder, model = write()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="not empty"):
        save_checkpoint(
            folder, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, generation=chat_defaults
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_that_do_not_fit_the_config_are_refused(
    tmp_path: Path,
    random_model: Callable[[ModelConfig], Transformer],
    make_config: Callable[..., ModelConfig],
    tokenizer: Tokenizer,
    chat_defaults: GenerationDefaults,
) -> None:
    model = random_model(make_config("qwen2"))
    for change in ({"norm.weight": torch.ones(31)}, {"lora.weight": torch.ones(2)}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            save_checkpoint(
                tmp_path / "out",
                model_state=model.state_dict() | change,
                config=model.config,
                tokenizer=tokenizer,
                generation=chat_defaults,
            )
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(
    tmp_path: Path,
    make_config: Callable[..., ModelConfig],
    random_model: Callable[[ModelConfig], Transformer],
    tokenizer: Tokenizer,
    chat_defaults: GenerationDefaults,
) -> None:
    grouped = random_model(make_config("qwen", num_kv_heads=2))  # v1's config.json cannot say this
    with pytest.raises(ConfigError):
        save_checkpoint(
            tmp_path / "out",
            model_state=grouped.state_dict(),
            config=grouped.config,
            tokenizer=tokenizer,
            generation=chat_defaults,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with new_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_transformers_reads_what_we_write(family: Family, tied: bool, write: Write, tokenizer: Tokenizer) -> None:
    folder, model = write(family, tie_embeddings=tied, max_shard_bytes=20_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.randint(0, tokenizer.size, (50,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(theirs(ids[None]).logits[0], model.logits(ids), atol=1e-5, rtol=0)
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.end_of_text_id]
    assert (generation.top_k, generation.top_p, generation.temperature) == (5, 0.8, 0.7)
    assert AutoTokenizer.from_pretrained(folder)("你好, cat")["input_ids"] == tokenizer.encode("你好, cat")

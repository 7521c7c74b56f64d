"""A vocabulary of single bytes and models small enough to train within a test."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from kiloq.checkpoint import GenerationDefaults
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.optim import OptimConfig
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.rollouts import RolloutConfig
from kiloq.train.run_folder import export
from kiloq.train.settings import LoopConfig
from kiloq.train.state import newest_state
from tests.tiny import tiny_config, tiny_network


@pytest.fixture(scope="session")
def byte_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (folder / "bytes.tiktoken").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(byte_vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(byte_vocabulary)


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(vocab_size: int = 64, *, num_kv_heads: int = 4, window: int | None = None, seed: int = 0) -> Transformer:
        changes = {"num_kv_heads": num_kv_heads, "windows": (window, None)}
        return tiny_network(tiny_config("qwen", vocab_size=vocab_size, **changes), seed)

    return make


@pytest.fixture
def own_answers(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., dict[str, Any]]:
    """What a recipe that learns from its own answers needs: a random chat model whose tokens differ in their chances,
    and a file of prompts."""
    shape = ShapeConfig(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, trained_length=256)
    config = replace(qwen1_config(shape, tokenizer.size), initializer_range=0.3, dtype="float32")
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    end = tokenizer.end_of_text_id
    stops = (tokenizer.im_end_id, end)
    generation = GenerationDefaults(stop_ids=stops, pad_id=end, chat_format="chatml", max_window=256)
    export(tmp_path / "chat", model, tokenizer, generation)
    rows = [{"instruction": f"q{i}", "output": f"{i}"} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def settings(steps: int = 4) -> dict[str, Any]:
        return {
            "out": str(tmp_path / "run"),
            "model": str(tmp_path / "chat"),
            "rollout": RolloutConfig(prompts=2, answers=4, max_tokens=8, seq_len=128),
            "optim": OptimConfig(lr=1e-3, steps=steps, warmup_steps=0, weight_decay=0.0),
            "loop": LoopConfig(device="cpu", precision="fp32", compile="off", log_every=1, save_every=1000, report=()),
        }

    return settings


@pytest.fixture(scope="session")
def saved_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """What a run's last state keeps of the trained parameters (or below another prefix), read by torch's own reader."""

    def read(run: Path, prefix: str = "model/") -> dict[str, torch.Tensor]:
        state = newest_state(run)
        assert state is not None
        kept = {n: k for n, k in FileSystemReader(state).read_metadata().state_dict_metadata.items() if prefix in n}
        tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in kept.items()}
        load(tensors, storage_reader=FileSystemReader(state), no_dist=True)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    return read

"""Tiny models, a byte vocabulary and a way to run an engine dry: real things that check a law in milliseconds."""

import base64
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kiloq.checkpoint import GenerationDefaults, save_checkpoint
from kiloq.engine import Engine, EngineConfig
from kiloq.engine.events import Event
from kiloq.model import ModelConfig, RopeConfig, Transformer
from kiloq.model.lora import Adapter, LowRank
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.vocabulary import Vocabulary, qwen_specials

VOCAB = 480  # 256 bytes, 208 control tokens, 16 spare rows
Answer = tuple[str, int]  # request id, index


@dataclass
class Observed:
    """The logits that an engine drew from, by request, answer and number of tokens seen."""

    rows: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def __call__(self, request_id: str, index: int, length: int, logits: Tensor) -> None:
        self.rows[request_id, index, length] = logits.clone()


class Lab:
    """What tests of the engine need; models are shared, so nobody may change their weights."""

    Observed = Observed

    @staticmethod
    @cache
    def model(kind: str = "v1") -> Transformer:
        """Random weights, wide enough that greedy choices are no ties. "v1" has NTK and LogN beyond 32 tokens."""
        kv_heads = {"v1": 4, "gqa": 2, "qk-norm": 1, "windows": 2}[kind]
        config = ModelConfig(
            family={"v1": "qwen", "qk-norm": "qwen3"}.get(kind, "qwen2"),
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            num_kv_heads=kv_heads,
            head_dim=8,
            intermediate_size=48,
            qkv_bias=kind != "qk-norm",
            qk_norm=kind == "qk-norm",
            tie_embeddings=kind == "gqa",
            rope=RopeConfig(rotary_dim=8, kind="qwen1" if kind == "v1" else "plain", original_length=32),
            logn_length=32 if kind == "v1" else None,
            windows=(None, 20, 7) if kind == "windows" else (None, None, None),
            max_length=256,
            initializer_range=0.15,
        )
        model = Transformer(config)
        model.init_weights(torch.Generator().manual_seed(0))
        return model.eval().requires_grad_(False)

    @staticmethod
    @cache
    def tokenizer() -> Tokenizer:
        """One token per byte, and the control tokens of v1."""
        ranks = {bytes([byte]): byte for byte in range(256)}
        return Tokenizer(Vocabulary(name="bytes", ranks=ranks, special=qwen_specials(256)))

    @staticmethod
    def adapter(model: Transformer, seed: int, *, matrices: tuple[str, ...] = ("",), strength: float = 0.3) -> Adapter:
        """Random updates of the matrices whose names end so, by default strong enough to change greedy answers."""
        random = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random) * strength

        return {
            name.removesuffix(".weight"): LowRank(noise(3 + seed, parameter.shape[1]), noise(len(parameter), 3 + seed))
            for name, parameter in model.named_parameters()
            if name.startswith("blocks.") and parameter.dim() == 2 and name.removesuffix(".weight").endswith(matrices)
        }

    @staticmethod
    def ids(count: int, seed: int = 0) -> list[int]:
        return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def engine(self, kind: str = "v1", *, observer: Observed | None = None, **limits: object) -> Engine:
        return Engine(self.model(kind), EngineConfig(**limits), tokenizer=self.tokenizer(), logits_observer=observer)

    @staticmethod
    def run(engine: Engine) -> dict[Answer, list[Event]]:
        """Step until nothing is left; the events of every answer."""
        events: dict[Answer, list[Event]] = {}
        while engine.has_work:
            for event in engine.step():
                events.setdefault((event.request_id, event.index), []).append(event)
        engine.check_integrity()
        return events

    def answers(self, engine: Engine) -> dict[Answer, tuple[int, ...]]:
        """Step until nothing is left; the token ids of every answer."""
        return {key: tuple(i for event in events for i in event.token_ids) for key, events in self.run(engine).items()}


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="session")
def checkpoint(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The "v1" model as a folder of Qwen v1 format."""
    folder = tmp_path_factory.mktemp("tiny")
    ranks = (b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))
    (folder / "bytes.tiktoken").write_bytes(b"".join(ranks))
    tokenizer = Tokenizer.load(folder / "bytes.tiktoken")
    defaults = GenerationDefaults(
        stop_ids=(tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.end_of_text_id),
        pad_id=tokenizer.end_of_text_id,
        chat_format="chatml",
        max_window=256,
        max_tokens=24,
        top_p=0.8,
    )
    model = lab.model("v1")
    save_checkpoint(
        folder / "model",
        model_state=model.state_dict(),
        config=model.config,
        tokenizer=tokenizer,
        generation=defaults,
    )
    return folder / "model"

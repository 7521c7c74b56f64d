import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kiloq.chat import QWEN1
from kiloq.checkpoint import GenerationDefaults, bundled, open_checkpoint
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train import preflight as rehearsal
from kiloq.train.adapters import AdapterConfig
from kiloq.train.conversations import conversation
from kiloq.train.forward import Runtime
from kiloq.train.optim import OptimConfig
from kiloq.train.preflight import preflight
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.rows import good_rows
from kiloq.train.run_folder import export
from kiloq.train.samples import Samples
from kiloq.train.settings import BatchConfig, LoopConfig
from kiloq.train.sft import ChatSource, SftConfig, sft

PLAIN = Runtime("cpu", torch.float32, compiled=False)


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> SftConfig:
    monkeypatch.setattr(rehearsal, "_FASTER", (10.0,))
    monkeypatch.setattr(rehearsal, "STEPS", 60)  # weights from nowhere need more than 20
    model = Transformer(
        qwen1_config(ShapeConfig(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96), tokenizer.size)
    )
    model.init_weights(torch.Generator().manual_seed(0))
    end = tokenizer.end_of_text_id
    export(tmp_path / "base", model, tokenizer, GenerationDefaults((end,), end, "raw", 512))
    rows = [{"instruction": "hi", "output": "Hello!"}, {"instruction": "1+1?", "output": "Two, I think."}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return SftConfig(
        out=str(tmp_path / "run"),
        model=str(tmp_path / "base"),
        data=(ChatSource(path=str(tmp_path / "chat.jsonl")),),
        batch=BatchConfig(seq_len=160, tokens=160),
        optim=OptimConfig(lr=1e-3, steps=2, warmup_steps=0),
        loop=LoopConfig(device="cpu", precision="fp32", compile="off", report=()),
    )


def rehearse(config: SftConfig, *, stop_ids: tuple[int, ...], lr: float = 1e-3) -> str:
    checkpoint = open_checkpoint(config.model)
    samples = Samples(checkpoint.tokenizer, QWEN1, seq_len=160)
    return preflight(
        config,
        checkpoint,
        samples.read(good_rows(Path(config.data[0].path), conversation)),
        generation=replace(checkpoint.generation, stop_ids=stop_ids),
        runtime=PLAIN,
        optim=replace(config.optim, lr=lr),
    )


def test_a_run_that_was_tried_first_is_the_same_run(
    config: SftConfig, tmp_path: Path, saved_weights: Callable[..., dict[str, torch.Tensor]]
) -> None:
    sft(config, try_first=True)
    log = (Path(config.out) / "log.jsonl").read_text(encoding="utf-8")
    assert "the answer is repeated and ends by itself" in log
    assert not (Path(config.out) / "preflight").exists()
    plain = replace(config, out=str(tmp_path / "plain"))
    sft(plain)
    for kept in ("model/", "random/"):
        tried, untried = (saved_weights(Path(one.out), kept) for one in (config, plain))
        assert tried
        assert all(torch.equal(tried[name], tensor) for name, tensor in untried.items())
    sft(replace(config, optim=replace(config.optim, steps=3)), try_first=True)  # one that has begun goes on
    assert (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").count("preflight: ") == 1


def test_an_answer_that_does_not_end_is_told(config: SftConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"says the answer, but does not end it with <\|im_end\|>"):
        rehearse(config, stop_ids=(tokenizer.end_of_text_id,))


def test_a_model_that_learns_nothing_is_told(config: SftConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"loss \d\.\d\d to \d\.\d\d at lr 1\.0e-08\) the model has not learned them"):
        rehearse(config, stop_ids=(tokenizer.im_end_id,), lr=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, AdapterConfig()])
def test_20_steps_are_enough_for_a_model_that_speaks(
    config: SftConfig, adapter: AdapterConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "STEPS", 20)
    checkpoint = open_checkpoint(bundled())
    samples = Samples(checkpoint.tokenizer, QWEN1, seq_len=160)
    note = preflight(
        replace(config, model=str(bundled()), adapter=adapter),
        checkpoint,
        samples.read(good_rows(Path(config.data[0].path), conversation)),
        generation=checkpoint.generation,
        runtime=PLAIN,
        optim=replace(config.optim, lr=3e-4),
    )
    assert note.startswith("preflight: 20 steps on 2 samples at lr 3.0e-03 took the loss from ")

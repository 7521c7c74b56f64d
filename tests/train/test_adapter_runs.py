"""`kiloq train sft` with [adapter]: a folder at the end, and the same bits however often the run was broken off."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kiloq.checkpoint import GenerationDefaults, load_dense, open_checkpoint
from kiloq.checkpoint.fingerprint import Base, find_base
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.adapters import AdapterConfig, attach
from kiloq.train.optim import OptimConfig
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.run_folder import export
from kiloq.train.settings import BatchConfig, LoopConfig
from kiloq.train.sft import ChatSource, HeldOut, SftConfig, sft

WEIGHTS = "adapter/adapter_model.safetensors"


def write_base(folder: Path, tokenizer: Tokenizer, seed: int = 0) -> None:
    shape = ShapeConfig(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, trained_length=128)
    model = Transformer(qwen1_config(shape, tokenizer.size))
    model.init_weights(torch.Generator().manual_seed(seed))
    end = tokenizer.end_of_text_id
    export(folder, model, tokenizer, GenerationDefaults((end,), end, "raw", max_window=128))


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> SftConfig:
    write_base(tmp_path / "base", tokenizer)
    rows = [
        {"messages": [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": word * 3}]}
        for word in ("ab", "cd", "ef", "gh", "ij")
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return SftConfig(
        out=str(tmp_path / "run"),
        model=str(tmp_path / "base"),
        data=(ChatSource(path=str(tmp_path / "chat.jsonl")),),
        adapter=AdapterConfig(rank=4, dropout=0.2),
        batch=BatchConfig(seq_len=128, tokens=256),
        optim=OptimConfig(lr=1e-2, steps=12, warmup_steps=2, weight_decay=0.0),
        loop=LoopConfig(device="cpu", precision="fp32", compile="off", log_every=1, save_every=1),
    )


def lines_of(config: SftConfig) -> list[dict[str, object]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_ends_in_an_adapter_that_makes_a_base_model_chat(config: SftConfig, tmp_path: Path) -> None:
    assert sft(config) == "finished"
    losses = [float(str(line["loss"])) for line in lines_of(config) if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    out = Path(config.out)
    assert not (out / "model").exists()
    assert "trains 3,584 of 54,112 parameters (6.62 %), 128 of them in embed and head" in json.dumps(
        lines_of(config)[0]
    )
    assert json.loads((out / "adapter" / "generation_config.json").read_text())["chat_format"] == "chatml"
    base = open_checkpoint(config.model)
    assert Base.read(out / "adapter") == Base.of(base.folder)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert find_base(out / "adapter") == tmp_path / "moved"


def test_answers_to_prompts_know_no_dropout_and_do_not_disturb_the_run(config: SftConfig) -> None:
    dora = AdapterConfig(rank=4, alpha=8.0, dropout=0.5, dora=True)  # which the engine serves as the network itself
    asked = ("hello", "hello")
    sft(replace(config, adapter=dora, out=f"{config.out}-plain"))
    held = (HeldOut(name="data", path=config.data[0].path),)
    watched = replace(config, adapter=dora, held=held, prompts=asked, loop=replace(config.loop, eval_every=4))
    sft(watched)
    told = [str(line["note"]) for line in lines_of(watched) if str(line.get("note")).startswith("'hello' -> ")]
    assert len(told) >= 2
    assert told[0::2] == told[1::2]

    def losses(config: SftConfig) -> list[object]:
        return [line["loss"] for line in lines_of(config) if "loss" in line]

    assert losses(watched) == losses(replace(config, out=f"{config.out}-plain"))


def test_a_run_goes_on_from_an_adapter(config: SftConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    sft(config)
    first = [float(str(line["loss"])) for line in lines_of(config) if "loss" in line]
    assert config.adapter is not None
    begun = str(Path(config.out) / "adapter")
    more = replace(config, out=f"{config.out}-2", adapter=AdapterConfig(start=begun, dropout=0.0))
    sft(more)
    again = [float(str(line["loss"])) for line in lines_of(more) if "loss" in line]
    assert again[0] < first[1]
    raw = [json.loads((Path(one.out) / "adapter" / "adapter_config.json").read_text()) for one in (config, more)]
    assert raw[0] | {"lora_dropout": 0.0} == raw[1]
    assert "trained on" not in str(lines_of(more)[0])
    write_base(tmp_path / "other", tokenizer, seed=1)
    elsewhere = replace(more, out=f"{config.out}-3", model=str(tmp_path / "other"))
    sft(replace(elsewhere, optim=replace(config.optim, steps=1)))
    assert "trained on base, whose weights are not this model's" in str(lines_of(elsewhere)[0])


def test_a_run_killed_at_any_moment_ends_in_the_same_bits(config: SftConfig) -> None:
    sft(config)
    broken = replace(config, out=f"{config.out}-broken")
    deaths = 0
    while not (Path(broken.out) / WEIGHTS).exists():
        torch.manual_seed(deaths)  # what a new process would find there is anything
        child = os.fork()
        if child == 0:
            # The kernel ends it in the midst of whatever it does; no handler runs.
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.15 if deaths < 4 else 0)
            os._exit(0 if sft(broken) == "finished" else 1)
        _, status = os.waitpid(child, 0)
        deaths += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    assert deaths > 0
    whole, mended = (load_file(Path(one.out) / WEIGHTS) for one in (config, broken))
    assert all(torch.equal(mended[name], tensor) for name, tensor in whole.items())


def test_another_base_under_a_run_is_refused(config: SftConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    sft(replace(config, loop=replace(config.loop, max_minutes=0.0)))
    (tmp_path / "base").rename(tmp_path / "first")
    write_base(tmp_path / "base", tokenizer, seed=1)
    with pytest.raises(ConfigError, match=r"holds a run on base .*, and the model is now base"):
        sft(config)


def test_what_the_state_keeps_is_what_is_trained(
    config: SftConfig, saved_weights: Callable[..., dict[str, torch.Tensor]]
) -> None:
    sft(replace(config, loop=replace(config.loop, max_minutes=0.0)))
    checkpoint = open_checkpoint(config.model)
    model = load_dense(checkpoint)
    assert config.adapter is not None
    attach(model, checkpoint, config.adapter)
    assert saved_weights(Path(config.out)).keys() == {
        name for name, one in model.named_parameters() if one.requires_grad
    }

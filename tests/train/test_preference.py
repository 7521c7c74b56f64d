import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from kiloq.chat import QWEN1
from kiloq.checkpoint import GenerationDefaults, load_dense, open_checkpoint
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.adapters import AdapterConfig
from kiloq.train.comparisons import PackedPairs, read_compared, read_labelled
from kiloq.train.forward import Forward, Runtime
from kiloq.train.losses import IGNORE
from kiloq.train.optim import OptimConfig
from kiloq.train.parallel import Alone
from kiloq.train.preference import Method, PreferenceConfig, answer_log_probs, prefer, preference_objective
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.run_folder import export
from kiloq.train.samples import Samples
from kiloq.train.sampling import Answers
from kiloq.train.settings import BatchConfig, LoopConfig
from kiloq.train.sft import ChatSource, HeldOut

QUESTIONS = ("hi", "你好", "안녕", "1+1?", "who?", "why?")


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> PreferenceConfig:
    shape = ShapeConfig(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, trained_length=128)
    model = Transformer(qwen1_config(shape, tokenizer.size))
    model.init_weights(torch.Generator().manual_seed(0))
    end = tokenizer.end_of_text_id
    raw = GenerationDefaults(stop_ids=(end,), pad_id=end, chat_format="raw", max_window=512)
    export(tmp_path / "base", model, tokenizer, raw)
    rows = [{"prompt": question, "chosen": "please", "rejected": "no"} for question in QUESTIONS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = [{"prompt": question, "completion": "please"} for question in QUESTIONS]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    return PreferenceConfig(
        out=str(tmp_path / "run"),
        model=str(tmp_path / "base"),
        data=(ChatSource(path=str(tmp_path / "pairs.jsonl")),),
        held=(HeldOut(name="same", path=str(tmp_path / "pairs.jsonl")),),
        held_text=(HeldOut(name="texts", path=str(tmp_path / "texts.jsonl")),),
        batch=BatchConfig(seq_len=160, tokens=480),
        optim=OptimConfig(lr=3e-3, steps=12, warmup_steps=2, weight_decay=0.0),
        loop=LoopConfig(device="cpu", precision="fp32", compile="off", log_every=1, save_every=1000, eval_every=1000),
    )


def log_of(config: PreferenceConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return load_dense(open_checkpoint(folder)).state_dict()


@pytest.mark.parametrize(("loss", "beta", "start"), [("dpo", 0.1, math.log(2)), ("ipo", 0.5, 1.0), ("kto", 0.1, 0.5)])
def test_the_model_comes_to_prefer_what_was_chosen(
    config: PreferenceConfig, loss: Method, beta: float, start: float
) -> None:
    assert prefer(replace(config, loss=loss, beta=beta)) == "finished"
    steps = [line for line in log_of(config) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(start, rel=1e-4)  # policy and reference are one before the first step
    assert steps[0]["drift"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["loss"] < 0.6 * start
    assert steps[-1]["accuracy"] == 1
    assert steps[-1]["drift"] > 0
    (held,) = [line for line in log_of(config) if "eval/same" in line]
    assert held["eval/same/accuracy"] == 1
    assert next(line["eval/texts"] for line in log_of(config) if "eval/texts" in line) > 0
    assert open_checkpoint(Path(config.out) / "model").generation.chat_format == "chatml"


def test_the_sft_term_makes_what_was_chosen_likelier_and_the_log_shows_answers(config: PreferenceConfig) -> None:
    prefer(replace(config, sft_weight=1.0, prompts=("hi", "why?")))
    log = log_of(config)
    assert next(line["eval/texts"] for line in log if "eval/texts" in line) < 5  # from 5.6, where all bytes are alike
    assert [str(line["note"]).split(" -> ")[0] for line in log[-2:]] == ["'hi'", "'why?'"]


def test_a_model_in_parts_answers_no_prompts_and_says_so_before_the_first_step(config: PreferenceConfig) -> None:
    checkpoint = open_checkpoint(config.model)
    model = load_dense(checkpoint, dtype=torch.float32)
    in_parts = Alone(is_sharded=True)
    with pytest.raises(ConfigError, match="prompts, which a whole model answers"):
        Answers(model, checkpoint, ("hi",), parallel=in_parts)
    assert Answers(model, checkpoint, (), parallel=in_parts).lines() == []


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_adapters_learn_too_and_the_reference_is_the_model_without_them(
    config: PreferenceConfig, quantization: Literal["int8"] | None
) -> None:
    adapter = AdapterConfig(rank=8, alpha=32.0, embeddings="none", quantization=quantization)
    assert prefer(replace(config, adapter=adapter)) == "finished"
    steps = [line for line in log_of(config) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=0.02)  # dropout is at work
    assert steps[-1]["loss"] < 0.5
    assert steps[-1]["accuracy"] == 1
    assert (Path(config.out) / "adapter" / "adapter_config.json").is_file()


def test_a_run_that_was_stopped_ends_with_the_same_weights_and_measures_its_reference_once(
    config: PreferenceConfig, tmp_path: Path
) -> None:
    whole = replace(config, out=str(tmp_path / "whole"))
    assert prefer(whole) == "finished"
    assert prefer(replace(config, loop=replace(config.loop, max_minutes=0.0))) == "paused"
    measured = (Path(config.out) / "reference.npz").stat().st_mtime_ns
    assert prefer(config) == "finished"
    assert (Path(config.out) / "reference.npz").stat().st_mtime_ns == measured
    wanted, found = (weights_of(f"{one.out}/model") for one in (whole, config))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_reference_of_other_data_is_measured_anew(config: PreferenceConfig) -> None:
    prefer(config)
    shutil.rmtree(Path(config.out) / "state")
    pairs = Path(config.data[0].path)
    pairs.write_text(pairs.read_text(encoding="utf-8").replace("please", "certainly"), encoding="utf-8")
    prefer(config)
    assert log_of(config)[0]["note"]  # the log begins anew with the run
    first = next(line for line in log_of(config) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4)


def make_forward(model: Transformer) -> Forward:
    return Forward(model, Runtime("cpu", torch.float32, compiled=False), seq_len=160)


@pytest.mark.parametrize("apart", [False, True])
def test_log_probs_of_packed_answers_are_those_of_each_alone(
    config: PreferenceConfig, tokenizer: Tokenizer, make_model: Callable[..., Transformer], *, apart: bool
) -> None:
    model = make_model(tokenizer.size)
    samples, path = Samples(tokenizer, QWEN1, seq_len=160), Path(config.data[0].path)
    data = read_labelled(path, samples, 0) if apart else read_compared(path, samples)
    stream = PackedPairs([(data, 1.0)], batch=config.batch, seed=0, filler=0, apart=apart)
    for batch in stream.one_pass():
        with torch.no_grad():
            found = answer_log_probs(make_forward(model), batch)
        for item, row in zip(batch.items.tolist(), found, strict=True):
            for sample, value in zip(data[item].samples, row, strict=True):
                ids, targets = torch.from_numpy(sample.ids).long(), torch.from_numpy(sample.targets).long()
                every = torch.log_softmax(model.logits(ids), dim=-1).gather(1, targets.clamp(min=0)[:, None])
                torch.testing.assert_close(value, every.squeeze(1)[targets != IGNORE].sum(), rtol=1e-5, atol=1e-4)


def test_gradients_do_not_depend_on_how_pairs_are_packed(
    config: PreferenceConfig, tokenizer: Tokenizer, make_model: Callable[..., Transformer]
) -> None:
    model = make_model(tokenizer.size).requires_grad_(True)
    objective = preference_objective(make_forward(model), replace(config, sft_weight=0.5))
    data = read_compared(Path(config.data[0].path), Samples(tokenizer, QWEN1, seq_len=160))
    gradients = []
    for tokens in (320, 960):
        stream = PackedPairs([(data, 1.0)], batch=BatchConfig(seq_len=160, tokens=tokens), seed=0, filler=0)
        stream.reference[:] = [[-30.0, -20.0]] * len(data)
        model.zero_grad()
        for batch in stream.one_pass():
            objective(batch).total.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_impossible_settings_are_told(config: PreferenceConfig) -> None:
    with pytest.raises(ConfigError, match="label_smoothing below"):
        replace(config, label_smoothing=0.5)
    with pytest.raises(ConfigError, match="beta must be above zero"):
        replace(config, beta=0.0)

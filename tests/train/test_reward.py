import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from kiloq.chat import QWEN1, Message
from kiloq.checkpoint import GenerationDefaults, load_dense, open_checkpoint
from kiloq.errors import CheckpointError, RequestError
from kiloq.tokenizer import Tokenizer
from kiloq.train.adapters import AdapterConfig
from kiloq.train.comparisons import PackedPairs, read_compared
from kiloq.train.forward import Forward, Runtime
from kiloq.train.losses import IGNORE
from kiloq.train.optim import OptimConfig
from kiloq.train.reward import RewardConfig, RewardModel, end_tokens, load_reward_model, reward, reward_objective
from kiloq.train.run_folder import export
from kiloq.train.samples import Samples
from kiloq.train.settings import BatchConfig, LoopConfig
from kiloq.train.sft import ChatSource, HeldOut
from tests.tiny import tiny_config, tiny_network

QUESTIONS = ("hi", "你好", "안녕", "1+1?", "who?", "why?")


def talk(question: str, answer: str) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


@pytest.fixture
def make_config(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., RewardConfig]:
    def make(family: str = "qwen", *, tied: bool = False) -> RewardConfig:
        changes = {"vocab_size": -(-tokenizer.size // 64) * 64, "num_kv_heads": 4, "dtype": "float32"}
        model = tiny_network(tiny_config(family, original_length=256, tie_embeddings=tied, **changes))
        end = tokenizer.end_of_text_id
        raw = GenerationDefaults(stop_ids=(end,), pad_id=end, chat_format="raw", max_window=256)
        export(tmp_path / "base", model, tokenizer, raw)
        rows = [{"prompt": question, "chosen": "please", "rejected": "no"} for question in QUESTIONS]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return RewardConfig(
            out=str(tmp_path / "run"),
            model=str(tmp_path / "base"),
            data=(ChatSource(path=str(tmp_path / "pairs.jsonl")),),
            held=(HeldOut(name="same", path=str(tmp_path / "pairs.jsonl")),),
            batch=BatchConfig(seq_len=200, tokens=400),
            optim=OptimConfig(lr=1e-2, steps=16, warmup_steps=2, weight_decay=0.0),
            loop=LoopConfig(
                device="cpu", precision="fp32", compile="off", log_every=1, save_every=1000, eval_every=1000
            ),
        )

    return make


def log_of(config: RewardConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_reward_model_learns_which_answer_is_better(make_config: Callable[..., RewardConfig]) -> None:
    config = make_config()
    assert reward(config) == "finished"
    steps = [line for line in log_of(config) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2))  # all scores are zero before the first step
    assert steps[-1]["loss"] < 0.3
    assert next(line["eval/same/accuracy"] for line in log_of(config) if "eval/same" in line) == 1
    judge = load_reward_model(Path(config.out) / "model")
    scores = judge.score([talk(question, answer) for question in QUESTIONS for answer in ("please", "no")])
    assert all(better > worse for better, worse in zip(scores[::2], scores[1::2], strict=True))
    with pytest.raises(RequestError, match="no answer"):
        judge.score([[Message(role="user", content="hi")]])


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", False)])
def test_transformers_gives_the_same_scores(
    make_config: Callable[..., RewardConfig], tokenizer: Tokenizer, family: str, *, tied: bool
) -> None:
    config = make_config(family, tied=tied)
    reward(replace(config, optim=replace(config.optim, steps=4)))
    folder = Path(config.out) / "model"
    judge = load_reward_model(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(theirs).__name__ == f"{family.capitalize()}ForSequenceClassification"
    conversations = [talk("hi", "please"), talk("who are you?", "no")]
    ids = [judge._ids(one) for one in conversations]
    longest = max(map(len, ids))
    padded = torch.tensor([one + [tokenizer.end_of_text_id] * (longest - len(one)) for one in ids])
    with torch.no_grad():
        logits = theirs(padded, attention_mask=(padded != tokenizer.end_of_text_id).long()).logits
    assert logits.shape == (2, 1)
    torch.testing.assert_close(torch.tensor(judge.score(conversations)), logits.squeeze(1), rtol=1e-4, atol=1e-5)


def test_an_adapter_keeps_its_row_beside_it_and_is_loaded_onto_its_base(
    make_config: Callable[..., RewardConfig],
) -> None:
    config = replace(make_config(), adapter=AdapterConfig(rank=4, dropout=0.0, embeddings="none"))
    reward(config)
    judge = load_reward_model(Path(config.out) / "adapter")
    better, worse = judge.score([talk("hi", "please"), talk("hi", "no")])
    measured = next(line["eval/same/margin"] for line in log_of(config) if "eval/same" in line)
    assert better - worse > 0
    assert measured > 0
    (Path(config.out) / "adapter" / "score.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none to a reward model"):
        load_reward_model(Path(config.out) / "adapter")


def test_a_reward_model_is_no_chat_model_nor_the_other_way_round(make_config: Callable[..., RewardConfig]) -> None:
    config = make_config()
    reward(replace(config, optim=replace(config.optim, steps=1)))
    folder = Path(config.out) / "model"
    assert load_file(folder / "model.safetensors")["score.weight"].shape == (1, 32)
    with pytest.raises(CheckpointError, match="this is a reward model"):
        load_dense(open_checkpoint(folder))
    with pytest.raises(CheckpointError, match=r"there is no score\.weight"):
        load_reward_model(config.model)


def test_scores_are_read_where_the_answer_ends_and_gradients_are_the_slopes(
    make_config: Callable[..., RewardConfig], tokenizer: Tokenizer
) -> None:
    config = make_config()
    checkpoint = open_checkpoint(config.model)
    model = load_dense(checkpoint, dtype=torch.float32).requires_grad_(True)
    module = RewardModel(model)
    torch.nn.init.normal_(module.score.weight, generator=torch.Generator().manual_seed(1))
    samples = Samples(tokenizer, QWEN1, seq_len=200)
    stream = PackedPairs(
        [(read_compared(Path(config.data[0].path), samples), 1.0)], batch=config.batch, seed=0, filler=0
    )
    batch = stream.next_batch()
    ends = end_tokens(batch.flat)[batch.places.flatten()]
    assert set(batch.flat.ids[ends].tolist()) == {tokenizer.im_end_id}
    assert (batch.flat.targets[ends - 1] != IGNORE).all()
    objective = reward_objective(Forward(model, Runtime("cpu", torch.float32, compiled=False), seq_len=200), module)
    objective(batch).total.backward()
    bias = model.get_parameter("blocks.0.attn.qkv.bias")
    assert bias.grad is not None
    place, step = int(bias.grad.abs().argmax()), 1e-2
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            bias[place] += sign * step
            values.append(objective(batch).total.item())
            bias[place] -= sign * step
    assert bias.grad[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kiloq.checkpoint import load_dense, open_checkpoint, save_checkpoint
from kiloq.checkpoint.names import SCORE
from kiloq.errors import ConfigError
from kiloq.train.adapters import AdapterConfig
from kiloq.train.experience import Judges, Rounds
from kiloq.train.optim import OptimConfig, make_optimizer, set_learning_rate
from kiloq.train.ppo import Critic, Gae, PpoConfig, advantages, ppo, ppo_objective, value_errors
from kiloq.train.recipe import to_toml
from kiloq.train.reinforce import Cast, PromptSource, assemble, forward_of
from kiloq.train.reward import RewardModel, load_reward_model
from kiloq.train.rewards import Attempt, RewardConfig
from kiloq.train.sft import ChatSource
from kiloq.train.traces import Trace, log_probs


@pytest.fixture
def config(tmp_path: Path, own_answers: Callable[..., dict[str, Any]]) -> PpoConfig:
    data = (PromptSource(path=str(tmp_path / "prompts.jsonl")),)
    reward = (RewardConfig(check="matches", pattern="(?s).*[aeiou].*"),)
    return PpoConfig(**own_answers(), data=data, reward=reward, value_lr=1e-3, value_warmup=2)


def vowels(attempts: Sequence[Attempt]) -> list[float]:
    return [sum(letter in "aeiou" for letter in one.text) / 8 for one in attempts]


def log_of(config: PpoConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def stage(config: PpoConfig) -> tuple[Cast, Critic, Rounds]:
    cast = assemble(config, vowels)
    value = RewardModel(assemble(config, vowels).policy.model)
    critic = Critic(value, forward_of(value.model, config))
    return cast, critic, rounds_of(config, cast, critic)


def rounds_of(config: PpoConfig, cast: Cast, critic: Critic) -> Rounds:
    judges = Judges(cast.reward, cast.policy, cast.reference, critic)
    gae = Gae(kl=config.kl, gamma=config.gamma, lam=config.lam)
    warmup = config.value_warmup
    return Rounds(cast.prompts, cast.player, judges, gae, config.rollout, seed=0, warmup=warmup)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_papers_sum(gamma: float, lam: float) -> None:
    draw = random.Random(0)
    rewards, values = ([draw.gauss(0, 1) for _ in range(7)] for _ in range(2))
    found = advantages(torch.tensor(rewards).double(), torch.tensor(values).double(), gamma=gamma, lam=lam)
    for t in range(7):  # equation 16, term by term
        deltas = [rewards[i] + gamma * (values[i + 1] if i < 6 else 0.0) - values[i] for i in range(t, 7)]
        wanted = sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas))
        assert float(found[t]) == pytest.approx(wanted, rel=1e-6)


def test_rewards_are_brought_to_what_rewards_were_so_far() -> None:
    def traces(rewards: Sequence[float]) -> list[Trace]:
        zero = torch.zeros(2)
        return [Trace(torch.arange(4), 2, 0, one, zero, old=zero, reference=zero, values=zero) for one in rewards]

    gae, seen = Gae(kl=0.0, gamma=1.0, lam=1.0), []
    for rewards in ([1.0, 2.0, 6.0], [100.0, -3.0]):
        some = traces(rewards)
        gae.credit(some)
        seen += rewards
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((one - mean) ** 2 for one in seen) / len(seen))
        for trace, reward in zip(some, rewards, strict=True):
            # gamma and lam of 1 and values of 0: every token returns the whole reward.
            assert trace.returns.tolist() == pytest.approx([(reward - mean) / deviation] * 2, rel=1e-5)
    again = Gae(kl=0.0, gamma=1.0, lam=1.0)
    again.restore(gae.state())
    assert (again.mean, again.deviation) == (gae.mean, gae.deviation)


def test_a_token_pays_for_leaving_the_reference() -> None:
    old, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    trace = Trace(torch.arange(4), 2, 0, 0.0, old, old=old, reference=reference, values=torch.zeros(2))
    Gae(kl=0.1, gamma=1.0, lam=1.0).credit([trace])
    assert trace.returns.tolist() == pytest.approx([-0.05 + 0.1, 0.1])


def test_a_round_of_one_token_is_a_round() -> None:
    zero = torch.zeros(1)
    trace = Trace(torch.arange(3), 2, 0, 1.0, zero, old=zero, reference=zero, values=zero)
    facts = Gae(kl=0.1, gamma=1.0, lam=1.0).credit([trace])
    assert trace.advantages.tolist() == [0.0]
    assert all(math.isfinite(fact) for fact in facts.values())


def test_values_are_held_near_where_they_were() -> None:
    draw = random.Random(1)
    new, old, returns = ([draw.gauss(0, 0.3) for _ in range(50)] for _ in range(3))
    found = value_errors(torch.tensor(new), torch.tensor(old), torch.tensor(returns), 0.15)
    for i in range(50):
        held = min(max(new[i], old[i] - 0.15), old[i] + 0.15)
        wanted = 0.5 * max((new[i] - returns[i]) ** 2, (held - returns[i]) ** 2)
        assert float(found[i]) == pytest.approx(wanted, rel=1e-5)


def test_the_loss_is_written_out_as_loops(config: PpoConfig) -> None:
    config = replace(config, value_warmup=0)
    cast, critic, rounds = stage(config)
    nn.init.normal_(critic.net.score.weight, generator=torch.Generator().manual_seed(0))
    batch = rounds.next_batch()
    noise = torch.randn(3, len(batch.old), generator=torch.Generator().manual_seed(1)) * 0.3
    batch = replace(batch, old=batch.old + noise[0], values=batch.values + noise[1])
    found = ppo_objective(cast, critic, config)(batch)
    own, values = log_probs(cast.policy, batch.answers).tolist(), critic(batch.answers).tolist()
    total = 0.0
    for i, (log_prob, value) in enumerate(zip(own, values, strict=True)):
        ratio, advantage = math.exp(log_prob - float(batch.old[i])), float(batch.advantages[i])
        total -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        was, wanted = float(batch.values[i]), float(batch.returns[i])
        held = min(max(value, was - 0.15), was + 0.15)
        total += 0.5 * max((value - wanted) ** 2, (held - wanted) ** 2)
    assert found.total.item() == pytest.approx(total, rel=1e-5)
    assert batch.count == len(own)


def test_at_first_only_the_value_network_learns(config: PpoConfig) -> None:
    cast, critic, rounds = stage(config)
    module = nn.ModuleDict({"policy": cast.policy.model, "value": critic.net})
    for number in range(4):
        module.zero_grad()
        ppo_objective(cast, critic, config)(rounds.next_batch()).total.backward()
        assert any(one.grad is not None for one in critic.net.parameters())
        assert all(one.grad is None for one in cast.policy.model.parameters()) == (number < 2)


def test_two_networks_learn_at_two_rates() -> None:
    module = nn.ModuleDict({"policy": nn.Linear(2, 2), "value": nn.Linear(2, 2)})
    optimizer = make_optimizer(module, OptimConfig(lr=1e-3), {"value.": 5.0})
    set_learning_rate(optimizer, 1e-2)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in module["policy"].parameters()] == [1e-2] * 2
    assert [rates[id(p)] for p in module["value"].parameters()] == [5e-2] * 2


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_reward_rises(config: PpoConfig, tmp_path: Path, *, with_adapter: bool) -> None:
    adapter = AdapterConfig(rank=8, alpha=32, targets=("all-linear",)) if with_adapter else None
    text = (ChatSource(path=str(tmp_path / "prompts.jsonl")),)
    rollout = replace(config.rollout, prompts=4, answers=8, epochs=2)
    optim = replace(config.optim, lr=3e-2 if with_adapter else 4e-3, steps=16, floor=1.0)
    config = replace(config, rollout=rollout, optim=optim, kl=0.01, text=text, text_weight=0.01, adapter=adapter)
    assert ppo(config, reward=vowels) == "finished"
    log = [line for line in log_of(config) if "reward" in line]
    rewards = [line["reward"] for line in log]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    assert log[0]["kl"] == 0
    assert log[-1]["kl"] > 0.01
    assert {"value_loss", "explained", "clipped", "text_loss"} <= log[-1].keys()
    assert (Path(config.out) / ("adapter" if with_adapter else "model")).is_dir()


def test_a_run_goes_on_from_before_the_policy_moves(config: PpoConfig, tmp_path: Path) -> None:
    ppo(config)  # 4 steps, the first 2 of the value network alone
    parts = replace(config, out=str(tmp_path / "parts"), loop=replace(config.loop, max_minutes=0.0))
    for _ in range(4):
        ppo(parts)  # one step each time
    assert told(parts) == told(config)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not(config: PpoConfig, tmp_path: Path) -> None:
    rollout = replace(config.rollout, epochs=2, minibatches=2)
    loop = replace(config.loop, save_every=3)
    whole = replace(config, rollout=rollout, optim=replace(config.optim, steps=10), loop=loop)
    ppo(whole)
    killed = replace(whole, out=str(tmp_path / "killed"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(killed), encoding="utf-8")
    command = [sys.executable, "-m", "kiloq", "train", "ppo", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 5/"):  # in the midst of a round, two steps after the last state
                process.send_signal(signal.SIGKILL)
                break
    assert ppo(killed) == "finished"
    assert told(killed) == told(whole)


def told(config: PpoConfig) -> list[tuple[float, ...]]:
    return [tuple(line[x] for x in ("step", "loss", "reward", "kl")) for line in log_of(config) if "loss" in line]


def test_a_reward_model_judges_and_begins_the_value_network(config: PpoConfig, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(config.model)
    model = load_dense(checkpoint, dtype=torch.float32)
    score = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    save_checkpoint(
        tmp_path / "judge",
        model_state={**model.state_dict(), SCORE: score},
        config=model.config,
        tokenizer=checkpoint.tokenizer,
        generation=checkpoint.generation,
    )
    config = replace(config, reward=(), reward_model=str(tmp_path / "judge"), kl=0.0, value_warmup=0)
    config = replace(config, optim=replace(config.optim, steps=1))
    assert ppo(config) == "finished"
    judge = load_reward_model(tmp_path / "judge")
    cast = assemble(config, None)
    critic = Critic(judge.reward, forward_of(judge.reward.model, config))
    rounds = rounds_of(config, cast, critic)
    rounds.next_batch()
    for trace in rounds.traces:
        # One scores the last token, the other what is to come before each: the network reads the same tokens.
        assert trace.reward == pytest.approx(judge.score_ids([trace.ids.tolist()])[0], abs=1e-4)
        if trace.length > 1:
            before = judge.score_ids([trace.ids[:-1].tolist()])[0]
            assert float(trace.values[-1]) == pytest.approx(before, abs=1e-4)


def test_an_adapter_learns_without_dropout(config: PpoConfig) -> None:
    adapter = replace(config, adapter=AdapterConfig(dropout=0.1)).adapter
    assert adapter == AdapterConfig(dropout=0.0)


def test_what_cannot_be_trained_is_refused(config: PpoConfig) -> None:
    with pytest.raises(ConfigError, match="gamma and lam"):
        replace(config, lam=1.5)
    with pytest.raises(ConfigError, match="value_clip"):
        replace(config, value_clip=0.0)
    with pytest.raises(ConfigError, match="muon"):
        ppo(replace(config, optim=replace(config.optim, kind="muon")))

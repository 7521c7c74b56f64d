import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.errors import ConfigError, DataError
from kiloq.model.trained_lora import trained_layers
from kiloq.train.adapters import AdapterConfig, export
from kiloq.train.experience import Experience, Judges, Rounds
from kiloq.train.grpo import Groups, GrpoConfig, grpo, grpo_objective, token_losses
from kiloq.train.reinforce import Cast, PromptSource, assemble, loss_of
from kiloq.train.rewards import Attempt, RewardConfig
from kiloq.train.rollouts import RolloutConfig, sample_seed, shuffled
from kiloq.train.sft import HeldOut
from kiloq.train.traces import Trace, k3, log_probs, packed_traces

SHORT = (RewardConfig(check="short", tokens=8),)


@pytest.fixture
def config(tmp_path: Path, own_answers: Callable[..., dict[str, Any]]) -> GrpoConfig:
    data = (PromptSource(path=str(tmp_path / "prompts.jsonl")),)
    return GrpoConfig(**own_answers(), data=data, reward=SHORT)


def rounds_of(config: GrpoConfig, cast: Cast) -> Rounds:
    method = Groups(scale=config.scale, average=config.average, max_tokens=config.rollout.max_tokens)
    judges = Judges(cast.reward, cast.policy, cast.reference)
    return Rounds(cast.prompts, cast.player, judges, method, config.rollout, seed=config.seed)


def log_of(config: GrpoConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def vowels(attempts: Sequence[Attempt]) -> list[float]:
    return [sum(letter in "aeiou" for letter in one.text) / 8 for one in attempts]


@pytest.mark.parametrize(
    "adapter",
    [
        None,
        AdapterConfig(rank=4, targets=("all-linear",)),
        AdapterConfig(rank=4, targets=("all-linear",), dora=True),
        AdapterConfig(rank=4, targets=("all-linear",), quantization="int8"),
    ],
    ids=["full", "lora", "dora", "qlora"],
)
def test_the_engine_plays_what_the_trainer_trains(config: GrpoConfig, adapter: AdapterConfig | None) -> None:
    cast = assemble(replace(config, adapter=adapter), None)
    rounds = rounds_of(config, cast)
    rounds.next_batch()
    assert rounds.facts["kl"] == 0  # the policy has not moved
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as an optimiser does
        for parameter in cast.policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
    rounds.next_batch()
    assert rounds.facts["kl"] > 0.01
    for trace in rounds.traces:
        # The engine's weights are bf16, and so is its cache; these have fp32.
        torch.testing.assert_close(trace.engine, trace.old[: len(trace.engine)], atol=0.25, rtol=0)
        assert trace.length - len(trace.engine) in (0, 1)
    assert rounds.facts["mismatch"] < rounds.facts["kl"] / 20


def test_an_adapter_that_goes_on_is_held_to_where_it_began(config: GrpoConfig, tmp_path: Path) -> None:
    adapter = AdapterConfig(rank=4, targets=("all-linear",))
    begun = assemble(replace(config, adapter=adapter), None).policy.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in trained_layers(begun).values():
            layer.ups[0].normal_(0, 0.05, generator=generator)
    export(tmp_path / "begun", begun, adapter)
    cast = assemble(replace(config, adapter=replace(adapter, start=str(tmp_path / "begun"))), None)
    rounds = rounds_of(config, cast)
    rounds.next_batch()
    assert rounds.facts["kl"] == 0
    layer = next(iter(trained_layers(cast.policy.model).values()))
    with torch.no_grad():
        layer.ups[0].mul_(3)
    moved = layer.ups[0].detach().clone()
    rounds.given = rounds.round * rounds.parts
    rounds.next_batch()
    assert rounds.facts["kl"] > 0
    assert torch.equal(layer.ups[0], moved)  # the reference leaves no trace


def test_the_first_step_is_reinforce(config: GrpoConfig) -> None:
    cast = assemble(replace(config, kl=0.0), vowels)
    batch = rounds_of(config, cast).next_batch()
    own = log_probs(cast.policy, batch.answers)
    assert torch.equal(own.detach(), batch.old)  # ratios of 1 to the last bit

    policy = cast.policy.model
    (-(own * batch.advantages * batch.weights).sum()).backward()
    wanted = {name: parameter.grad for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    grpo_objective(cast.policy, replace(config, kl=0.0))(batch).total.backward()
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in wanted.values() if gradient is not None)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


@pytest.mark.parametrize("average", ["answer", "token", "constant"])
def test_the_loss_is_the_papers_written_as_loops(config: GrpoConfig, average: Any) -> None:
    config = replace(config, average=average, clip_high=0.28)
    cast = assemble(config, vowels)
    rounds = rounds_of(config, cast)
    batch = rounds.next_batch()
    generator = torch.Generator().manual_seed(1)
    # As if the policy had moved since, beyond either clip.
    moved = replace(batch, old=batch.old + torch.randn(batch.old.shape, generator=generator) * 0.3)
    moved = replace(moved, reference=batch.reference + torch.randn(batch.old.shape, generator=generator) * 0.3)
    found = grpo_objective(cast.policy, config)(moved)
    own, at = log_probs(cast.policy, batch.answers).double().tolist(), 0
    total, num_tokens = 0.0, 0
    for trace in packed_traces(rounds._share(0), 128)[0]:
        answer = 0.0
        for _ in range(trace.length):
            ratio = torch.tensor(own[at] - float(moved.old[at])).exp().item()
            gap = float(moved.reference[at]) - own[at]
            advantage = float(batch.advantages[at])
            gain = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            answer += gain - 0.04 * (torch.tensor(gap).exp().item() - gap - 1)
            at += 1
        total -= answer * {"answer": 1 / trace.length, "token": 1.0, "constant": 1 / 8}[average]
        num_tokens += trace.length
    assert found.total.item() == pytest.approx(total, rel=1e-5)
    assert batch.count == (num_tokens if average == "token" else 8)


@pytest.mark.parametrize("average", ["answer", "token", "constant"])
def test_the_loss_and_its_gradient_are_trls(config: GrpoConfig, average: Any) -> None:
    case = json.loads((Path(__file__).parents[1] / "data" / "golden" / "grpo.json").read_text(encoding="utf-8"))
    config = replace(config, average=average, clip_high=0.28)
    empty, lengths = torch.empty(0), case["lengths"]
    traces = [Trace(torch.arange(2 + n), 2, 0, 0.0, empty) for n in lengths]
    weights, count = Groups(scale=True, average=average, max_tokens=case["max_tokens"]).weigh(traces)
    own, old, reference = (torch.tensor(case[x], dtype=torch.float64) for x in ("own", "old", "reference"))
    batch = Experience(
        answers=packed_traces(traces, 64)[1],
        weights=weights,
        old=old,
        reference=reference,
        values=empty,
        advantages=torch.tensor(case["advantages"]).double().repeat_interleave(torch.tensor(lengths)),
        returns=empty,
        count=count,
        facts={},
    )
    own.requires_grad_(True)
    tokens, _ = token_losses(own, batch, config)
    loss = (tokens * batch.weights).sum() / count
    loss.backward()
    assert loss.item() == pytest.approx(case[average]["loss"], rel=1e-6)
    assert own.grad is not None
    assert own.grad.tolist() == pytest.approx(case[average]["gradient"], rel=1e-6)


def test_advantages_compare_within_a_group() -> None:
    def traces(rewards: Sequence[float]) -> list[Trace]:
        empty = torch.empty(0)
        return [Trace(torch.arange(5), 3, i // 3, reward, empty) for i, reward in enumerate(rewards)]

    some = traces([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    facts = Groups(scale=False, average="answer", max_tokens=8).credit(some)
    assert [trace.advantages.tolist() for trace in some] == [[x] * 2 for x in (-2.0, -1.0, 3.0, 0.0, 0.0, 0.0)]
    assert facts == {"flat": 0.5}
    Groups(scale=True, average="answer", max_tokens=8).credit(some)
    deviation = 7**0.5
    assert some[2].advantages.tolist() == pytest.approx([3 / deviation] * 2, rel=1e-3)
    assert some[3].advantages.tolist() == [0.0, 0.0]


def test_answers_are_packed_whole_and_only_they_are_targets() -> None:
    empty = torch.empty(0)
    traces = [Trace(torch.arange(10, 10 + n), start, 0, 0.0, empty) for n, start in ((6, 4), (5, 2), (4, 1))]
    order, batch = packed_traces(traces[::-1], 8)
    assert [len(trace.ids) for trace in order] == [6, 4, 5]  # the longest first, each into the fullest row
    assert batch.size == 16
    assert batch.targets[batch.targets >= 0].tolist() == [14, 15, 11, 12, 13, 12, 13, 14]
    assert batch.pieces == [0, 5, 8, 12, 16]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]


def test_k3_is_zero_where_nothing_moved_and_never_below() -> None:
    own = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert not k3(own, own).any()
    assert bool((k3(own, own.flip(0)) >= 0).all())


def test_what_a_step_adds_up_lies_on_one_device(config: GrpoConfig) -> None:
    batch = rounds_of(config, assemble(config, None)).next_batch()
    loss = loss_of(batch, torch.zeros((), device="meta"), {})  # in a GPU's place
    assert "reward" in loss.measures
    assert {one.device.type for one in loss.measures.values()} == {"meta"}


def test_rounds_restored_go_on_with_the_same_batches(config: GrpoConfig) -> None:
    rollout = RolloutConfig(prompts=2, answers=4, max_tokens=8, seq_len=128, epochs=2, minibatches=2, accumulate=2)
    config = replace(config, rollout=rollout)
    cast = assemble(config, vowels)
    first = rounds_of(config, cast)
    batches = [first.next_batch() for _ in range(3)]
    saved = copy.deepcopy(first.state())
    batches += [first.next_batch() for _ in range(8)]  # into the next round
    second = rounds_of(config, cast)
    second.restore(saved)
    for before in batches[3:]:
        after = second.next_batch()
        for name, value in vars(before).items():
            if isinstance(value, Tensor):
                assert torch.equal(value, getattr(after, name)), name
        assert torch.equal(before.answers.ids, after.answers.ids)
        assert before.facts == after.facts
    assert not same_answers(batches[0], batches[-1])
    learned = [sorted(b.answers.targets[b.answers.targets >= 0].tolist()) for b in batches[:8]]
    assert sorted(x for one in learned[:4] for x in one) == sorted(x for one in learned[4:] for x in one)


def same_answers(one: Experience, other: Experience) -> bool:
    return one.answers.ids.shape == other.answers.ids.shape and torch.equal(one.answers.ids, other.answers.ids)


def test_prompts_come_in_shuffled_passes() -> None:
    places = shuffled(5, 0, 0, 15)
    assert all(sorted(places[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert places[3:9] == shuffled(5, 0, 3, 9)
    assert len({sample_seed(0, i, j) for i in range(30) for j in range(30)}) == 900


def test_a_reward_rises_and_the_run_can_be_looked_at(config: GrpoConfig, tmp_path: Path) -> None:
    prompts = str(tmp_path / "prompts.jsonl")
    held = (HeldOut(name="held", path=prompts),)
    rollout = replace(config.rollout, prompts=4, answers=8)
    optim = replace(config.optim, lr=4e-3, steps=16, floor=1.0)
    config = replace(
        config, rollout=rollout, optim=optim, kl=1e-3, held=held, held_text=(HeldOut(name="text", path=prompts),)
    )
    assert grpo(config, reward=vowels) == "finished"
    log = log_of(config)
    rewards = [line["reward"] for line in log if "reward" in line]
    assert len(rewards) == 16
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
    assert {"kl", "length", "entropy", "ended", "mismatch"} <= next(line for line in log if "reward" in line).keys()
    assert any("->" in line.get("note", "") for line in log)
    assert [line["step"] for line in log if "eval/held/reward" in line] == [0, 16]  # before and after
    assert [line["step"] for line in log if "eval/text" in line] == [0, 16]
    before = load_dense(open_checkpoint(config.model), dtype=torch.float32)
    after = load_dense(open_checkpoint(Path(config.out) / "model"), dtype=torch.float32)
    assert not torch.equal(before.embed.weight, after.embed.weight)


def test_a_run_that_stops_goes_on_as_if_it_had_not(config: GrpoConfig, tmp_path: Path) -> None:
    rollout = replace(config.rollout, epochs=2, minibatches=2)
    whole = replace(config, rollout=rollout, optim=replace(config.optim, steps=7), out=str(tmp_path / "whole"))
    grpo(whole)
    halves = replace(whole, out=str(tmp_path / "halves"), loop=replace(config.loop, max_minutes=0.0))
    for _ in range(7):
        grpo(halves)  # one step each time

    def told(config: GrpoConfig) -> list[tuple[float, ...]]:
        return [tuple(line[x] for x in ("loss", "reward", "kl")) for line in log_of(config) if "loss" in line]

    assert told(halves) == told(whole)


def test_what_cannot_be_trained_is_refused(config: GrpoConfig) -> None:
    with pytest.raises(ConfigError, match="divide evenly"):
        RolloutConfig(prompts=2, answers=3, minibatches=4)
    with pytest.raises(ConfigError, match="at least 2"):
        replace(config, rollout=replace(config.rollout, answers=1))
    with pytest.raises(ConfigError, match=r"optim\.steps"):
        replace(config, optim=replace(config.optim, steps=0))
    with pytest.raises(ConfigError, match="clip"):
        replace(config, clip=1.5)
    with pytest.raises(DataError, match="leaves room for"):
        grpo(replace(config, rollout=replace(config.rollout, seq_len=32)))

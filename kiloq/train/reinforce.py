"""What PPO and GRPO share: recipe fields, the networks at the start, held-out answers, the run. Knows no loss."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kiloq.chat import chat_format_for
from kiloq.checkpoint import Checkpoint, load_dense, open_checkpoint
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.model.trained_lora import frozen_alone

from .adapters import AdapterConfig
from .data import Batch
from .experience import Experience, PerToken, Rounds, Scored, facts_of
from .forward import Forward, Runtime
from .live import Live
from .network import read_network, write_network
from .objective import Loss, Objective, Watch
from .optim import OptimConfig, with_steps
from .parallel import Parallel, join
from .ranges import Seed
from .recipe import to_toml
from .reward import load_reward_model
from .rewards import Attempt, Reward, RewardConfig, combined
from .rollouts import Player, Prompt, RolloutConfig, read_prompts
from .run_folder import claim_folder
from .settings import BatchConfig, LoopConfig, ParallelConfig, TrainConfig
from .sft import ChatSource, HeldOut, text_stream
from .state import trained_parameters
from .traces import log_probs
from .trainer import Outcome, Trainer

Learned: TypeAlias = Experience | Scored | Batch
"""What such a run gives its objective: answers to learn from; held-out answers; held-out text."""


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """A file of conversations: all but their last answer is the prompt, and that answer what rewards compare with."""

    path: str


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """A whole run. Prompts of `held` are answered greedily and scored; of `held_text` the loss is watched, which shows
    what of its language the model loses. The score of a `reward_model` is added to what the checks give. `kl` holds the
    policy to where it began; 0 keeps no reference. An adapter's dropout is off: the ratio of a token's probabilities
    before and after a step would compare different networks. Of several processes each plays a share of every round
    with the whole model.
    """

    out: str
    model: str
    seed: Seed = 0
    data: tuple[PromptSource, ...]
    held: tuple[HeldOut, ...] = ()
    held_text: tuple[HeldOut, ...] = ()
    reward: tuple[RewardConfig, ...] = ()
    reward_model: str | None = None
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    kl: float = 0.04
    adapter: AdapterConfig | None = None
    optim: OptimConfig
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.parallel.kind not in ("auto", "ddp") or self.parallel.tensor > 1:
            raise ConfigError(
                f"parallel.kind is {self.parallel.kind} and tensor {self.parallel.tensor}; rollouts take whole weights "
                "in each process, so set kind to ddp and leave tensor out."
            )
        if self.adapter is not None:
            object.__setattr__(self, "adapter", dataclasses.replace(self.adapter, dropout=0.0))
        if self.kl < 0 or self.optim.steps < 1:
            raise ConfigError(
                f"kl is {self.kl} and optim.steps {self.optim.steps}; kl must be zero or more, and steps at least 1: "
                f"a round of rollouts takes {self.rollout.epochs * self.rollout.minibatches}."
            )


@dataclass(frozen=True)
class Cast:
    """Everyone who takes part in a run, as it begins."""

    checkpoint: Checkpoint
    policy: Forward
    reference: PerToken | None
    player: Player
    prompts: list[Prompt]
    reward: Reward
    trained: str  # what of the policy is, for the log
    parallel: Parallel


def assemble(config: ReinforceConfig, reward: Reward | None) -> Cast:
    """Read prompts and networks; `reward` stands in for the recipe's checks."""
    checkpoint = open_checkpoint(config.model)
    reward = reward or _reward(config, checkpoint)
    prompts = [prompt for source in config.data for prompt in _prompts(config, checkpoint, source.path)]
    runtime = runtime_of(config)
    parallel = join(dataclasses.replace(config.parallel, kind="ddp"), runtime.device)
    model, trained = read_network(config, checkpoint, runtime, parallel)
    policy = forward_of(model, config)
    return Cast(
        checkpoint=checkpoint,
        policy=policy,
        reference=_reference(config, checkpoint, policy),
        player=Player(Live(model), checkpoint, config.rollout),
        prompts=prompts,
        reward=reward,
        trained=trained,
        parallel=parallel,
    )


def runtime_of(config: ReinforceConfig) -> Runtime:
    """Rounds differ in size, so nothing is compiled unless the recipe insists."""
    loop = config.loop if config.loop.compile == "on" else dataclasses.replace(config.loop, compile="off")
    return Runtime.choose(loop)


def forward_of(model: Transformer, config: ReinforceConfig) -> Forward:
    """How a network of the run goes over packed answers."""
    return Forward(model, runtime_of(config), seq_len=config.rollout.seq_len, checkpointing=config.loop.recompute)


def run(
    config: ReinforceConfig,
    cast: Cast,
    rounds: Rounds,
    objective: Objective[Experience],
    *,
    module: nn.Module | None = None,
    rates: Mapping[str, float] | None = None,
) -> Outcome:
    """Train, or go on where the run in `config.out` stopped; export the policy when the last step is done."""
    folder = Path(config.out)
    with cast.parallel.first_goes_ahead():
        changes = claim_folder(folder, to_toml(config))
    held = {one.name: _prompts(config, cast.checkpoint, one.path) for one in config.held}
    texts = {
        one.name: text_stream(cast.checkpoint, [ChatSource(path=one.path)], share_of(config, 8))
        for one in config.held_text
    }
    seen = _Seen()
    trainer: Trainer[Learned] = Trainer(
        module or cast.policy.model,
        partial(_any_loss, objective, cast.policy),
        rounds,
        folder=folder,
        config=TrainConfig(
            batch=share_of(config, 1),
            optim=with_steps(config.optim, 1.0, epoch_tokens=0, step_tokens=1),
            loop=config.loop,
            rates=rates or {},
        ),
        watch=Watch(
            notes=[
                cast.trained,
                f"{len(cast.prompts):,} prompts, {config.rollout.num_answers:,} answers a round",
                *changes,
            ],
            held={
                **{name: partial(seen.score, cast, prompts) for name, prompts in held.items()},
                **{name: partial(stream.one_pass, config.loop.eval_tokens) for name, stream in texts.items()},
            },
            samples=seen.lines,
            before=True,
        ),
        parallel=cast.parallel,
    )
    outcome = trainer.run()
    if outcome == "finished":
        write_network(config, cast.policy.model, cast.checkpoint, cast.checkpoint.generation, cast.parallel)
    return outcome


def share_of(config: ReinforceConfig, rows: int) -> BatchConfig:
    """A part of a step, as the loop and streams of text count it."""
    seq_len = config.rollout.seq_len
    return BatchConfig(seq_len=seq_len, tokens=rows * seq_len, accumulate=config.rollout.accumulate)


def loss_of(batch: Experience, total: Tensor, measures: Mapping[str, Tensor]) -> Loss:
    """The loss with the facts of the round beside its own measures: means become sums, which the loop divides again."""
    facts = {name: total.new_tensor(value * batch.count, dtype=torch.float64) for name, value in batch.facts.items()}
    return Loss(total, {**facts, **measures})


class _Seen:
    """Held-out answers as they are scored; some of them for people to read."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def score(self, cast: Cast, prompts: Sequence[Prompt]) -> Iterator[Scored]:
        """All prompts answered greedily, a batch for each process, of which it plays its own only."""
        shares = [share for first in range(cast.parallel.world) if (share := prompts[first :: cast.parallel.world])]
        own = min(cast.parallel.rank, len(shares) - 1)
        for number, share in enumerate(shares):
            yield self._score(cast, share) if number == own else Scored(len(share), {})

    def _score(self, cast: Cast, prompts: Sequence[Prompt]) -> Scored:
        answers = cast.player.best(prompts)
        rewards = cast.reward([answer.attempt for answer in answers])
        self._lines += [
            f"{answer.prompt.messages[-1].content!r} -> {answer.text!r} (reward {reward:.2f})"
            for answer, reward in list(zip(answers, rewards, strict=True))[:: max(1, len(answers) // 3)][:3]
        ]
        return Scored(len(answers), facts_of(answers, rewards))

    def lines(self) -> list[str]:
        """What came since the last call."""
        lines, self._lines = self._lines, []
        return lines


def _any_loss(objective: Callable[[Experience], Loss], policy: Forward, batch: Learned) -> Loss:
    if isinstance(batch, Experience):
        return objective(batch)
    if isinstance(batch, Batch):
        return Loss(policy.cross_entropy(batch))
    sums = {name: torch.tensor(value * batch.count, dtype=torch.float64) for name, value in batch.facts.items()}
    return Loss(-sums["reward"], sums)  # lower is better, as with any loss


def _reward(config: ReinforceConfig, checkpoint: Checkpoint) -> Reward:
    """What the recipe's checks and reward model give together."""
    if config.reward_model is None:
        return combined(config.reward)
    judge = load_reward_model(config.reward_model, device=runtime_of(config).device)
    if judge.checkpoint.tokenizer.size != checkpoint.tokenizer.size:
        raise ConfigError(
            f"reward_model {config.reward_model} has {judge.checkpoint.tokenizer.size:,} tokens and {config.model} "
            f"{checkpoint.tokenizer.size:,}; it reads the policy's own tokens, so the two must share a vocabulary."
        )
    checks = combined(config.reward) if config.reward else None

    def reward(attempts: Sequence[Attempt]) -> list[float]:
        scores = judge.score_ids([attempt.ids for attempt in attempts])
        return scores if checks is None else [a + b for a, b in zip(scores, checks(attempts), strict=True)]

    return reward


def _reference(config: ReinforceConfig, checkpoint: Checkpoint, policy: Forward) -> PerToken | None:
    """Where the policy began: itself without its adapter or with the one it goes on from, else a copy of the
    checkpoint."""
    if not config.kl:
        return None
    if config.adapter is None:
        return partial(log_probs, forward_of(load_dense(checkpoint, dtype=torch.float32), config))

    trained = trained_parameters(policy.model)
    begun = {name: one.detach().clone() for name, one in trained.items()} if config.adapter.start else {}

    def as_begun(batch: Batch) -> Tensor:
        with _holding(trained, begun) if begun else frozen_alone(policy.model):
            return log_probs(policy, batch)

    return as_begun


@contextmanager
def _holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the parameters have these values, in their own places."""
    now = {name: one.detach().clone() for name, one in parameters.items()}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
        try:
            yield
        finally:
            for name, value in now.items():
                parameters[name].copy_(value)


def _prompts(config: ReinforceConfig, checkpoint: Checkpoint, path: str) -> list[Prompt]:
    fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
    # The last token of an answer is never read, so a row holds one more.
    longest = config.rollout.seq_len - config.rollout.max_tokens + 1
    return read_prompts(Path(path), checkpoint, fmt, longest=longest)

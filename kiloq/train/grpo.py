"""GRPO: answers to one prompt are compared with each other, and the better ones made likelier. No value network.

Shao et al., arXiv 2402.03300. What others found since is data here: Dr. GRPO (Liu et al., arXiv 2503.20783) and DAPO
(Yu et al., arXiv 2503.14476).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kiloq.errors import ConfigError

from .experience import Experience, Judges, Rounds
from .forward import Forward
from .objective import Loss, Objective
from .reinforce import ReinforceConfig, assemble, loss_of, run
from .rewards import Reward
from .run_folder import alone
from .traces import Trace, k3, log_probs
from .trainer import Outcome

Average = Literal["answer", "token", "constant"]


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(ReinforceConfig):
    """As published with its defaults. `scale` divides a group's advantages by their deviation; Dr. GRPO does not.

    `average` says what a step's loss is a mean over: answers, each the mean of its tokens (as published); all "token"s
    alike (DAPO); or answers, each its tokens' sum by max_tokens, a "constant" that favours no length (Dr. GRPO).
    `clip_high` lets ratios rise further than they fall (DAPO: 0.28); None is `clip`.
    """

    clip: float = 0.2
    clip_high: float | None = None
    scale: bool = True
    average: Average = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip < 1 or (self.clip_high is not None and self.clip_high <= 0):
            raise ConfigError(
                f"clip is {self.clip} and clip_high {self.clip_high}; clip must lie between 0 and 1, and clip_high "
                "above 0."
            )
        if self.rollout.answers < 2:
            raise ConfigError("rollout.answers is 1; GRPO compares the answers to a prompt, so it needs at least 2.")


@alone
def grpo(config: GrpoConfig, *, reward: Reward | None = None) -> Outcome:
    """Train `config.model` on its own answers. `reward`, from Python, replaces the recipe's checks."""
    cast = assemble(config, reward)
    method = Groups(scale=config.scale, average=config.average, max_tokens=config.rollout.max_tokens)
    judges = Judges(cast.reward, cast.policy, cast.reference, parallel=cast.parallel)
    rounds = Rounds(cast.prompts, cast.player, judges, method, config.rollout, seed=config.seed)
    return run(config, cast, rounds, grpo_objective(cast.policy, config))


@dataclass(frozen=True)
class Groups:
    """Advantages by comparison within a group, the same for all tokens of an answer."""

    scale: bool
    average: Average
    max_tokens: int

    def credit(self, traces: Sequence[Trace]) -> Mapping[str, float]:
        """A = r - mean(group), by its deviation where it is scaled. `flat` are answers whose group teaches nothing."""
        flat = 0
        for group in {trace.group for trace in traces}:
            members = [trace for trace in traces if trace.group == group]
            rewards = torch.tensor([trace.reward for trace in members])
            above = rewards - rewards.mean()
            if self.scale:
                above = above / (rewards.std() + 1e-4)
            for trace, advantage in zip(members, above.tolist(), strict=True):
                trace.advantages = torch.full((trace.length,), advantage)
            flat += len(members) if float(rewards.min()) == float(rewards.max()) else 0
        return {"flat": flat / len(traces)}

    def weigh(self, traces: Sequence[Trace]) -> tuple[Tensor, int]:
        """Each token's part of the sum, and what it is divided by."""
        lengths = torch.tensor([trace.length for trace in traces])
        if self.average == "token":
            return torch.ones(int(lengths.sum())), int(lengths.sum())
        shares = 1 / lengths if self.average == "answer" else torch.full((len(traces),), 1 / self.max_tokens)
        return shares.repeat_interleave(lengths), len(traces)

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: dict[str, float]) -> None:
        pass


def grpo_objective(policy: Forward, config: GrpoConfig) -> Objective[Experience]:
    """Minus equation 3 of the paper: clipped ratio times advantage, less the KL to the reference (equation 4)."""

    def loss(batch: Experience) -> Loss:
        own = log_probs(policy, batch.answers)
        tokens, clipped = token_losses(own, batch, config)
        total = (tokens * batch.weights.to(own.device)).sum()
        return loss_of(batch, total, {"clipped": clipped.double().mean() * batch.count})

    return loss


def token_losses(own: Tensor, batch: Experience, config: GrpoConfig) -> tuple[Tensor, Tensor]:
    """Of each answer token its loss, from its log-probability under the live policy, and whether it is clipped."""
    high = config.clip if config.clip_high is None else config.clip_high
    old, advantages = batch.old.to(own.device), batch.advantages.to(own.device)
    gains, clipped = clipped_gain(own - old, advantages, config.clip, high)
    tokens = -gains
    if config.kl:
        tokens = tokens + config.kl * k3(own, batch.reference.to(own.device))
    return tokens, clipped


def clipped_gain(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's surrogate (arXiv 1707.06347, equation 7) of each token, and where its clip holds the policy back."""
    ratio = log_ratio.exp()
    free, held = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return torch.minimum(free, held), held < free

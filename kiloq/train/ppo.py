"""PPO as Qwen's report describes it (arXiv 2309.16609, section 3.2.2): policy, value network, reference and reward.

PPO: Schulman et al., arXiv 1707.06347, with the advantages of arXiv 1506.02438; for language: arXiv 2203.02155.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kiloq.errors import ConfigError

from .data import Batch
from .experience import Experience, Judges, Rounds
from .forward import Forward
from .grpo import clipped_gain
from .network import read_network
from .objective import Loss, Objective
from .reinforce import Cast, ReinforceConfig, assemble, forward_of, loss_of, run, runtime_of, share_of
from .reward import RewardModel, load_reward_model
from .rewards import Reward
from .run_folder import alone
from .sft import ChatSource, text_stream
from .traces import Trace, answer_rows, log_probs
from .trainer import Outcome


@dataclass(frozen=True, kw_only=True)
class PpoConfig(ReinforceConfig):
    """With the report's figures as defaults; its `optim.lr` was 1e-6, with 2 answers a prompt and top_p 0.9.

    `kl` is taken from the reward of each token. For the first `value_warmup` steps only the value network learns, at
    `value_lr` throughout. `clip` bounds the policy's ratios, `value_clip` how far values move from what they were.
    `gamma` and `lam` are GAE's. The mean cross entropy of `text` is added `text_weight` times, against forgetting.
    """

    value_lr: float = 5e-6
    value_warmup: int = 50
    value_clip: float = 0.15
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    text: tuple[ChatSource, ...] = ()
    text_weight: float = 1.0
    text_rows: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.value_lr, self.value_clip, self.text_rows) <= 0 or not 0 < self.clip < 1:
            raise ConfigError(
                f"value_lr is {self.value_lr}, value_clip {self.value_clip}, clip {self.clip} and text_rows "
                f"{self.text_rows}; all must be above zero, and clip below 1."
            )
        if not (0 < self.gamma <= 1 and 0 <= self.lam <= 1) or min(self.value_warmup, self.text_weight) < 0:
            raise ConfigError(
                f"gamma is {self.gamma}, lam {self.lam}, value_warmup {self.value_warmup} and text_weight "
                f"{self.text_weight}; gamma and lam lie between 0 and 1, the others are zero or more."
            )


@alone
def ppo(config: PpoConfig, *, reward: Reward | None = None) -> Outcome:
    """Train `config.model` on its own answers. `reward`, from Python, replaces the recipe's checks."""
    cast = assemble(config, reward)
    value = _value_network(config, cast)
    critic = Critic(value, forward_of(value.model, config))
    text = None
    if config.text and config.text_weight:
        text = text_stream(cast.checkpoint, config.text, share_of(config, config.text_rows), seed=config.seed)
    rounds = Rounds(
        cast.prompts,
        cast.player,
        Judges(cast.reward, cast.policy, cast.reference, critic, cast.parallel),
        Gae(kl=config.kl, gamma=config.gamma, lam=config.lam),
        config.rollout,
        seed=config.seed,
        warmup=config.value_warmup,
        text=text,
    )
    return run(
        config,
        cast,
        rounds,
        ppo_objective(cast, critic, config),
        module=nn.ModuleDict({"policy": cast.policy.model, "value": value}),
        rates={"value.": config.value_lr / config.optim.lr},
    )


@dataclass(frozen=True)
class Critic:
    """The value network as it goes over packed answers."""

    net: RewardModel
    forward: Forward

    def __call__(self, batch: Batch) -> Tensor:
        """What is to come before each of the batch's N trained tokens, [N] fp32."""
        hidden, _ = answer_rows(self.forward, batch)
        values: Tensor = self.net(hidden)
        return values


class Gae:
    """Credit by generalised advantage estimation, from rewards brought to mean 0 and deviation 1 as they come in."""

    def __init__(self, *, kl: float, gamma: float, lam: float) -> None:
        self.kl, self.gamma, self.lam = kl, gamma, lam
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0  # of all rewards so far

    @property
    def deviation(self) -> float:
        """Of all rewards so far."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def credit(self, traces: Sequence[Trace]) -> Mapping[str, float]:
        """Each token pays for its distance from the reference; the last one gets the answer's reward.

        Advantages have mean 0 and deviation 1 over the round. `explained` is the share of the returns' variance that
        the value network foresaw.
        """
        self._meet([trace.reward for trace in traces])
        for trace in traces:
            rewards = -self.kl * (trace.old - trace.reference) if self.kl else torch.zeros(trace.length)
            rewards[-1] += (trace.reward - self.mean) / max(self.deviation, 1e-6)
            trace.advantages = advantages(rewards, trace.values, gamma=self.gamma, lam=self.lam)
            trace.returns = trace.advantages + trace.values
        every = torch.cat([trace.advantages for trace in traces])
        returns = torch.cat([trace.returns for trace in traces])
        correction = int(len(every) > 1)  # a round of one token has no deviation
        for trace in traces:
            trace.advantages = (trace.advantages - every.mean()) / (every.std(correction=correction) + 1e-8)
        left, whole = every.var(correction=correction), returns.var(correction=correction)
        return {"explained": float(1 - left / whole.clamp(min=1e-8))}

    def weigh(self, traces: Sequence[Trace]) -> tuple[Tensor, int]:
        """All tokens alike."""
        count = sum(trace.length for trace in traces)
        return torch.ones(count), count

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]

    def _meet(self, rewards: Sequence[float]) -> None:
        """Welford's update of the running mean and squares."""
        for reward in rewards:
            self.count += 1
            before = reward - self.mean
            self.mean += before / self.count
            self.squares += before * (reward - self.mean)


def advantages(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> Tensor:
    """GAE of one answer, equation 16 of arXiv 1506.02438: sum (gamma lam)^l delta_{t+l}. Nothing follows the end."""
    following = torch.cat([values[1:], values.new_zeros(1)])
    found, ahead = (rewards + gamma * following - values).tolist(), 0.0
    for t in reversed(range(len(found))):
        ahead = found[t] = found[t] + gamma * lam * ahead
    return torch.tensor(found)


def ppo_objective(cast: Cast, critic: Critic, config: PpoConfig) -> Objective[Experience]:
    """The clipped surrogate, the clipped squared error of the values, and the text's cross entropy, each a mean."""

    def loss(batch: Experience) -> Loss:
        values = critic(batch.answers)
        device = values.device
        errors = value_errors(values, batch.values.to(device), batch.returns.to(device), config.value_clip)
        total = errors.sum()
        measures = {"value_loss": total.detach()}
        if batch.moves_policy:
            own = log_probs(cast.policy, batch.answers)
            gains, held = clipped_gain(
                own - batch.old.to(device), batch.advantages.to(device), config.clip, config.clip
            )
            total = total - gains.sum()
            measures["clipped"] = held.sum()
            if batch.text is not None:
                # Its sum is over tokens of its own; the loop divides by those of the answers.
                text = cast.policy.cross_entropy(batch.text) * (batch.count / max(1, batch.text.count))
                total = total + config.text_weight * text
                measures["text_loss"] = text.detach()
        return loss_of(batch, total, measures)

    return loss


def value_errors(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, the worse of a value and of what is within `clip` of where it was."""
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def _value_network(config: PpoConfig, cast: Cast) -> RewardModel:
    """Begins as the reward model, else as the policy with a row of zeros: what is to come is worth nothing yet."""
    if config.reward_model is not None and config.adapter is None:
        runtime = cast.policy.runtime
        net = load_reward_model(config.reward_model, device=runtime.device).reward.requires_grad_(True)
        cast.parallel.spread(net.model, runtime)
        return net
    model, _ = read_network(config, cast.checkpoint, runtime_of(config), cast.parallel)
    if isinstance(model.head, nn.Module):
        model.head.requires_grad_(False)  # nobody asks it for logits
    return RewardModel(model).to(cast.policy.runtime.device)

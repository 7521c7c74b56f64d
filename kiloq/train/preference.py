"""Learning from preferences without a reward model: DPO, IPO and KTO."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kiloq.checkpoint import open_checkpoint
from kiloq.errors import ConfigError

from . import pair_losses
from .adapters import AdapterConfig
from .comparisons import PairBatch, read_compared, read_labelled
from .contract import check_contract, check_saved
from .data import Batch, piece_of_tokens
from .forward import Forward, Runtime, head_of
from .losses import token_log_probs
from .network import read_network, write_network
from .objective import Loss, Objective, Watch
from .optim import OptimConfig
from .pair_data import read_pair_data
from .parallel import join
from .ranges import Seed
from .recipe import to_toml
from .reference import measure_reference
from .run_folder import alone, claim_folder
from .samples import Long
from .sampling import Answers
from .settings import BatchConfig, LoopConfig, ParallelConfig, TrainConfig
from .sft import AnswerConfig, ChatSource, HeldOut, answering, text_stream
from .trainer import Outcome, Trainer

Method = Literal["dpo", "ipo", "kto"]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """A whole run over preferences: pairs (chosen, rejected), or for `loss` "kto" also answers with a label.

    `beta` holds the model to the one it began as: the larger, the closer (IPO's tau). `sft_weight` adds the mean
    cross entropy of good answers (RPO, arXiv 2404.19733). `label_smoothing` is for DPO, `weights` of good and bad
    answers for KTO, which wants both together alike. `long` says what becomes of pairs of which an answer is beyond
    batch.seq_len: the oldest rounds of the prompt are left out ("cut"), the pair is ("drop"), or it is an error. Of
    `held` preferences are scored, of `held_text` the loss of plain conversations: what the run does to the rest.
    `prompts` are answered greedily beside these figures.
    """

    out: str
    model: str
    seed: Seed = 0
    data: tuple[ChatSource, ...]
    held: tuple[HeldOut, ...] = ()
    held_text: tuple[HeldOut, ...] = ()
    prompts: tuple[str, ...] = ()
    loss: Method = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    weights: tuple[float, float] = (1.0, 1.0)
    long: Long = "cut"
    epochs: float = 1.0
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    adapter: AdapterConfig | None = None
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5 or self.sft_weight < 0 or min(self.weights) < 0:
            raise ConfigError(
                f"beta is {self.beta}, label_smoothing {self.label_smoothing}, sft_weight {self.sft_weight} and "
                f"weights {self.weights}; beta must be above zero, label_smoothing below 0.5, and none below zero."
            )


@alone
def prefer(config: PreferenceConfig) -> Outcome:
    """Train `config.model`, or go on where the run in `config.out` stopped; export when the last step is done."""
    folder = Path(config.out)
    checkpoint = open_checkpoint(config.model)
    runtime = Runtime.choose(config.loop)
    read = partial(read_labelled, seed=config.seed) if config.loss == "kto" else read_compared
    pairs = read_pair_data(config, checkpoint, read, apart=config.loss == "kto")
    stream = pairs.stream
    texts = {one.name: text_stream(checkpoint, [ChatSource(path=one.path)], config.batch) for one in config.held_text}
    generation = answering(checkpoint, config.answer)
    learned = [sample for one in stream.compared for sample in one.samples[: 1 if stream.apart else 2]]
    notes = check_contract(learned, checkpoint.tokenizer, generation, vocab_size=checkpoint.config.vocab_size)
    parallel = join(config.parallel, runtime.device)
    with parallel.first_goes_ahead():
        changes = claim_folder(folder, to_toml(config))
    model, trained = read_network(config, checkpoint, runtime, parallel)
    forward = Forward(model, runtime, seq_len=config.batch.seq_len, checkpointing=config.loop.recompute)
    measured = measure_reference(
        folder,
        {"": stream, **pairs.held},
        partial(answer_log_probs, forward),
        model=model,
        dtype=runtime.dtype,
        parallel=parallel,
    )
    limit = config.loop.eval_tokens
    trainer: Trainer[PairBatch | Batch] = Trainer(
        model,
        preference_objective(forward, config),
        stream,
        folder=folder,
        config=TrainConfig(batch=config.batch, optim=pairs.optim, loop=config.loop),
        parallel=parallel,
        watch=Watch(
            held={
                **{name: partial(packed.one_pass, limit) for name, packed in pairs.held.items()},
                **{name: partial(packed.one_pass, limit) for name, packed in texts.items()},
            },
            samples=Answers(model, checkpoint, config.prompts, parallel=parallel).lines,
            notes=[trained, pairs.note, *notes, measured, *changes],
        ),
    )
    outcome = trainer.run()
    if outcome == "finished":
        written = write_network(config, model, checkpoint, generation, parallel)
        if parallel.is_first:
            check_saved(written)
    return outcome


def preference_objective(forward: Forward, config: PreferenceConfig) -> Objective[PairBatch | Batch]:
    """The loss that the recipe names, summed over comparisons; of held-out text its cross entropy."""

    def objective(batch: PairBatch | Batch) -> Loss:
        if isinstance(batch, Batch):
            return Loss(forward.cross_entropy(batch))
        log_probs = answer_log_probs(forward, batch)
        device = log_probs.device
        ratios, lengths, good = log_probs - batch.reference.to(device), batch.lengths.to(device), batch.good.to(device)
        losses, measures = _kto(ratios, good, config) if config.loss == "kto" else _paired(ratios, lengths, config)
        if config.sft_weight:
            means = -log_probs[:, 0] / lengths[:, 0]
            losses = losses + config.sft_weight * torch.where(good, means, 0.0)
        # How far the policy has gone, for a token of these answers.
        measures["drift"] = (ratios.detach().abs() / lengths).mean(dim=1)
        return Loss(losses.sum(), {name: value.sum() for name, value in measures.items()})

    return objective


def answer_log_probs(forward: Forward, batch: PairBatch) -> Tensor:
    """log p of the two answers of every comparison, [n, 2] fp32; without gradients for those that are apart."""
    first = sums_of_pieces(forward, batch.flat)
    if batch.others is None:
        return first[batch.places.to(first.device)]
    with torch.no_grad():
        second = sums_of_pieces(forward, batch.others)
    places = batch.places.to(first.device)
    return torch.stack([first[places[:, 0]], second[places[:, 1]]], dim=1)


def sums_of_pieces(forward: Forward, batch: Batch) -> Tensor:
    """log p of what each piece trains, summed over its tokens, [pieces]."""
    hidden = forward(batch)
    tokens = token_log_probs(hidden, head_of(forward.model), batch.targets.to(hidden.device))
    piece = piece_of_tokens(batch).to(hidden.device)
    return torch.zeros(len(batch.pieces) - 1, device=hidden.device).index_add(0, piece, tokens)


def _paired(ratios: Tensor, lengths: Tensor, config: PreferenceConfig) -> tuple[Tensor, dict[str, Tensor]]:
    if config.loss == "ipo":
        losses = pair_losses.ipo(ratios, lengths, beta=config.beta)
    else:
        losses = pair_losses.dpo(ratios, beta=config.beta, label_smoothing=config.label_smoothing)
    rewards = config.beta * ratios.detach()
    chosen, rejected = rewards.unbind(dim=1)
    return losses, {
        "accuracy": (chosen > rejected).double(),
        "margin": chosen - rejected,
        "chosen": chosen,
        "rejected": rejected,
    }


def _kto(ratios: Tensor, good: Tensor, config: PreferenceConfig) -> tuple[Tensor, dict[str, Tensor]]:
    drift = pair_losses.kto_drift(ratios[:, 1])
    losses = pair_losses.kto(ratios[:, 0], good, drift, beta=config.beta, weights=config.weights)
    # Above zero: on the side of the reference point where the label wants it.
    margin = config.beta * (ratios[:, 0].detach() - drift) * torch.where(good, 1.0, -1.0)
    return losses, {"accuracy": (margin > 0).double(), "margin": margin, "kl": drift.expand(len(good))}

"""A reward model: a network and one row that scores what an answer ends with. Learned from pairs, then asked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kiloq.chat import ChatFormat, Message, chat_format_for, render
from kiloq.checkpoint import Checkpoint, load_dense, load_scored, open_checkpoint, save_checkpoint
from kiloq.checkpoint.fingerprint import find_base
from kiloq.checkpoint.names import SCORE
from kiloq.errors import CheckpointError, RequestError
from kiloq.model import Transformer

from . import adapters
from .adapters import SCORE_FILE, AdapterConfig
from .comparisons import PairBatch, read_compared
from .data import Batch, piece_of_tokens
from .forward import Forward, Runtime
from .losses import IGNORE
from .network import read_network, trained_folder, write_network
from .objective import Loss, Objective, Watch
from .optim import OptimConfig
from .pair_data import read_pair_data
from .pair_losses import bradley_terry
from .parallel import join
from .ranges import Seed
from .recipe import to_toml
from .run_folder import alone, claim_folder, replacing
from .samples import Long
from .settings import BatchConfig, LoopConfig, ParallelConfig, TrainConfig
from .sft import ChatSource, HeldOut
from .trainer import Outcome, Trainer

_SCORED_TOKENS = 4096  # at a time


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A whole run over pairs (chosen, rejected, and by how much: an optional margin). Preference-model pre-training is
    the same on rougher data. `long` is as in PreferenceConfig.
    """

    out: str
    model: str
    seed: Seed = 0
    data: tuple[ChatSource, ...]
    held: tuple[HeldOut, ...] = ()
    long: Long = "cut"
    epochs: float = 1.0
    adapter: AdapterConfig | None = None
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


class RewardModel(nn.Module):
    """`model` and the row `score` that its hidden states are multiplied with; the row begins as zeros."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.score = nn.Linear(model.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, hidden_size] of end tokens -> scores [n], in the type of the row (fp32)."""
        scores: Tensor = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)
        return scores


@dataclass(frozen=True)
class Judge:
    """A reward model, ready to be asked. Conversations are scored at the token that ends their last answer."""

    reward: RewardModel
    checkpoint: Checkpoint
    format: ChatFormat

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """The higher the better; comparable within one question."""
        return self.score_ids([self._ids(one) for one in conversations])

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The same of ids that end with the token that ends an answer."""
        model, scores = self.reward.model, list[float]()
        device = self.reward.score.weight.device
        for part in _parts(sequences):
            starts = [0, *accumulate(map(len, part))]
            ids = torch.tensor([token_id for one in part for token_id in one], device=device)
            hidden = model(ids, *model.packed(starts, device))
            scores += self.reward(hidden[torch.tensor(starts[1:], device=device) - 1]).tolist()
        return scores

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        rendered = render(messages, self.checkpoint.tokenizer, self.format, add_generation_prompt=False)
        if not any(rendered.trained):
            raise RequestError("the conversation has no answer that could be scored.")
        return rendered.ids[: max(i for i, trained in enumerate(rendered.trained) if trained) + 1]


@alone
def reward(config: RewardConfig) -> Outcome:
    """Train a reward model from `config.model`, or go on where the run in `config.out` stopped; export at the end."""
    folder = Path(config.out)
    checkpoint = open_checkpoint(config.model)
    runtime = Runtime.choose(config.loop)
    pairs = read_pair_data(config, checkpoint, read_compared)
    parallel = join(config.parallel, runtime.device)
    with parallel.first_goes_ahead():
        changes = claim_folder(folder, to_toml(config))
    model, trained = read_network(config, checkpoint, runtime, parallel, headless=True)
    forward = Forward(model, runtime, seq_len=config.batch.seq_len, checkpointing=config.loop.recompute)
    module = RewardModel(model).to(runtime.device)
    trainer = Trainer(
        module,
        reward_objective(forward, module),
        pairs.stream,
        folder=folder,
        config=TrainConfig(batch=config.batch, optim=pairs.optim, loop=config.loop),
        parallel=parallel,
        watch=Watch(
            held={name: partial(packed.one_pass, config.loop.eval_tokens) for name, packed in pairs.held.items()},
            notes=[f"{trained}, and the row that scores", pairs.note, *changes],
        ),
    )
    outcome = trainer.run()
    if outcome == "finished" and parallel.gather(module.model):
        _write(config, module, checkpoint)
    return outcome


def reward_objective(forward: Forward, module: RewardModel) -> Objective[PairBatch]:
    """InstructGPT's equation 1, summed over pairs. `accuracy` is the share of pairs that are ordered as people did."""

    def objective(batch: PairBatch) -> Loss:
        hidden = forward(batch.flat)
        scores = module(hidden[end_tokens(batch.flat).to(hidden.device)])[batch.places.to(hidden.device)]  # [n, 2]
        chosen, rejected = scores.detach().unbind(dim=1)
        measures = {
            "accuracy": (chosen > rejected).double(),
            "margin": chosen - rejected,
            "chosen": chosen,
            "rejected": rejected,
        }
        losses = bradley_terry(scores, batch.margins.to(hidden.device))
        return Loss(losses.sum(), {name: value.sum() for name, value in measures.items()})

    return objective


def end_tokens(batch: Batch) -> Tensor:
    """Where the token that ends the last answer of each piece stands, [pieces]; 0 where nothing is trained."""
    behind = torch.where(batch.targets != IGNORE, torch.arange(len(batch.targets)) + 1, 0)
    ends = torch.zeros(len(batch.pieces) - 1, dtype=torch.int64)
    return ends.scatter_reduce(0, piece_of_tokens(batch), behind, "amax")


def load_reward_model(folder: str | Path, *, device: str = "cpu") -> Judge:
    """A reward model's folder, as kiloq train reward or transformers wrote it, or that of an adapter to one."""
    if not (Path(folder) / "adapter_config.json").is_file():
        checkpoint = open_checkpoint(folder)
        model, score = load_scored(checkpoint, dtype=torch.float32, device=device)
    else:
        checkpoint = open_checkpoint(find_base(folder))
        model, score = _adapted(checkpoint, Path(folder))
    module = RewardModel(model.to(device))
    with torch.no_grad():
        module.score.weight.copy_(score)
    module.eval().requires_grad_(False)
    return Judge(module, checkpoint, chat_format_for(checkpoint.config.family, checkpoint.folder))


def _write(config: RewardConfig, module: RewardModel, checkpoint: Checkpoint) -> Path:
    """As a checkpoint of its family with the row in it, or an adapter with the row beside it; where it is."""
    folder, score = trained_folder(config), module.score.weight.detach().cpu()
    if config.adapter is not None:
        return write_network(config, module.model, checkpoint, checkpoint.generation, score=score)
    dtype = getattr(torch, module.model.config.dtype)
    state = {**module.model.state_dict(), SCORE: score}
    with replacing(folder) as new:
        save_checkpoint(
            new,
            model_state={name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()},
            config=module.model.config,
            tokenizer=checkpoint.tokenizer,
            generation=checkpoint.generation,
        )
    return folder


def _adapted(checkpoint: Checkpoint, folder: Path) -> tuple[Transformer, Tensor]:
    if not (folder / SCORE_FILE).is_file():
        raise CheckpointError(f"{folder} is an adapter without {SCORE_FILE}, so it is none to a reward model.")
    model = load_dense(checkpoint, dtype=torch.float32)
    adapters.attach(model, checkpoint, AdapterConfig(start=str(folder), dropout=0.0))
    return model, load_file(folder / SCORE_FILE)[SCORE]


def _parts(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """In order, so many at a time as fit together."""
    part: list[Sequence[int]] = []
    for one in sequences:
        if part and sum(map(len, part)) + len(one) > _SCORED_TOKENS:
            yield part
            part = []
        part.append(one)
    if part:
        yield part

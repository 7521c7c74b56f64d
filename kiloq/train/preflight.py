"""The short run before the long one: samples learned by heart on a copy, whose answers must then end by themselves.

What can go wrong with a model, its adapter, its mask and its stop ids shows here in minutes, not after the run.
"""

import difflib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kiloq.checkpoint import Checkpoint, GenerationDefaults
from kiloq.engine import EngineConfig, SamplingParams
from kiloq.engine.engine import Engine
from kiloq.engine.readers import Readers
from kiloq.engine.results import Choice, Result
from kiloq.errors import ConfigError
from kiloq.model import Transformer

from .adapters import AdapterConfig
from .contract import trained_marks
from .forward import Forward, Runtime
from .network import NetworkRecipe, read_network
from .objective import next_token
from .optim import OptimConfig
from .parallel import Alone
from .samples import PackedSamples, Sample
from .settings import BatchConfig, LoopConfig, TrainConfig
from .state import trained_parameters
from .trainer import Trainer

STEPS = 20
_SAMPLES = 2
_FASTER = (10.0, 50.0, 2.0, 250.0)  # times the run's own rate: 20 steps must do what the run does in many more
_ALIKE = 0.9  # of the trained answer, by difflib's ratio over tokens
_FEW = 4  # an answer of fewer tokens would prove little


@dataclass(frozen=True)
class _Copy:
    """The run's recipe as far as its network goes, in a folder of its own."""

    out: str
    model: str
    seed: int
    adapter: AdapterConfig | None


@dataclass(frozen=True)
class _Attempt:
    """What became of one short run: its loss at the first and last step, and what it then answered."""

    rate: float
    losses: tuple[float, float]
    wanted: tuple[int, ...]
    given: Choice

    @property
    def ends(self) -> bool:
        return self.given.stop_id == self.wanted[-1]

    @property
    def alike(self) -> float:
        wanted = self.wanted[:-1]
        return difflib.SequenceMatcher(None, wanted, self.given.token_ids[: len(wanted)], autojunk=False).ratio()


def preflight(
    recipe: NetworkRecipe,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    generation: GenerationDefaults,
    runtime: Runtime,
    optim: OptimConfig,
) -> str:
    """A line for the log, or ConfigError that says what a person would have found after the run.

    The network is read anew for it, so the run's own weights and random numbers stay as they are. Other rates are
    tried, in case 20 steps at the first are too little or too much.
    """
    chosen = _telling(samples)
    tried: list[_Attempt] = []
    folder = Path(recipe.out) / "preflight"
    with torch.random.fork_rng():
        model, _ = read_network(_Copy(str(folder), recipe.model, recipe.seed, recipe.adapter), checkpoint, runtime)
        before = {name: tensor.detach().clone() for name, tensor in trained_parameters(model).items()}
        for faster in _FASTER:
            with torch.no_grad():
                for name, tensor in trained_parameters(model).items():
                    tensor.copy_(before[name])
            shutil.rmtree(folder, ignore_errors=True)
            losses = _learn(model, chosen, folder, replace(optim, lr=faster * optim.lr), runtime)
            shutil.rmtree(folder, ignore_errors=True)
            tried += [
                _Attempt(faster * optim.lr, losses, wanted, given)
                for wanted, given in _answers(model, chosen, checkpoint, generation)
            ]
            best = max(tried, key=lambda one: (one.ends, one.alike))
            if best.ends and best.alike >= _ALIKE:
                return (
                    f"preflight: {STEPS} steps on {len(chosen)} samples at lr {best.rate:.1e} took the loss from "
                    f"{losses[0]:.2f} to {losses[1]:.3f}; the answer is repeated and ends by itself"
                )
    raise ConfigError(_what_failed(tried, len(chosen), checkpoint))


def _telling(samples: Sequence[Sample]) -> list[Sample]:
    """The shortest samples, if there are enough whose answer is more than a word or two."""
    return sorted(samples, key=lambda sample: (len(_parts(sample)[1]) <= _FEW, len(sample.ids)))[:_SAMPLES]


def _parts(sample: Sample) -> tuple[list[int], list[int]]:
    """The last answer with the token that ends it, and what comes before it."""
    marks = trained_marks(sample)
    end = len(marks) - marks[::-1].index(True)
    start = end
    while marks[start - 1]:
        start -= 1
    return sample.ids[:start].tolist(), sample.ids[start:end].tolist()


def _learn(
    model: Transformer, samples: Sequence[Sample], folder: Path, optim: OptimConfig, runtime: Runtime
) -> tuple[float, float]:
    """The loss at the first step and at the last; mutates the model."""
    length = 16 * -(-sum(len(sample.ids) for sample in samples) // 16)
    stream = PackedSamples([(samples, 1.0)], seq_len=length, tokens=length, seed=0, filler=int(samples[0].ids[0]))
    forward = Forward(model, replace(runtime, compiled=False), seq_len=length)
    trainer = Trainer(
        model,
        next_token(forward),
        stream,
        folder=folder,
        config=TrainConfig(
            batch=BatchConfig(seq_len=length, tokens=length),
            optim=replace(optim, steps=STEPS, warmup_steps=2, warmup_ratio=None, weight_decay=0.0),
            loop=LoopConfig(report=(), log_every=STEPS, save_every=STEPS + 1),
        ),
        parallel=Alone(),
    )
    if trainer.run() != "finished":
        raise ConfigError("the preflight was stopped; nothing has been trained.")
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [float(line["loss"]) for line in lines if "loss" in line]
    return losses[0], losses[-1]


def _answers(
    model: Transformer, samples: Sequence[Sample], checkpoint: Checkpoint, generation: GenerationDefaults
) -> list[tuple[tuple[int, ...], Choice]]:
    """Of each sample the answer that was trained, and the one that is given."""
    parts = [_parts(sample) for sample in samples]
    room = max(len(answer) for _, answer in parts) + 32
    engine = Engine(
        model.eval(),
        EngineConfig(max_context=max(len(prompt) for prompt, _ in parts) + room, max_batch=len(parts)),
        tokenizer=checkpoint.tokenizer,
        stop_ids=generation.stop_ids,
    )
    greedy = SamplingParams(max_tokens=room, temperature=0.0, speculation="none")
    found: list[tuple[tuple[int, ...], Choice]] = []
    for number, result in Readers(engine).completed([(prompt, greedy) for prompt, _ in parts], ""):
        if not isinstance(result, Result):
            raise result
        found.append((tuple(parts[number][1]), result.choices[0]))
    return found


def _what_failed(tried: Sequence[_Attempt], count: int, checkpoint: Checkpoint) -> str:
    best = max(tried, key=lambda one: (one.ends, one.alike, -one.losses[1]))
    decode = checkpoint.tokenizer.decode
    curves = ", ".join(f"{a.losses[0]:.2f} to {a.losses[1]:.2f} at lr {a.rate:.1e}" for a in tried[::count])
    said = f"preflight: after {STEPS} steps on {count} samples (loss {curves}) the model "
    shown = f"It should say {decode(list(best.wanted))[-200:]!r} and says {decode(list(best.given.token_ids))[:200]!r}."
    if best.alike < _ALIKE:
        return f"{said}has not learned them. {shown} Look at the adapter's targets and rank, and at `kiloq train show`."
    return f"{said}says the answer, but does not end it with {decode([best.wanted[-1]])}. {shown}"

"""kiloq's training loop as a contender of finetune_peers.py: the same samples in each step, laid into rows."""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from train_worker import PLAN, Turns

from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.model import Transformer
from kiloq.train import adapters
from kiloq.train.comparisons import Compared, PackedPairs, PairBatch
from kiloq.train.data import Batch
from kiloq.train.forward import Forward, Runtime
from kiloq.train.objective import B, Objective, next_token
from kiloq.train.optim import OptimConfig
from kiloq.train.parallel import Alone
from kiloq.train.preference import PreferenceConfig, answer_log_probs, preference_objective
from kiloq.train.reference import LogProbs, measure_reference
from kiloq.train.samples import PackedSamples, Sample
from kiloq.train.settings import BatchConfig, LoopConfig, TrainConfig
from kiloq.train.trainer import Trainer

turns = Turns()
BATCH = BatchConfig(seq_len=PLAN["seq_len"], tokens=PLAN["tokens"])
OPTIM = OptimConfig(lr=PLAN["lr"], steps=10**6, warmup_steps=0, floor=1.0, weight_decay=0.0)


class Steps(Generic[B]):
    """The given batches, one after the other."""

    def __init__(self, made: list[B]) -> None:
        self.made, self.at = made, 0

    def next_batch(self) -> B:
        self.at += 1
        return self.made[(self.at - 1) % len(self.made)]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class Watched(Trainer[B]):
    def _log(self, journal: Any, means: dict[str, float], **rest: float) -> None:
        turns.stepped(means["loss"])


def main() -> None:
    torch.set_num_threads(PLAN["threads"])
    loop = LoopConfig(
        device="cpu",
        precision="bf16" if PLAN["bf16"] else "fp32",
        compile="on" if PLAN["setting"] == "compiled" else "off",
        log_every=1,
        save_every=10**9,
        report=(),
    )
    runtime = Runtime.choose(loop)
    checkpoint = open_checkpoint(PLAN["model"])
    model = load_dense(checkpoint, dtype=runtime.dtype if PLAN["lora"] else torch.float32).requires_grad_(True)
    if PLAN["lora"]:
        adapters.attach(model, checkpoint, adapters.AdapterConfig(dropout=0.0, embeddings="none"))
    forward = Forward(Alone().spread(model, runtime), runtime, seq_len=BATCH.seq_len)
    if PLAN["loss"] == "dpo":
        pairs = pair_batches(model, partial(answer_log_probs, forward), runtime.dtype)
        recipe = PreferenceConfig(out="", model="", data=(), optim=OPTIM)
        train(model, preference_objective(forward, recipe), Steps(pairs), loop)
    else:
        train(model, next_token(forward), Steps(sample_batches()), loop)


def train(model: Transformer, objective: Objective[B], batches: Steps[B], loop: LoopConfig) -> None:
    config = TrainConfig(batch=BATCH, optim=OPTIM, loop=loop)
    Watched(model, objective, batches, folder=Path(tempfile.mkdtemp()), config=config).run()


def sample_batches() -> list[Batch]:
    """The samples of each step in rows."""
    made = []
    for step in json.loads(Path(PLAN["data"]).read_text()):
        samples = [Sample(np.array(s["input_ids"]), np.array([*s["labels"][1:], -100])) for s in step]
        packed = PackedSamples([(samples, 1.0)], seq_len=BATCH.seq_len, tokens=BATCH.tokens, seed=0, filler=0)
        assert len(packed) * BATCH.seq_len == BATCH.tokens  # the rows that they came from
        made.append(packed.next_batch())
    return made


def pair_batches(model: Transformer, log_probs: LogProbs, dtype: torch.dtype) -> list[PairBatch]:
    """The pairs of each step in rows, with what `model` says of them now."""
    streams = {}
    for number, step in enumerate(json.loads(Path(PLAN["data"]).read_text())):
        compared = [Compared(answers(**one)) for one in step]
        streams[str(number)] = PackedPairs([(compared, 1.0)], batch=BATCH, seed=0, filler=0)
        assert len(streams[str(number)]) == 1
    folder = Path(tempfile.mkdtemp())
    measure_reference(folder, streams, log_probs, model=model, dtype=dtype, parallel=Alone())
    return [stream.next_batch() for stream in streams.values()]


def answers(prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int]) -> tuple[Sample, Sample]:
    untrained = [-100] * (len(prompt_ids) - 1)
    chosen, rejected = (
        Sample(np.array(prompt_ids + answer), np.array([*untrained, *answer, -100]))
        for answer in (chosen_ids, rejected_ids)
    )
    return chosen, rejected


main()

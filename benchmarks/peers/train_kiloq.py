"""kiloq's training loop as a contender of finetune_peers.py: the same samples in each step, laid into rows."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_worker import PLAN, Turns

from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.train import adapters
from kiloq.train.data import Batch
from kiloq.train.forward import Forward, Runtime
from kiloq.train.objective import next_token
from kiloq.train.optim import OptimConfig
from kiloq.train.samples import PackedSamples, Sample
from kiloq.train.settings import BatchConfig, LoopConfig, TrainConfig
from kiloq.train.trainer import Trainer

turns = Turns()


class Steps:
    """The given samples, step after step, in rows of `seq_len`."""

    def __init__(self, seq_len: int, tokens: int) -> None:
        steps = json.loads(Path(PLAN["data"]).read_text())
        samples = [
            [Sample(np.array(s["input_ids"]), np.array([*s["labels"][1:], -100])) for s in step] for step in steps
        ]
        packed = [PackedSamples([(one, 1.0)], seq_len=seq_len, tokens=tokens, seed=0, filler=0) for one in samples]
        assert all(len(one) * seq_len == tokens for one in packed)  # the rows that they came from
        self.made = [one.next_batch() for one in packed]
        self.at = 0

    def next_batch(self) -> Batch:
        self.at += 1
        return self.made[(self.at - 1) % len(self.made)]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class Watched(Trainer[Batch]):
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
    batch, runtime = BatchConfig(seq_len=PLAN["seq_len"], tokens=PLAN["tokens"]), Runtime.choose(loop)
    checkpoint = open_checkpoint(PLAN["model"])
    lora = PLAN["method"] == "lora"
    model = load_dense(checkpoint, dtype=runtime.dtype if lora else torch.float32).requires_grad_(True)
    if lora:
        adapters.attach(model, checkpoint, adapters.AdapterConfig(dropout=0.0, embeddings="none"))
    forward = Forward(model, runtime, seq_len=batch.seq_len)
    optim = OptimConfig(lr=PLAN["lr"], steps=10**6, warmup_steps=0, floor=1.0, weight_decay=0.0)
    stream = Steps(batch.seq_len, batch.tokens)
    config = TrainConfig(batch=batch, optim=optim, loop=loop)
    Watched(model, next_token(forward), stream, folder=Path(tempfile.mkdtemp()), config=config).run()


main()

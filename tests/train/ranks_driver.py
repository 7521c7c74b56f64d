"""One process of several: trains the tiny model of tests/train as its arguments say. Started by torchrun, or alone.

ranks_driver.py OUT JOB...: each JOB is "NAME key=value ...", run one after the other in this session, into OUT/NAME.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from kiloq.model import ModelConfig, RopeConfig, Transformer
from kiloq.train import state
from kiloq.train.data import PackedBatches, TokenFolder, held_out_batches
from kiloq.train.forward import Forward, Runtime
from kiloq.train.objective import Watch, next_token
from kiloq.train.optim import OptimConfig
from kiloq.train.parallel import join
from kiloq.train.settings import BatchConfig, LoopConfig, ParallelConfig, TrainConfig
from kiloq.train.trainer import Trainer


def tiny(*, tied: bool) -> Transformer:
    config = ModelConfig(
        family="qwen3",
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        qkv_bias=True,
        qk_norm=True,
        tie_embeddings=tied,
        rope=RopeConfig(rotary_dim=8, original_length=64),
        windows=(None, None),
        max_length=256,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def train(out: Path, name: str, options: dict[str, str]) -> None:
    loop = LoopConfig(
        device="cpu",
        precision=options.get("precision", "fp32"),
        compile=options.get("compile", "off"),
        checkpointing=options.get("recompute", "none"),
        log_every=1,
        save_every=int(options.get("save_every", 3)),
        eval_every=4,
        report=(),
    )
    steps = int(options.get("steps", 6))
    config = TrainConfig(
        batch=BatchConfig(seq_len=16, tokens=32, accumulate=4),
        optim=OptimConfig(lr=1e-2, steps=steps, warmup_steps=2),
        loop=loop,
    )
    chosen = {"kind": options.get("kind", "auto"), "tensor": int(options.get("tensor", 1))}
    runtime = Runtime.choose(loop)
    parallel = join(replace(ParallelConfig(), sync=options.get("sync", "step"), **chosen), runtime.device)
    model = parallel.spread(tiny(tied="tied" in options).requires_grad_(True), runtime)
    forward = Forward(model, runtime, seq_len=16, checkpointing=loop.recompute)
    corpus = TokenFolder(out / "corpus")
    stream = PackedBatches([(corpus, 1.0)], seq_len=16, tokens=32, seed=0)
    held = {"same": lambda: held_out_batches([corpus], seq_len=16, tokens=32, limit=96)}
    folder = out / name
    trainer = Trainer(
        model, next_token(forward), stream, folder=folder, config=config, watch=Watch(held=held), parallel=parallel
    )
    if "die" in options:
        die(options["die"], rank=int(options.get("rank", 0)))
    if "nan" in options and os.environ["RANK"] == "1":
        spoil(trainer)
    trainer.run()
    if parallel.gather(model):
        torch.save({n: p.detach() for n, p in model.named_parameters()}, folder / "trained.pt")


def die(moment: str, *, rank: int) -> None:
    """Kill this process, as kill -9 would, at a moment of the second save: before, amid and after its files."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    owner, attribute = {
        "begun": (state, "_parts"),
        "amid": (torch.distributed.checkpoint.FileSystemWriter, "finish"),
        "written": (Path, "rename"),
        "renamed": (state.shutil, "rmtree"),
    }[moment]
    original, calls = getattr(owner, attribute), [0]

    def fatal(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == (4 if moment == "renamed" else 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, fatal)


def spoil(trainer: Trainer) -> None:
    following = trainer.batches.next_batch

    def next_batch() -> object:
        if trainer.progress.step == 2:
            for parameter in trainer.module.parameters():
                parameter.data.fill_(torch.nan)
        return following()

    trainer.batches.next_batch = next_batch


if __name__ == "__main__":
    for job in sys.argv[2:]:
        job_name, *words = job.split()
        train(Path(sys.argv[1]), job_name, dict(word.split("=") for word in words))

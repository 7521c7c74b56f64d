"""One process of several: trains the tiny model of tests/train as its arguments say. Started by torchrun, or alone.

ranks_driver.py OUT JOB...: each JOB is "NAME key=value ...", run one after the other in this session, into OUT/NAME.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter

from kiloq.cli.terminal import end_process
from kiloq.model import Transformer
from kiloq.train import state
from kiloq.train.data import PackedBatches, TokenFolder, held_out_batches
from kiloq.train.forward import Forward, Runtime
from kiloq.train.objective import Watch, next_token
from kiloq.train.optim import OptimConfig
from kiloq.train.parallel import join
from kiloq.train.settings import BatchConfig, LoopConfig, ParallelConfig, TrainConfig
from kiloq.train.trainer import Trainer
from tests.tiny import tiny_config, tiny_network


def tiny(*, tied: bool) -> Transformer:
    return tiny_network(tiny_config("qwen3", qkv_bias=True, tie_embeddings=tied))


def train(out: Path, name: str, options: dict[str, str]) -> None:
    loop = LoopConfig(
        device="cpu",
        precision=options.get("precision", "fp32"),
        compile=options.get("compile", "off"),
        checkpointing=options.get("recompute", "none"),
        log_every=1,
        save_every=2,
        eval_every=4,
        report=(),
    )
    config = TrainConfig(
        batch=BatchConfig(seq_len=16, tokens=32, accumulate=4),
        optim=OptimConfig(lr=1e-2, steps=6, warmup_steps=2, kind=options.get("optim", "adamw")),
        loop=loop,
    )
    runtime = Runtime.choose(loop)
    sharing = {key: options[key] for key in ("kind", "sync", "config") if key in options}
    parallel = join(ParallelConfig(tensor=int(options.get("tensor", 1)), **sharing), runtime.device)
    model = tiny(tied="tied" in options).requires_grad_(True)
    if "logits" in options:
        random = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # biases and gains too
            parameter.data.normal_(0, 0.5, generator=random)
    model = parallel.spread(model, runtime)
    if "logits" in options:
        with torch.no_grad():
            torch.save(model.logits(torch.arange(40), [0, 25, 40]), out / f"{name}-{os.environ.get('RANK', '0')}.pt")
        return
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
        before(trainer, step=2, do=lambda: [p.data.fill_(torch.nan) for p in model.parameters()])
    if "gone" in options and os.environ["RANK"] == "1":
        before(trainer, step=2, do=lambda: os.kill(os.getpid(), signal.SIGKILL))
    if "stop" in options and os.environ.get("RANK", "1") == "1":
        before(trainer, step=int(options["stop"]) - 1, do=lambda: signal.raise_signal(signal.SIGTERM))
    if trainer.run() == "paused":
        return
    if parallel.gather(model):
        torch.save({n: p.detach() for n, p in model.named_parameters()}, folder / "trained.pt")


def die(moment: str, *, rank: int) -> None:
    """Kill this process, as kill -9 would, at a moment of the second save: before, amid and after its files."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    owner, attribute, fatal_call = {
        "begun": (state, "_parts", 2),
        "amid": (FileSystemWriter, "finish", 2),  # of the data, before their index
        "written": (Path, "rename", 4),  # a save renames its index, then its folder
        "renamed": (shutil, "rmtree", 3),  # of the state before
    }[moment]
    original, calls = getattr(owner, attribute), [0]

    def fatal(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == fatal_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, fatal)


def before(trainer: Trainer, *, step: int, do: Callable[[], object]) -> None:
    """Do it once, when the batches after `step` steps are asked for."""
    following, left = trainer.batches.next_batch, [do]

    def next_batch() -> object:
        if trainer.progress.step == step and left:
            left.pop()()
        return following()

    trainer.batches.next_batch = next_batch


if __name__ == "__main__":
    for job in sys.argv[2:]:
        job_name, *words = job.split()
        train(Path(sys.argv[1]), job_name, dict(word.split("=") for word in words))
    end_process(0)

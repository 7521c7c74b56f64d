import json
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kiloq.errors import CheckpointError, ConfigError, DataError, NumericsError
from kiloq.model import Transformer
from kiloq.train.data import Batch, PackedBatches, TokenFolder, held_out_batches, write_tokens
from kiloq.train.forward import Forward, Runtime
from kiloq.train.objective import Loss, Watch, next_token
from kiloq.train.optim import OptimConfig
from kiloq.train.parallel import Alone
from kiloq.train.settings import BatchConfig, LoopConfig, TrainConfig
from kiloq.train.state import load_state, newest_state, save_state
from kiloq.train.trainer import Trainer

LOOP = LoopConfig(device="cpu", precision="fp32", compile="off", log_every=1, save_every=3)
OPTIM = OptimConfig(lr=1e-2, steps=8, warmup_steps=2)


@pytest.fixture
def corpus(tmp_path: Path) -> TokenFolder:
    random = np.random.default_rng(0)
    write_tokens(tmp_path / "corpus", [random.integers(0, 64, n).tolist() for n in (40, 9, 70, 25, 13)], 64)
    return TokenFolder(tmp_path / "corpus")


@pytest.fixture
def make_trainer(
    tmp_path: Path, corpus: TokenFolder, make_model: Callable[..., Transformer]
) -> Callable[..., Trainer[Batch]]:
    def make(
        name: str = "run",
        *,
        batch: BatchConfig = BatchConfig(seq_len=16, tokens=64),
        optim: OptimConfig = OPTIM,
        loop: LoopConfig = LOOP,
        watch: Watch[Batch] | None = None,
    ) -> Trainer[Batch]:
        stream = PackedBatches([(corpus, 1.0)], seq_len=batch.seq_len, tokens=batch.tokens, seed=0)
        config = TrainConfig(batch=batch, optim=optim, loop=loop)
        model = make_model(vocab_size=256)  # of which the embedding is large enough for 8-bit averages
        forward = Forward(model, Runtime.choose(loop), seq_len=batch.seq_len, checkpointing=loop.recompute)
        return Trainer(model, next_token(forward), stream, folder=tmp_path / name, config=config, watch=watch)

    return make


def curve(trainer: Trainer[Batch]) -> dict[int, float]:
    """Step -> loss, from the log on disk."""
    lines = map(json.loads, (trainer.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights_equal(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class BrokenOffError(Exception):
    pass


def break_off(trainer: Trainer[Batch], *, at: int) -> None:
    """Run until the batch of step `at` is asked for; nothing is saved then, as when the machine goes down."""
    following = trainer.batches.next_batch
    left = iter(range(at - 1 - trainer.progress.step))

    def next_batch() -> Batch:
        if next(left, None) is None:
            raise BrokenOffError
        return following()

    trainer.batches.next_batch = next_batch
    with pytest.raises(BrokenOffError):
        trainer.run()


def test_the_loss_falls(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    trainer = make_trainer(optim=replace(OPTIM, steps=60))
    assert trainer.run() == "finished"
    losses = curve(trainer)
    assert losses[60] < losses[1] - 0.5


def test_bf16_learns_what_fp32_learns(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    runs = [
        make_trainer(kind, loop=replace(LOOP, precision=kind), optim=replace(OPTIM, steps=60))
        for kind in ("fp32", "bf16")
    ]
    for run in runs:
        run.run()
    exact, rough = map(curve, runs)
    assert rough != exact  # the products did run in bf16
    assert max(abs(rough[step] - exact[step]) for step in exact) < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in runs[1].module.parameters())


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_broken_run_goes_on_with_the_same_losses_and_weights(
    make_trainer: Callable[..., Trainer[Batch]], kind: Any, offload: bool
) -> None:
    optim = replace(OPTIM, kind=kind, offload=offload)
    straight = make_trainer("straight", optim=optim)
    straight.run()
    break_off(make_trainer("broken", optim=optim), at=6)  # saved at 3: steps 4 and 5 are lost and done again
    resumed = make_trainer("broken", optim=optim)
    assert resumed.run() == "finished"
    assert curve(resumed) == curve(straight)
    assert list(curve(resumed)) == list(range(1, 9))
    assert weights_equal(resumed.module, straight.module)


def test_a_run_that_is_done_only_says_so(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    first = make_trainer()
    first.run()
    again = make_trainer()
    assert again.run() == "finished"
    assert weights_equal(first.module, again.module)
    assert len(curve(again)) == 8


def test_the_time_limit_pauses_and_the_same_command_goes_on(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    straight = make_trainer("straight")
    straight.run()
    paused = make_trainer("paused", loop=replace(LOOP, max_minutes=0.0))
    assert paused.run() == "paused"
    assert paused.progress.step == 1
    resumed = make_trainer("paused")
    assert resumed.run() == "finished"
    assert curve(resumed) == curve(straight)


def test_a_signal_saves_before_it_stops(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    trainer = make_trainer()
    following = trainer.batches.next_batch

    def next_batch() -> Batch:
        if trainer.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return following()

    trainer.batches.next_batch = next_batch
    assert trainer.run() == "paused"
    resumed = make_trainer()
    resumed.run()
    assert list(curve(resumed)) == list(range(1, 9))


def test_four_small_batches_make_the_step_of_one_large(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    # Not to the last bit: a product over 256 rows adds up in another order than four over 64.
    one = make_trainer("one", batch=BatchConfig(seq_len=16, tokens=256))
    four = make_trainer("four", batch=BatchConfig(seq_len=16, tokens=64, accumulate=4))
    for trainer in (one, four):
        trainer.run()
    for step, loss in curve(one).items():
        assert curve(four)[step] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("what", ["selective", "full", True])
def test_recomputing_blocks_changes_nothing(make_trainer: Callable[..., Trainer[Batch]], what: Any) -> None:
    plain, frugal = make_trainer("plain"), make_trainer("frugal", loop=replace(LOOP, checkpointing=what))
    for trainer in (plain, frugal):
        trainer.run()
    assert curve(plain) == curve(frugal)
    assert weights_equal(plain.module, frugal.module)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_state(
    make_trainer: Callable[..., Trainer[Batch]],
) -> None:
    trainer = make_trainer()
    following = trainer.batches.next_batch

    def next_batch() -> Batch:
        if trainer.progress.step == 4:
            trainer.module.norm.weight.data.fill_(torch.nan)
        return following()

    trainer.batches.next_batch = next_batch
    with pytest.raises(NumericsError, match=r"step 5: loss is nan.*lower optim\.lr"):
        trainer.run()
    resumed = make_trainer()
    assert resumed.run() == "finished"
    straight = make_trainer("straight")
    straight.run()
    assert weights_equal(resumed.module, straight.module)


def spiked(trainer: Trainer[Batch], *, at: int) -> Trainer[Batch]:
    """The batch of step `at` asks for what no data before it had: its loss and gradients jump."""
    plain = trainer.objective

    def objective(batch: Batch) -> Loss:
        loss = plain(batch)
        return Loss(loss.total * 40) if trainer.progress.step == at - 1 else loss

    trainer.objective = objective
    return trainer


def notes(trainer: Trainer[Batch]) -> dict[int, str]:
    lines = map(json.loads, (trainer.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["note"] for line in lines if "note" in line}


LONGER = replace(OPTIM, steps=24)


def test_a_step_that_jumps_is_told_with_its_place_in_the_data(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    trainer = spiked(make_trainer(optim=LONGER), at=20)
    assert trainer.run() == "finished"
    (told,) = notes(trainer).items()
    assert told[0] == 20
    assert re.fullmatch(
        r"step 20: loss \d+\.?\d* where the last 19 steps had \d\.\d+;.*epoch \d+, index \d+.*all the same", told[1]
    )


def test_a_step_that_jumps_can_be_left_out(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    skipping = replace(LOOP, spike="skip")
    left_out = spiked(make_trainer(optim=LONGER, loop=skipping), at=20)
    left_out.optimizer.register_step_pre_hook(lambda *_: steps.append(left_out.progress.step + 1))
    steps: list[int] = []
    left_out.run()
    assert steps == [step for step in range(1, 25) if step != 20]


def test_a_run_that_goes_on_leaves_out_the_same_steps(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    skipping = replace(LOOP, spike="skip")
    straight = spiked(make_trainer("straight", optim=LONGER, loop=skipping), at=20)
    straight.run()
    break_off(make_trainer("broken", optim=LONGER, loop=skipping), at=19)  # saved at 18
    resumed = spiked(make_trainer("broken", optim=LONGER, loop=skipping), at=20)
    resumed.run()
    assert notes(resumed) == notes(straight) != {}
    assert weights_equal(resumed.module, straight.module)


def test_a_step_that_jumps_can_end_the_run(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    trainer = spiked(make_trainer(optim=LONGER, loop=replace(LOOP, spike="stop")), at=20)
    with pytest.raises(NumericsError, match=r"step 20: loss .* saved state is in .* set loop\.spike"):
        trainer.run()


def test_held_out_loss_is_logged_and_does_not_disturb_training(
    make_trainer: Callable[..., Trainer[Batch]], corpus: TokenFolder
) -> None:
    def held() -> Iterator[Batch]:
        return held_out_batches([corpus], seq_len=16, tokens=64, limit=128)

    watched = make_trainer("watched", watch=Watch(held={"zh": held}), loop=replace(LOOP, eval_every=3))
    plain = make_trainer("plain")
    for trainer in (watched, plain):
        trainer.run()
    lines = map(json.loads, (watched.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    scored = {line["step"]: line["eval/zh"] for line in lines if "eval/zh" in line}
    assert list(scored) == [3, 6, 8]
    assert scored[8] < scored[3]
    assert curve(watched) == curve(plain)


def test_each_step_logs_what_people_ask_for(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    trainer = make_trainer(watch=Watch(notes=["seven parameters"]))
    trainer.run()
    note, first, *_ = map(json.loads, (trainer.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    assert note == {"step": 0, "note": "seven parameters"}
    figures = {"tokens_per_second", "mfu", "peak_memory", "eta_seconds"}
    assert first.keys() == {"step", "loss", "lr", "grad_norm", "tokens", "seconds", *figures}
    # Not between 0 and 1: a busy machine gives a step of this size 0.0000 of its peak.
    share = trainer.meter.flops * first["tokens_per_second"] / trainer.meter.peak
    assert first["mfu"] == pytest.approx(share, abs=1e-4)
    assert first["eta_seconds"] >= 0
    assert (first["step"], first["tokens"]) == (1, 64)
    assert list((trainer.folder / "tensorboard").iterdir())


def test_another_batch_shape_than_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a multiple of seq_len"):
        BatchConfig(seq_len=16, tokens=40)


def test_the_state_of_another_model_is_one_clear_error(
    make_trainer: Callable[..., Trainer[Batch]], make_model: Callable[..., Transformer]
) -> None:
    trainer = make_trainer()
    trainer.run()
    other = make_model(vocab_size=32)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        load_state(trainer.folder, module=other, optimizer=torch.optim.AdamW(other.parameters()), parallel=Alone())


def test_a_damaged_state_is_one_clear_error(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    trainer = make_trainer()
    trainer.run()
    for path in newest_state(trainer.folder).iterdir():
        data = path.read_bytes()
        for damaged in (b"", data[:100], data[: len(data) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="does not fit this run"):
                make_trainer().run()
        path.write_bytes(data)
    make_trainer().run()


def test_a_state_of_another_version_is_no_reason_to_begin_again(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    trainer = make_trainer()
    trainer.folder.mkdir()
    (trainer.folder / "state.pt").touch()
    with pytest.raises(CheckpointError, match="another version of kiloq"):
        trainer.run()


def test_a_save_that_breaks_off_leaves_the_state_before_it(
    make_trainer: Callable[..., Trainer[Batch]], tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.run()
    before = newest_state(trainer.folder)

    class Unwritable:
        def __reduce__(self) -> str:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        save_state(
            trainer.folder,
            module=trainer.module,
            optimizer=trainer.optimizer,
            progress=replace(trainer.progress, step=trainer.progress.step + 1),
            stream={"last": Unwritable()},
            parallel=Alone(),
        )
    assert newest_state(trainer.folder) == before
    resumed = make_trainer()
    assert resumed.run() == "finished"
    assert weights_equal(resumed.module, trainer.module)


def test_other_data_under_a_run_is_refused(make_trainer: Callable[..., Trainer[Batch]], tmp_path: Path) -> None:
    make_trainer().run()
    resumed = make_trainer()
    write_tokens(tmp_path / "other", [[1, 2, 3]], 64)
    resumed.batches = PackedBatches([(TokenFolder(tmp_path / "other"), 1.0)], seq_len=16, tokens=64, seed=0)
    with pytest.raises(DataError, match="not what this run began with"):
        resumed.run()


@pytest.mark.slow
def test_the_compiled_step_follows_the_plain_one(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    plain, compiled = make_trainer("plain"), make_trainer("compiled", loop=replace(LOOP, compile="on"))
    for trainer in (plain, compiled):
        trainer.run()
    for step, loss in curve(plain).items():
        assert curve(compiled)[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.gpu
def test_a_gpu_follows_the_processor(make_trainer: Callable[..., Trainer[Batch]]) -> None:
    here, there = make_trainer("cpu"), make_trainer("gpu", loop=replace(LOOP, device="cuda"))
    for trainer in (here, there):
        trainer.run()
    for step, loss in curve(here).items():
        assert curve(there)[step] == pytest.approx(loss, abs=1e-3)

"""What a run tells is read back as it was told, also after a stop; TensorBoard's own reader is the oracle."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kiloq.errors import ConfigError
from kiloq.train.journal import Journal


def test_tensorboard_shows_one_curve_of_a_run_that_was_killed(tmp_path: Path) -> None:
    with Journal(tmp_path, step=0, report=["tensorboard"]) as journal:
        for step in range(1, 9):
            journal.write(step, {"loss": 1 / step, "eval/zh": 2 / step})
    with Journal(tmp_path, step=6, report=["tensorboard"]) as journal:  # its newest state was that of step 6
        for step in range(7, 11):
            journal.write(step, {"loss": 1 / step})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curves = {name: {one.step: one.value for one in board.Scalars(name)} for name in board.Tags()["scalars"]}
    assert curves["loss"] == pytest.approx({step: 1 / step for step in range(1, 11)})
    assert curves["eval/zh"] == pytest.approx({step: 2 / step for step in range(1, 7)})


def test_a_wandb_that_does_not_start_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusalError(Exception):
        """The real package's own, which is not installed here."""

    def init(**_: object) -> None:
        raise RefusalError("No API key configured.")

    wandb = ModuleType("wandb")
    vars(wandb).update(Error=RefusalError, init=init)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ConfigError, match=r"No API key configured\. Set WANDB_MODE=offline"):
        Journal(tmp_path, step=0, report=["wandb"])

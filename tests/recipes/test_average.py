"""The mean of two checkpoints is the mean of their weights."""

import sys
from pathlib import Path

import average
import pytest
import torch

from kiloq.checkpoint import bundled, load_dense, open_checkpoint


def test_a_quarter_of_the_way_from_one_checkpoint_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [bundled("kiloq-mini"), bundled("kiloq-mini-chat")]
    monkeypatch.setattr(sys, "argv", ["average.py", *map(str, folders), "--share", "0.25", "--out", str(tmp_path)])
    average.main()
    first, second, mean = (load_dense(open_checkpoint(f)).state_dict() for f in (*folders, tmp_path))
    for name, weight in mean.items():
        expected = 0.75 * first[name].float() + 0.25 * second[name].float()
        torch.testing.assert_close(weight.float(), expected, rtol=2**-8, atol=1e-6)

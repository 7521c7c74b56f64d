import json
from pathlib import Path

from kiloq.bench.finetune import Cell, fill, table


def test_what_does_not_fit_is_predicted_and_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    cells = [Cell(shape="qwen2.5-0.1b", method="LoRA", length=length) for length in (256, 512)]
    known = tmp_path / "cells.json"
    first = fill(cells[:1], known, 0.0, lambda: None)
    assert "peak_bytes" not in first[0]
    written = json.loads(known.read_text())
    written[0] |= {"peak_bytes": 3 << 30, "seconds": 1.25}
    known.write_text(json.dumps(written))
    both = fill(cells, known, 0.0, lambda: None)
    assert both[0] == written[0]
    shown = table(both)
    assert "| Model Size   | Method |" in shown
    assert "3.0G / 1.2s/it" in shown
    assert "(0." in shown

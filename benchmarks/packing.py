"""Packed against padded fine-tuning: trained tokens per second on the same samples, and the same loss.

    python benchmarks/packing.py FILE... --tokenizer QWEN.tiktoken [--size 7|50] [--seq-len 512] [--rows 4] [--rounds 2]

Lengths are those of the real vocabulary; the network is random, with 8,000 words. Padded are one sample a row, as the
published script does, and rows of eight samples as long as the longest of them. Times are the processor's on one
thread, so that other programs disturb them little.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from kiloq.chat import QWEN1
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.conversations import read_conversations
from kiloq.train.data import Batch, flat
from kiloq.train.forward import Forward, Runtime, choose_precision
from kiloq.train.losses import IGNORE
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.samples import PackedSamples, Sample, Samples

WORDS = 8_000
SHAPES = {
    7: ShapeConfig(),
    50: ShapeConfig(hidden_size=640, num_layers=8, num_heads=10, intermediate_size=1728),
}


def padded(samples: list[Sample], length: int) -> Batch:
    """One sample a row, the rest of it filled."""
    ids, targets, positions, pieces = [], [], [], [0]
    for sample in samples:
        left = length - len(sample.ids)
        ids += [sample.ids, np.zeros(left, dtype=np.int64)]
        targets += [sample.targets, np.full(left, IGNORE)]
        positions += [np.arange(len(sample.ids)), np.arange(left)]
        pieces += [pieces[-1] + len(sample.ids)] + ([pieces[-1] + length] if left else [])
    return Batch(flat(ids), flat(targets), flat(positions), pieces)


class Race:
    """The same samples, laid out in different ways."""

    def __init__(self, samples: list[Sample], seq_len: int, rows: int, model: Transformer) -> None:
        self.model, self.seq_len = model, seq_len
        self.runtime = Runtime("cpu", choose_precision("auto", "cpu"), compiled=False)
        stream = PackedSamples([(samples, 1.0)], seq_len=seq_len, tokens=rows * seq_len, seed=0, filler=0)
        self.batch = stream.next_batch()
        bounds = list(pairwise(self.batch.pieces))
        self.samples = [
            Sample(self.batch.ids[a:b].numpy(), self.batch.targets[a:b].numpy())
            for a, b in bounds
            if (self.batch.targets[a:b] != IGNORE).any()
        ]

    def run(self, layout: str) -> tuple[float, float, int]:
        """Seconds, loss per trained token, and flat tokens of one forward and backward pass over all samples."""
        if layout == "packed":
            parts = [(self.batch, self.seq_len)]
        else:
            eights = [self.samples[i : i + 8] for i in range(0, len(self.samples), 8)]
            longest = layout == "padded to the longest of 8"
            sizes = [max(len(one.ids) for one in part) if longest else self.seq_len for part in eights]
            parts = [(padded(part, size), size) for part, size in zip(eights, sizes, strict=True)]
        loss, began = 0.0, time.process_time()
        for batch, length in parts:
            total = Forward(self.model, self.runtime, seq_len=length).cross_entropy(batch)
            total.backward()
            loss += total.item()
        seconds = time.process_time() - began
        self.model.zero_grad()
        return seconds, loss / self.batch.count, sum(len(batch.ids) for batch, _ in parts)


LAYOUTS = ("packed", "padded to seq_len", "padded to the longest of 8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--size", type=int, choices=list(SHAPES), default=7)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.tokenizer)
    model = Transformer(qwen1_config(SHAPES[options.size], WORDS)).requires_grad_(True)
    model.init_weights(torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    for file in options.files:
        rows = read_conversations(file)[0][:1000]
        reader = Samples(tokenizer, QWEN1, seq_len=options.seq_len)
        samples = [Sample(one.ids % WORDS, np.where(one.targets < 0, IGNORE, one.targets % WORDS))
                   for one in reader.read(rows)]  # fmt: skip
        race = Race(samples, options.seq_len, options.rows, model)
        race.run("packed")
        times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        seen: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for layout in LAYOUTS:
                seconds, *seen[layout] = race.run(layout)
                times[layout].append(seconds)
        found = {}
        for layout, (loss, tokens) in seen.items():
            found[layout] = {
                "trained_tokens_per_second": [round(race.batch.count / t) for t in times[layout]],
                "packed_is_faster_by": round(
                    statistics.median(a / b for a, b in zip(times[layout], times["packed"], strict=True)), 2
                ),
                "loss": round(loss, 5),
                "flat_tokens": tokens,
            }
        lengths = [len(one.ids) for one in samples]
        print(json.dumps({
            "file": file.name, "seq_len": options.seq_len, "parameters": model.config.num_parameters,
            "dtype": str(race.runtime.dtype), "samples": len(race.samples),
            "median_length": int(statistics.median(lengths)), "trained_tokens": race.batch.count, **found,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

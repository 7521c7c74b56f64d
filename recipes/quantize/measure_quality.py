"""How far rounded models move from their originals: perplexity and KL divergence, one table, through the kernels.

python recipes/quantize/measure_quality.py --out runs/quality --texts runs/mini/{train,heldout}.{en,zh,ko}.jsonl \\
    --model kiloq/assets/mini/kiloq-mini-chat --model kiloq/assets/mini/kiloq-mini

A chat model is scored on the answers alone, as it was trained, in conversations of the generator in recipes/mini that
training never saw. Others are scored on every token of the `heldout.*` texts. Labels end with what was read meanwhile:
the conversations that kiloq brings along, or more of the model's own kind, fresh conversations or pieces of `train.*`.
Each result is a line of a file in --out; the same command goes on from there.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kiloq import ops
from kiloq.chat import chat_format_for, parse_messages, parse_tools, render
from kiloq.checkpoint import Checkpoint, load_dense, load_model, open_checkpoint
from kiloq.checkpoint.quantized_writer import write_quantized
from kiloq.checkpoint.weights import Weights
from kiloq.cli.calibration_file import own_files, read_rows
from kiloq.evals.perplexity import Row
from kiloq.model import Transformer
from kiloq.quant.calibrate import QuantizeConfig, quantize_layers, quantized_weights
from kiloq.quant.calibration_data import CalibrationData, choose_rows, windows
from kiloq.quant.gptq import GptqConfig
from kiloq.tokenizer.train import read_texts

ROOT = Path(__file__).parents[2]
_AT_ONCE = 4096  # tokens
_WINDOW = 512
_SEED = 100  # of conversations that calibrate: training had 0, the bundled ones 20
_ROWS = {"bundled": 256, "more": 1024}


@dataclass(frozen=True)
class Scores:
    """For each scored token: its negative log-likelihood, and the logarithms of all probabilities."""

    losses: Tensor  # [T]
    logs: list[Tensor]  # [T, vocab] in batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--conversations", type=int, default=600)
    parser.add_argument("--windows", type=int, default=45)
    parser.add_argument("--only", default="", help="Only what has this in its label.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for folder in args.model:
        checkpoint = open_checkpoint(folder)
        if checkpoint.generation.chat_format == "chatml":
            rows = conversations(checkpoint, args.conversations)
        else:
            rows = texts(checkpoint, args.texts, args.windows)
        measure(checkpoint, rows, args.texts, args.out, args.only)
    (args.out / "table.md").write_text(table(args.out), "utf-8")


def measure(checkpoint: Checkpoint, rows: Sequence[Row], files: Sequence[Path], out: Path, only: str) -> None:
    """Whatever is not yet in the model's file of results."""
    exact = score(load_dense(checkpoint, dtype="float32"), rows)
    name = checkpoint.folder.name
    print(f"{name}: {len(rows):,} rows, {len(exact.losses):,} scored tokens, {ops.backend()}", flush=True)
    done = results(out / f"{name}.jsonl")
    for label, wanted in variants():
        if label in done or only not in label:
            continue
        calibration = calibrate_on(checkpoint, label.rpartition(", ")[2], files)
        start = time.process_time()
        model = load(checkpoint, wanted, calibration, out)
        spent = time.process_time() - start
        found = compare(model, rows, exact) | {
            "label": label,
            "cpu_seconds": round(spent, 1),
            "calibration_tokens": len(calibration.ids) if calibration else 0,
        }
        with (out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{label}: {cells(found)}", flush=True)


def results(file: Path) -> dict[str, dict[str, Any]]:
    """By label, in the order of measuring."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return {one["label"]: one for one in map(json.loads, lines)}


def variants() -> Iterator[tuple[str, QuantizeConfig | str]]:
    """What is compared: a label, whose last word names the calibration, and how the weights are kept."""
    yield "bf16 kernels", "bf16"
    yield "int8 at load", "int8"
    yield "int4 at load", "int4"
    for size in (128, 64, 32):
        yield f"g{size} rounded", QuantizeConfig(group_size=size, method="rtn")
        for share in (0.0, 0.5, 0.25, 1.0) if size == 128 else (0.0, 0.5):
            name = f"GPTAQ {share:g}" if share else "GPTQ"
            wanted = QuantizeConfig(group_size=size, gptq=GptqConfig(correction=share))
            yield f"g{size} {name}, bundled", wanted
            if size == 128 and share in (0.0, 0.5):
                yield f"g{size} {name}, more", wanted
    yield "int8 GPTQ, bundled", QuantizeConfig(bits=8, gptq=GptqConfig(correction=0.0))


def conversations(checkpoint: Checkpoint, count: int, *, heldout: bool = True, seed: int = 1) -> list[Row]:
    """Fresh ones of the generator that made the bundled model's training data."""
    sys.path.insert(0, str(ROOT / "recipes" / "mini"))
    from make_chat import samples

    fmt, found = chat_format_for(checkpoint.config.family, checkpoint.folder), []
    for sample in samples(count, seed=seed, heldout=heldout):
        rendered = render(
            parse_messages(sample.messages),
            checkpoint.tokenizer,
            fmt,
            tools=parse_tools(sample.tools),
            add_generation_prompt=False,
        )
        found.append(Row(rendered.ids[:_WINDOW], rendered.trained[:_WINDOW]))
    return found


def texts(checkpoint: Checkpoint, files: Sequence[Path], count: int) -> list[Row]:
    """Windows of text, as many from each file, scored from the second token on."""
    found = []
    chosen = [file for file in files if file.name.startswith("heldout.")]
    for file in chosen:
        rows = text_windows(checkpoint, file, documents=None)
        found += [Row(ids, [True] * len(ids)) for ids in rows[: math.ceil(count / len(chosen))]]
    return found


def text_windows(checkpoint: Checkpoint, file: Path, documents: int | None) -> list[list[int]]:
    tokenizer, found = checkpoint.tokenizer, list(read_texts([file]))
    if documents is not None:
        found = random.Random(_SEED).sample(found, documents)
    rows = windows([[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in found], _WINDOW)
    return [row for row in rows if len(row) == _WINDOW]


def calibrate_on(checkpoint: Checkpoint, name: str, files: Sequence[Path]) -> CalibrationData | None:
    """The rows that a label's last word names; None for what measures nothing."""
    if name not in _ROWS:
        return None
    if name == "bundled":
        found, _ = read_rows(own_files()[:1], checkpoint, _WINDOW)
        rows = [row.ids for row in found]
    elif checkpoint.generation.chat_format == "chatml":
        rows = [row.ids for row in conversations(checkpoint, _ROWS[name], heldout=False, seed=_SEED)]
    else:
        train = [file for file in files if file.name.startswith("train.")]
        rows = [row for file in train for row in text_windows(checkpoint, file, documents=300)]
        return choose_rows(rows, samples=_ROWS[name] // 8, max_length=_WINDOW, seed=0)
    return choose_rows(rows, samples=_ROWS[name], max_length=_WINDOW, seed=0)


def load(checkpoint: Checkpoint, wanted: QuantizeConfig | str, data: CalibrationData | None, out: Path) -> Transformer:
    """The model as a person would get it: rounded at load, or quantised into a folder and read from there."""
    if isinstance(wanted, str):
        return load_model(checkpoint, quantization=None if wanted == "bf16" else wanted)
    work, folder = out / "work", out / "quantized"
    for old in (work, folder):
        shutil.rmtree(old, ignore_errors=True)
    weights = Weights(checkpoint.folder, checkpoint.config)
    quantize_layers(
        checkpoint.config,
        lambda name: weights.read(name, dtype=weights.dtype),
        data,
        wanted,
        work=work,
        digest="",
    )
    write_quantized(folder, checkpoint, quantized_weights(checkpoint.config, work), layout="gptq", notes={})
    return load_model(open_checkpoint(folder))


@torch.no_grad()
def score(model: Transformer, rows: Sequence[Row]) -> Scores:
    losses, logs = [], []
    for batch in batches(rows):
        starts = [0]
        for row in batch:
            starts.append(starts[-1] + len(row.ids))
        ids = torch.tensor([token for row in batch for token in row.ids])
        scored = torch.tensor([i > 0 and kept for row in batch for i, kept in enumerate(row.scored)])
        at = scored.nonzero().flatten()
        found = model.logits(ids, starts)[at - 1].float().log_softmax(-1)
        logs.append(found)
        losses.append(-found.gather(1, ids[at, None]).flatten())
    return Scores(torch.cat(losses), logs)


def batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        if batch and sum(len(one.ids) for one in batch) + len(row.ids) > _AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def compare(model: Transformer, rows: Sequence[Row], exact: Scores) -> dict[str, Any]:
    """Perplexity, its change in %, and the mean KL divergence, both with standard errors over rows."""
    found = score(model, rows)
    near = torch.cat([(p.exp() * (p - q)).sum(1) for p, q in zip(exact.logs, found.logs, strict=True)])
    owner = torch.tensor([n for n, row in enumerate(rows) for kept in row.scored[1:] if kept])
    change, change_error = mean_and_error(found.losses - exact.losses, owner)
    divergence, divergence_error = mean_and_error(near, owner)
    return {
        "perplexity": float(found.losses.mean().exp()),
        "original": float(exact.losses.mean().exp()),
        "change": 100 * math.expm1(change),
        "change_error": 100 * change_error,
        "kl": divergence,
        "kl_error": divergence_error,
    }


def mean_and_error(values: Tensor, owner: Tensor) -> tuple[float, float]:
    """Of values [T] that belong together by rows."""
    mean = values.double().mean()
    sums = torch.zeros(int(owner.max()) + 1, dtype=torch.float64).index_add_(0, owner, values.double() - mean)
    return float(mean), float(sums.square().sum().sqrt() / len(values))


def cells(found: Mapping[str, Any]) -> str:
    return (
        f"{found['perplexity']:.4f} | {found['change']:+.2f} ± {found['change_error']:.2f} % "
        f"| {1000 * found['kl']:.2f} ± {1000 * found['kl_error']:.2f}"
    )


def table(out: Path) -> str:
    """All models side by side; KL divergences times 1,000."""
    models = {file.stem: results(file) for file in sorted(out.glob("*.jsonl"))}
    labels = [label for label, _ in variants() if all(label in done for done in models.values())]
    head = "| weights |" + "".join(f" {name}: perplexity | change | 1,000 KL |" for name in models)
    lines = [head, "|---" * (1 + 3 * len(models)) + "|"]
    lines += [f"| {label} | " + " | ".join(cells(done[label]) for done in models.values()) + " |" for label in labels]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

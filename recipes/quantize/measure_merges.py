"""What merging costs: adapters beside 16-bit weights, int4 codes and NF4, merged in every way, by several seeds.

python recipes/finetune/demo/make_data.py --out runs/merges
python recipes/quantize/measure_merges.py runs/merges

Each adapter teaches kiloq-mini-chat the identity of the demonstration. Scored are the answers of conversations of the
generator's held-out side, against base and adapter side by side in fp32, and the greedy answers to the questions of
the demonstration in wordings that were not trained. First, codes without an adapter: made once, and made again of what
they stand for. Each result is a line of results.jsonl; the same command goes on from there, and ends with the table.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measure_quality import Scores, calibrate_on, cells, compare, conversations, results, score

from kiloq import LLM, SamplingParams
from kiloq.checkpoint import load_dense, load_frozen, open_checkpoint
from kiloq.checkpoint.quantized_writer import write_quantized
from kiloq.checkpoint.weights import Weights
from kiloq.evals.perplexity import Row
from kiloq.model import Transformer
from kiloq.quant.calibrate import QuantizeConfig, quantize_layers, quantized_weights
from kiloq.quant.gptq import GptqConfig
from kiloq.train.adapters import AdapterConfig, attach

ROOT = Path(__file__).parents[2]
_BASE = "kiloq-mini-chat"
_CALIBRATION = ("--samples", "128", "--max-length", "128")
_METHODS = {"LoRA": "", "Q-LoRA, int4": "codes", "Q-LoRA, NF4": "nf4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of 2,048 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="adapters of each kind")
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--only", default="", help="Only adapters with this in their name.")
    args = parser.parse_args()
    out: Path = args.out
    rows = conversations(open_checkpoint(_BASE), args.conversations)
    if not (out / "codes").exists():
        kiloq("quantize", "-m", _BASE, "--bits", "4", "-o", str(out / "codes"), *_CALIBRATION)
    measure_codes(out, rows)
    for seed in range(args.seeds):
        for name in _METHODS:
            if args.only in name:
                measure_adapter(out, name, seed, args.steps, rows)
    (out / "table.md").write_text(table(out), "utf-8")
    print(table(out), end="")


def measure_codes(out: Path, rows: Sequence[Row]) -> None:
    """What int4 costs without an adapter, once and twice: codes lie on no grid but their own."""
    once, twice = "no adapter, int4 (GPTQ)", "no adapter, int4, written out and quantised again"
    if {once, twice} <= results(out / "results.jsonl").keys():
        return
    exact = score(load_dense(open_checkpoint(_BASE), dtype="float32"), rows)
    codes = open_checkpoint(out / "codes")
    record(out, once, compare(load_dense(codes, dtype="float32"), rows, exact))
    weights, work, folder = Weights(codes.folder, codes.config, codes.quantization), out / "work", out / "again"
    for old in (work, folder):
        shutil.rmtree(old, ignore_errors=True)
    quantize_layers(
        codes.config,
        lambda name: weights.read(name, dtype=weights.dtype),
        calibrate_on(codes, "bundled", []),
        QuantizeConfig(group_size=128, gptq=GptqConfig(correction=0.5)),
        work=work,
        digest="",
    )
    # The settings and the dense weights are the base's.
    write_quantized(folder, open_checkpoint(_BASE), quantized_weights(codes.config, work), layout="gptq", notes={})
    record(out, twice, compare(load_dense(open_checkpoint(folder), dtype="float32"), rows, exact))


def measure_adapter(out: Path, name: str, seed: int, steps: int, rows: Sequence[Row]) -> None:
    """One adapter side by side with its base, and each way of merging it, as far as they are not yet known."""
    ways = ["side by side", *(label for label, *_ in ways_of(out, name))]
    if {f"{name}, {way}, seed {seed}" for way in ways} <= results(out / "results.jsonl").keys():
        return
    model = str(out / "codes") if _METHODS[name] == "codes" else _BASE
    quantization = "nf4" if _METHODS[name] == "nf4" else ""
    adapter = train(out, name, model, quantization, steps, seed)
    beside = side_by_side(model, quantization, adapter)
    exact = score(beside, rows)
    # The engine has no NF4.
    asked = None if quantization else right(LLM(model, adapters={"new": adapter}), out, "new")
    record(out, f"{name}, side by side, seed {seed}", compare(beside, rows, exact), asked)
    for label, folder in merged(out, name, adapter):
        report(f"{name}, {label}, seed {seed}", folder, rows, exact, out)


def record(out: Path, label: str, found: dict[str, Any], asked: int | None = None) -> None:
    print(f"{label}: {cells(found)}, asked: {asked}", flush=True)
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"label": label, **found, "asked": asked}) + "\n")


def train(out: Path, name: str, model: str, quantization: str, steps: int, seed: int) -> Path:
    """The folder of the adapter."""
    run = out / ("".join(letter for letter in name.lower() if letter.isalnum()) + str(seed))
    if not (run / "adapter").exists():
        changes = [f"out={run}", f"model={model}", f"optim.steps={steps}", "loop.log_every=20", f"seed={seed}"]
        changes += [f"adapter.quantization={quantization}"] if quantization else []
        flags = [word for change in changes for word in ("--set", change)]
        kiloq("train", "sft", str(ROOT / "recipes/finetune/demo/lora.toml"), "--data", str(out / "chat.jsonl"), *flags)
    return run / "adapter"


def side_by_side(model: str, quantization: str, adapter: Path) -> Transformer:
    """Base and adapter as they were trained, in fp32."""
    base = open_checkpoint(model)
    if quantization or base.quantization:
        found = load_frozen(base, kind="nf4" if quantization else "auto", dtype="float32")
    else:
        found = load_dense(base, dtype="float32")
    attach(found, base, AdapterConfig(start=str(adapter), dropout=0.0))
    return found.eval()


def ways_of(out: Path, name: str) -> list[tuple[str, str, str]]:
    """Label, what is merged into, and the type of the result."""
    model = str(out / "codes") if _METHODS[name] == "codes" else _BASE
    ways = [("merged, fp32", model, "float32"), ("merged, bf16", model, "bfloat16")]
    ways += [(f"merged and rounded to {form} (GPTQ)", model, form) for form in ("int8", "int4")]
    return [("merged into the 16-bit original, bf16", _BASE, "bfloat16"), *ways] if model != _BASE else ways


def merged(out: Path, name: str, adapter: Path) -> Iterator[tuple[str, Path]]:
    """Every way, as a folder."""
    for label, base, form in ways_of(out, name):
        folder = adapter.parent / "merged"
        shutil.rmtree(folder, ignore_errors=True)
        # --calibration: what the adapter was trained on tells best what the model will read.
        text = ["--calibration", str(out / "chat.jsonl"), *_CALIBRATION]
        kiloq("convert", "--merge", str(adapter), "-m", base, "-o", str(folder), "--to", form, *text)
        yield label, folder


def report(label: str, folder: Path, rows: Sequence[Row], exact: Scores, out: Path) -> None:
    found = compare(load_dense(open_checkpoint(folder), dtype="float32"), rows, exact)
    record(out, label, found, right(LLM(folder), out))


def questions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "questions.jsonl").read_text("utf-8").splitlines()]


def right(llm: LLM, out: Path, adapter: str = "") -> int:
    """Questions that are answered with the new name."""
    asked = questions(out)
    answers = llm.chat([one["messages"] for one in asked], SamplingParams(temperature=0.0), adapter=adapter)
    return sum(one["expect"] in answer.text for one, answer in zip(asked, answers, strict=True))


def table(out: Path) -> str:
    """Means over seeds ± their standard deviations; KL divergences times 1,000."""
    found: dict[str, list[dict[str, Any]]] = {}
    for label, one in results(out / "results.jsonl").items():
        found.setdefault(label.rpartition(", seed ")[0] or label, []).append(one)
    lines = ["| adapter and way | seeds | perplexity | change | 1,000 KL | asked |", "|---" * 6 + "|"]
    for label, runs in found.items():
        perplexity = statistics.mean(one["perplexity"] for one in runs)
        change, kl = spread([one["change"] for one in runs], "+"), spread([1000 * one["kl"] for one in runs])
        asked = [one["asked"] for one in runs if one["asked"] is not None]
        shown = f"{sum(asked)} of {len(asked) * len(questions(out))}" if asked else ""
        lines.append(f"| {label} | {len(runs)} | {perplexity:.4f} | {change} % | {kl} | {shown} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], sign: str = "") -> str:
    """The mean, and how far seeds lie apart."""
    mean = format(statistics.mean(values), f"{sign}.2f")
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def kiloq(*arguments: str) -> None:
    """A command as a person types it; what it says goes to stderr."""
    print(f"$ kiloq {' '.join(arguments)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "kiloq", *arguments], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()

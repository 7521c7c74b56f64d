"""What merging costs: adapters trained beside 16-bit weights, int4 codes and NF4, merged in every way.

python recipes/finetune/demo/make_data.py --out runs/merges
python recipes/quantize/measure_merges.py runs/merges

Each adapter teaches kiloq-mini-chat the identity of the demonstration. Scored are the answers of conversations of the
generator's held-out side, against base and adapter side by side in fp32, and the greedy answers to the questions of
the demonstration in wordings that were not trained. A finished run is not trained again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from measure_quality import Scores, cells, compare, conversations, score

from kiloq import LLM, SamplingParams
from kiloq.checkpoint import load_dense, load_frozen, open_checkpoint
from kiloq.evals.perplexity import Row
from kiloq.model import Transformer
from kiloq.train.adapters import AdapterConfig, attach

ROOT = Path(__file__).parents[2]
_BASE = "kiloq-mini-chat"
_CALIBRATION = ("--samples", "128", "--max-length", "128")


def main() -> None:
    """Prints one line for each adapter side by side with its base, and for each way of merging it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of 2,048 tokens")
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--only", default="", help="Only adapters with this in their name.")
    args = parser.parse_args()
    out: Path = args.out
    base = open_checkpoint(_BASE)
    rows = conversations(base, args.conversations)
    if not (out / "codes").exists():
        kiloq("quantize", "-m", _BASE, "--bits", "4", "-o", str(out / "codes"), *_CALIBRATION)
    print("| | perplexity | change | KL x 1,000 | asked |", flush=True)
    for name, model, quantization in (
        ("LoRA", _BASE, ""),
        ("Q-LoRA, int4", str(out / "codes"), ""),
        ("Q-LoRA, NF4", _BASE, "nf4"),
    ):
        if args.only not in name:
            continue
        adapter = train(out, name, model, quantization, args.steps)
        beside = side_by_side(model, quantization, adapter)
        exact = score(beside, rows)
        # The engine has no NF4.
        asked = "" if quantization else right(LLM(model, adapters={"new": adapter}), out, "new")
        print(f"| {name}, side by side | {cells(compare(beside, rows, exact))} | {asked} |", flush=True)
        for label, folder in merged(out, adapter, model):
            report(f"{name}, {label}", folder, rows, exact, out)


def train(out: Path, name: str, model: str, quantization: str, steps: int) -> Path:
    """The folder of the adapter."""
    run = out / "".join(letter for letter in name.lower() if letter.isalnum())
    if not (run / "adapter").exists():
        changes = [f"out={run}", f"model={model}", f"optim.steps={steps}", "loop.log_every=20"]
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


def merged(out: Path, adapter: Path, model: str) -> Iterator[tuple[str, Path]]:
    """Every way, as a folder."""
    ways = [("merged, fp32", model, "float32"), ("merged, bf16", model, "bfloat16")]
    ways += [(f"merged and rounded to {form} (GPTQ)", model, form) for form in ("int8", "int4")]
    if model != _BASE:
        ways = [("merged into the 16-bit original, bf16", _BASE, "bfloat16"), *ways]
    for label, base, form in ways:
        folder = adapter.parent / "merged"
        shutil.rmtree(folder, ignore_errors=True)
        # --calibration: what the adapter was trained on tells best what the model will read.
        text = ["--calibration", str(out / "chat.jsonl"), *_CALIBRATION]
        kiloq("convert", "--merge", str(adapter), "-m", base, "-o", str(folder), "--to", form, *text)
        yield label, folder


def report(label: str, folder: Path, rows: list[Row], exact: Scores, out: Path) -> None:
    found = compare(load_dense(open_checkpoint(folder), dtype="float32"), rows, exact)
    print(f"| {label} | {cells(found)} | {right(LLM(folder), out)} |", flush=True)


def right(llm: LLM, out: Path, adapter: str = "") -> str:
    """Questions that are answered with the new name."""
    asked = [json.loads(line) for line in (out / "questions.jsonl").read_text("utf-8").splitlines()]
    answers = llm.chat([one["messages"] for one in asked], SamplingParams(temperature=0.0), adapter=adapter)
    count = sum(one["expect"] in answer.text for one, answer in zip(asked, answers, strict=True))
    return f"{count} of {len(asked)}"


def kiloq(*arguments: str) -> None:
    """A command as a person types it; what it says goes to stderr."""
    print(f"$ kiloq {' '.join(arguments)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "kiloq", *arguments], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()

"""The record of a run as one Markdown page: medians with their spread, ratios to ours, machine and versions."""

import json
import statistics
from pathlib import Path

from kiloq.bench.shapes import shape_config
from kiloq.bench.tables import markdown

_MARK = "<!-- the last recorded run -->"
FIGURES = {"prefill": "Prefill 512 tok/s", "decode": "Decode tok/s", "batch": "Batch 8 tok/s"}
# Ours, the peer, and how many times faster ours is meant to be.
GOALS = [
    ("kiloq int4", "openvino int4", {"prefill": 1.35, "decode": 1.45, "batch": 1.3}),
    ("kiloq int4 kv8", "openvino int4", {"decode": 1.45, "batch": 1.3}),
    ("kiloq int8", "openvino int8", {"prefill": 1.35, "batch": 1.3}),
    ("kiloq int4", "llama.cpp Q4_0", {"decode": 2.2}),
    ("kiloq int8", "llama.cpp Q8_0", {}),
    ("kiloq int4", "kiloq bf16", {"decode": 3.0}),
    ("kiloq bf16", "transformers bf16", {}),
]


def write_report(output: Path, record: dict) -> None:
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(record))


def replace_table(file: Path, record: dict) -> None:
    """Keep what a person wrote above the mark; what follows it is this run."""
    above = file.read_text().partition(_MARK)[0]
    file.write_text(f"{above}{_MARK}\n\n{page(record)}")


def page(record: dict) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    settings = record["settings"]
    parts = [
        f"{facts}.",
        f"Random weights, random prompts, greedy. Prefill: {settings['prompt']} tokens, until the first answer token. "
        f"Decode: median of {settings['steps']} steps after it. Batch 8: median step, prompts of "
        f"{settings['batch_prompt']} tokens. Every figure is the median of its rounds, with the slowest and the "
        "fastest round in brackets. kiloq is timed through its whole engine, sampling and Python included.",
    ]
    for shape, groups in record["shapes"].items():
        for group, measured in groups.items():
            parts += [f"### {shape}, {group}", *tables(shape, measured)]
    return "\n\n".join(parts) + "\n"


def tables(shape: str, measured: dict) -> list[str]:
    contenders = measured["contenders"]
    bandwidth = statistics.median(measured["bandwidth"]) / 1e9
    rows = [
        [name, *(spread([r[key] for r in c["rounds"]]) for key in FIGURES), f"{c['peak_bytes'] / 1e9:.2f} GB"]
        for name, c in contenders.items()
    ]
    ratios = [
        [f"{ours} / {peer}", *(ratio(contenders[ours], contenders[peer], key, goals.get(key)) for key in FIGURES)]
        for ours, peer, goals in GOALS
        if ours in contenders and peer in contenders
    ]
    versions = "; ".join(
        sorted({f"{k} {v}" for c in contenders.values() for k, v in c["versions"].items() if k != "build"})
    )
    rounds = len(measured["bandwidth"])
    return [
        f"{shape_config(shape).num_parameters / 1e9:.2f} billion weights; memory reads {bandwidth:.1f} GB/s (median of "
        f"{rounds}, one a round, {min(measured['bandwidth']) / 1e9:.1f} to {max(measured['bandwidth']) / 1e9:.1f}).",
        markdown(["Runtime", *FIGURES.values(), "Peak memory"], rows),
        "Ratio of medians; in brackets the lowest and the highest ratio of one round; goals after the arrow.",
        markdown(["Ratio", *(title.removesuffix(" tok/s") for title in FIGURES.values())], ratios),
        f"Versions: {versions}.",
    ]


def spread(values: list[float]) -> str:
    digits = 0 if statistics.median(values) >= 100 else 1
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def ratio(ours: dict, peer: dict, key: str, goal: float | None) -> str:
    ours_values, peer_values = ([r[key] for r in one["rounds"]] for one in (ours, peer))
    each = [a / b for a, b in zip(ours_values, peer_values, strict=True)]
    middle = statistics.median(ours_values) / statistics.median(peer_values)
    aim = "" if goal is None else f" -> {goal:.2f}"
    return f"{middle:.2f} ({min(each):.2f}-{max(each):.2f}){aim}"

"""`kiloq bench`: how fast and how large a model is on this machine. The work is done in kiloq.bench."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from kiloq.cli.options import Model
from kiloq.cli.terminal import progress, say, write
from kiloq.errors import ConfigError

Results = list[dict[str, object]]
Cells = list[dict[str, object]]

KVKinds = Annotated[str, Parameter(help="How keys and values are kept: auto (bf16), int8, or both with a comma.")]

app = App(name="bench", help="Speed and memory of a model on this machine, end to end through the engine.")
app.command(
    "kiloq.cli.bench_serve:serve",
    name="serve",
    help="Ask a server for many answers at once: speed, waits, and what was lost.",
    help_prologue="Example: `kiloq bench serve --shape qwen2.5-0.5b --clients 32`",
)

app.command(
    "kiloq.cli.bench_finetune:finetune",
    name="finetune",
    help="Memory and time of fine-tuning by method and length.",
    help_prologue="Example: `kiloq bench finetune --shape qwen2.5-0.5b --lengths 256,512`",
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What every measurement asks."""

    model: Model = None
    shape: Annotated[
        str | None,
        Parameter(help="Random weights in a model's shape instead: qwen-1.8b, qwen2.5-7b, qwen3-0.6b ..."),
    ] = None
    precision: Annotated[
        str | None,
        Parameter(
            help="bf16, int8, int4, or several with commas. Default: all (kv-cache: int4); a quantised model's own."
        ),
    ] = None
    repeats: Annotated[int, Parameter(help="Generations per cell; medians are shown.")] = 3
    threads: Annotated[int | None, Parameter(help="Default: one for each core.")] = None
    device: Annotated[str, Parameter(help="cpu or cuda.")] = "cpu"
    json_: Annotated[Path | None, Parameter(name="--json", help="Write every figure to this file.")] = None
    plot: Annotated[Path | None, Parameter(help="Draw the table into this PNG file.")] = None
    seed: Annotated[int, Parameter(help="Of weights and prompts.")] = 0


@app.command(help_prologue="Example: `kiloq bench speed --shape qwen2.5-0.5b --precision int4,int8`")
def speed(
    *,
    options: BenchOptions = BenchOptions(),  # frozen
    prompt: Annotated[str, Parameter(help="Tokens of the prompt, or several with commas.")] = "512",
    tokens: Annotated[str, Parameter(help="Tokens to generate; the README's table has 2048,8192.")] = "64",
    batch: Annotated[str, Parameter(help="Answers at once, or several with commas.")] = "1",
    kv: Annotated[
        str, Parameter(help="How keys and values are kept: auto (bf16), int8, or both with a comma.")
    ] = "auto",
) -> None:
    """Prefill and decode speed. The first Qwen README's table: --prompt 2048 --tokens 2048,8192."""
    from kiloq.bench.tables import speed_tables

    cells: Cells = [
        {"prompt_tokens": length, "new_tokens": new, "batch": count, "kv": kind}
        for kind in _kinds(kv)
        for count in _counts("--batch", batch)
        for length in _counts("--prompt", prompt)
        for new in _counts("--tokens", tokens)
    ]
    results = _measure(options, cells)
    _tell(options, speed_tables(results), {"speed": results})
    _draw(options, results, {"Prefill tok/s": "prefill_tok_s", "Decode tok/s": "decode_tok_s"})


@app.command(help_prologue="Example: `kiloq bench memory --shape qwen-7b --precision int4 --tokens 512`")
def memory(
    *,
    options: BenchOptions = BenchOptions(),  # frozen
    prompt: Annotated[int, Parameter(help="Tokens read before one is generated; the README's table has 2048.")] = 2048,
    tokens: Annotated[int, Parameter(help="Tokens generated after one is read; the README's table has 8192.")] = 256,
    kv: Annotated[
        str, Parameter(help="How keys and values are kept: auto (bf16), int8, or both with a comma.")
    ] = "auto",
) -> None:
    """Peak memory of reading a long prompt, and of a long answer. The first Qwen README's table: --tokens 8192."""
    from kiloq.bench.tables import memory_table

    _counts("--prompt", str(prompt))
    _counts("--tokens", str(tokens))
    lengths = ((prompt, 1), (1, tokens))
    cells: Cells = [{"prompt_tokens": p, "new_tokens": new, "kv": kind} for kind in _kinds(kv) for p, new in lengths]
    results = _measure(options, cells, repeats=1)
    _tell(options, memory_table(results), {"memory": results})
    _draw(options, results, {"Peak memory, GB": "peak_bytes"})


@app.command(name="kv-cache", help_prologue="Example: `kiloq bench kv-cache --shape qwen-1.8b --precision int4`")
def kv_cache(
    *,
    options: BenchOptions = BenchOptions(),  # frozen
    batch: Annotated[str, Parameter(help="Batch sizes; the README's table has 1,4,16,32,64,100.")] = "1,4,16",
    batch_length: Annotated[int, Parameter(help="Tokens of each sequence in that table; the README's has 1024.")] = 256,
    lengths: Annotated[
        str, Parameter(help="Sequence lengths; the README's table has 512,1024,2048,4096,8192.")
    ] = "512,1024,2048",
    tokens: Annotated[int, Parameter(help="How many of each sequence are generated; the rest is prompt.")] = 16,
) -> None:
    """Memory and speed with keys and values in 16 bits and in 8, by batch size and by sequence length."""
    from kiloq.bench.tables import kv_cache_tables

    sizes, longs = _counts("--batch", batch), _counts("--lengths", lengths)
    shortest = min(batch_length, *longs)
    if not 0 < tokens < shortest:
        raise ConfigError(f"--tokens is {tokens}; it must be at least 1 and less than the shortest length, {shortest}.")
    if "," in (options.precision or ""):
        raise ConfigError("kv-cache compares two caches of one model; name one --precision.")
    by_batch: Cells = [_part(batch_length, tokens, count, kv) for kv in ("auto", "int8") for count in sizes]
    by_length: Cells = [_part(length, tokens, 1, kv) for kv in ("auto", "int8") for length in longs]
    results = _measure(options, by_batch + by_length, repeats=1, unless_named="int4")
    first, second = results[: len(by_batch)], results[len(by_batch) :]
    _tell(options, kv_cache_tables(first, second), {"by_batch": first, "by_length": second})
    _draw(options, results, {"Peak memory, GB": "peak_bytes", "Decode tok/s": "decode_tok_s"})


def _part(length: int, tokens: int, batch: int, kv: str) -> dict[str, object]:
    return {"prompt_tokens": length - tokens, "new_tokens": tokens, "batch": batch, "kv": kv}


def _measure(
    options: BenchOptions, cells: Cells, *, repeats: int | None = None, unless_named: str = "bf16,int8,int4"
) -> Results:
    """Every cell at every precision, one process for each precision."""
    from kiloq.bench.plot import require_matplotlib
    from kiloq.bench.shapes import shape_config
    from kiloq.bench.worker import PRECISIONS, Job, run_in_child

    if options.plot is not None:
        require_matplotlib()
    if options.shape is not None and options.model is not None:
        raise ConfigError("--shape and --model are both given; measure one at a time.")
    if options.shape is not None:
        shape_config(options.shape)
    _counts("--repeats", str(options.repeats))
    if options.threads is not None:
        _counts("--threads", str(options.threads))
    precisions = _words("--precision", options.precision or _own_precision(options) or unless_named, PRECISIONS)
    results: Results = []
    with progress(len(precisions) * len(cells)) as told:
        for precision in precisions:
            job = Job(
                model=options.model,
                shape=options.shape,
                precision=precision,
                cells=tuple(cells),
                repeats=repeats or options.repeats,
                seed=options.seed,
                device=options.device,
                threads=options.threads,
            )
            results += run_in_child(job, told)
    return results


def _own_precision(options: BenchOptions) -> str | None:
    """That of a quantised checkpoint; None where any can be made."""
    if options.model is None:
        return None
    from kiloq.checkpoint import open_checkpoint

    found = open_checkpoint(options.model).quantization
    return None if found is None else f"int{found.bits}"


def _tell(options: BenchOptions, text: str, record: Mapping[str, object]) -> None:
    write(f"{text}\n")
    if options.json_ is not None:
        options.json_.parent.mkdir(parents=True, exist_ok=True)
        partial = options.json_.with_name(f"{options.json_.name}.partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.json_)
        say(f"figures  {options.json_}")


def _draw(options: BenchOptions, results: Results, panels: Mapping[str, str]) -> None:
    """A panel for each figure: a group of bars for each cell, a colour for each precision and cache."""
    if options.plot is None:
        return
    from kiloq.bench.plot import draw
    from kiloq.bench.tables import picture_names

    drawn = []
    for label, key in panels.items():
        series: dict[str, dict[str, float]] = {}
        for result in results:
            value = result.get(key)
            if isinstance(value, int | float):
                name, group = picture_names(result)
                series.setdefault(name, {})[group] = value / 1e9 if key.endswith("bytes") else value
        drawn.append((label, series))
    title = f"{results[0]['name']}{', random weights' if results[0]['random_weights'] else ''}"
    draw(options.plot, title, drawn)
    say(f"picture  {options.plot}")


def _kinds(kv: str) -> Sequence[str]:
    return _words("--kv", kv, ("auto", "int8"))


def _words(option: str, text: str, known: Sequence[str]) -> list[str]:
    words = [word.strip().lower() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise ConfigError(f"{option} has {word!r}; it takes {', '.join(known)}, or several with commas.")
    return words


def _counts(option: str, text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ConfigError(f"{option} is {text!r}; it takes whole numbers from 1 on, with commas between them.")
    return counts

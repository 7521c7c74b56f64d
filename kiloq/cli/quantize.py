"""`kiloq quantize`: a checkpoint in fewer bits. The work is done in kiloq.quant and kiloq.checkpoint."""

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from kiloq.cli.options import Model
from kiloq.cli.terminal import say
from kiloq.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from kiloq.checkpoint import Checkpoint
    from kiloq.checkpoint.quantized_writer import Layout
    from kiloq.evals.perplexity import Perplexity, Row
    from kiloq.quant.calibrate import LayerReport, QuantizeConfig
    from kiloq.quant.calibration_data import CalibrationData

# Nearest to the original at every group size of 4 bits (docs/quantization.md); with 8 GPTQ itself gains nothing.
_CORRECTION = 0.5
_HELD_ROWS = 64
# Perplexity before and after is a courtesy: at most this many weights times tokens, and this large a model.
_CHEAP_WORK, _CHEAP_MODEL = 4e12, 3e9


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """How the weights are kept."""

    bits: Annotated[int, Parameter(help="4 or 8.")] = 4
    group_size: Annotated[
        int | None,
        Parameter(help="32, 64 or 128 neighbours share a scale. Default: the largest that fits; with 8 bits, a row."),
    ] = None
    asymmetric: Annotated[
        bool, Parameter(negative="", help="4 bits: each group has a zero of its own; fewer programs read that.")
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """How the codes are found."""

    method: Annotated[
        Literal["gptq", "rtn"], Parameter(help="rtn rounds to nearest: no calibration, seconds, larger errors.")
    ] = "gptq"
    order: Annotated[
        Literal["static", "act", "none"],
        Parameter(help="Which columns first: static = large inputs, at no cost later; act = with groups of their own."),
    ] = "static"
    correction: Annotated[
        float | None,
        Parameter(
            help="The share of GPTAQ's correction, 0 to 1: earlier layers' losses are made good too, for up to "
            "twice the CPU time. Default: 0.5 with 4 bits, 0 with 8."
        ),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What the model reads while it is measured."""

    calibration: Annotated[
        list[Path] | None,
        Parameter(help="Text, .jsonl with `text`, or conversations as for training; may be repeated.", negative=""),
    ] = None
    samples: Annotated[int, Parameter(help="Rows at most.")] = 256
    max_length: Annotated[int, Parameter(help="Tokens of a row at most.")] = 512
    seed: Annotated[int, Parameter(help="Which rows are taken.")] = 0


def quantize(
    *,
    model: Model = None,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The new folder.")],
    grid: GridOptions = GridOptions(),  # frozen
    solver: SolverOptions = SolverOptions(),  # frozen
    data: CalibrationOptions = CalibrationOptions(),  # frozen
    format_: Annotated[
        Literal["gptq", "compressed-tensors"], Parameter(name="--format", help="How files name and pack the codes.")
    ] = "gptq",
) -> None:
    """Quantise a model layer by layer. After a stop, the same command goes on where it was."""
    from kiloq.checkpoint import bundled, open_checkpoint
    from kiloq.checkpoint.writer import refuse_existing

    refuse_existing(output)
    checkpoint = open_checkpoint(bundled() if model is None else model)
    _refuse_quantized(checkpoint)
    text = read_text(checkpoint, data, is_bundled=model is None)
    quantize_checkpoint(checkpoint, output, text, grid=grid, solver=solver, data=data, layout=format_)
    print(output)


def quantize_checkpoint(
    checkpoint: "Checkpoint",
    output: Path,
    text: "CalibrationText",
    *,
    grid: GridOptions = GridOptions(),  # frozen
    solver: SolverOptions = SolverOptions(),  # frozen
    data: CalibrationOptions = CalibrationOptions(),  # frozen
    layout: "Layout" = "gptq",
) -> None:
    """Write the quantised checkpoint, going on where an earlier call with the same arguments was stopped."""
    from kiloq.checkpoint.quantized_writer import write_quantized
    from kiloq.quant.calibrate import quantized_weights

    wanted = _wish(checkpoint, grid, solver, layout)
    rows = None if wanted.method == "rtn" else _choose(checkpoint, text, data)
    work = output.absolute().parent / f".{output.name}.quantizing"
    try:
        layers = _run(checkpoint, wanted, rows, work)
    except KeyboardInterrupt:
        say(f"stopped; the finished layers are in {work}, and the same command goes on from there")
        raise
    write_quantized(
        output,
        checkpoint,
        quantized_weights(checkpoint.config, work),
        layout=layout,
        notes={
            "damp_percent": 0.01,
            "desc_act": solver.order == "act",
            "static_groups": solver.order == "static",
            "true_sequential": True,
        },
    )
    facts = {"settings": asdict(wanted), "tokens": len(rows.ids) if rows else 0, "layers": [asdict(x) for x in layers]}
    facts |= _compare(checkpoint, output, text.held)
    unfinished = output / ".quantize_report.unfinished"
    unfinished.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    unfinished.replace(output / "quantize_report.json")
    shutil.rmtree(work)


def _refuse_quantized(checkpoint: "Checkpoint") -> None:
    from kiloq.checkpoint.files import read_json

    if read_json(checkpoint.folder / "config.json").get("quantization_config") is not None:
        raise CheckpointError(f"{checkpoint.folder} is quantised already; start from the unquantised model.")


def _wish(checkpoint: "Checkpoint", grid: GridOptions, solver: SolverOptions, layout: "Layout") -> "QuantizeConfig":
    """The settings as the quantiser takes them, checked against the model and the files before any work."""
    from kiloq.checkpoint.quantized_writer import check_layout, scale_dtype
    from kiloq.quant.calibrate import QuantizeConfig, default_group_size, schemes
    from kiloq.quant.gptq import GptqConfig
    from kiloq.quant.grid import checked_bits

    bits = checked_bits(grid.bits)
    group_size = grid.group_size
    check_layout(layout, bits, group_size)
    if group_size is None and bits == 4:
        group_size = default_group_size(checkpoint.config)
    correction = solver.correction
    if correction is None:
        correction = _CORRECTION if bits == 4 else 0.0
    wanted = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        symmetric=not grid.asymmetric,
        scale_dtype=scale_dtype(layout, checkpoint),
        method=solver.method,
        gptq=GptqConfig(order=solver.order, correction=correction),
    )
    found = schemes(checkpoint.config, wanted)
    for name, scheme in found.items():
        if scheme.bits != bits:
            say(f"{name} keeps 8 bits: no group size divides its inputs")
    return wanted


@dataclass(frozen=True)
class CalibrationText:
    """Rows that a model may be measured on, a few `held` back to compare it by, and what was noticed."""

    rows: "list[Row]"
    held: "list[Row]"
    notes: list[str]


def read_text(checkpoint: "Checkpoint", options: CalibrationOptions, *, is_bundled: bool) -> CalibrationText:
    """The files of the options, or our own; the bundled model knows its generator's world, not documents and code."""
    from kiloq.cli.calibration_file import own_files, read_rows
    from kiloq.evals.perplexity import Row

    files = options.calibration or own_files()[: 1 if is_bundled else None]
    first, notes = read_rows(files[:1], checkpoint, options.max_length)
    others, more = read_rows(files[1:], checkpoint, options.max_length)
    notes += more
    first = [row for row in first if len(row.ids) > 1]
    rows = first + [row for row in others if len(row.ids) > 1]
    if not rows:
        raise DataError(f"no usable row is in {', '.join(map(str, files))}. {' '.join(notes)}")
    # Rows of the first file are held back: it is the one most like what the model is for.
    count = min(_HELD_ROWS, len(rows) // 10, len(first))
    order = random.Random(options.seed).sample(range(len(first)), count)
    held = [Row(rows[i].ids[: options.max_length], rows[i].scored[: options.max_length]) for i in order]
    if options.calibration is None and not is_bundled:
        notes.append(
            "calibrating on the short text that kiloq brings along; --calibration with text of your own kind is better"
        )
    return CalibrationText([row for i, row in enumerate(rows) if i not in set(order)], held, notes)


def _choose(checkpoint: "Checkpoint", text: CalibrationText, options: CalibrationOptions) -> "CalibrationData":
    """The rows that the model is measured on."""
    from kiloq.quant.calibration_data import choose_rows, shortcomings

    ids = [row.ids for row in text.rows]
    data = choose_rows(ids, samples=options.samples, max_length=options.max_length, seed=options.seed)
    for note in (*text.notes, *shortcomings(data, checkpoint.config.hidden_size)):
        say(note)
    say(f"calibration: {data.rows:,} rows, {len(data.ids):,} tokens")
    return data


def _run(
    checkpoint: "Checkpoint", wanted: "QuantizeConfig", data: "CalibrationData | None", work: Path
) -> "list[LayerReport]":
    from kiloq.checkpoint.files import weight_files
    from kiloq.checkpoint.merge import adapter_digest, weights_of
    from kiloq.quant.calibrate import job_digest, quantize_layers

    config = checkpoint.config
    weights = weights_of(checkpoint)
    states: list[object] = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(checkpoint.folder)
    ]
    if checkpoint.adapter is not None:
        states.append(adapter_digest(checkpoint.adapter))

    def report(layer: "LayerReport") -> None:
        errors = "  ".join(f"{name} {100 * m.error:.2f} %" for name, m in layer.matrices.items())
        say(f"layer {layer.layer + 1} of {config.num_layers}  {errors}  {layer.seconds:,.1f} s")

    return quantize_layers(
        config,
        lambda name: weights.read(name, dtype=weights.dtype),
        data,
        wanted,
        work=work,
        digest=job_digest(config, wanted, data, json.dumps([str(checkpoint.folder), states])),
        report=report,
    )


def affordable(checkpoint: "Checkpoint", rows: "Sequence[Row]") -> "list[Row]":
    """As many rows as a model of this size reads in seconds; none if it is too large to be loaded for that."""
    size, kept = checkpoint.config.num_parameters, [row for row in rows if row.count]
    while kept and sum(len(row.ids) for row in kept) * size > _CHEAP_WORK:
        kept.pop()
    return kept if size <= _CHEAP_MODEL else []


def scored_on(found: "Perplexity") -> str:
    """What a perplexity is of, for messages."""
    return f"on {found.tokens:,} tokens of answers or text in {len(found.rows):,} held rows"


def changed(before: "Perplexity", after: "Perplexity") -> str:
    """By how much, and how sure that is: rows are few."""
    change, error = before.change(after)
    return f"{change:+.2f} %" if math.isnan(error) else f"{change:+.2f} ± {error:.2f} %"


def _compare(checkpoint: "Checkpoint", output: Path, held: "Sequence[Row]") -> dict[str, Any]:
    """Perplexity before and after on rows that were not used, where that takes seconds."""
    from kiloq.checkpoint import load_model, open_checkpoint
    from kiloq.evals.perplexity import perplexity_of_rows

    rows = affordable(checkpoint, held)
    if not rows:
        say(f"not compared with the original: kiloq eval perplexity -m {output} TEXT does that")
        return {}
    before = perplexity_of_rows(load_model(checkpoint), rows)
    after = perplexity_of_rows(load_model(open_checkpoint(output)), rows)
    say(f"perplexity {before.value:.3f} -> {after.value:.3f} ({changed(before, after)}) {scored_on(before)}")
    return {"perplexity": {"before": before.value, "after": after.value, "tokens": before.tokens}}

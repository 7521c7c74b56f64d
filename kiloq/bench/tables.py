"""Results as Markdown tables, with the columns of the first Qwen README where it has such a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

Result = Mapping[str, object]
T = TypeVar("T")


def speed_tables(results: Sequence[Result]) -> str:
    """Everything about each cell; then the README's table, where batch 1 was measured."""
    single = [result for result in results if _cell(result)["batch"] == 1]
    parts = [heading(results), _details(results)]
    if single:
        parts += [_AVERAGE_NOTE, _readme_speed(single)]
    return "\n\n".join(parts)


def memory_table(results: Sequence[Result]) -> str:
    """The README's "memory usage" table: precision by what is read and generated, measured and predicted."""
    cells = _ordered(_memory_label(result) for result in results)
    rows = []
    for precision, kv in _ordered((_precision(result), _kv(result)) for result in results):
        found = {_memory_label(r): r for r in results if (_precision(r), _kv(r)) == (precision, kv)}
        rows.append([_size(results), precision, kv, *(_memory(found.get(cell)) for cell in cells)])
    note = "Peak resident memory of the whole process; in brackets what weights and cache alone must take."
    return "\n\n".join([heading(results), note, markdown(["Model size", "Precision", "KV cache", *cells], rows)])


def kv_cache_tables(by_batch: Sequence[Result], by_length: Sequence[Result]) -> str:
    """The README's two tables of the quantised cache: memory by batch size and by sequence length; decoding beside."""
    parts = [heading([*by_batch, *by_length])]
    for results, word in ((by_batch, "bs"), (by_length, "sl")):
        if not results:
            continue
        label: Callable[[Result], str] = _batch_label if word == "bs" else _length_label
        cells = _ordered(label(result) for result in results)
        at = f"at {_context(results[0]):,} tokens each" if word == "bs" else "at batch 1"
        for what, show in (("Peak memory", _peak), ("Decode tok/s", _decode)):
            rows = []
            for kv in _ordered(_kv(result) for result in results):
                found = {label(result): result for result in results if _kv(result) == kv}
                rows.append(["yes" if kv == "int8" else "no", *(show(found.get(cell)) for cell in cells)])
            parts += [f"{what} {at}:", markdown(["USE KVCache quantization", *cells], rows)]
    return "\n\n".join(parts)


def heading(results: Sequence[Result]) -> str:
    """Which model on which machine: without it a figure says nothing."""
    first = results[0]
    facts = first["machine"]
    assert isinstance(facts, Mapping)
    weights = "random weights" if first["random_weights"] else "its own weights"
    fastest = max(_number(result, "bandwidth") or 0.0 for result in results) / 1e9
    memory = f", {facts['memory']}" if "memory" in facts else ""
    return (
        f"{first['name']}, {weights}, random prompts, greedy. {facts['processor']}, {facts['threads']} threads of "
        f"{facts['cores']} cores{memory}; backend {facts['backend']}; memory bandwidth {fastest:.1f} GB/s in this run; "
        f"kiloq {facts['kiloq']}, torch {facts['torch']}, Python {facts['python']}; {facts['date']}."
    )


def picture_names(result: Result) -> tuple[str, str]:
    """What a bar of this cell is called: its colour, and the group it stands in."""
    cell = _cell(result)
    batch = "" if cell["batch"] == 1 else f"\nbatch {cell['batch']}"
    return f"{_precision(result)}, {_kv(result)} cache", f"{_memory_label(result)}{batch}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as plain text too: words to the left, figures to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    is_text = [not any(cell[:1].isdigit() for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if text else c.rjust(w) for c, w, text in zip(cells, widths, is_text, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if text else "-" * (w + 1) + ":" for w, text in zip(widths, is_text, strict=True))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


_AVERAGE_NOTE = (
    "Average generate speed (tokens/s), prompt and answer tokens together over the whole time, as the first Qwen "
    "README counted it:"
)


def _details(results: Sequence[Result]) -> str:
    return markdown(list(_DETAILS), [[show(result) for show in _DETAILS.values()] for result in results])


def _readme_speed(results: Sequence[Result]) -> str:
    lengths = _ordered(_memory_label(result) for result in results)
    rows = []
    for precision, kv in _ordered((_precision(result), _kv(result)) for result in results):
        found = {_memory_label(r): r for r in results if (_precision(r), _kv(r)) == (precision, kv)}
        shown = (_show(found[length], "average_tok_s", ".2f") if length in found else "-" for length in lengths)
        rows.append([_size(results), precision, f"native, {kv} cache", *shown])
    return markdown(["Model Size", "Precision", "Attention", *lengths], rows)


def _cell(result: Result) -> Mapping[str, object]:
    cell = result["cell"]
    assert isinstance(cell, Mapping)
    return cell


def _number(result: Result, key: str) -> float | None:
    value = result.get(key)
    return float(value) if isinstance(value, int | float) else None


def _show(result: Result | None, key: str, form: str) -> str:
    """A figure, "oom" where memory did not suffice, "-" where there is none."""
    if result is None:
        return "-"
    value = _number(result, key)
    return str(result.get("error", "-")) if value is None else format(value, form)


def _steps(result: Result) -> str:
    steps = result.get("step_ms")
    return " / ".join(f"{step:.1f}" for step in steps.values()) if isinstance(steps, Mapping) and steps else "-"


def _peak(result: Result | None) -> str:
    peak = None if result is None else _number(result, "peak_bytes")
    return _show(result, "peak_bytes", "") if peak is None else f"{peak / 1e9:.2f} GB"


def _decode(result: Result | None) -> str:
    return _show(result, "decode_tok_s", ".1f")


def _memory(result: Result | None) -> str:
    if result is None or _number(result, "peak_bytes") is None:
        return _peak(result)
    predicted = (_number(result, "weight_bytes") or 0.0) + (_number(result, "cache_bytes") or 0.0)
    return f"{_peak(result)} ({predicted / 1e9:.2f})"


def _precision(result: Result) -> str:
    return {"bf16": "BF16", "int8": "Int8", "int4": "Int4"}[str(result["precision"])]


def _kv(result: Result) -> str:
    kv = str(_cell(result)["kv"])
    return "bf16" if kv == "auto" else kv


def _size(results: Sequence[Result]) -> str:
    name = str(results[0]["name"])
    return name.rsplit("-", 1)[-1].upper() if results[0]["random_weights"] else name.rsplit("/", 1)[-1]


def _context(result: Result) -> int:
    return int(str(_cell(result)["prompt_tokens"])) + int(str(_cell(result)["new_tokens"]))


def _memory_label(result: Result) -> str:
    return f"{_cell(result)['prompt_tokens']} + {_cell(result)['new_tokens']}"


def _batch_label(result: Result) -> str:
    return f"bs={_cell(result)['batch']}"


def _length_label(result: Result) -> str:
    return f"sl={_context(result)}"


def _ordered(items: Iterable[T]) -> list[T]:
    """Each once, in the order of first sight."""
    return list(dict.fromkeys(items))


_DETAILS: dict[str, Callable[[Result], str]] = {
    "Precision": _precision,
    "KV cache": _kv,
    "Batch": lambda r: f"{_cell(r)['batch']}",
    "Prompt + new": lambda r: f"{_cell(r)['prompt_tokens']:,} + {_cell(r)['new_tokens']:,}",
    "Prefill tok/s": lambda r: _show(r, "prefill_tok_s", ",.0f"),
    "First token s": lambda r: _show(r, "first_token_s", ".2f"),
    "Decode tok/s": _decode,
    "Step ms p50 / p90 / p99": _steps,
    "Of bandwidth": lambda r: _show(r, "of_bandwidth", ".0%"),
    "Peak memory": _peak,
}

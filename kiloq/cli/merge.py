"""`kiloq convert --merge`: a model and an adapter become one model, and a person is told what that changed."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kiloq.cli.quantize import (
    CalibrationOptions,
    GridOptions,
    affordable,
    changed,
    quantize_checkpoint,
    read_text,
    scored_on,
)
from kiloq.cli.terminal import say
from kiloq.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from kiloq.checkpoint import Checkpoint
    from kiloq.checkpoint.load import FrozenKind
    from kiloq.evals.perplexity import Row
    from kiloq.model import Transformer
    from kiloq.model.config import Family

Form = Literal["float32", "bfloat16", "float16", "int4", "int8"]

_LOGIT_ROWS, _LOGIT_TOKENS = 4, 64  # where logits are compared: all of them, of a large vocabulary


def merge_adapter(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    form: Form | None = None,
    family: "Family | None" = None,
    data: CalibrationOptions,
) -> None:
    """Write the model that a base and an adapter are together; without `model`, the base is found by the adapter.

    `form` None keeps the type that the base is stored in.
    """
    from kiloq.checkpoint import convert_checkpoint, open_checkpoint
    from kiloq.checkpoint.merge import with_adapter
    from kiloq.checkpoint.writer import refuse_existing

    refuse_existing(output)
    trained_on, base = _bases(adapter, model)
    merged = with_adapter(open_checkpoint(base), adapter)
    if merged.config.tie_embeddings != open_checkpoint(base).config.tie_embeddings:
        say("the adapter has a head of its own: the result keeps embedding and head as two matrices, and says so")
    is_bundled = data.calibration is None and _is_bundled(base)
    text = read_text(merged, data, is_bundled=is_bundled)
    if form in ("int4", "int8"):
        quantize_checkpoint(merged, output, text, grid=GridOptions(bits=4 if form == "int4" else 8), data=data)
    else:
        convert_checkpoint(merged, output, family=family or merged.config.family, dtype=form or "auto")
    # What nothing was measured on is as good as held out.
    rows = affordable(merged, text.held or ([] if form in ("int4", "int8") else text.rows))
    if rows:
        _compare(adapter, trained_on, merged, output, rows)
    else:
        say(f"not compared with base and adapter: kiloq eval perplexity -m {output} TEXT does that")


def _bases(adapter: Path, model: str | None) -> tuple[Path, Path]:
    """The folder of the model that the adapter was trained on, as far as it can be found, and of the one to merge into.

    A Q-LoRA adapter may go into the weights that its base was quantised from.
    """
    from kiloq.checkpoint import resolve
    from kiloq.checkpoint.fingerprint import find_base

    if model is None:
        found = find_base(adapter)
        return found, found
    base = resolve(model)
    try:
        return find_base(adapter, base), base
    except CheckpointError:
        pass
    try:
        trained_on = find_base(adapter)
    except CheckpointError:
        say(f"{adapter} was trained on another model than {base}, which was not found to compare with")
        return base, base
    say(f"{adapter} was trained on {trained_on}; it is merged into {base}")
    return trained_on, base


def _is_bundled(folder: Path) -> bool:
    from kiloq.checkpoint.hub import bundled, bundled_names

    return folder.resolve() in [bundled(name).resolve() for name in bundled_names()]


def _compare(adapter: Path, trained_on: Path, merged: "Checkpoint", output: Path, rows: "list[Row]") -> None:
    """Perplexity and logits of base and adapter side by side, and of what was written; one model at a time.

    The base alone tells whether the rows are what the adapter was trained for: if it is hardly worse, what a merged
    model loses there says little of what was learned.
    """
    from kiloq.checkpoint import load_dense, open_checkpoint
    from kiloq.evals.perplexity import perplexity_of_rows

    alone = perplexity_of_rows(load_dense(open_checkpoint(trained_on), dtype="float32"), rows)
    beside = _beside(open_checkpoint(trained_on), adapter)
    before, logits = perplexity_of_rows(beside, rows), _logits(beside, rows)
    del beside
    rounding = _logits(load_dense(merged, dtype="float32"), rows)
    written = load_dense(open_checkpoint(output), dtype="float32")
    after, found = perplexity_of_rows(written, rows), _logits(written, rows)
    say(
        f"perplexity: base alone {alone.value:.3f}, base and adapter {before.value:.3f}, merged {after.value:.3f} "
        f"({changed(before, after)}) {scored_on(before)}"
    )
    largest, lost = (found - logits).abs().max(), (found - rounding).abs().max()
    wanted, given = logits.log_softmax(-1), found.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - given)).sum(-1).mean().clamp(min=0)
    say(
        f"largest difference of a logit: {largest:.2g}, of which rounding the weights is {lost:.2g}; logits spread by "
        f"{logits.std():.2g}; KL divergence of the predictions {divergence:.2g}"
    )


def _beside(base: "Checkpoint", adapter: Path) -> "Transformer":
    """Base and adapter as training had them, computed in fp32."""
    from kiloq.checkpoint import load_dense, load_frozen
    from kiloq.checkpoint.fingerprint import Base
    from kiloq.checkpoint.merge import with_adapter
    from kiloq.train.adapters import AdapterConfig, attach

    together = with_adapter(base, adapter)
    if together.config.tie_embeddings != base.config.tie_embeddings:
        return load_dense(together, dtype="float32")  # a head of its own cannot stand beside a tied one
    recorded = Base.read(adapter)
    kind = _kind(recorded.quantization) if recorded is not None and base.quantization is None else "auto"
    model = (
        load_dense(base, dtype="float32")
        if kind == "auto" and base.quantization is None
        else load_frozen(base, kind=kind, dtype="float32")
    )
    attach(model, base, AdapterConfig(start=str(adapter), dropout=0.0))
    return model.eval()


def _kind(recorded: str | None) -> "FrozenKind":
    """What a base was rounded to for training; "auto" is as it is."""
    match recorded:
        case "int8" | "int4" | "nf4":
            return recorded
    return "auto"


def _logits(model: "Transformer", rows: "list[Row]") -> "Tensor":
    import torch

    with torch.no_grad():
        heads = [torch.tensor(row.ids[:_LOGIT_TOKENS]) for row in rows[:_LOGIT_ROWS]]
        return torch.cat([model.logits(ids) for ids in heads])

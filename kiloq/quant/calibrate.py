"""A model in few bits, layer by layer: what each matrix reads is measured behind the layers that are quantised already.

One layer's weights and moments are in memory at a time. Hidden states lie in files of the work folder, mapped: the
system keeps them in memory while there is room. A finished layer is kept there too, so that a killed run goes on from
it to the same result. Knows no checkpoint: weights come by name from whoever reads them.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from kiloq.errors import ConfigError, NumericsError
from kiloq.model import ModelConfig
from kiloq.ops.layout import GROUP_SIZES, QuantWeight

from .calibration_data import CalibrationData
from .gptq import GptqConfig, InputMoments, MatrixReport, quantize_matrix
from .grid import Scheme, fit, rtn
from .layer_files import find_finished, hidden_file, read_layer, save_layer
from .stream import Stream

ReadWeight = Callable[[str], Tensor]
"""Our parameter name -> its values, in any floating type."""

# In the order in which a token meets them: each is measured behind those before it.
MATRICES = ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How a whole model is quantised; `group_size` None is one scale a row for 8 bits, the largest that fits for 4.

    `scale_dtype` is what the files will keep scales in.
    """

    bits: Literal[4, 8] = 4
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    method: Literal["gptq", "rtn"] = "gptq"
    gptq: GptqConfig = field(default_factory=GptqConfig)

    def __post_init__(self) -> None:
        # The sizes are checked where each matrix is known; this catches bits that nothing has.
        Scheme(bits=self.bits, group_size=self.group_size or (32 if self.bits == 4 else None), symmetric=self.symmetric)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One finished layer, by the names of MATRICES."""

    layer: int
    matrices: dict[str, MatrixReport]
    seconds: float


def schemes(config: ModelConfig, wanted: QuantizeConfig) -> dict[str, Scheme]:
    """How each matrix of a layer will be kept; ConfigError if the wish does not fit its size."""
    inputs = _inputs(config)
    found = {name: fit(name, inputs[name], wanted.bits, wanted.group_size) for name in MATRICES}
    return {
        name: Scheme(
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=wanted.symmetric or scheme.bits == 8,
            scale_dtype=wanted.scale_dtype,
        )
        for name, scheme in found.items()
    }


def default_group_size(config: ModelConfig) -> int:
    """The group size for 4 bits where nobody says one: the largest that fits all matrices which any fits."""
    sizes = [size for size in _inputs(config).values() if size % GROUP_SIZES[0] == 0]
    fitting = [group for group in GROUP_SIZES if all(size % group == 0 for size in sizes)]
    return fitting[-1] if fitting else GROUP_SIZES[0]


def _inputs(config: ModelConfig) -> dict[str, int]:
    return {
        "attn.qkv": config.hidden_size,
        "attn.out": config.num_heads * config.head_dim,
        "mlp.gate_up": config.hidden_size,
        "mlp.down": config.intermediate_size,
    }


def job_digest(config: ModelConfig, wanted: QuantizeConfig, data: CalibrationData | None, source: str) -> str:
    """What makes two runs the same; `source` says which weights, as the caller knows them."""
    text = json.dumps([asdict(config), asdict(wanted), source, data.starts if data else ()], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    if data is not None:
        digest.update(data.ids.numpy().tobytes())
    return digest.hexdigest()


def quantize_layers(
    config: ModelConfig,
    read: ReadWeight,
    data: CalibrationData | None,
    wanted: QuantizeConfig,
    *,
    work: Path,
    digest: str,
    report: Callable[[LayerReport], None] = lambda _: None,
) -> list[LayerReport]:
    """Quantise every layer into `work`, going on where an earlier run of the same job was stopped.

    `data` may be missing for the method "rtn", which measures nothing. `report` is called for each finished layer.
    """
    plan = schemes(config, wanted)
    if data is None and wanted.method == "gptq":
        raise ConfigError("method gptq needs calibration data; give some, or take method rtn.")
    _guard(work, digest)
    done = [_report_of(n, facts) for n, facts in enumerate(find_finished(work, config.num_layers))]
    for layer in range(len(done), config.num_layers):
        start = time.monotonic()
        if wanted.method == "gptq":
            assert data is not None
            found = _measure_and_quantize(config, read, data, wanted, plan, layer=layer, work=work)
        else:
            found = _round_layer(read, plan, layer)
        reports = {name: matrix for name, (_, matrix) in found.items()}
        one = LayerReport(layer=layer, matrices=reports, seconds=round(time.monotonic() - start, 2))
        save_layer(work, layer, {name: weight for name, (weight, _) in found.items()}, asdict(one))
        for spent in (hidden_file(work, "hidden", layer), hidden_file(work, "exact", layer)):
            spent.unlink(missing_ok=True)
        done.append(one)
        report(one)
    return done


def quantized_weights(config: ModelConfig, work: Path) -> Iterator[tuple[str, QuantWeight]]:
    """What `quantize_layers` has left in `work`, by our parameter names; one layer in memory at a time."""
    for layer in range(config.num_layers):
        for name, weight in read_layer(work, layer).items():
            yield f"blocks.{layer}.{name}.weight", weight


def _guard(work: Path, digest: str) -> None:
    """A work folder belongs to one job."""
    work.mkdir(parents=True, exist_ok=True)
    owner = work / "job"
    if not owner.exists():
        owner.write_text(digest, "utf-8")
    elif owner.read_text("utf-8") != digest:
        raise ConfigError(
            f"{work} holds the unfinished work of another job (other weights, settings or calibration). Finish it "
            "with the same command, remove the folder, or give another output."
        )


def _report_of(layer: int, facts: dict[str, object]) -> LayerReport:
    matrices, seconds = facts["matrices"], facts["seconds"]
    assert isinstance(matrices, dict), layer
    assert isinstance(seconds, float), layer
    return LayerReport(
        layer=layer, matrices={name: MatrixReport(**values) for name, values in matrices.items()}, seconds=seconds
    )


def _round_layer(read: ReadWeight, plan: dict[str, Scheme], layer: int) -> dict[str, tuple[QuantWeight, MatrixReport]]:
    found = {}
    for name, scheme in plan.items():
        weight = read(f"blocks.{layer}.{name}.weight").float()
        quantized = rtn(weight, scheme)
        error = float((quantized.dequantize() - weight).norm() / weight.norm().clamp(min=1e-30))
        found[name] = quantized, MatrixReport(error=error, rounding_error=error, damp=0.0, tokens=0, dead=0)
    return found


def _measure_and_quantize(
    config: ModelConfig,
    read: ReadWeight,
    data: CalibrationData,
    wanted: QuantizeConfig,
    plan: dict[str, Scheme],
    *,
    layer: int,
    work: Path,
) -> dict[str, tuple[QuantWeight, MatrixReport]]:
    """The matrices of one layer; the hidden states behind them are left in the next layer's files."""
    stream = Stream(config, read, data, layer=layer, work=work, kind="hidden")
    exact = Stream(config, read, data, layer=layer, work=work, kind="exact") if wanted.gptq.correction else None
    found = {}
    for name in MATRICES:
        weight = stream.weight(name)
        moments = InputMoments(weight.shape[1], corrected=exact is not None)
        for chunk in stream.chunks:
            moments.add(stream.inputs(name, chunk), exact.inputs(name, chunk) if exact else None)
        try:
            found[name] = quantize_matrix(weight, moments, plan[name], wanted.gptq)
        except NumericsError as error:
            raise NumericsError(f"layer {layer}, {name}: {error} The weights may be damaged.") from None
        stream.set_weight(name, found[name][0].dequantize())
    for one in (stream, exact):
        if one is not None:
            one.finish()
    return found

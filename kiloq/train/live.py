"""The model that is being trained, as the engine runs it fastest. Knows no prompt and no method."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kiloq import ops
from kiloq.model import Transformer
from kiloq.model.lora import Adapter
from kiloq.model.trained_lora import Frozen, TrainedLinear, as_adapter, trained_layers
from kiloq.model.trained_rows import Rows, trained_tables
from kiloq.quant.linear import QuantEmbedding, QuantLinear

ADAPTER = "live"
"""What requests to an engine over a model with updates must name; "" where there are none."""


class Live:
    """Hands out `model` with the weights that it has now.

    Where the CPU has kernels that is a copy packed in bf16, made anew each time (6 M parameters: 14 ms on one core); it
    answers many times faster than the plain network. Beside low-rank updates only the frozen model is packed, and once.
    Elsewhere, and with what no adapter in service can hold (DoRA, trained tokens), it is the model itself.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._frozen: Transformer | None = None

    def now(self) -> tuple[Transformer, Mapping[str, Adapter]]:
        """What an engine serves, and the adapter beside it."""
        model = self._model
        if next(model.parameters()).device.type != "cpu" or ops.backend() == "reference":
            return model, {}
        if not any(isinstance(one, TrainedLinear | Rows) for one in model.modules()):
            return packed(model), {}
        if trained_tables(model) or any(one.magnitude is not None for one in trained_layers(model).values()):
            return model, {}
        self._frozen = self._frozen or packed(model)
        return self._frozen, {ADAPTER: as_adapter(model)}


@torch.no_grad()
def packed(model: Transformer) -> Transformer:
    """A copy for the kernels: matrices in bf16, the rest in fp32."""

    def linear(name: str, _columns: int, rows: int, _bias: bool) -> nn.Module:
        layer = model.get_submodule(name)
        layer = layer.shared if isinstance(layer, TrainedLinear) else layer
        bias = layer.bias
        weight = layer.weight if isinstance(layer, nn.Linear) else _dense(layer, rows)
        # Packing keeps a bias where it lies; this one shall not move with the next step.
        return QuantLinear(ops.pack(weight, bias.clone() if isinstance(bias, Tensor) else None))

    def embedding(name: str, _rows: int, _columns: int) -> QuantEmbedding:
        return QuantEmbedding(ops.pack(model.get_parameter(f"{name}.weight")))

    copy = Transformer(model.config, linear=linear, embedding=embedding)
    for name, small in copy.named_parameters():
        small.copy_(model.get_parameter(name))
    return copy.eval().requires_grad_(False)


def _dense(layer: nn.Module, rows: int) -> Tensor:
    """What a frozen matrix in few bits stands for."""
    assert isinstance(layer, Frozen), type(layer)
    return layer.dense_rows(0, rows)

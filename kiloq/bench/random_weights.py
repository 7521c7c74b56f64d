"""Models of any shape with random weights, made matrix by matrix in few bits. Knows no file.

What the speed depends on is as in a trained model: sizes, layout, finite hidden states of ordinary size. The codes are
uniform with a mean of exactly zero; a mean of half a step would add up, over thousands of columns, to hidden states
that all point one way.
"""

import torch
from torch import Tensor, nn

from kiloq import ops
from kiloq.model import ModelConfig, Transformer
from kiloq.ops.layout import GROUP_SIZES, QuantWeight
from kiloq.quant.linear import QuantEmbedding, QuantLinear

_STD = 0.02  # of the weights: what Qwen models are initialised with
_INT4_STD = 4.18  # of the codes below
_INT8_STD = 73.5
_STRETCH = 4_194_301  # a prime


def random_model(config: ModelConfig, precision: str, *, seed: int = 0, device: str = "cpu") -> Transformer:
    """A model of `precision` "bf16", "int8" or "int4"; embedding and head of the int4 model are int8."""
    generator = torch.Generator(device).manual_seed(seed)
    if device != "cpu" or (ops.backend() == "reference" and precision == "bf16"):
        return _dense(config, device, generator)
    draw = RandomMatrices(generator)

    def linear(name: str, columns: int, rows: int, has_bias: bool) -> nn.Module:
        bias = torch.empty(rows).normal_(0, 0.1, generator=generator) if has_bias else None
        kind = "int8" if precision == "int4" and name == "head" else precision
        return QuantLinear(ops.pack(draw(rows, columns, kind), bias))

    def embedding(name: str, rows: int, columns: int) -> QuantEmbedding:
        return QuantEmbedding(ops.pack(draw(rows, columns, "int8" if precision == "int4" else precision)))

    model = Transformer(config, linear=linear, embedding=embedding)
    for parameter in model.parameters():  # gains of the norms: nothing else is left
        parameter.data.fill_(1.0)
    return model.eval().requires_grad_(False)


class RandomMatrices:
    """Draws matrices of zero mean and a standard deviation of 0.02 from one stretch of random values per precision.

    A stretch is used over and over: drawing billions of numbers takes minutes. Its length is prime, so that no two rows
    of a matrix begin at the same place in it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        values = torch.randint(-(2**15), 2**15, (_STRETCH,), dtype=torch.int16, generator=generator)
        low = (values & 15).to(torch.uint8)
        byte = (values >> 8).to(torch.int8)
        self._stretches = {
            "int4": torch.where(low == 0, 8, low),  # 1..15, and zero at 8
            "int8": torch.where(byte == -128, 0, byte),
            "bf16": (values.float() * (_STD * 12**0.5 / 2**16)).bfloat16(),  # uniform as well
        }
        self._offset = 0

    def __call__(self, rows: int, columns: int, precision: str) -> QuantWeight | Tensor:
        if precision == "bf16":
            return self._values("bf16", rows, columns)
        group_size = next((size for size in reversed(GROUP_SIZES) if columns % size == 0), None)
        if precision == "int4" and group_size is not None:
            scales = torch.full((rows, columns // group_size), _STD / _INT4_STD)
            codes = self._values("int4", rows, columns)
            return QuantWeight(kind="int4", group_size=group_size, codes=codes, scales=scales)
        scales = torch.full((rows, 1), _STD / _INT8_STD)
        return QuantWeight(kind="int8", group_size=columns, codes=self._values("int8", rows, columns), scales=scales)

    def _values(self, kind: str, rows: int, columns: int) -> Tensor:
        stretch = self._stretches[kind]
        values = stretch.new_empty(rows * columns)
        filled = 0
        while filled < len(values):
            part = stretch[self._offset : self._offset + len(values) - filled]
            values[filled : filled + len(part)] = part
            filled += len(part)
            self._offset = (self._offset + len(part)) % _STRETCH
        return values.view(rows, columns)


def _dense(config: ModelConfig, device: str, generator: torch.Generator) -> Transformer:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Transformer(config)
    finally:
        torch.set_default_dtype(before)
    model.init_weights(generator)
    return model.eval().requires_grad_(False)

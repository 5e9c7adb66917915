"""Each kind of quantization by itself: weights, activations, KV cache, for ablations.

Shapes: M tokens, K input and N output channels, R rank of the branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.transformer import Infinity
from var_compressor.ops import reference as ops
from var_compressor.ops.primitives import dequantize_symmetric


@dataclass(frozen=True)
class Switches:
    """Which kinds of quantization are on."""

    weights: bool = True
    activations: bool = True
    kv: bool = True

    @property
    def is_full_precision(self) -> bool:
        return not (self.weights or self.activations or self.kv)


class RoundedInputLinear(nn.Module):
    """A full-precision weight with the rounded input of the quantized linear in its place.

    ``y = W (smooth Q(x_hat) - shift) + (x_hat - Q(x_hat)) down^T up^T + bias``: what the quantized
    linear computes when its residual is not rounded, the branch reading the input as it is.
    """

    def __init__(self, quantized: QuantizedLinear, linear: nn.Linear) -> None:
        super().__init__()
        assert quantized.act_format is not None
        self.act_format, self.shift = quantized.act_format, quantized.shift
        self.act_group_size = quantized.act_group_size
        for name in ("smooth_factor", "proj_down", "proj_up"):
            self.register_buffer(name, getattr(quantized, name))
        self.linear = linear

    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor

    def forward(self, x: Tensor) -> Tensor:
        codes_MK, xscales_MG, low_MR = ops.quantize_act(
            x.flatten(0, -2),
            self.smooth_factor,
            self.proj_down,
            group_size=self.act_group_size,
            format=self.act_format,
            shift=self.shift,
        )
        qx_MK = dequantize_symmetric(codes_MK, xscales_MG, format=self.act_format)
        lost_MR = low_MR - qx_MK @ self.proj_down.float().T
        y_MN = F.linear((qx_MK * self.smooth_factor - self.shift).to(x.dtype), self.linear.weight)
        y_MN = y_MN.float() + lost_MR @ self.proj_up.float().T + self.linear.bias.float()
        return y_MN.to(x.dtype).unflatten(0, x.shape[:-1])


def switch_linears(transformer: Infinity, switches: Switches, base: Infinity | None) -> None:
    """Turn weights or activations of a compressed transformer back to full precision, in place.

    ``base``, the full-precision transformer, gives its linears up; needed with weights off. Comes
    before `use_kernels`.
    """
    for name, linear in list(_quantized(transformer)):
        if switches.weights:
            if not switches.activations:
                _leave_inputs(linear)
            continue
        assert base is not None
        full = base.get_submodule(name)
        assert isinstance(full, nn.Linear)
        rounds = switches.activations and linear.act_format is not None
        parent, attribute = name.rsplit(".", 1)
        replaced = RoundedInputLinear(linear, full) if rounds else full
        setattr(transformer.get_submodule(parent), attribute, replaced)


def _quantized(transformer: Infinity) -> Iterator[tuple[str, QuantizedLinear]]:
    for name, module in transformer.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def _leave_inputs(linear: QuantizedLinear) -> None:
    """The quantized weight, with inputs that are not rounded."""
    if linear.shift:
        # a negative shift takes the bias's correction back
        weight_NK = linear.weight_on_inputs()
        linear.bias = ops.shifted_bias(linear.bias, weight_NK, shift=-linear.shift)
    linear.act_format, linear.shift = None, 0.0

"""Linears of which the weight alone is coded: what the text encoder runs with to take less memory.

Shapes: N output and K input channels, G groups of E channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.ops.packing import pack_codes, unpack_codes
from var_compressor.ops.primitives import FORMATS, NumberFormat, quantize_dynamic, split_groups
from var_compressor.spec import WEIGHT_FORMATS, WHOLE_ROW

# of a text encoder's linears, by bits; 16 leaves them as they are
_FORMATS = {8: "sint8", 4: "sint4"}
TEXT_ENCODER_BITS = (16, *_FORMATS)


class WeightOnlyLinear(nn.Module):
    """``y = x W^T`` with W as codes, expanded to the dtype of x for this one product.

    ``qweight`` int8 ``[N, K]`` or, of 4 bits, two codes a byte: uint8 ``[N, K/2]``; ``wscales``
    bf16 ``[N, G]``. No bias.
    """

    qweight: Tensor
    wscales: Tensor
    # transformers asks for its dtype to cast what T5's last linear reads
    weight = None

    def __init__(self, codes_NK: Tensor, scales_NG: Tensor, format: NumberFormat) -> None:
        super().__init__()
        self.format = format
        self.register_buffer("qweight", pack_codes(codes_NK, format=format))
        self.register_buffer("wscales", scales_NG.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.expanded(x.dtype))

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """W ``[N, K]``. In bf16 the one rounding is that of the product: codes are exact."""
        codes_NK = unpack_codes(self.qweight, format=self.format).to(dtype)
        group_size = codes_NK.shape[1] // self.wscales.shape[1]
        codes_NGE = split_groups(codes_NK, group_size=group_size)
        return codes_NGE.mul_(self.wscales.to(dtype).unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class WeightOnly:
    """Makes linears of weights: int8 with a scale per output channel, or int4 in groups of 64."""

    nbits: int

    def linear(self, weight_NK: Tensor) -> WeightOnlyLinear:
        """On the device of the weight, which it does not keep.

        Raises: ValueError for channels that do not split into groups.
        """
        format = FORMATS[_FORMATS[self.nbits]]
        group_size = WEIGHT_FORMATS[format.name]
        codes_NK, scales_NG = quantize_dynamic(
            weight_NK,
            format=format,
            group_size=weight_NK.shape[1] if group_size == WHOLE_ROW else group_size,
            scale_dtype=torch.bfloat16,
        )
        return WeightOnlyLinear(codes_NK, scales_NG, format)


def weight_only(nbits: int) -> WeightOnly | None:
    """What a text encoder of so many bits makes its linears with; None for 16, which keeps them.

    Raises: ValueError for another number.
    """
    if nbits not in TEXT_ENCODER_BITS:
        raise ValueError(f"a text encoder of {nbits} bits is not made here; use 16, 8 or 4")
    return None if nbits == 16 else WeightOnly(nbits)

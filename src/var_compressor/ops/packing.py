"""int4 codes as bytes, and exactly back. Shapes: N output channels, K input channels."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes_NK: Tensor) -> Tensor:
    """Two neighbouring codes in one byte, two's complement; the low nibble is the even channel.

    codes_NK: int8, -8..7, K even. Returns uint8 [N, K/2]. Raises ValueError for another dtype, an
    odd K, or a code that four bits cannot hold.
    """
    if codes_NK.dtype != torch.int8:
        raise ValueError(f"pack_int4 takes int8 codes, got {codes_NK.dtype}")
    if codes_NK.ndim == 0 or codes_NK.shape[-1] % 2:
        raise ValueError(
            f"pack_int4 pairs channels, so K must be even; got shape {tuple(codes_NK.shape)}"
        )
    if codes_NK.numel():
        lowest, highest = (int(c) for c in codes_NK.aminmax())
        if lowest < -8 or highest > 7:
            raise ValueError(f"codes span {lowest}..{highest}; four signed bits hold -8..7")
    nibbles_NK = codes_NK.view(torch.uint8) & 0xF
    return nibbles_NK[..., 0::2] | (nibbles_NK[..., 1::2] << 4)


def unpack_int4(packed_NJ: Tensor) -> Tensor:
    """Exact inverse of `pack_int4`: uint8 [N, J] -> int8 codes [N, 2J], -8..7.

    Raises ValueError for another dtype.
    """
    if packed_NJ.dtype != torch.uint8:
        raise ValueError(f"unpack_int4 takes the uint8 bytes of pack_int4, got {packed_NJ.dtype}")
    bytes_NJ = packed_NJ.view(torch.int8)
    codes_NJ2 = torch.empty(*packed_NJ.shape, 2, dtype=torch.int8, device=packed_NJ.device)
    # on signed bytes the right shift is arithmetic, which extends the nibble's sign
    codes_NJ2[..., 0] = (bytes_NJ << 4) >> 4
    codes_NJ2[..., 1] = bytes_NJ >> 4
    return codes_NJ2.flatten(-2)

"""Codes of fewer than 8 bits as bytes, and exactly back.

Shapes: N output channels, K input channels, J bytes of a row (K/2 for 4 bits), b bits of a code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .primitives import NumberFormat


def packed_columns(num_channels: int, *, format: NumberFormat) -> int:
    """Elements that a row of codes takes in storage: bytes, where a code has fewer than 8 bits.

    Raises: ValueError for channels whose codes do not fill whole bytes.
    """
    if num_channels * format.nbits % 8:
        raise ValueError(
            f"{num_channels} input channels of {format.nbits} bits do not fill whole bytes; "
            f"{format.name} needs a multiple of {8 // math.gcd(8, format.nbits)}"
        )
    return num_channels * format.nbits // 8


def pack_codes(codes_NK: Tensor, *, format: NumberFormat) -> Tensor:
    """Codes of any format as they are stored: `nbits` each, without gaps; unchanged for 8 bits.

    Raises as `pack_nibbles`, for as many bits.
    """
    if format.nbits == 8:
        return codes_NK
    if format.nbits == 4:
        return pack_int4(codes_NK) if format.kind == "int" else pack_nibbles(codes_NK)
    return _pack_bits(codes_NK, format)


def unpack_codes(stored_NJ: Tensor, *, format: NumberFormat) -> Tensor:
    """Exact inverse of `pack_codes`."""
    if format.nbits == 8:
        return stored_NJ
    if format.nbits == 4:
        return unpack_int4(stored_NJ) if format.kind == "int" else unpack_nibbles(stored_NJ)
    return _unpack_bits(stored_NJ, format)


def _pack_bits(codes_NK: Tensor, format: NumberFormat) -> Tensor:
    """Codes of any width, the lowest bit first, as `pack_nibbles` has them."""
    is_signed, num_codes = format.kind == "int", 2**format.nbits
    lowest = -num_codes // 2 if is_signed else 0
    dtype = torch.int8 if is_signed else torch.uint8
    _check_codes(codes_NK, dtype=dtype, nbits=format.nbits, lowest=lowest)
    packed_columns(codes_NK.shape[-1], format=format)
    places_b = torch.arange(format.nbits, dtype=torch.uint8, device=codes_NK.device)
    bits_NKb = (codes_NK.view(torch.uint8).unsqueeze(-1) >> places_b) & 1
    bits_NJ8 = bits_NKb.flatten(-2).unflatten(-1, (-1, 8))
    places_8 = torch.arange(8, dtype=torch.uint8, device=codes_NK.device)
    return (bits_NJ8 << places_8).sum(-1, dtype=torch.uint8)


def _unpack_bits(stored_NJ: Tensor, format: NumberFormat) -> Tensor:
    _check_bytes(stored_NJ)
    places_8 = torch.arange(8, dtype=torch.uint8, device=stored_NJ.device)
    bits_NKb = ((stored_NJ.unsqueeze(-1) >> places_8) & 1).flatten(-2)
    bits_NKb = bits_NKb.unflatten(-1, (-1, format.nbits))
    codes_NK = (bits_NKb << places_8[: format.nbits]).sum(-1, dtype=torch.uint8)
    if format.kind != "int":
        return codes_NK
    # the code's own sign bit, carried up to the byte's
    unused = 8 - format.nbits
    return (codes_NK << unused).view(torch.int8) >> unused


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """Two neighbouring codes in one byte; the low nibble is the even channel.

    codes_NK: uint8, 0..15, K even. Returns uint8 [N, J]. Raises ValueError for another dtype, an
    odd K, or a code that four bits cannot hold.
    """
    _check_codes(codes_NK, dtype=torch.uint8, nbits=4, lowest=0)
    return join_nibbles(codes_NK)


def join_nibbles(codes_NK: Tensor) -> Tensor:
    """`pack_nibbles` of the lower four bits of int8 or uint8 codes, unchecked: waits for no GPU."""
    nibbles_NK = codes_NK.view(torch.uint8) & 0xF
    return nibbles_NK[..., 0::2] | (nibbles_NK[..., 1::2] << 4)


def unpack_nibbles(packed_NJ: Tensor) -> Tensor:
    """Exact inverse of `pack_nibbles`: uint8 [N, J] -> uint8 codes [N, 2J], 0..15.

    Raises ValueError for another dtype.
    """
    _check_bytes(packed_NJ)
    return torch.stack((packed_NJ & 0xF, packed_NJ >> 4), dim=-1).flatten(-2)


def pack_int4(codes_NK: Tensor) -> Tensor:
    """`pack_nibbles` of signed codes in two's complement.

    codes_NK: int8, -8..7, K even. Returns uint8 [N, J]. Raises as `pack_nibbles`.
    """
    _check_codes(codes_NK, dtype=torch.int8, nbits=4, lowest=-8)
    return join_nibbles(codes_NK)


def unpack_int4(packed_NJ: Tensor) -> Tensor:
    """Exact inverse of `pack_int4`: uint8 [N, J] -> int8 codes [N, 2J], -8..7.

    Raises ValueError for another dtype.
    """
    _check_bytes(packed_NJ)
    bytes_NJ = packed_NJ.view(torch.int8)
    # on signed bytes the right shift is arithmetic, which extends the nibble's sign
    return torch.stack(((bytes_NJ << 4) >> 4, bytes_NJ >> 4), dim=-1).flatten(-2)


def to_tile_order(packed_NJ: Tensor, *, group_size: int) -> Tensor:
    """The nibbles of every group rearranged for kernels: byte j holds channels j and j + E/2.

    packed_NJ: uint8 [N, J] of `pack_int4`; E = group_size, even. Undone by `from_tile_order`.
    """
    codes_NGE = unpack_nibbles(packed_NJ).unflatten(-1, (-1, group_size))
    lower, upper = codes_NGE.chunk(2, dim=-1)
    return (lower | (upper << 4)).flatten(-2)


def from_tile_order(tiled_NJ: Tensor, *, group_size: int) -> Tensor:
    """Exact inverse of `to_tile_order`."""
    bytes_NGH = tiled_NJ.unflatten(-1, (-1, group_size // 2))
    return join_nibbles(torch.cat([bytes_NGH & 0xF, bytes_NGH >> 4], dim=-1).flatten(-2))


def _check_codes(codes_NK: Tensor, *, dtype: torch.dtype, nbits: int, lowest: int) -> None:
    if codes_NK.dtype != dtype:
        raise ValueError(f"expected {dtype} codes to pack, got {codes_NK.dtype}")
    if nbits == 4 and (codes_NK.ndim == 0 or codes_NK.shape[-1] % 2):
        raise ValueError(
            f"packing pairs channels, so K must be even; got shape {tuple(codes_NK.shape)}"
        )
    if codes_NK.numel():
        found, highest = tuple(int(c) for c in codes_NK.aminmax()), lowest + 2**nbits - 1
        if found[0] < lowest or found[1] > highest:
            raise ValueError(
                f"codes span {found[0]}..{found[1]}; {nbits} bits hold {lowest}..{highest}"
            )


def _check_bytes(packed_NJ: Tensor) -> None:
    if packed_NJ.dtype != torch.uint8:
        raise ValueError(f"expected packed uint8 bytes, got {packed_NJ.dtype}")

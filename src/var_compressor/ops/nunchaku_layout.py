"""The orders in which nunchaku's kernels read 4-bit weights, scales and branches; exact inverses.

Every order is one idea: the axes of a tensor are split into small digits, and the digits change
places. Axes are first padded to whole tiles: 128 channels, 16 ranks.

Shapes: N output and K input channels, G groups, R rank of the branch.

Source: packer and kernels of nunchaku (github.com/nunchaku-tech/nunchaku, commit 3a3cc3d) and
the AWQ order of its W4A16 kernel; agrees byte for byte with what they packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import join_nibbles, unpack_nibbles

TILE, RANK_TILE = 128, 16
INT4_GROUP, NVFP4_GROUP = 64, 16
# AWQ stores codes from 0: this is added to symmetric ones
AWQ_OFFSET = 7

Digits = Sequence[tuple[int, ...]]


def _reordered(x: Tensor, digits: Digits, order: Sequence[int]) -> Tensor:
    """The elements in their new order, flat; one tuple of digit sizes per axis, -1 for the rest."""
    for axis in reversed(range(x.ndim)):
        x = x.unflatten(axis, digits[axis])
    return x.permute(tuple(order)).flatten()


def _restored(flat: Tensor, shape: Sequence[int], digits: Digits, order: Sequence[int]) -> Tensor:
    """The inverse: a tensor of that (padded) shape."""
    places = torch.arange(flat.numel(), device=flat.device).view(tuple(shape))
    x = torch.empty_like(flat)
    x[_reordered(places, digits, order)] = flat
    return x.view(tuple(shape))


def _padded(x: Tensor, tiles: Sequence[int], fill: float) -> Tensor:
    """Every axis filled up to a multiple of its tile."""
    missing = [-size % tile for size, tile in zip(x.shape, tiles, strict=True)]
    if not any(missing):
        return x
    pads = [pad for one in reversed(missing) for pad in (0, one)]
    # 8-bit floats have no pad()
    as_bytes = x.itemsize == 1
    if not as_bytes:
        return F.pad(x, pads, value=fill)
    filler = int(torch.tensor(fill, dtype=x.dtype).view(torch.uint8))
    return F.pad(x.view(torch.uint8), pads, value=filler).view(x.dtype)


def padded_size(size: int, tile: int = TILE) -> int:
    """The size that an axis has when it is packed."""
    return size + -size % tile


# --- 4-bit codes ----------------------------------------------------------------------------------

_WEIGHT = ((-1, 8, 2, 8), (-1, 2, 4, 8)), (0, 4, 1, 3, 6, 2, 5, 7)


def pack_weight(codes_NK: Tensor) -> Tensor:
    """W4A4 codes, int8 (-8..7) or uint8 (e2m1, 0..15), as int8 ``[N, K/2]`` of padded sizes."""
    flat = _reordered(_padded(codes_NK.view(torch.uint8), (TILE, TILE), 0), *_WEIGHT)
    N, K = (padded_size(size) for size in codes_NK.shape)
    return join_nibbles(flat).view(torch.int8).view(N, K // 2)


def unpack_weight(packed_NJ: Tensor, *, shape: tuple[int, int], signed: bool) -> Tensor:
    """Codes ``[N, K]`` of the given true shape: int8 if ``signed``, else uint8."""
    N, J = packed_NJ.shape
    flat = unpack_nibbles(packed_NJ.view(torch.uint8).flatten())
    codes_NK = _restored(flat, (N, 2 * J), *_WEIGHT)[: shape[0], : shape[1]]
    # the shifts bring the nibble's sign to where int8 has its own
    return (codes_NK.view(torch.int8) << 4 >> 4 if signed else codes_NK).contiguous()


# --- vectors and scales ---------------------------------------------------------------------------

_ROWS = (8, 2, 4, 2)
_VECTOR = ((-1, *_ROWS),), (0, 1, 3, 2, 4)
_GROUPS = ((-1, *_ROWS), (-1,)), (0, 5, 1, 3, 2, 4)
_MICRO = ((-1, 4, 4, 8), (-1, 4)), (0, 4, 3, 2, 1, 5)


def pack_vector(values_N: Tensor) -> Tensor:
    """Bias or smoothing factors, or a scale per channel, padded with 1."""
    return _reordered(_padded(values_N, (TILE,), 1), *_VECTOR)


def unpack_vector(packed: Tensor, *, size: int) -> Tensor:
    return _restored(packed, packed.shape, *_VECTOR)[:size].clone()


def pack_group_scales(scales_NG: Tensor) -> Tensor:
    """INT4 scales of groups of 64 as ``[G, N]`` of padded sizes, filled with 1."""
    padded_NG = _padded(scales_NG, (TILE, TILE // INT4_GROUP), 1)
    return _reordered(padded_NG, *_GROUPS).view(padded_NG.shape[1], padded_NG.shape[0])


def unpack_group_scales(packed_GN: Tensor, *, shape: tuple[int, int]) -> Tensor:
    G, N = packed_GN.shape
    return _restored(packed_GN.flatten(), (N, G), *_GROUPS)[: shape[0], : shape[1]].clone()


def pack_micro_scales(scales_NG: Tensor) -> Tensor:
    """NVFP4's e4m3 scales of groups of 16 as ``[G, N]`` of padded sizes, filled with 1."""
    padded_NG = _padded(scales_NG, (TILE, TILE // NVFP4_GROUP), 1)
    flat = _reordered(padded_NG.view(torch.uint8), *_MICRO)
    return flat.view(scales_NG.dtype).view(padded_NG.shape[1], padded_NG.shape[0])


def unpack_micro_scales(packed_GN: Tensor, *, shape: tuple[int, int]) -> Tensor:
    G, N = packed_GN.shape
    found_NG = _restored(packed_GN.view(torch.uint8).flatten(), (N, G), *_MICRO)
    return found_NG[: shape[0], : shape[1]].clone().view(packed_GN.dtype)


# --- branch ---------------------------------------------------------------------------------------

_HALVES = (2, 8)
_QUARTERS = (2, 4, 2)
_UP = ((-1, *_HALVES), (-1, *_QUARTERS)), (0, 3, 2, 5, 1, 4, 6)
_DOWN = ((-1, *_HALVES), (-1, *_QUARTERS)), (3, 0, 2, 5, 1, 4, 6)


def pack_up(up_NR: Tensor) -> Tensor:
    """``[N, R]`` of padded sizes, filled with 0."""
    padded_NR = _padded(up_NR, (TILE, RANK_TILE), 0)
    return _reordered(padded_NR, *_UP).view(padded_NR.shape)


def unpack_up(packed_NR: Tensor, *, shape: tuple[int, int]) -> Tensor:
    found_NR = _restored(packed_NR.flatten(), packed_NR.shape, *_UP)
    return found_NR[: shape[0], : shape[1]].clone()


def pack_down(down_RK: Tensor) -> Tensor:
    """``[K, R]`` of padded sizes, filled with 0; the kernel's acts on unsmoothed inputs."""
    padded_RK = _padded(down_RK, (RANK_TILE, TILE), 0)
    R, K = padded_RK.shape
    return _reordered(padded_RK, *_DOWN).view(K, R)


def unpack_down(packed_KR: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """``[R, K]`` of the given true shape."""
    K, R = packed_KR.shape
    return _restored(packed_KR.flatten(), (R, K), *_DOWN)[: shape[0], : shape[1]].clone()


# --- W4A16 ----------------------------------------------------------------------------------------

_AWQ = ((-1, 4), (-1, 2, 4, 8)), (0, 2, 1, 3, 5, 4)


def pack_awq_weight(codes_NK: Tensor) -> Tensor:
    """Symmetric codes -7..7 as int32 ``[N/4, K/2]``.

    Raises: ValueError for sizes that are no multiples of 4 and 64, or the code -8.
    """
    N, K = codes_NK.shape
    if N % 4 or K % INT4_GROUP:
        raise ValueError(f"AWQ packs 4 rows and {INT4_GROUP} channels at a time, not [{N}, {K}]")
    if codes_NK.numel() and int(codes_NK.min()) < -AWQ_OFFSET:
        raise ValueError(f"AWQ codes begin at -{AWQ_OFFSET}, found {int(codes_NK.min())}")
    flat = _reordered(codes_NK + AWQ_OFFSET, *_AWQ)
    return join_nibbles(flat).view(torch.int32).view(N // 4, K // 2)


def unpack_awq_weight(packed: Tensor) -> Tensor:
    """Exact inverse of `pack_awq_weight`: int8 ``[N, K]``."""
    rows, half = packed.shape
    codes = unpack_nibbles(packed.contiguous().view(torch.uint8).flatten()).view(torch.int8)
    return _restored(codes, (4 * rows, 2 * half), *_AWQ) - AWQ_OFFSET


def awq_scales(scales_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros ``[G, N]``, with which w = code * scale + zero, in the scales' dtype."""
    scales_GN = scales_NG.T.contiguous()
    return scales_GN, scales_GN * -AWQ_OFFSET

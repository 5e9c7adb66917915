"""Ranges of a KV cache: affine codes per (head, channel), found from recorded keys or values.

Shapes: H heads, T recorded tokens, D head channels, C = H*D channels, P candidates. Both searches
return the same `KVRange`; `calibrate_channels` is the better one, `calibrate_shared_percentile`
repeats VAR-Compressor's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from var_compressor.ops.primitives import choose_affine, dequantize_affine, quantize_affine

_GOLDEN = (1 + 5**0.5) / 2
# percentiles of the original's coarse grid
_SHARED_GRID = (
    *(0.98, 0.985, 0.99, 0.992, 0.995, 0.997),
    *(0.9985, 0.999, 0.9995, 0.9998, 0.9999, 0.99999),
)
# share of the tokens that one tail may clip; 0 is the extreme value itself
_TAILS = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# upper and lower side are searched in turn; the second round settles their interaction
_ROUNDS, _GOLDEN_STEPS = 2, 6
# elements quantized at once by the per-channel search: 64 MiB in each of a few float32 temporaries
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class KVRange:
    """Affine parameters of a cache tensor, x = (code - zero_point) * scale, and their cost.

    scale_HD float32, zero_point_HD int32, mse_HD float32: mean squared reconstruction error over
    the tokens, weighted if they were. percentile: the shared one, or None where every channel has
    its own bounds.
    """

    scale_HD: Tensor
    zero_point_HD: Tensor
    mse_HD: Tensor
    percentile: float | None


def calibrate_channels(x_HTD: Tensor, *, nbits: int, weight_HT: Tensor | None = None) -> KVRange:
    """Bounds of every channel on their own, minimising its mean squared reconstruction error.

    x_HTD: recorded keys (after rotation) or values, float; rows of a batch and images joined along
    T. weight_HT: float, positive: how much a token's error counts. The two tails are clipped apart:
    first a logarithmic grid of clipped shares, then golden section between its neighbours, for all
    channels at once. Starts from min-max and only takes improvements, so no channel is worse than
    min-max. The zero point is not clamped: a range need not contain 0.
    Raises ValueError for an empty or non-finite record.
    """
    H, T, D = x_HTD.shape
    x_CT = x_HTD.float().transpose(1, 2).reshape(H * D, T)
    if T == 0 or not x_CT.isfinite().all():
        raise ValueError(
            f"the record of shape {tuple(x_HTD.shape)} is empty or holds NaN or infinite values"
        )
    channels = max(1, _CHUNK_ELEMENTS // T)
    if weight_HT is None:
        weight_HT = x_HTD.new_ones(H, 1, dtype=torch.float32)
    share_HT = weight_HT.float() / weight_HT.float().mean(1, keepdim=True)
    share_CT = share_HT.unsqueeze(1).expand(H, D, -1).flatten(0, 1)
    parts = [
        _search_bounds(*part, nbits=nbits)
        for part in zip(x_CT.split(channels), share_CT.split(channels), strict=True)
    ]
    lo_C, hi_C, mse_C = (torch.cat(column) for column in zip(*parts, strict=True))
    scale_C, zero_point_C = choose_affine(lo_C, hi_C, nbits=nbits)
    return KVRange(scale_C.view(H, D), zero_point_C.view(H, D), mse_C.view(H, D), None)


def largest_magnitudes(x_HTD: Tensor, *, highest_code: float) -> KVRange:
    """Scales that put every channel's largest magnitude on the highest code; no zero point."""
    scale_HD = x_HTD.float().abs().amax(1).clamp_min(1e-30) / highest_code
    zero_point_HD = torch.zeros_like(scale_HD, dtype=torch.int32)
    return KVRange(scale_HD, zero_point_HD, torch.full_like(scale_HD, torch.nan), None)


def calibrate_shared_percentile(x_HTD: Tensor) -> KVRange:
    """The original's search: one clipping percentile for the whole tensor, 8 bits.

    Minimises the median over channels of the squared error, on a coarse grid and then by three
    golden-section steps. The zero point is clamped to the code range, so channels whose range
    excludes 0 saturate: use `calibrate_channels` unless a result of the original is to be repeated.
    Source: search_best_p_unimodal in VAR-Compressor's calibrate_cache_quantization.py, commit
    a9f224d.
    """
    x_HTD = x_HTD.float()
    sorted_HTD = x_HTD.sort(dim=1).values

    def score(p: float) -> float:
        return float(_range_at(x_HTD, sorted_HTD, p).mse_HD.median())

    grid_scores = [score(p) for p in _SHARED_GRID]
    best = min(range(len(_SHARED_GRID)), key=grid_scores.__getitem__)
    a, b = _SHARED_GRID[max(best - 1, 0)], _SHARED_GRID[min(best + 1, len(_SHARED_GRID) - 1)]
    c, d = b - (b - a) / _GOLDEN, a + (b - a) / _GOLDEN
    score_c, score_d = score(c), score(d)
    for _ in range(3):
        if score_c < score_d:
            b, d, score_d = d, c, score_c
            c = b - (b - a) / _GOLDEN
            score_c = score(c)
        else:
            a, c, score_c = c, d, score_d
            d = a + (b - a) / _GOLDEN
            score_d = score(d)
    finalists = {a: score(a), c: score_c, d: score_d, b: score(b)}
    finalists.setdefault(_SHARED_GRID[best], grid_scores[best])
    return _range_at(x_HTD, sorted_HTD, min(finalists, key=finalists.__getitem__))


def _range_at(x_HTD: Tensor, sorted_HTD: Tensor, percentile: float) -> KVRange:
    lo_HD, hi_HD = _quantile(sorted_HTD, 1 - percentile), _quantile(sorted_HTD, percentile)
    scale_HD = (hi_HD - lo_HD).clamp_min(1e-12) / 255
    zero_point_HD = torch.round(-128 - lo_HD / scale_HD).clamp(-128, 127).to(torch.int32)
    scale_H1D, zero_point_H1D = scale_HD.unsqueeze(1), zero_point_HD.unsqueeze(1)
    codes_HTD = quantize_affine(x_HTD, scale_H1D, zero_point_H1D, nbits=8)
    error_HTD = dequantize_affine(codes_HTD, scale_H1D, zero_point_H1D) - x_HTD
    return KVRange(scale_HD, zero_point_HD, error_HTD.square_().mean(1), percentile)


def _quantile(sorted_HTD: Tensor, share: float) -> Tensor:
    """Quantile along T of sorted data, linear between ranks.

    As the original's numbers are: the share rounded to float32, its rank in float64, the blend in
    float32.
    """
    rank = torch.tensor(share, dtype=torch.float32).double() * (sorted_HTD.shape[1] - 1)
    below, above = int(rank.floor()), int(rank.ceil())
    return torch.lerp(sorted_HTD[:, below], sorted_HTD[:, above], float(rank - below))


def _search_bounds(x_CT: Tensor, share_CT: Tensor, *, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best (lo_C, hi_C, mse_C) by searching one side at a time with the other held."""
    sorted_CT = x_CT.sort(dim=1).values
    ranks_P = torch.tensor(_TAILS, dtype=torch.float64, device=x_CT.device) * (x_CT.shape[1] - 1)
    ranks_P = ranks_P.round().long().unique()
    lows_PC, highs_PC = sorted_CT[:, ranks_P].T, sorted_CT[:, x_CT.shape[1] - 1 - ranks_P].T

    def error(one_side_C: Tensor, other_side_C: Tensor) -> Tensor:
        # in a narrow channel a step may move one side past the other: the smaller is the lower
        lo_C = torch.minimum(one_side_C, other_side_C)
        hi_C = torch.maximum(one_side_C, other_side_C)
        scale_C, zero_point_C = choose_affine(lo_C, hi_C, nbits=nbits)
        scale_C1, zero_point_C1 = scale_C.unsqueeze(1), zero_point_C.unsqueeze(1)
        codes_CT = quantize_affine(x_CT, scale_C1, zero_point_C1, nbits=nbits)
        restored_CT = dequantize_affine(codes_CT, scale_C1, zero_point_C1)
        return restored_CT.sub_(x_CT).square_().mul_(share_CT).mean(1)

    lo_C, hi_C = lows_PC[0], highs_PC[0]
    mse_C = error(lo_C, hi_C)
    for _ in range(_ROUNDS):
        hi_C, mse_C = _search_side(partial(error, lo_C), highs_PC, hi_C, mse_C)
        lo_C, mse_C = _search_side(partial(error, hi_C), lows_PC, lo_C, mse_C)
    return torch.minimum(lo_C, hi_C), torch.maximum(lo_C, hi_C), mse_C


def _search_side(
    error: Callable[[Tensor], Tensor], grid_PC: Tensor, bound_C: Tensor, mse_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Grid, then golden section around its best point; the incumbent stays unless beaten."""
    P = len(grid_PC)
    errors_PC = torch.stack([error(candidate_C) for candidate_C in grid_PC])
    best_1C = errors_PC.argmin(0, keepdim=True)
    a_C = grid_PC.gather(0, (best_1C - 1).clamp_min(0))[0]
    b_C = grid_PC.gather(0, (best_1C + 1).clamp_max(P - 1))[0]
    c_C, d_C = b_C - (b_C - a_C) / _GOLDEN, a_C + (b_C - a_C) / _GOLDEN
    error_c_C, error_d_C = error(c_C), error(d_C)
    for _ in range(_GOLDEN_STEPS):
        # left: [a, d] remains and c becomes its d; otherwise [c, b] remains and d becomes its c
        left_C = error_c_C < error_d_C
        a_C, b_C = torch.where(left_C, a_C, c_C), torch.where(left_C, d_C, b_C)
        kept_C = torch.where(left_C, c_C, d_C)
        kept_error_C = torch.where(left_C, error_c_C, error_d_C)
        step_C = (b_C - a_C) / _GOLDEN
        new_C = torch.where(left_C, b_C - step_C, a_C + step_C)
        new_error_C = error(new_C)
        c_C, d_C = torch.where(left_C, new_C, kept_C), torch.where(left_C, kept_C, new_C)
        error_c_C = torch.where(left_C, new_error_C, kept_error_C)
        error_d_C = torch.where(left_C, kept_error_C, new_error_C)
    grid_best_C, grid_error_C = grid_PC.gather(0, best_1C)[0], errors_PC.amin(0)
    finalists = ((grid_best_C, grid_error_C), (c_C, error_c_C), (d_C, error_d_C))
    for candidate_C, found_C in finalists:
        bound_C = torch.where(found_C < mse_C, candidate_C, bound_C)
        mse_C = torch.minimum(found_C, mse_C)
    return bound_C, mse_C

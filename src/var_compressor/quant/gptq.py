"""Weight rounding: nearest, with an optional range search, and GPTQ. Both have the same signature.

Shapes: N output and K input channels, G groups of E channels (K = G*E), B columns of a GPTQ block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from var_compressor.ops.primitives import (
    NumberFormat,
    choose_scales,
    dequantize_symmetric,
    quantize_symmetric,
    split_groups,
)

# while the Hessian is not positive definite, damping grows by this factor, at most so many times
_DAMP_GROWTH, _DAMP_TRIES = 10.0, 6


@dataclass(frozen=True)
class RoundingOptions:
    """How codes are chosen.

    `clip_ratios`: fractions of absmax tried as a group's range; (1.0,) tries none.

    GPTQ only: `damp` is the share of the Hessian's mean diagonal added to its diagonal,
    `block_size` the columns between two updates of the rest, `act_order` takes the columns with the
    strongest inputs first.
    """

    format: NumberFormat
    group_size: int
    scale_dtype: torch.dtype
    clip_ratios: tuple[float, ...] = (1.0,)
    damp: float = 0.01
    block_size: int = 128
    act_order: bool = True


@dataclass(frozen=True)
class QuantizedWeight:
    """codes_NK in the format's dtype, scales_NG float32; codes * scales approximates the weight."""

    codes_NK: Tensor
    scales_NG: Tensor

    def dequantize(self) -> Tensor:
        return dequantize_symmetric(self.codes_NK, self.scales_NG)


WeightRounding = Callable[[Tensor, Tensor | None, RoundingOptions], QuantizedWeight]


def hessian(x_TK: Tensor) -> Tensor:
    """Sum over tokens of x x^T, float32 [K, K]; a weight error D costs tr(D H D^T) at the output.

    Blocks of tokens add up; the Hessian of the inputs that the quantized weight will multiply is
    the right one.
    """
    x_TK = x_TK.float()
    return x_TK.T @ x_TK


def output_errors(weight_NK: Tensor, quantized: QuantizedWeight, hessian_KK: Tensor) -> Tensor:
    """Squared output error of every output channel, float64 [N]."""
    error_NK = weight_NK.double() - quantized.dequantize().double()
    return ((error_NK @ hessian_KK.double()) * error_NK).sum(-1)


def rtn(weight_NK: Tensor, hessian_KK: Tensor | None, options: RoundingOptions) -> QuantizedWeight:
    """Round to nearest, each group with the range that loses least.

    A group's loss is its squared error, every channel weighted by its diagonal entry of hessian_KK
    (None: equally); with clip_ratios (1.0,) the range is the absmax. Ties: the first ratio.
    Raises ValueError if the channels do not split into groups.
    """
    scales_NG = _search_scales(weight_NK, hessian_KK, options)
    return QuantizedWeight(
        quantize_symmetric(weight_NK, scales_NG, format=options.format), scales_NG
    )


def gptq(weight_NK: Tensor, hessian_KK: Tensor | None, options: RoundingOptions) -> QuantizedWeight:
    """Round column by column, moving each column's error onto the columns not yet rounded.

    Group scales are those of `rtn`, fixed before the first column. A row whose output error did
    not fall below that of `rtn` keeps rtn's codes, so the result is never worse; an identity
    Hessian gives rtn itself. hessian_KK: `hessian` of the calibration inputs, required. A dead
    input (zero diagonal) is rounded to nearest.
    Raises ValueError without a Hessian, for a wrong shape, or if damping cannot make it positive
    definite.
    Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323
    """
    K = weight_NK.shape[-1]
    if hessian_KK is None or hessian_KK.shape != (K, K):
        shape = None if hessian_KK is None else tuple(hessian_KK.shape)
        raise ValueError(
            f"gptq needs a [{K}, {K}] Hessian of the inputs, got {shape}; collect one or use rtn"
        )
    nearest = rtn(weight_NK, hessian_KK, options)
    diagonal_K = hessian_KK.diagonal()
    order_K = torch.arange(K, device=weight_NK.device)
    if options.act_order:
        order_K = diagonal_K.argsort(descending=True, stable=True)
    inverse_KK = _inverse_factor(hessian_KK[order_K][:, order_K], damp=options.damp)
    # one scale per element makes the permuted columns independent of where their groups went
    scales_NK = nearest.scales_NG.repeat_interleave(options.group_size, dim=-1)
    codes_NK = torch.empty_like(nearest.codes_NK)
    codes_NK[:, order_K] = _round_columns(
        weight_NK.float()[:, order_K], scales_NK[:, order_K], inverse_KK, options
    )
    compensated = QuantizedWeight(codes_NK, nearest.scales_NG)
    error_N = output_errors(weight_NK, compensated, hessian_KK)
    worse_N = error_N >= output_errors(weight_NK, nearest, hessian_KK)
    codes_NK[worse_N] = nearest.codes_NK[worse_N]
    return compensated


def _search_scales(
    weight_NK: Tensor, hessian_KK: Tensor | None, options: RoundingOptions
) -> Tensor:
    full_NG = choose_scales(
        weight_NK,
        format=options.format,
        group_size=options.group_size,
        scale_dtype=options.scale_dtype,
    )
    if options.clip_ratios == (1.0,):
        return full_NG
    importance_K = torch.ones(weight_NK.shape[-1], device=weight_NK.device)
    if hessian_KK is not None:
        importance_K = hessian_KK.diagonal().float()
    best_NG, lowest_NG = full_NG, torch.full_like(full_NG, torch.inf)
    for ratio in options.clip_ratios:
        scales_NG = (full_NG * ratio).to(options.scale_dtype).float()
        codes_NK = quantize_symmetric(weight_NK, scales_NG, format=options.format)
        error_NK = (
            weight_NK.float() - dequantize_symmetric(codes_NK, scales_NG)
        ).square_() * importance_K
        error_NG = split_groups(error_NK, group_size=options.group_size).sum(-1)
        improved_NG = error_NG < lowest_NG
        best_NG = torch.where(improved_NG, scales_NG, best_NG)
        lowest_NG = torch.where(improved_NG, error_NG, lowest_NG)
    return best_NG


def _round_columns(
    weight_NK: Tensor, scales_NK: Tensor, inverse_KK: Tensor, options: RoundingOptions
) -> Tensor:
    """Codes of the columns in the given order; inverse_KK is from `_inverse_factor`."""
    weight_NK = weight_NK.clone()
    K = weight_NK.shape[1]
    columns = []
    for start in range(0, K, options.block_size):
        end = min(start + options.block_size, K)
        block_NB, errors_NB = weight_NK[:, start:end], torch.empty_like(weight_NK[:, start:end])
        for j in range(end - start):
            k = start + j
            scale_N1 = scales_NK[:, k : k + 1]
            column_N1 = block_NB[:, j : j + 1]
            codes_N1 = quantize_symmetric(column_N1, scale_N1, format=options.format)
            error_N1 = (column_N1 - codes_N1.float() * scale_N1) / inverse_KK[k, k]
            block_NB[:, j + 1 :] -= error_N1 * inverse_KK[k, k + 1 : end]
            errors_NB[:, j : j + 1] = error_N1
            columns.append(codes_N1)
        weight_NK[:, end:] -= errors_NB @ inverse_KK[start:end, end:]
    return torch.cat(columns, dim=1)


def _inverse_factor(hessian_KK: Tensor, *, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float32; computed in float64."""
    hessian_KK = hessian_KK.double()
    if not hessian_KK.isfinite().all():
        raise ValueError(
            "the Hessian holds NaN or infinite entries; look at the calibration inputs"
        )
    mean = float(hessian_KK.diagonal().mean())
    # no input was ever active: a unit diagonal leaves plain rounding
    damping = damp * mean if mean > 0 else 1.0
    for _ in range(_DAMP_TRIES):
        damped_KK = hessian_KK.clone()
        damped_KK.diagonal().add_(damping)
        factor_KK, info = torch.linalg.cholesky_ex(damped_KK)
        if not info.any():
            inverse_KK, info = torch.linalg.cholesky_ex(
                torch.cholesky_inverse(factor_KK), upper=True
            )
            if not info.any():
                return inverse_KK.float()
        damping = max(damping, 1e-6 * mean) * _DAMP_GROWTH
    raise ValueError(
        f"the Hessian is not positive definite even with {damping:.3g} added; raise `damp`"
    )

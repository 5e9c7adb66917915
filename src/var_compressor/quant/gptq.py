"""Weight rounding: nearest, with an optional range search, and GPTQ. Both have the same signature.

Shapes: N output and K input channels, G groups of E channels (K = G*E), B columns of a GPTQ block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from var_compressor.ops.primitives import (
    NumberFormat,
    QuantizedWeight,
    choose_tensor_scale,
    quantize_symmetric,
    round_scales,
    round_to_grid,
    split_groups,
    unrounded_scales,
)

# while the Hessian is not positive definite, damping grows by this factor, at most so many times
_DAMP_GROWTH, _DAMP_TRIES = 10.0, 6


@dataclass(frozen=True)
class RoundingOptions:
    """How codes are chosen.

    `scale_dtype`: what group scales are rounded to, where the format does not prescribe it.
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


def rtn(weight_NK: Tensor, energy_K: Tensor | None, options: RoundingOptions) -> QuantizedWeight:
    """Round to nearest, each group with the range that loses least.

    A group's loss is its squared error, every channel weighted by energy_K, the mean or sum of its
    squared inputs (None: equally); with clip_ratios (1.0,) the range is the absmax. Ties: the first
    ratio. Both may carry leading dimensions: a batch of matrices is rounded as each would be alone.
    Raises ValueError if the channels do not split into groups.
    """
    tensor_scale = choose_tensor_scale(weight_NK, format=options.format)
    scales_NG = _search_scales(weight_NK, tensor_scale, energy_K, options)
    codes_NK = quantize_symmetric(weight_NK, scales_NG, format=options.format)
    return QuantizedWeight(codes_NK, scales_NG, options.format, tensor_scale)


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
    diagonal_K = hessian_KK.diagonal()
    nearest = rtn(weight_NK, diagonal_K, options)
    order_K = torch.arange(K, device=weight_NK.device)
    if options.act_order:
        order_K = diagonal_K.argsort(descending=True, stable=True)
    inverse_KK = _inverse_factor(hessian_KK[order_K][:, order_K], damp=options.damp)
    # one scale per element makes the permuted columns independent of where their groups went
    scales_NK = nearest.scales_NG.repeat_interleave(options.group_size, dim=-1)
    compensated_NK = torch.empty_like(weight_NK, dtype=torch.float32)
    compensated_NK[:, order_K] = _compensate(
        weight_NK.float()[:, order_K], scales_NK[:, order_K], inverse_KK, options
    )
    error_N = output_errors(weight_NK, _with_codes_of(compensated_NK, nearest), hessian_KK)
    worse_N = error_N >= output_errors(weight_NK, nearest, hessian_KK)
    kept_NK = torch.where(worse_N.unsqueeze(-1), weight_NK.float(), compensated_NK)
    return _with_codes_of(kept_NK, nearest)


def _with_codes_of(weight_NK: Tensor, quantized: QuantizedWeight) -> QuantizedWeight:
    """The nearest codes of another weight under the same scales."""
    codes_NK = quantize_symmetric(weight_NK, quantized.scales_NG, format=quantized.format)
    return replace(quantized, codes_NK=codes_NK)


def _search_scales(
    weight_NK: Tensor,
    tensor_scale: Tensor | None,
    energy_K: Tensor | None,
    options: RoundingOptions,
) -> Tensor:
    weight_NK, format = weight_NK.float(), options.format
    widest_NG = unrounded_scales(weight_NK, format=format, group_size=options.group_size)
    rounded = partial(
        round_scales, format=format, scale_dtype=options.scale_dtype, tensor_scale=tensor_scale
    )
    best_NG = rounded(widest_NG * options.clip_ratios[0])
    if len(options.clip_ratios) == 1:
        return best_NG
    lowest_NG = torch.full_like(best_NG, torch.inf)
    for ratio in options.clip_ratios:
        scales_NG = rounded(widest_NG * ratio)
        error_NK = round_to_grid(weight_NK, scales_NG, format=format).sub_(weight_NK).square_()
        if energy_K is not None:
            error_NK *= energy_K.unsqueeze(-2)
        error_NG = split_groups(error_NK, group_size=options.group_size).sum(-1)
        improved_NG = error_NG < lowest_NG
        best_NG = torch.where(improved_NG, scales_NG, best_NG)
        lowest_NG = torch.where(improved_NG, error_NG, lowest_NG)
    return best_NG


def _compensate(
    weight_NK: Tensor, scales_NK: Tensor, inverse_KK: Tensor, options: RoundingOptions
) -> Tensor:
    """The weight whose nearest codes are GPTQ's: every column with the errors moved onto it.

    Columns are taken in the given order, one scale per element; inverse_KK is from
    `_inverse_factor`. Nothing here waits for a GPU.
    """
    weight_NK = weight_NK.clone()
    K = weight_NK.shape[1]
    for start in range(0, K, options.block_size):
        end = min(start + options.block_size, K)
        errors_NB = torch.empty_like(weight_NK[:, start:end])
        for k in range(start, end):
            column_N1 = weight_NK[:, k : k + 1]
            rounded_N1 = round_to_grid(column_N1, scales_NK[:, k : k + 1], format=options.format)
            error_N1 = (column_N1 - rounded_N1) / inverse_KK[k, k]
            weight_NK[:, k + 1 : end].addcmul_(error_N1, inverse_KK[k, k + 1 : end], value=-1)
            errors_NB[:, k - start : k - start + 1] = error_N1
        weight_NK[:, end:] -= errors_NB @ inverse_KK[start:end, end:]
    return weight_NK


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

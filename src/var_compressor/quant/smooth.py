"""Smoothing: per-channel factors that move the range of an input into the weight.

Shapes: N output and K input channels, T calibration tokens. Convention: the input is divided by the
factors at run time, the weight's columns are multiplied by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .lowrank import truncate


@dataclass(frozen=True)
class SmoothSearch:
    """The factors found, their exponents, and the error of every candidate tried."""

    factors_K: Tensor
    alpha: float
    beta: float
    candidates: tuple[tuple[float, float], ...]
    errors: tuple[float, ...]


def smooth_candidates(num_grids: int) -> list[tuple[float, float]]:
    """Exponents (alpha, beta): no smoothing, then by the input alone, then by input and weight.

    2 * (num_grids - 1) + 1 pairs: (0, 0); (i/n, 0); (i/n, 1 - i/n) for i = 1 .. n-1. Raises
    ValueError below 1.
    """
    if num_grids < 1:
        raise ValueError(f"num_grids must be at least 1, got {num_grids}")
    alphas = [i / num_grids for i in range(1, num_grids)]
    return [(0.0, 0.0), *((a, 0.0) for a in alphas), *((a, 1 - a) for a in alphas)]


def smoothing_factors(
    x_absmax_K: Tensor, w_absmax_K: Tensor, *, alpha: float, beta: float
) -> Tensor:
    """x_absmax^alpha / w_absmax^beta, float32, positive and finite.

    x_absmax_K: largest |input| of each channel over the calibration tokens. w_absmax_K: largest
    |weight| of each column over all weights that share the input. A channel whose factor would be
    zero, infinite or NaN, because it is dead or broken on either side, gets 1 and spoils no other.
    (alpha, beta) = (0, 0) is no smoothing.
    """
    factors_K = x_absmax_K.float().pow(alpha) / w_absmax_K.float().pow(beta)
    usable_K = factors_K.isfinite() & (factors_K > 0)
    return torch.where(usable_K, factors_K, 1.0)


def search_smoothing(
    weights: Sequence[Tensor],
    x_TK: Tensor,
    x_absmax_K: Tensor,
    *,
    candidates: Sequence[tuple[float, float]],
    rank: int,
    quantize_weight: Callable[[Tensor], Tensor],
    quantize_act: Callable[[Tensor], Tensor],
    output_fn: Callable[[list[Tensor]], Tensor] | None,
    generator: torch.Generator,
) -> SmoothSearch:
    """Keep the candidate whose quantized projections have the lowest squared output error.

    weights: [N_i, K] matrices that read the same input x_TK (unsmoothed calibration tokens);
    x_absmax_K may come from more tokens than x_TK holds. rank: of the low-rank branch fitted once
    per candidate, jointly for all weights (0: none). quantize_weight, quantize_act: float matrix ->
    its dequantized image; each weight is passed on its own. output_fn: maps the projections'
    outputs, [T, N_i] without bias and in the order of `weights`, to what is compared, such as the
    output of the attention they feed; None compares the projections themselves. Ties go to the
    later candidate. One candidate at a time is in memory: two float32 copies of the weights.
    Raises ValueError without candidates or weights, or if every candidate's error is NaN.
    Source: candidates and objective as in deepcompressor's SmoothLinearCalibrator.
    """
    if not weights or not candidates:
        raise ValueError(f"nothing to search: {len(weights)} weights, {len(candidates)} candidates")
    sizes = [len(w) for w in weights]
    stacked_NK = torch.cat([w.float() for w in weights])
    x_TK = x_TK.float()
    w_absmax_K = stacked_NK.abs().amax(0)
    compared = output_fn if output_fn is not None else lambda outputs: torch.cat(outputs, dim=-1)
    wanted = compared(list((x_TK @ stacked_NK.T).split(sizes, dim=-1)))
    errors: list[float] = []
    best, lowest, basis_KP = -1, float("inf"), None
    for alpha, beta in candidates:
        factors_K = smoothing_factors(x_absmax_K, w_absmax_K, alpha=alpha, beta=beta)
        smoothed_NK, x_hat_TK = stacked_NK * factors_K, x_TK / factors_K
        # neighbouring candidates are nearly the same matrix, so the search for the branch starts
        # from the last one
        branch = truncate(smoothed_NK, rank=rank, start_KP=basis_KP, generator=generator)
        basis_KP = branch.basis_KP
        y_TN = (x_hat_TK @ branch.down_RK.T) @ branch.up_NR.T
        residual_NK = smoothed_NK.addmm_(branch.up_NR, branch.down_RK, alpha=-1)
        qresidual_NK = torch.cat(
            [quantize_weight(part).float() for part in residual_NK.split(sizes)]
        )
        y_TN.addmm_(quantize_act(x_hat_TK).float(), qresidual_NK.T)
        found = compared(list(y_TN.split(sizes, dim=-1)))
        errors.append(float((found - wanted).square().sum(dtype=torch.float64)))
        if errors[-1] <= lowest:
            best, lowest = len(errors) - 1, errors[-1]
    if best < 0:
        raise ValueError("every candidate's output error is NaN; look at the inputs and weights")
    alpha, beta = candidates[best]
    factors_K = smoothing_factors(x_absmax_K, w_absmax_K, alpha=alpha, beta=beta)
    return SmoothSearch(factors_K, alpha, beta, tuple(candidates), tuple(errors))

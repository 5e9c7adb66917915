"""Smoothing: per-channel factors that move the range of an input into the weight.

Shapes: C candidates, N output and K input channels, R rank, T calibration tokens. Convention: the
input is divided by the factors at run time, the weight's columns are multiplied by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .lowrank import truncate
from .objectives import Objective

# float32 copies of weights, inputs and outputs that a group of candidates may take together
_CHUNK_BYTES = 2**29


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
    weight_NK: Tensor,
    objective: Objective,
    x_absmax_K: Tensor,
    *,
    candidates: Sequence[tuple[float, float]],
    rank: int,
    quantize_weight: Callable[[Tensor], Tensor],
    quantize_act: Callable[[Tensor], Tensor],
    shift: float,
    generator: torch.Generator,
) -> SmoothSearch:
    """Keep the candidate with the lowest error of `objective`, the low-rank branch taking part.

    weight_NK: all matrices that share the input, stacked. x_absmax_K: largest |input + shift| of
    each channel, perhaps over more tokens than the objective holds. rank: of the branch fitted once
    per candidate (0: none). quantize_weight, quantize_act: float tensors [C, N, K] and [C, T, K] ->
    their dequantized images. shift: added to the input before smoothing, and taken out of the
    output again. Candidates are tried in groups, as many at once as fit `_CHUNK_BYTES`. Ties go to
    the later candidate.
    Raises ValueError without candidates, or if every candidate's error is NaN.
    Source: candidates and objective as in deepcompressor's SmoothLinearCalibrator.
    """
    if not candidates:
        raise ValueError("nothing to search: no candidates")
    weight_NK, x_TK = weight_NK.float(), objective.x_TK + shift
    w_absmax_K = weight_NK.abs().amax(0)
    factors_CK = torch.stack(
        [smoothing_factors(x_absmax_K, w_absmax_K, alpha=a, beta=b) for a, b in candidates]
    )
    errors_C, basis_KP = [], None
    for chunk_CK in factors_CK.split(_chunk_size(weight_NK, x_TK)):
        smoothed_CNK = weight_NK * chunk_CK[:, None]
        branch = truncate(smoothed_CNK, rank=rank, start_KP=basis_KP, generator=generator)
        if branch.basis_KP is not None:
            # neighbouring candidates are nearly the same matrix: the next group starts here
            basis_KP = branch.basis_KP[-1]
        residual_CNK = smoothed_CNK.sub_(branch.up_NR @ branch.down_RK)
        qresidual_CNK = quantize_weight(residual_CNK)
        del smoothed_CNK, residual_CNK
        y_CTN = compressed_output(
            x_TK / chunk_CK[:, None],
            chunk_CK,
            (branch.up_NR, branch.down_RK),
            qresidual_CNK,
            quantize_act=quantize_act,
            shift=shift,
        )
        errors_C.append(objective.errors(y_CTN))
    errors = torch.cat(errors_C).tolist()
    comparable = [(error, -i) for i, error in enumerate(errors) if error == error]
    if not comparable:
        raise ValueError("every candidate's output error is NaN; look at the inputs and weights")
    best = -min(comparable)[1]
    return SmoothSearch(factors_CK[best], *candidates[best], tuple(candidates), tuple(errors))


def compressed_output(
    x_hat_CTK: Tensor,
    factors_CK: Tensor,
    branch: tuple[Tensor, Tensor],
    qresidual_CNK: Tensor,
    *,
    quantize_act: Callable[[Tensor], Tensor],
    shift: float,
) -> Tensor:
    """What quantized linears put out, without bias: [C, T, N] float32.

    x_hat_CTK: shifted and smoothed inputs; branch: (up_CNR, down_CRK); qresidual_CNK: dequantized
    codes. The branch reads the unquantized input.
    """
    up_CNR, down_CRK = branch
    y_CTN = quantize_act(x_hat_CTK) @ qresidual_CNK.mT
    y_CTN += (x_hat_CTK @ down_CRK.mT) @ up_CNR.mT
    if shift:
        # what the shift alone puts out is part of the stored bias
        inverse_CK1 = shift / factors_CK.unsqueeze(-1)
        y_CTN -= (qresidual_CNK @ inverse_CK1 + up_CNR @ (down_CRK @ inverse_CK1)).mT
    return y_CTN


def _chunk_size(weight_NK: Tensor, x_TK: Tensor) -> int:
    (N, K), T = weight_NK.shape, len(x_TK)
    return max(1, _CHUNK_BYTES // (4 * (3 * N * K + 3 * T * K + 3 * T * N)))

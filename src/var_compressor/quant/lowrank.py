"""The low-rank branch: which part of a weight stays in high precision.

Shapes: N rows, K columns, R rank, P columns of a search basis, T tokens; matrices may carry leading
batch dimensions, which are factorised together. Weights that read the same input are split together
by stacking their rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# up to this smaller side the Gram matrix is diagonalised exactly, which is also the faster way
_EXACT_SIDE = 192
# extra directions and products with the matrix: within 1 % of the full SVD even on flat spectra
_OVERSAMPLING = 16
_COLD_PASSES = 5
_WARM_PASSES = 2
# share of the input's mean energy that unseen directions are given when the branch is refitted
_RIDGE = 0.5


@dataclass(frozen=True)
class LowRankFactors:
    """up @ down approximates a matrix: U S and V^T of its truncated SVD, float32.

    `basis_KP` is where the next, similar matrix may start its search; None after an exact
    factorisation.
    """

    up_NR: Tensor
    down_RK: Tensor
    basis_KP: Tensor | None


@dataclass(frozen=True)
class LowRankSplit:
    """weight = residual + up @ down, with the errors of every iteration tried.

    residual_NK is what remains to be quantized (float32). best_iter indexes `errors`.
    """

    up_NR: Tensor
    down_RK: Tensor
    residual_NK: Tensor
    errors: tuple[float, ...]
    best_iter: int


def truncate_exact(matrix_NK: Tensor, *, rank: int) -> LowRankFactors:
    """Best rank-R approximation in the Frobenius norm, from the smaller Gram matrix in float64.

    Singular values below 1e-8 of the largest are noise in this route; as directions to keep they
    carry no weight.
    """
    matrix_NK = matrix_NK.double()
    N, K = matrix_NK.shape[-2:]
    if N >= K:
        down_RK = _top_eigenvectors(matrix_NK.mT @ matrix_NK, rank).mT
        return LowRankFactors((matrix_NK @ down_RK.mT).float(), down_RK.float(), None)
    left_NR = _top_eigenvectors(matrix_NK @ matrix_NK.mT, rank)
    # left^T M is S V^T; its rows are orthogonal, so QR only normalises them, and survives zero rows
    right_KR, scale_RR = torch.linalg.qr(matrix_NK.mT @ left_NR)
    return LowRankFactors((left_NR @ scale_RR.mT).float(), right_KR.mT.float(), None)


def truncate_subspace(
    matrix_NK: Tensor, *, rank: int, start_KP: Tensor | None, generator: torch.Generator
) -> LowRankFactors:
    """Near-best rank-R approximation by subspace iteration: a few products with the matrix.

    start_KP: `basis_KP` of a similar matrix, which then needs fewer products; None starts from
    `generator`.
    Source: randomized subspace iteration, Halko, Martinsson & Tropp 2011,
    https://arxiv.org/abs/0909.4061
    """
    matrix_NK = matrix_NK.float()
    N, K = matrix_NK.shape[-2:]
    passes = _COLD_PASSES if start_KP is None else _WARM_PASSES
    if start_KP is None:
        P = min(rank + _OVERSAMPLING, N, K)
        start_KP = torch.randn(K, P, generator=generator, device=generator.device).to(matrix_NK)
    basis_KP = start_KP
    for _ in range(passes):
        basis_KP = _orthonormal(matrix_NK.mT @ (matrix_NK @ basis_KP))
    image_NP = matrix_NK @ basis_KP
    image64_NP = image_NP.double()
    rotation_PP = _top_eigenvectors(image64_NP.mT @ image64_NP, basis_KP.shape[-1]).float()
    basis_KP = basis_KP @ rotation_PP
    return LowRankFactors(
        image_NP @ rotation_PP[..., :rank], basis_KP[..., :rank].mT.contiguous(), basis_KP
    )


def truncate(
    matrix_NK: Tensor, *, rank: int, start_KP: Tensor | None, generator: torch.Generator
) -> LowRankFactors:
    """Rank-R factors, exact for small matrices, by `truncate_subspace` for large ones.

    Raises ValueError for a rank beyond the matrix.
    """
    smaller_side = min(matrix_NK.shape[-2:])
    if not 0 <= rank <= smaller_side:
        raise ValueError(
            f"rank {rank} does not fit a {tuple(matrix_NK.shape)} matrix; use 0..{smaller_side}"
        )
    if rank == 0 or smaller_side <= _EXACT_SIDE:
        return truncate_exact(matrix_NK, rank=rank) if rank else _no_branch(matrix_NK)
    return truncate_subspace(matrix_NK, rank=rank, start_KP=start_KP, generator=generator)


def split_low_rank(
    weight_NK: Tensor,
    *,
    rank: int,
    quantize_residual: Callable[[Tensor], Tensor],
    evaluate_error: Callable[[Tensor, Tensor, Tensor], float],
    max_iters: int,
    patience: int,
    generator: torch.Generator,
) -> LowRankSplit:
    """Split a (smoothed) weight into a low-rank branch and a residual that quantizes well.

    Alternates L_t = best rank-R approximation of W - Q_{t-1} and Q_t = quantize_residual(W - L_t),
    from Q_{-1} = 0, and keeps the t with the lowest `evaluate_error(up_NR, down_RK, qresidual_NK)`
    (ties: the later one). The alternation itself does not look at activations, so errors need not
    fall at every step: it stops after `patience` steps without a new best, or `max_iters` in all.
    quantize_residual: [N, K] -> its dequantized float image. Rank 0 takes one step with an empty
    branch.
    Raises ValueError for max_iters or patience below 1, a rank beyond the matrix, or errors that
    are all NaN.
    Source: the alternation is SVDQuant's, as in deepcompressor's QuantLowRankCalibrator.
    """
    if max_iters < 1 or patience < 1:
        raise ValueError(f"max_iters {max_iters} and patience {patience} must be at least 1")
    weight_NK = weight_NK.float()
    qresidual_NK, basis_KP, best = torch.zeros_like(weight_NK), None, None
    errors: list[float] = []
    best_iter, lowest = 0, float("inf")
    for t in range(max_iters if rank else 1):
        factors = truncate(
            weight_NK - qresidual_NK, rank=rank, start_KP=basis_KP, generator=generator
        )
        basis_KP = factors.basis_KP
        residual_NK = weight_NK - factors.up_NR @ factors.down_RK
        qresidual_NK = quantize_residual(residual_NK).float()
        errors.append(float(evaluate_error(factors.up_NR, factors.down_RK, qresidual_NK)))
        if errors[t] <= lowest:
            best, best_iter, lowest = (factors, residual_NK), t, errors[t]
        elif t - best_iter >= patience:
            break
    if best is None:
        raise ValueError(
            f"no step had a comparable output error: {errors}; look for NaN in the inputs"
        )
    factors, residual_NK = best
    return LowRankSplit(factors.up_NR, factors.down_RK, residual_NK, tuple(errors), best_iter)


def refit_branch(
    missing_NK: Tensor, x_TK: Tensor, *, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The branch (up_NR, down_RK) that brings back most of what codes lost, at the output.

    missing_NK: weight minus its dequantized codes. With D = missing - up down, the branch minimises
    || x D^T ||^2 + ridge || D ||^2, where the ridge, a share of the mean channel's energy, stands
    for the inputs that the sample does not hold: with U the R strongest output directions of
    missing under that measure, up is U and down is U^T missing.
    """
    missing_NK, x_TK = missing_NK.float(), x_TK.float()
    ridge = _RIDGE * x_TK.square().sum() / x_TK.shape[1]
    seen_TN = torch.cat([x_TK @ missing_NK.T, ridge.sqrt() * missing_NK.T])
    outputs = truncate(seen_TN, rank=rank, start_KP=None, generator=generator)
    return outputs.down_RK.T.contiguous(), outputs.down_RK @ missing_NK


def _no_branch(matrix_NK: Tensor) -> LowRankFactors:
    N, K = matrix_NK.shape[-2:]
    batch = matrix_NK.shape[:-2]
    empty = matrix_NK.new_empty(0, dtype=torch.float32)
    return LowRankFactors(empty.view(*batch, N, 0), empty.view(*batch, 0, K), None)


def _orthonormal(columns_KP: Tensor) -> Tensor:
    """An orthonormal basis of the columns by Cholesky QR, twice; dead directions become zero.

    Gram matrices and small factors are float64, everything runs in batched products: a Householder
    QR of tall matrices would cost a GPU more than the products it serves.
    """
    for _ in range(2):
        columns64_KP = columns_KP.double()
        gram_PP = columns64_KP.mT @ columns64_KP
        # keeps a singular Gram matrix positive definite; the second round removes its effect
        floor = 1e-13 * gram_PP.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-300
        gram_PP.diagonal(dim1=-2, dim2=-1).add_(floor.unsqueeze(-1))
        factor_PP, _ = torch.linalg.cholesky_ex(gram_PP)
        columns_KP = torch.linalg.solve_triangular(
            factor_PP, columns64_KP.mT, upper=False
        ).mT.float()
    return columns_KP


def _top_eigenvectors(gram_SS: Tensor, count: int) -> Tensor:
    """Eigenvectors of the `count` largest eigenvalues as columns, largest first."""
    # small matrices: a CPU is faster at them than a GPU
    _, vectors_SS = torch.linalg.eigh(gram_SS.cpu())
    return vectors_SS.flip(-1)[..., :count].to(gram_SS.device)

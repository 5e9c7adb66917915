"""The low-rank branch: which part of a weight stays in high precision.

Shapes: N rows, K columns, R rank, P columns of a search basis, T tokens. Weights that read the same
input are split together by stacking their rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# up to this smaller side the Gram matrix is diagonalised exactly, which is also the faster way
_EXACT_SIDE = 512
# extra directions and powers of the Krylov basis: within 1 % of the full SVD even on flat spectra
_OVERSAMPLING = 16
_COLD_DEPTH = 4
_WARM_DEPTH = 1


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
    N, K = matrix_NK.shape
    if N >= K:
        down_RK = _top_eigenvectors(matrix_NK.T @ matrix_NK, rank).T
        return LowRankFactors((matrix_NK @ down_RK.T).float(), down_RK.float(), None)
    left_NR = _top_eigenvectors(matrix_NK @ matrix_NK.T, rank)
    # left^T M is S V^T; its rows are orthogonal, so QR only normalises them, and survives zero rows
    right_KR, scale_RR = torch.linalg.qr(matrix_NK.T @ left_NR)
    return LowRankFactors((left_NR @ scale_RR.T).float(), right_KR.T.float(), None)


def truncate_krylov(
    matrix_NK: Tensor, *, rank: int, start_KP: Tensor | None, generator: torch.Generator
) -> LowRankFactors:
    """Near-best rank-R approximation from a block Krylov space: a few products with the matrix.

    start_KP: `basis_KP` of a similar matrix, which then needs fewer products; None starts from
    `generator`.
    Source: randomized block Krylov iteration, Musco & Musco 2015, https://arxiv.org/abs/1504.05477
    """
    matrix_NK = matrix_NK.float()
    N, K = matrix_NK.shape
    depth = _COLD_DEPTH if start_KP is None else _WARM_DEPTH
    if start_KP is None:
        P = min(rank + _OVERSAMPLING, N, K)
        start_KP = torch.randn(K, P, generator=generator, device=generator.device).to(matrix_NK)
    blocks = [torch.linalg.qr(start_KP).Q]
    for _ in range(depth):
        blocks.append(torch.linalg.qr(matrix_NK.T @ (matrix_NK @ blocks[-1])).Q)
    # more columns than rows would leave the space unchanged
    basis_KB = torch.linalg.qr(torch.cat(blocks, dim=1)[:, :K]).Q
    image_NB = matrix_NK @ basis_KB
    image64_NB = image_NB.double()
    P = min(rank + _OVERSAMPLING, N, K)
    rotation_BP = _top_eigenvectors(image64_NB.T @ image64_NB, P).float()
    basis_KP = basis_KB @ rotation_BP
    return LowRankFactors(
        image_NB @ rotation_BP[:, :rank], basis_KP[:, :rank].T.contiguous(), basis_KP
    )


def truncate(
    matrix_NK: Tensor, *, rank: int, start_KP: Tensor | None, generator: torch.Generator
) -> LowRankFactors:
    """Rank-R factors, exact for small matrices, by `truncate_krylov` for large ones.

    Raises ValueError for a rank beyond the matrix.
    """
    smaller_side = min(matrix_NK.shape)
    if not 0 <= rank <= smaller_side:
        raise ValueError(
            f"rank {rank} does not fit a {tuple(matrix_NK.shape)} matrix; use 0..{smaller_side}"
        )
    if smaller_side <= _EXACT_SIDE:
        return truncate_exact(matrix_NK, rank=rank)
    return truncate_krylov(matrix_NK, rank=rank, start_KP=start_KP, generator=generator)


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


def projection_error(
    weight_NK: Tensor,
    x_TK: Tensor,
    qx_TK: Tensor,
    up_NR: Tensor,
    down_RK: Tensor,
    qresidual_NK: Tensor,
) -> float:
    """Squared output error of a split projection, summed over tokens and outputs.

    || qx qresidual^T + x (up down)^T - x weight^T ||^2, where qx is x after activation quantization
    (smoothed like the weight) and the branch reads x itself.
    """
    branch_NK = up_NR @ down_RK
    difference_TN = qx_TK @ qresidual_NK.T
    difference_TN.addmm_(x_TK, (branch_NK - weight_NK).T)
    return float(difference_TN.square().sum(dtype=torch.float64))


def _top_eigenvectors(gram_SS: Tensor, count: int) -> Tensor:
    """Eigenvectors of the `count` largest eigenvalues as columns, largest first."""
    _, vectors_SS = torch.linalg.eigh(gram_SS)
    return vectors_SS.flip(-1)[:, :count]

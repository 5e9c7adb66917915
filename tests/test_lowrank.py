"""Low-rank split. Shapes: N rows, K columns, R rank, T tokens."""

from functools import partial

import pytest
import torch

from quant_golden import joined, load_golden, tokens
from var_compressor.ops.primitives import FORMATS, quantize_dynamic, round_trip
from var_compressor.quant import lowrank
from var_compressor.quant.lowrank import split_low_rank, truncate_exact

grouping = {"format": FORMATS["sint4"], "group_size": 64, "scale_dtype": torch.float32}
int4 = partial(round_trip, **grouping)


def projection_error(weight_NK, x_TK, qx_TK, up_NR, down_RK, qresidual_NK):
    """|| qx qresidual^T + x (up down)^T - x weight^T ||^2, the branch reading x itself."""
    y_TN = qx_TK @ qresidual_NK.T + x_TK @ (up_NR @ down_RK - weight_NK).T
    return float(y_TN.square().sum(dtype=torch.float64))


def split(weight_NK, x_TK, **changes):
    options = {
        "rank": 8,
        "quantize_residual": int4,
        "evaluate_error": partial(projection_error, weight_NK, x_TK, int4(x_TK)),
        "max_iters": 20,
        "patience": 3,
        "generator": torch.Generator().manual_seed(0),
    }
    return split_low_rank(weight_NK, **(options | changes))


def spectrum(kind, N, K):
    rng = torch.Generator().manual_seed(3)
    matrix_NK = torch.randn(N, K, generator=rng)
    if kind == "outlier columns":
        matrix_NK *= torch.exp(1.5 * torch.randn(K, generator=rng))
    if kind == "decaying":
        left_NR = torch.randn(N, 48, generator=rng) * torch.logspace(1, -1, 48)
        matrix_NK += left_NR @ torch.randn(48, K, generator=rng)
    return matrix_NK


def svd_error(matrix_NK, rank):
    return float(torch.linalg.svdvals(matrix_NK.double())[rank:].norm())


def error_of(matrix_NK, factors):
    product_NK = factors.up_NR.double() @ factors.down_RK.double()
    return float((matrix_NK.double() - product_NK).norm())


@pytest.mark.parametrize("name", ["lowrank_a", "lowrank_qkv_b"])
def test_refinement_equals_the_original(name):
    golden = load_golden(name)
    weight_NK, x_TK = joined(golden, "weight"), tokens(golden)
    steps = len(golden["errors"])
    found = split(weight_NK, x_TK, rank=len(golden["a.weight"]), max_iters=steps, patience=steps)
    torch.testing.assert_close(torch.tensor(found.errors), golden["errors"], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found.up_NR @ found.down_RK, golden["b.weight"] @ golden["a.weight"], rtol=0, atol=1e-5
    )
    codes_NK, _ = quantize_dynamic(found.residual_NK, **grouping)
    # a last-bit difference of the factors may move a code that sits on a rounding boundary
    assert (codes_NK != joined(golden, "residual_codes")).sum() <= 2


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (1, 9), (9, 1), (33, 33)])
def test_exact_truncation_equals_the_svd(shape):
    matrix_NK = spectrum("flat", *shape)
    for rank in {0, 1, min(4, *shape), min(shape)}:
        factors = truncate_exact(matrix_NK, rank=rank)
        assert error_of(matrix_NK, factors) == pytest.approx(
            svd_error(matrix_NK, rank), rel=1e-5, abs=1e-5 * float(matrix_NK.norm())
        )
        gram_RR = factors.down_RK @ factors.down_RK.T
        torch.testing.assert_close(gram_RR, torch.eye(rank), rtol=0, atol=1e-5)


def test_truncation_survives_a_deficient_matrix():
    matrix_NK = torch.zeros(20, 30)
    matrix_NK[3, 4] = 2.0
    rng = torch.Generator().manual_seed(0)
    for factors in (
        truncate_exact(matrix_NK, rank=5),
        truncate_exact(matrix_NK.T, rank=5),
        lowrank.truncate_subspace(matrix_NK, rank=5, start_KP=None, generator=rng),
        lowrank.truncate_subspace(matrix_NK.T, rank=5, start_KP=None, generator=rng),
    ):
        assert error_of(matrix_NK if len(factors.up_NR) == 20 else matrix_NK.T, factors) < 1e-6


@pytest.mark.parametrize("kind", ["flat", "outlier columns", "decaying"])
@pytest.mark.parametrize("shape", [(600, 576), (544, 900)])
def test_subspace_iteration_is_within_one_percent_of_the_svd_at_every_step(kind, shape):
    """Cold on the weight, then warm on what each refinement step hands over."""
    weight_NK, rank = spectrum(kind, *shape), 32
    residual_int4 = partial(round_trip, **(grouping | {"group_size": shape[1] // 4}))
    generator = torch.Generator().manual_seed(0)
    target_NK, basis_KP = weight_NK, None
    for _ in range(3):
        factors = lowrank.truncate_subspace(
            target_NK, rank=rank, start_KP=basis_KP, generator=generator
        )
        assert error_of(target_NK, factors) <= 1.01 * svd_error(target_NK, rank)
        gram_RR = factors.down_RK @ factors.down_RK.T
        torch.testing.assert_close(gram_RR, torch.eye(rank), rtol=0, atol=1e-4)
        basis_KP = factors.basis_KP
        target_NK = weight_NK - residual_int4(weight_NK - factors.up_NR @ factors.down_RK)


@pytest.mark.parametrize("size", [48, 300])
def test_a_batch_is_factorised_like_its_matrices(size):
    """Exactly up to 192, by subspace iteration beyond."""
    matrices_CNK = torch.stack([spectrum(kind, size, 320) for kind in ("flat", "decaying")])
    together = lowrank.truncate(
        matrices_CNK, rank=8, start_KP=None, generator=torch.Generator().manual_seed(0)
    )
    for i, matrix_NK in enumerate(matrices_CNK):
        alone = lowrank.truncate(
            matrix_NK, rank=8, start_KP=None, generator=torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(
            together.up_NR[i] @ together.down_RK[i], alone.up_NR @ alone.down_RK, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("shape", [(48, 64, 100), (300, 320, 500), (40, 64, 5)])
def test_the_refitted_branch_is_the_best_of_its_rank_at_the_output(shape):
    """No rank-R matrix lowers the refit's measure further: the optimum is known in closed form
    from the singular values of what the measure weighs (Eckart-Young)."""
    N, K, T = shape
    rng = torch.Generator().manual_seed(2)
    missing_NK = torch.randn(N, K, generator=rng)
    x_TK = torch.randn(T, K, generator=rng) * torch.exp(torch.randn(K, generator=rng))
    ridge = lowrank._RIDGE * x_TK.double().square().sum() / K
    measure_SK = torch.cat([x_TK.double(), ridge.sqrt() * torch.eye(K, dtype=torch.float64)])

    def left(up_NR, down_RK):
        return float(
            (measure_SK @ (missing_NK.double() - up_NR.double() @ down_RK.double()).T).norm()
        )

    found = left(*lowrank.refit_branch(missing_NK, x_TK, rank=6, generator=rng))
    best = float(torch.linalg.svdvals(measure_SK @ missing_NK.double().T)[6:].norm())
    assert best * (1 - 1e-6) <= found <= 1.01 * best
    plain = truncate_exact(missing_NK, rank=6)
    assert found < left(plain.up_NR, plain.down_RK)


def test_refinement_by_subspace_iteration_ends_like_refinement_by_svd(monkeypatch):
    rng = torch.Generator().manual_seed(5)
    weight_NK = spectrum("outlier columns", 256, 320)
    x_TK = torch.randn(40, 320, generator=rng)
    exact = split(weight_NK, x_TK, rank=16, max_iters=6)
    monkeypatch.setattr(lowrank, "_EXACT_SIDE", 0)
    fast = split(weight_NK, x_TK, rank=16, max_iters=6)
    assert fast.errors[fast.best_iter] <= 1.02 * exact.errors[exact.best_iter]


def test_the_best_step_is_kept_and_patience_ends_the_search():
    weight_NK, x_TK = spectrum("flat", 32, 64), torch.randn(4, 64)
    scripted = iter([5.0, 3.0, 4.0, 3.0, 9.0, 8.0, 1.0])
    found = split(weight_NK, x_TK, evaluate_error=lambda *_: next(scripted), patience=2)
    assert found.errors == (5.0, 3.0, 4.0, 3.0, 9.0, 8.0)
    # 3.0 twice: the later step wins
    assert found.best_iter == 3
    rising = iter([2.0, 3.0])
    impatient = split(weight_NK, x_TK, evaluate_error=lambda *_: next(rising), patience=1)
    assert impatient.best_iter == 0 and len(impatient.errors) == 2


def test_residual_and_branch_add_up_to_the_weight():
    rng = torch.Generator().manual_seed(1)
    weight_NK, x_TK = torch.randn(24, 128, generator=rng), torch.randn(9, 128, generator=rng)
    for rank in (0, 1, 8):
        found = split(weight_NK, x_TK, rank=rank)
        assert found.up_NR.shape == (24, rank) and found.down_RK.shape == (rank, 128)
        torch.testing.assert_close(
            found.residual_NK + found.up_NR @ found.down_RK, weight_NK, rtol=0, atol=1e-5
        )
        branch_NK = found.up_NR.double() @ found.down_RK.double()
        y_TN = int4(x_TK).double() @ int4(found.residual_NK).double().T
        y_TN += x_TK.double() @ (branch_NK - weight_NK.double()).T
        best_error = found.errors[found.best_iter]
        assert best_error == pytest.approx(float(y_TN.square().sum()), rel=1e-4)
    assert torch.equal(split(weight_NK, x_TK, rank=0).residual_NK, weight_NK)


def test_misuse_is_named():
    weight_NK, x_TK = torch.ones(4, 64), torch.ones(2, 64)
    with pytest.raises(ValueError, match=r"rank 5 .* 0\.\.4"):
        split(weight_NK, x_TK, rank=5)
    with pytest.raises(ValueError, match="patience 0"):
        split(weight_NK, x_TK, rank=1, patience=0)
    with pytest.raises(ValueError, match="NaN"):
        split(weight_NK, x_TK, rank=1, evaluate_error=lambda *_: float("nan"))

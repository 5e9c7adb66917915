"""Weight rounding. Shapes: N output and K input channels, T tokens."""

from dataclasses import replace

import pytest
import torch

from quant_golden import load_golden, tokens
from var_compressor.ops.primitives import FORMATS
from var_compressor.quant.gptq import RoundingOptions, gptq, hessian, output_errors, rtn

OPTIONS = RoundingOptions(FORMATS["sint4"], group_size=64, scale_dtype=torch.float32)
CLIPPING = tuple(1 - i / 40 for i in range(20))


def correlated_case(*, N, K, T, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mixing_KK = torch.randn(K, K, generator=rng) / K**0.5 + 0.5 * torch.eye(K)
    x_TK = torch.randn(T, K, generator=rng) @ mixing_KK
    return torch.randn(N, K, generator=rng), x_TK * torch.exp(torch.randn(K, generator=rng))


def true_error(weight_NK, quantized, x_TK):
    """Squared output error in float64, without the Hessian."""
    difference_NK = quantized.dequantize().double() - weight_NK.double()
    return float((x_TK.double() @ difference_NK.T).square().sum())


def test_gptq_equals_the_original():
    golden = load_golden("gptq_a")
    weight_NK, x_TK = golden["weight"], tokens(golden)
    found = gptq(weight_NK, hessian(x_TK), OPTIONS)
    assert torch.equal(found.scales_NG.flatten(), golden["scale"].flatten())
    # a code on a rounding boundary may move with the order of a float32 sum
    assert (found.codes_NK != golden["codes"]).sum() <= 6
    assert true_error(weight_NK, found, x_TK) == pytest.approx(12.1125, rel=1e-2)
    nearest = rtn(weight_NK, None, OPTIONS)
    assert true_error(weight_NK, nearest, x_TK) == pytest.approx(38.34732, rel=1e-4)


@pytest.mark.parametrize("clip_ratios", [(1.0,), CLIPPING])
@pytest.mark.parametrize("act_order", [False, True])
def test_an_identity_hessian_gives_rtn(clip_ratios, act_order):
    weight_NK = torch.randn(7, 192, generator=torch.Generator().manual_seed(0))
    options = replace(OPTIONS, clip_ratios=clip_ratios, act_order=act_order)
    compensated = gptq(weight_NK, torch.eye(192), options)
    nearest = rtn(weight_NK, torch.eye(192), options)
    assert torch.equal(compensated.codes_NK, nearest.codes_NK)
    assert torch.equal(compensated.scales_NG, nearest.scales_NG)


@pytest.mark.parametrize(("N", "K", "T"), [(1, 64, 30), (5, 192, 400), (33, 128, 20)])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", ["sint4", "sint8", "fp8_e4m3"])
def test_no_row_is_worse_than_rtn(N, K, T, act_order, format):
    """T < K leaves the Hessian singular."""
    weight_NK, x_TK = correlated_case(N=N, K=K, T=T)
    hessian_KK = hessian(x_TK)
    options = replace(OPTIONS, format=FORMATS[format], act_order=act_order)
    compensated, nearest = (f(weight_NK, hessian_KK, options) for f in (gptq, rtn))
    error_N = output_errors(weight_NK, compensated, hessian_KK)
    assert (error_N <= output_errors(weight_NK, nearest, hessian_KK)).all()
    assert true_error(weight_NK, compensated, x_TK) < 0.8 * true_error(weight_NK, nearest, x_TK)


def test_rows_that_compensation_would_harm_keep_their_nearest_codes():
    """Nearly independent inputs: there is little to gain, and in some rows error feedback loses."""
    rng = torch.Generator().manual_seed(0)
    weight_NK, x_TK = torch.randn(400, 64, generator=rng), torch.randn(2000, 64, generator=rng)
    hessian_KK = hessian(x_TK)
    compensated, nearest = (f(weight_NK, hessian_KK, OPTIONS) for f in (gptq, rtn))
    error_N = output_errors(weight_NK, compensated, hessian_KK)
    assert (error_N <= output_errors(weight_NK, nearest, hessian_KK)).all()
    untouched_N = (compensated.codes_NK == nearest.codes_NK).all(-1)
    assert 0 < untouched_N.sum() < 200


@pytest.mark.parametrize("block_size", [1, 17, 64, 1000])
def test_the_block_size_does_not_change_the_result(block_size):
    weight_NK, x_TK = correlated_case(N=6, K=128, T=300)
    expected = gptq(weight_NK, hessian(x_TK), OPTIONS)
    found = gptq(weight_NK, hessian(x_TK), replace(OPTIONS, block_size=block_size))
    assert (found.codes_NK != expected.codes_NK).float().mean() < 0.005


def test_range_search_lowers_the_weighted_error_of_every_group():
    weight_NK, x_TK = correlated_case(N=8, K=128, T=300)
    importance_K = hessian(x_TK).diagonal().double()
    clipped = rtn(weight_NK, hessian(x_TK), replace(OPTIONS, clip_ratios=CLIPPING))
    losses = []
    for quantized in (clipped, rtn(weight_NK, None, OPTIONS)):
        error_NK = (quantized.dequantize().double() - weight_NK.double()).square() * importance_K
        losses.append(error_NK.view(8, 2, 64).sum(-1))
    assert (losses[0] <= losses[1] * (1 + 1e-5)).all()
    assert losses[0].sum() < 0.95 * losses[1].sum()


def test_dead_inputs_are_rounded_to_nearest():
    weight_NK, x_TK = correlated_case(N=5, K=128, T=300)
    x_TK[:, 40:50] = 0
    found = gptq(weight_NK, hessian(x_TK), OPTIONS)
    nearest = rtn(weight_NK, None, OPTIONS)
    assert torch.equal(found.codes_NK[:, 40:50], nearest.codes_NK[:, 40:50])
    nothing = gptq(weight_NK, torch.zeros(128, 128), OPTIONS)
    assert torch.equal(nothing.codes_NK, nearest.codes_NK)


def test_misuse_is_named():
    weight_NK = torch.ones(2, 64)
    with pytest.raises(ValueError, match=r"\[64, 64\] Hessian .* None"):
        gptq(weight_NK, None, OPTIONS)
    with pytest.raises(ValueError, match="NaN"):
        gptq(weight_NK, torch.full((64, 64), torch.nan), OPTIONS)
    with pytest.raises(ValueError, match="positive definite"):
        gptq(weight_NK, torch.ones(64, 64) - 1e9 * (1 - torch.eye(64)), OPTIONS)
